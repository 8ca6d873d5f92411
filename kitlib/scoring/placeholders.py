"""Placeholder predictions of SIIM-COVID's submission.csv: the class frequencies, for rows without a prediction."""

from collections.abc import Iterable

from kitlib.classes import STUDY_CLASSES

# Class frequencies in SIIM's train tables (6,054 studies, 6,334 images).
PRIORS = {
    "negative": 1676 / 6054,
    "typical": 2855 / 6054,
    "indeterminate": 1049 / 6054,
    "atypical": 474 / 6054,
    "none": 2040 / 6334,
}
# Labels without a box that a row has, keyed by the suffix of the row's id.
ONE_PIXEL_LABELS = {"study": STUDY_CLASSES, "image": ("none",)}


def placeholder(submission_id: str) -> str:
    """Return a prediction string with the class frequencies as confidences, for an id that ends in _study or _image."""
    labels = ONE_PIXEL_LABELS[submission_id.rpartition("_")[2]]
    return " ".join(one_pixel_groups(labels, [PRIORS[label] for label in labels]))


def one_pixel_groups(labels: Iterable[str], confidences: Iterable[float]) -> list[str]:
    """Return the parts `label confidence 0 0 1 1` of a prediction string, one per label, for labels that have no box."""
    return [f"{label} {format_confidence(p)} 0 0 1 1" for label, p in zip(labels, confidences, strict=True)]


def format_confidence(p: float) -> str:
    """Return a confidence as text, with seven significant digits, as float32 has, and without an exponent: not 1e-05."""
    text = f"{p:.7g}"
    return text if "e" not in text else f"{p:.15f}".rstrip("0").rstrip(".")
