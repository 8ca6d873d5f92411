"""Names of the classes and of the columns that carry them in the SIIM-FISABIO-RSNA competition."""

STUDY_CLASSES = ("negative", "typical", "indeterminate", "atypical")
IMAGE_CLASSES = ("none", "opacity")
SCORED_CLASSES = STUDY_CLASSES + IMAGE_CLASSES

# Column of train_study_level.csv -> class as it is written in a submission.
STUDY_LABEL_COLUMNS = {
    "Negative for Pneumonia": "negative",
    "Typical Appearance": "typical",
    "Indeterminate Appearance": "indeterminate",
    "Atypical Appearance": "atypical",
}
