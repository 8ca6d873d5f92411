"""Turns X-ray files (DICOM, PNG, JPEG, GIF) into display-ready pixels, and stores the decoded copies and the masks.

Nothing in this package depends on a data set, a label or a model.
"""
