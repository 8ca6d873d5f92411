"""The library behind the notebooks: chest X-rays from DICOM files to a competition's submission.

Files import only from floors below their own; `tests/test_floors.py` holds the list and checks it:
vocabulary, reading, models, running, judging, delivering.
"""

__version__ = "0.1.0"
