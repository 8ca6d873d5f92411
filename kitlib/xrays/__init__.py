"""X-ray files to display-ready pixels: DICOM, PNG and JPEG, decoding processes, decode-once cache, mask store.

Nothing that knows a data set, a label or a model.
"""
