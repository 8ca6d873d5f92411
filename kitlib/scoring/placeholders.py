"""Placeholder predictions of submission.csv: the class frequencies, for rows without a prediction.

No module imported here needs a package, so that a submission's first file is written before anything slow is imported.
"""

from collections.abc import Iterable
from pathlib import Path

from kitlib.atomic import write_text
from kitlib.classes import STUDY_CLASSES
from kitlib.datasets.sample_submission import HEADER, read_sample
from kitlib.errors import SubmissionError

# Class frequencies in SIIM's train tables (6,054 studies, 6,334 images).
PRIORS = {
    "negative": 1676 / 6054,
    "typical": 2855 / 6054,
    "indeterminate": 1049 / 6054,
    "atypical": 474 / 6054,
    "none": 2040 / 6334,
}
# The labels of a row that are not boxes, keyed by the suffix of the row's id.
ONE_PIXEL_LABELS = {"study": STUDY_CLASSES, "image": ("none",)}


def write_placeholders(sample: str | Path, path: str | Path) -> int:
    """Write a submission with placeholder predictions for the ids in sample_submission.csv; return the number of rows.

    Nothing is written, and 0 returned, if the sample cannot be read; `SubmissionRun`, which writes the file again, then
    uses the ids of the test files. The file is replaced atomically.
    """
    try:
        ids = read_sample(sample).ids
    except SubmissionError:
        return 0
    lines = [",".join(HEADER)]
    lines += [f"{submission_id},{placeholder(submission_id)}" for submission_id in ids]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(ids)


def placeholder(submission_id: str) -> str:
    """Return the prediction string of class frequencies for an id that ends in _study or _image."""
    labels = ONE_PIXEL_LABELS[submission_id.rpartition("_")[2]]
    return " ".join(one_pixel_groups(labels, [PRIORS[label] for label in labels]))


def one_pixel_groups(labels: Iterable[str], confidences: Iterable[float]) -> list[str]:
    """Return the groups of a prediction string for labels without a box."""
    return [f"{label} {format_confidence(p)} 0 0 1 1" for label, p in zip(labels, confidences, strict=True)]


def format_confidence(p: float) -> str:
    """Format a confidence with seven significant digits (float32's) and without an exponent, which some readers reject."""
    text = f"{p:.7g}"
    return text if "e" not in text else f"{p:.15f}".rstrip("0").rstrip(".")
