"""The class names of each data set, as they are written in the kit's tables."""

STUDY_CLASSES = ("negative", "typical", "indeterminate", "atypical")
IMAGE_CLASSES = ("none", "opacity")
SCORED_CLASSES = STUDY_CLASSES + IMAGE_CLASSES
# The finding of boxes whose data set has a single class of boxes, such as SIIM's and RSNA's opacities.
ONE_FINDING = "opacity"

# Column of train_study_level.csv -> class name in a submission.
STUDY_LABEL_COLUMNS = {
    "Negative for Pneumonia": "negative",
    "Typical Appearance": "typical",
    "Indeterminate Appearance": "indeterminate",
    "Atypical Appearance": "atypical",
}

# NIH ChestX-ray14: the findings in the order of Wang et al. 2017 (CVPR), then "No Finding", which excludes all of them.
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

# CheXpert: the observations in the order of its tables.
CHEXPERT_OBSERVATIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

# Pixel values of a label image; 0 is background. Left and right are the patient's. "lungs" is both lungs as one structure.
MASK_CODES = {"lungs": 1, "heart": 2, "left_lung": 3, "right_lung": 4, "pneumothorax": 5}
LUNG_CODES = tuple(code for name, code in MASK_CODES.items() if "lung" in name)
# Structures that most images do not have, so that an empty mask is valid.
SPARSE_STRUCTURES = ("pneumothorax",)
# Mask data sets define "lung" differently: without the part behind the heart (JSRT, Montgomery, Shenzhen), or with it
# (Darwin).
MASK_CONVENTIONS = ("lung_fields", "with_heart")

# RSNA Pneumonia Detection Challenge, stage_2_detailed_class_info.csv.
RSNA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")

# VinBigData Chest X-ray Abnormalities Detection: the findings in the order of class_id, which is followed by NO_FINDING.
VINBIGDATA_FINDINGS = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
NO_FINDING = "No finding"

# RANZCR CLiP: the labels in the order of the columns. An image can show several tubes and catheters with different labels,
# so the labels do not exclude each other.
RANZCR_LABELS = (
    "ETT - Abnormal",
    "ETT - Borderline",
    "ETT - Normal",
    "NGT - Abnormal",
    "NGT - Borderline",
    "NGT - Incompletely Imaged",
    "NGT - Normal",
    "CVC - Abnormal",
    "CVC - Borderline",
    "CVC - Normal",
    "Swan Ganz Catheter Present",
)

# SIIM-ACR Pneumothorax Segmentation: the only class.
PNEUMOTHORAX = "Pneumothorax"

# Diagnoses that an image may get when its data set is read. "pneumonia" is a pneumonia of another or an unknown kind;
# "other" is any other diagnosis.
DIAGNOSES = ("COVID-19", "viral", "bacterial", "pneumonia", "normal", "other")

# Scheme -> diagnosis -> class. Images whose diagnosis a scheme lacks are left out. A scheme's classes are ordered by first
# occurrence. flannel: Qiao et al., JAMIA 2021. three: normal, other pneumonia, COVID-19. covid: COVID-19 or not.
# covid_normal: COVID-19 or normal, as in UNet + HRNet.
CLASS_SCHEMES: dict[str, dict[str, str]] = {
    "flannel": {"COVID-19": "COVID-19", "viral": "viral", "bacterial": "bacterial", "normal": "normal"},
    "three": {
        "normal": "normal",
        "viral": "pneumonia",
        "bacterial": "pneumonia",
        "pneumonia": "pneumonia",
        "COVID-19": "COVID-19",
    },
    "covid": {"COVID-19": "COVID-19"} | dict.fromkeys(DIAGNOSES[1:], "not COVID-19"),
    "covid_normal": {"COVID-19": "COVID-19", "normal": "normal"},
}


def scheme_classes(scheme: str) -> tuple[str, ...]:
    """Return the ordered classes of a scheme that maps diagnoses to classes. Raises ValueError for an unknown scheme."""
    if scheme not in CLASS_SCHEMES:
        raise ValueError(f"unknown class scheme {scheme!r}; available: {', '.join(CLASS_SCHEMES)}")
    return tuple(dict.fromkeys(CLASS_SCHEMES[scheme].values()))
