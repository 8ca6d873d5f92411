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

# What a pixel of a label image shows; 0 is background. Sides are the patient's. "lungs" are both as one.
MASK_CODES = {"lungs": 1, "heart": 2, "left_lung": 3, "right_lung": 4}
LUNG_CODES = tuple(code for name, code in MASK_CODES.items() if "lung" in name)
# Whether who drew a set's lungs left out what lies behind the heart (JSRT, Montgomery, Shenzhen) or took it in (Darwin).
MASK_CONVENTIONS = ("lung_fields", "with_heart")

# RSNA Pneumonia Detection Challenge, stage_2_detailed_class_info.csv.
RSNA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")

# What a reader of a set with one diagnosis an image may say of it. "pneumonia" is one of another kind, or of no known one;
# "other" is anything else than the named ones.
DIAGNOSES = ("COVID-19", "viral", "bacterial", "pneumonia", "normal", "other")

# Scheme -> diagnosis -> class; a diagnosis that a scheme lacks has no place in it. A scheme's classes stand in the order in
# which they occur first. flannel: Qiao et al., JAMIA 2021. three: normal, other pneumonia, COVID-19. covid: COVID-19 or not.
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
}


def scheme_classes(scheme: str) -> tuple[str, ...]:
    """The classes of a key of CLASS_SCHEMES, in their order. Raises ValueError, which lists the schemes, for another."""
    if scheme not in CLASS_SCHEMES:
        raise ValueError(f"no scheme of classes is called {scheme!r}; there are: {', '.join(CLASS_SCHEMES)}")
    return tuple(dict.fromkeys(CLASS_SCHEMES[scheme].values()))
