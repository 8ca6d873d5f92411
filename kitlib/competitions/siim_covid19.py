"""SIIM-FISABIO-RSNA COVID-19 Detection (2021): four classes of studies, images without an opacity, and boxes of opacities.

Its metric, rows and validator are in kitlib.scoring, which the rest of the kit uses directly; this file only names them.
"""

from pathlib import Path

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.contract import Competition
from kitlib.datasets.sample_submission import HEADER, read_sample
from kitlib.errors import ScoringError
from kitlib.scoring import score
from kitlib.scoring.placeholders import placeholder
from kitlib.scoring.submission_csv import Submission, read_submission, submission_ids
from kitlib.scoring.validate import validate_rows


def read_truth(path: Path) -> score.Truth:
    """Return the ground truth in a folder, see kitlib.scoring.score.read_truth. Raises ScoringError for a file."""
    if path.is_file():
        raise ScoringError(
            f"{path} is a file; expected the folder with train_study_level.csv and train_image_level.csv, because this "
            "competition scores studies and images together"
        )
    return score.read_truth(path)


def _read_submission(path: Path, ids: list[str]) -> Submission:
    """Return a submission; the metric checks its ids."""
    return read_submission(path)


SIIM_COVID19 = Competition(
    name="siim-covid19",
    slug="siim-covid19-detection",
    title="SIIM-FISABIO-RSNA COVID-19 Detection",
    header=tuple(HEADER),
    read_truth=read_truth,
    truth_ids=lambda truth: submission_ids(truth.labels["id"], truth.image_ids),
    read_sample=lambda path: read_sample(path).ids,
    read_submission=_read_submission,
    find_faults=validate_rows,
    metric=score.score,
    baseline_rows=lambda ids: [[name, placeholder(name)] for name in ids],
    time_limit_hours=9.0,
    study_classes=STUDY_CLASSES,
    image_classes=("none",),
    box_classes=("opacity",),
)
