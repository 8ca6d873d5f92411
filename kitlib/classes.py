"""Names of the classes of each data set, as the kit's tables carry them."""

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

# NIH ChestX-ray14, in the order of Wang et al. 2017 (CVPR), then the one that excludes them.
NIH_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
    "No Finding",
)

# RSNA Pneumonia Detection Challenge, stage_2_detailed_class_info.csv.
RSNA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
