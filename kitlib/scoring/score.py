"""The score of SIIM-COVID: the unweighted mean of six average precisions (AP) of PASCAL VOC 2010.

Four classes belong to studies; `none` and `opacity` belong to images. Predictions of `opacity` are boxes. All other
predictions are scored like boxes, with the one-pixel box `0 0 1 1`. The AP of a class that is absent from the truth is NaN
and ignored in the mean; in the competition's tables all six classes are present.
"""

import ast
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import SCORED_CLASSES, STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.errors import ScoringError, TableError
from kitlib.scoring.average_precision import OVERLAP, Ranking, average_precision, first_hits, match_boxes
from kitlib.scoring.submission_csv import ONE_PIXEL, Submission, read_submission, submission_ids
from kitlib.tables import BOX, read_text_table

logger = logging.getLogger(__name__)

SCORE_KEYS = ("score", *SCORED_CLASSES, "opacity_boxed")


@dataclass(frozen=True)
class Truth:
    """Ground truth for a set of images and their studies.

    `labels` has one row per study: id and the four study classes, each 0 or 1. `boxes` has one row per box: image_id, xmin,
    ymin, xmax and ymax in original pixels. `image_ids` lists all images; images without a box have the class `none`.
    """

    labels: pd.DataFrame
    image_ids: tuple[str, ...]
    boxes: pd.DataFrame

    @property
    def is_none(self) -> np.ndarray:
        """Boolean mask, one entry per id in `image_ids`: whether the image has no box."""
        return ~pd.Index(self.image_ids).isin(self.boxes["image_id"])


def read_truth(folder: str | Path) -> Truth:
    """Return SIIM-COVID's ground truth, read from train_study_level.csv and train_image_level.csv in `folder`.

    As in Kaggle's scoring, all images are included, also the 217 train images that no annotator looked at, and boxes are not
    changed. Raises ScoringError if a file cannot be read, lacks a column, or contains an invalid value.
    """
    studies = _read_table(Path(folder) / "train_study_level.csv", ["id", *STUDY_LABEL_COLUMNS])
    labels = studies.rename(columns=STUDY_LABEL_COLUMNS)[["id", *STUDY_CLASSES]]
    labels["id"] = labels["id"].str.removesuffix("_study")
    values = labels[list(STUDY_CLASSES)].apply(pd.to_numeric, errors="coerce").astype(float)
    if not (is_valid := values.isin([0, 1]).all(axis=1)).all():
        first = labels[~is_valid].iloc[0]
        raise ScoringError(
            f"train_study_level.csv in {folder}: the labels of study {first.id} are {', '.join(map(str, first.iloc[1:]))}; "
            "expected 0 or 1 for each class"
        )
    labels[list(STUDY_CLASSES)] = values
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
            raise ScoringError(
                f"train_image_level.csv in {folder}: invalid boxes {cell!r} of {image_id}: {error}"
            ) from error
    boxes = pd.DataFrame(rows, columns=["image_id", *BOX]).astype({"image_id": object, **dict.fromkeys(BOX, float)})
    return Truth(labels, tuple(image_ids), boxes)


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame) -> Truth:
    """Return the ground truth of `images` and their studies. All arguments are tables of a run of notebook 10."""
    is_included = boxes["image_id"].isin(images["image_id"])
    return Truth(labels[labels["id"].isin(images["study_id"])], tuple(images["image_id"]), boxes[is_included])


def score_files(truth_folder: str | Path, submission: str | Path) -> dict[str, float]:
    """Score a submission.csv against the ground truth in `truth_folder`; return the dict that `score` returns.

    Raises SubmissionError if the submission cannot be read. Raises ScoringError if the ground truth cannot be read, or if
    its ids are not those of the submission.
    """
    return score(read_truth(truth_folder), read_submission(submission))


def score(truth: Truth, submission: Submission) -> dict[str, float]:
    """Score a submission; return a dict of values 0..1: `score`, the AP of each of six classes, and `opacity_boxed`.

    `score` is the mean of the six APs. `opacity_boxed` is the AP of opacity on the images with a box in the ground truth.
    Classes that are absent from the truth get NaN. Raises ScoringError unless the submission has exactly the ids of the
    truth; Kaggle would reject it.
    """
    expected, submitted = set(submission_ids(truth.labels["id"], truth.image_ids)), set(submission.ids)
    if expected != submitted:
        missing, unknown = sorted(expected - submitted), sorted(submitted - expected)
        raise ScoringError(
            f"the submission must have exactly the ids of the truth, but {len(missing)} are missing, such as {missing[:5]}, "
            f"and {len(unknown)} are unknown, such as {unknown[:5]}"
        )
    precision = {}
    for label in STUDY_CLASSES:
        rows = submission.studies[submission.studies["label"] == label]
        precision[label] = _one_pixel_precision(rows, "study_id", truth.labels.loc[truth.labels[label] == 1, "id"])
    nones = submission.images[submission.images["label"] == "none"]
    precision["none"] = _one_pixel_precision(nones, "image_id", np.array(truth.image_ids, dtype=object)[truth.is_none])
    opacities = submission.images[submission.images["label"] == "opacity"]
    hits = table_hits(opacities, "image_id", truth.boxes)
    scores = _summary(precision, *opacity_precisions(opacities, hits, truth.boxes))
    absent = [label for label in SCORED_CLASSES if np.isnan(scores[label])]
    if absent:
        logger.warning("the truth lacks the classes %s; the score is the mean over the other classes", ", ".join(absent))
    return scores


def score_tables(
    truth: Truth, study_probabilities: pd.DataFrame, none_probabilities: pd.DataFrame, detections: pd.DataFrame
) -> dict[str, float]:
    """Score predictions in tables; return the dict that `score` returns: values 0..1, NaN for classes not in the truth.

    `study_probabilities` has study_id and the four classes, `none_probabilities` image_id and none, `detections` image_id,
    score, xmin, ymin, xmax and ymax. Rows for ids that are not in the truth are ignored. Raises ScoringError unless every
    study and image of the truth has a probability.
    """
    # Ids are replaced by numbers, because hashing strings that are scattered over the memory takes most of the time.
    image = pd.Index(truth.image_ids).get_indexer(detections["image_id"])
    match = match_in_images(truth, image, detections[list(BOX)].to_numpy())
    return score_matched(truth, study_probabilities, none_probabilities, image, detections["score"].to_numpy(), match)


def match_in_images(truth: Truth, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return an int array (n,): for each predicted box, the row in `truth.boxes` of the matched box, or -1 if there is none.

    `boxes` (n, 4) are the predicted boxes. `image` (n,) has the index in `truth.image_ids` of a predicted box's image, or -1
    if the image is not in the truth.
    """
    return match_boxes(image, boxes, pd.Index(truth.image_ids).get_indexer(truth.boxes["image_id"]), truth.boxes[list(BOX)])


def score_matched(
    truth: Truth,
    study_probabilities: pd.DataFrame,
    none_probabilities: pd.DataFrame,
    image: np.ndarray,
    score: np.ndarray,
    match: np.ndarray,
) -> dict[str, float]:
    """Score predictions as `score_tables` does, for n detections that have already been matched to ground-truth boxes.

    All arrays are (n,). `image` has the index in `truth.image_ids` of a detection's image; detections with -1 are ignored.
    `score` has a detection's score. `match` has the row in `truth.boxes` of the matched box, or -1 if there is none.
    """
    studies = study_probabilities.set_index("study_id").reindex(truth.labels["id"])[list(STUDY_CLASSES)]
    nones = none_probabilities.set_index("image_id")["none"].reindex(list(truth.image_ids))
    missing = [*studies.index[studies.isna().any(axis=1)], *nones.index[nones.isna()]]
    if missing:
        raise ScoringError(f"{len(missing)} studies or images have no probability, such as {missing[:5]}")
    precision = {label: class_precision(studies[label], truth.labels[label] == 1) for label in STUDY_CLASSES}
    precision["none"] = class_precision(nones, truth.is_none)
    is_known = image >= 0
    image, score, match = image[is_known], score[is_known], match[is_known]
    on_boxed = ~truth.is_none[image]
    return _summary(precision, *_opacity_precisions(score, first_hits(score, match), on_boxed, len(truth.boxes)))


def class_precision(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the average precision of a class for n studies or images, 0..1; NaN if none of them has the class.

    `scores` (n,) are the predicted probabilities of the class, `positive` (n,) is True for studies or images that truly have
    it, and `weight` (n,) is how often each study or image counts.
    """
    positive = np.asarray(positive, dtype=bool)
    return average_precision(scores, positive, positive.sum() if weight is None else weight[positive].sum(), weight)


def opacity_precisions(detections: pd.DataFrame, hits: np.ndarray, boxes: pd.DataFrame) -> tuple[float, float]:
    """Return two average precisions of `opacity`: on all images, and on only the images that have a true box.

    `boxes` are the true boxes. The second value ignores detections on images without a true box. `hits` is a bool array,
    True for rows of `detections` that are hits.
    """
    on_boxed = detections["image_id"].isin(boxes["image_id"].unique()).to_numpy()
    return _opacity_precisions(detections["score"].to_numpy(), hits, on_boxed, len(boxes))


def _opacity_precisions(score: np.ndarray, hits: np.ndarray, on_boxed: np.ndarray, positives: int) -> tuple[float, float]:
    ranking = Ranking(score, hits)
    on_boxed = on_boxed[ranking.order].astype(float)
    return ranking.average_precision(positives), ranking.average_precision(positives, on_boxed)


def table_hits(rows: pd.DataFrame, key: str, truth: pd.DataFrame, overlap: float = OVERLAP) -> np.ndarray:
    """Return a bool array, True for predicted boxes in the table `rows` that are hits on true boxes in the table `truth`.

    In both tables, the column called `key` has the id of a box's image or study. The IoU of a hit is above `overlap`.
    """
    # Ids are replaced by numbers, because comparing strings would take most of the time.
    names = pd.Index(truth[key].unique())
    match = match_boxes(
        *(names.get_indexer(rows[key]), rows[list(BOX)], names.get_indexer(truth[key]), truth[list(BOX)]), overlap
    )
    return first_hits(rows["score"], match)


def competition_score(precision: dict[str, float]) -> float:
    """Return the mean of SIIM-COVID's six average precisions, keyed by class, ignoring NaN; NaN if all are NaN."""
    available = [precision[label] for label in SCORED_CLASSES if not np.isnan(precision[label])]
    return float(np.mean(available)) if available else float("nan")


def _summary(precision: dict[str, float], opacity: float, opacity_boxed: float) -> dict[str, float]:
    precision = {**precision, "opacity": opacity}
    return {"score": competition_score(precision), **precision, "opacity_boxed": opacity_boxed}


def _one_pixel_precision(rows: pd.DataFrame, key: str, positive: np.ndarray | pd.Series) -> float:
    truth = pd.DataFrame({key: np.asarray(positive), **dict(zip(BOX, ONE_PIXEL, strict=True))})
    return average_precision(rows["score"], table_hits(rows, key, truth), len(truth))


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        table = read_text_table(path)
    except TableError as error:
        raise ScoringError(str(error)) from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ScoringError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}")
    if table["id"].duplicated().any():
        raise ScoringError(f"{path} has several rows with the id {table['id'][table['id'].duplicated()].iloc[0]}")
    return table
