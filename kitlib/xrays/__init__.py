"""From X-ray files to display-ready pixels: DICOM, PNG and JPEG, decoding processes, the cache of decoded images, masks.

Does not belong here: data sets, labels and models.
"""
