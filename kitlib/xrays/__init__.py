"""Decodes X-ray files (DICOM, PNG, JPEG, GIF) to pixels for display, in several processes; stores decoded images and masks.

Does not belong here: data sets, labels and models.
"""
