"""The competition's score: the plain mean of six PASCAL VOC 2010 average precisions.

The four study classes and `none` pass through the same rule as boxes, with the one-pixel box `0 0 1 1`. A class that is
absent from the truth has no AP (NaN) and is left out of the mean; in the competition's own tables all six are present.
"""

import ast
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import SCORED_CLASSES, STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.errors import ScoringError
from kitlib.scoring.average_precision import average_precision, box_hits, first_hits
from kitlib.scoring.submission_csv import ONE_PIXEL, Submission, read_submission, submission_ids
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

SCORE_KEYS = ("score", *SCORED_CLASSES, "opacity_boxed")


@dataclass(frozen=True)
class Truth:
    """`labels` (id and the four study classes, 0 or 1), `image_ids`, and `boxes` (image_id, box) in original pixels.

    An image without a box is a `none`.
    """

    labels: pd.DataFrame
    image_ids: tuple[str, ...]
    boxes: pd.DataFrame

    @property
    def is_none(self) -> np.ndarray:
        """Whether each of `image_ids` (n,) has no box."""
        return ~pd.Index(self.image_ids).isin(self.boxes["image_id"])


def read_truth(folder: str | Path) -> Truth:
    """The truth as the competition gives it: train_study_level.csv and train_image_level.csv in `folder`.

    Every image counts, also the 217 train images that no annotator looked at, and boxes stay as they were drawn: Kaggle's
    rule knows no exceptions. Raises ScoringError for a file, column or value that cannot be read.
    """
    studies = _read_table(Path(folder) / "train_study_level.csv", ["id", *STUDY_LABEL_COLUMNS])
    labels = studies.rename(columns=STUDY_LABEL_COLUMNS)[["id", *STUDY_CLASSES]]
    labels["id"] = labels["id"].str.removesuffix("_study")
    try:
        labels[list(STUDY_CLASSES)] = labels[list(STUDY_CLASSES)].astype(float)
    except ValueError as error:
        raise ScoringError(f"train_study_level.csv in {folder}: a label is not a number: {error}") from error
    images = _read_table(Path(folder) / "train_image_level.csv", ["id", "boxes"])
    image_ids = images["id"].str.removesuffix("_image")
    rows = []
    for image_id, cell in zip(image_ids, images["boxes"], strict=True):
        try:
            rows += [
                (image_id, box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
                for box in ast.literal_eval(cell or "[]")
            ]
        except (ValueError, SyntaxError, TypeError, KeyError) as error:
            raise ScoringError(f"train_image_level.csv in {folder}: boxes of {image_id} are {cell!r}: {error}") from error
    boxes = pd.DataFrame(rows, columns=["image_id", *BOX]).astype({"image_id": object, **dict.fromkeys(BOX, float)})
    return Truth(labels, tuple(image_ids), boxes)


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame) -> Truth:
    """The truth of `images` and their studies, from the tables of a prepared run."""
    of_images = boxes["image_id"].isin(images["image_id"])
    return Truth(labels[labels["id"].isin(images["study_id"])], tuple(images["image_id"]), boxes[of_images])


def score_files(truth_folder: str | Path, submission: str | Path) -> dict[str, float]:
    """`score` of a submission.csv. Raises SubmissionError, ScoringError, as its parts do."""
    return score(read_truth(truth_folder), read_submission(submission))


def score(truth: Truth, submission: Submission) -> dict[str, float]:
    """SCORE_KEYS -> 0..1 (NaN where the truth has none of a class); `opacity_boxed` is over images that have boxes only.

    Raises ScoringError where the submission lacks ids of the truth, or has others, as Kaggle would.
    """
    wanted, given = set(submission_ids(truth.labels["id"], truth.image_ids)), set(submission.ids)
    if wanted != given:
        missing, unknown = sorted(wanted - given), sorted(given - wanted)
        raise ScoringError(
            f"the submission must answer for the truth's ids and no others: {len(missing)} are missing {missing[:5]}, "
            f"{len(unknown)} are unknown {unknown[:5]}"
        )
    precision = {}
    for label in STUDY_CLASSES:
        rows = submission.studies[submission.studies["label"] == label]
        precision[label] = _one_pixel_precision(rows, "study_id", truth.labels.loc[truth.labels[label] == 1, "id"])
    nones = submission.images[submission.images["label"] == "none"]
    precision["none"] = _one_pixel_precision(nones, "image_id", np.array(truth.image_ids, dtype=object)[truth.is_none])
    opacities = submission.images[submission.images["label"] == "opacity"]
    hits = table_hits(opacities, "image_id", truth.boxes)
    found = _summary(precision, *opacity_precisions(opacities, hits, truth.boxes))
    absent = [label for label in SCORED_CLASSES if np.isnan(found[label])]
    if absent:
        logger.warning("the truth has no %s; the score is the mean of the other classes", " and no ".join(absent))
    return found


def score_tables(
    truth: Truth,
    study_probabilities: pd.DataFrame,
    none_probabilities: pd.DataFrame,
    detections: pd.DataFrame,
    matches: np.ndarray | None = None,
) -> dict[str, float]:
    """As `score`, from tables in memory: study_id + four classes; image_id, none; image_id, score, box.

    `matches` is average_precision.match_boxes of the detections, for callers that change their scores only. Rows for other
    ids are left out. Raises ScoringError unless every study and image of the truth has a probability.
    """
    studies = study_probabilities.set_index("study_id").reindex(truth.labels["id"])[list(STUDY_CLASSES)]
    nones = none_probabilities.set_index("image_id")["none"].reindex(list(truth.image_ids))
    unanswered = [*studies.index[studies.isna().any(axis=1)], *nones.index[nones.isna()]]
    if unanswered:
        raise ScoringError(f"{len(unanswered)} studies or images have no probability, first {unanswered[:5]}")
    precision = {label: class_precision(studies[label], truth.labels[label] == 1) for label in STUDY_CLASSES}
    precision["none"] = class_precision(nones, truth.is_none)
    known = detections["image_id"].isin(truth.image_ids).to_numpy()
    if not known.all():
        detections, matches = detections[known], None if matches is None else matches[known]
    if matches is None:
        hits = table_hits(detections, "image_id", truth.boxes)
    else:
        hits = first_hits(detections["score"].to_numpy(), matches)
    return _summary(precision, *opacity_precisions(detections, hits, truth.boxes))


def class_precision(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """AP of one score (n,) an item whose `positive` (n,) is bool; NaN where none is positive. `weight`: as often counted."""
    positive = np.asarray(positive, dtype=bool)
    return average_precision(scores, positive, positive.sum() if weight is None else weight[positive].sum(), weight)


def opacity_precisions(detections: pd.DataFrame, hits: np.ndarray, boxes: pd.DataFrame) -> tuple[float, float]:
    """AP of boxes on all images, and on the images of `boxes` alone, where no healthy image can produce a false positive."""
    scores = detections["score"].to_numpy()
    boxed = detections["image_id"].isin(boxes["image_id"].unique()).to_numpy()
    return average_precision(scores, hits, len(boxes)), average_precision(scores[boxed], hits[boxed], len(boxes))


def table_hits(rows: pd.DataFrame, key: str, truth: pd.DataFrame) -> np.ndarray:
    """Which `rows` (n,) of scored boxes are hits on the boxes of `truth`; both name their image or study in column `key`."""
    # Numbers for names: comparing strings would take most of the time.
    names = pd.Index(truth[key].unique())
    return box_hits(
        names.get_indexer(rows[key]), rows["score"], rows[list(BOX)], names.get_indexer(truth[key]), truth[list(BOX)]
    )


def competition_score(precision: dict[str, float]) -> float:
    """The mean of the six APs of SCORED_CLASSES, without those that the truth cannot give; NaN without any."""
    given = [precision[label] for label in SCORED_CLASSES if not np.isnan(precision[label])]
    return float(np.mean(given)) if given else float("nan")


def _summary(precision: dict[str, float], opacity: float, opacity_boxed: float) -> dict[str, float]:
    precision = {**precision, "opacity": opacity}
    return {"score": competition_score(precision), **precision, "opacity_boxed": opacity_boxed}


def _one_pixel_precision(rows: pd.DataFrame, key: str, positive: np.ndarray | pd.Series) -> float:
    truth = pd.DataFrame({key: np.asarray(positive), **dict(zip(BOX, ONE_PIXEL, strict=True))})
    return average_precision(rows["score"], table_hits(rows, key, truth), len(truth))


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ScoringError(f"{path} cannot be read: {error}") from error
    missing = [column for column in columns if column not in table.columns]
    if missing or table["id"].duplicated().any():
        raise ScoringError(
            f"{path} must have the columns {', '.join(columns)} and each id once; has {', '.join(table.columns)}"
        )
    return table
