"""VinBigData Chest X-ray Abnormalities Detection (2021): boxes of 14 findings, and the image class `No finding`.

The metric is PASCAL VOC 2010's mean average precision at an IoU above 0.4, over the 14 findings and `No finding`. The box of
`No finding` is one pixel, 0 0 1 1. Three points that the rules leave open are decided as in
kitlib.scoring.average_precision: no pixel is added to the sides of a box, equal confidences enter the curve as one block,
and classes that are absent from the ground truth are not in the mean.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from kitlib.classes import NO_FINDING, VINBIGDATA_FINDINGS
from kitlib.competitions.contract import BoxTruth, Competition, fill_rows
from kitlib.competitions.csv_files import Rows, join_rows, read_numbers, read_truth_table, refuse_rows
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions, weighted_mean
from kitlib.datasets.vinbigdata import CORNERS, PUBLISHED
from kitlib.errors import ScoringError, SettingsError
from kitlib.scoring.average_precision import average_precision, first_hits, match_boxes
from kitlib.scoring.placeholders import format_confidence
from kitlib.scoring.submission_csv import ONE_PIXEL, box_groups
from kitlib.scoring.validate import READ_AS_NAN, check_groups
from kitlib.settings import NotNegative, Probability
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

FINDINGS = VINBIGDATA_FINDINGS
CLASSES = (*FINDINGS, NO_FINDING)
LABELS = tuple(map(str, range(len(CLASSES))))  # of a prediction string
BOXLESS = LABELS[-1:]  # "14"
OVERLAP = 0.4  # a hit needs a larger IoU
NO_FINDING_SHARE = PUBLISHED[NO_FINDING] / PUBLISHED["images"]


def read_truth(path: Path) -> BoxTruth:
    """Return the ground truth in train.csv: one box per row, as the radiologists drew them, without merging.

    A row of `No finding` has empty corners, or the one-pixel box 0 0 1 1. Three radiologists annotated each training image.
    So a finding usually has several boxes, and an image without findings has three `No finding` boxes. A predicted box can
    match only one true box. In the test set, the radiologists agreed on their boxes. So a score on the training data cannot
    be compared with a score on the test set.
    """
    table = read_truth_table(path, ("train.csv",), ("image_id", "class_id", *CORNERS))
    code = table["class_id"].map({label: code for code, label in enumerate(LABELS)}).to_numpy(float)
    refuse_rows(table, np.isnan(code), f"class_id must be a whole number from 0 to {LABELS[-1]}")
    corners = read_numbers(table, CORNERS)
    is_empty = code == len(FINDINGS)
    corners[is_empty & np.isnan(corners).all(axis=1)] = ONE_PIXEL
    refuse_rows(table, is_empty & ~(corners == ONE_PIXEL).all(axis=1), f"{NO_FINDING} must have no box, or {ONE_PIXEL}")
    has_area = (corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])
    refuse_rows(table, ~has_area, f"a finding must have a box, {', '.join(CORNERS)}, with an area")
    boxes = pd.DataFrame(corners, columns=list(BOX))
    boxes.insert(0, "image_id", table["image_id"])
    boxes.insert(1, "finding", pd.Categorical.from_codes(code.astype(int), categories=CLASSES))
    return BoxTruth(tuple(boxes["image_id"].unique()), boxes)


def _parse_row(image_id: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """Parse a prediction string; return its boxes (n, 6) and a list of faults.

    The columns of the boxes are class_id, confidence, xmin, ymin, xmax and ymax.
    """
    if cells[0].strip() in READ_AS_NAN:
        return np.empty((0, 6)), ["empty prediction string; an image without a finding has 14 1 0 0 1 1"]
    labels, numbers, faults = check_groups(cells[0], LABELS, BOXLESS)
    return np.column_stack([list(map(int, labels)), numbers]), faults


ROWS = Rows(("image_id", "PredictionString"), _parse_row)


def read_submission(path: Path, ids: list[str]) -> pd.DataFrame:
    """Read a submission file; return a table of its boxes: image_id, finding, score, xmin, ymin, xmax and ymax."""
    table = join_rows(ROWS.read(path, ids), ("finding", "score", *BOX))
    table["finding"] = pd.Categorical.from_codes(table["finding"].astype(int), categories=CLASSES)
    return table


def metric(truth: BoxTruth, detections: pd.DataFrame) -> dict[str, float]:
    """Return a dict: `score`, the mean average precision, and the average precision of each of CLASSES by name, all 0..1.

    `detections` has image_id, finding, score, xmin, ymin, xmax and ymax; the class `No finding` has the box 0 0 1 1. Classes
    that are absent from the truth get NaN and are not in the mean. Raises ScoringError for a detection of an unknown class,
    or of an image that is not in the truth.
    """
    key, true_key = (_keys(truth.image_ids, table) for table in (detections, truth.boxes))
    match = match_boxes(key, detections[list(BOX)], true_key, truth.boxes[list(BOX)], OVERLAP)
    parts = _precisions(detections["score"].to_numpy(float), match, key % len(CLASSES), true_key % len(CLASSES))
    absent = [name for name, value in parts.items() if np.isnan(value)]
    if absent:
        logger.warning("the truth lacks the classes %s; the score is the mean over the other classes", ", ".join(absent))
    return {"score": float(np.nanmean(list(parts.values()))) if len(truth.boxes) else float("nan"), **parts}


def _precisions(score: np.ndarray, match: np.ndarray, code: np.ndarray, true_code: np.ndarray) -> dict[str, float]:
    """Return the average precision of each class; NaN for classes without a true box.

    `score`, `match` and `code`, each (n,), belong to n detections; for `match` see `match_boxes`. `true_code` (m,) belongs
    to m true boxes. A code is the index of a box's class in CLASSES.
    """
    hit, positives = first_hits(score, match), np.bincount(true_code, minlength=len(CLASSES))
    return {
        name: average_precision(score[code == index], hit[code == index], positives[index])
        for index, name in enumerate(CLASSES)
    }


def _keys(image_ids: tuple[str, ...], table: pd.DataFrame) -> np.ndarray:
    """Return an int array (n,): a number for each row of `table`, equal only for rows with the same image and class."""
    image = pd.Index(image_ids).get_indexer(table["image_id"])
    code = pd.Categorical(table["finding"], categories=CLASSES).codes.astype(int)
    for is_unknown, column, expected in (
        (image < 0, "image_id", "an image of the truth"),
        (code < 0, "finding", f"one of {', '.join(CLASSES)}"),
    ):
        if is_unknown.any():
            unknown = table[column].iloc[int(np.flatnonzero(is_unknown)[0])]
            raise ScoringError(
                f"{is_unknown.sum()} boxes have an unknown {column}, such as {unknown!r}; expected {expected}"
            )
    return image * len(CLASSES) + code


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return a row with `No finding` for every id; its confidence is the share of training images without a finding."""
    return [[name, f"{BOXLESS[0]} {format_confidence(NO_FINDING_SHARE)} 0 0 1 1"] for name in ids]


@dataclass(frozen=True)
class VinBigDataFusion(FusionSettings):
    """Fusion settings of VinBigData: the formula for the probability of `No finding`, and how it changes box scores.

    The default `box_iou` is as low as 0.4, because the outlines of a diffuse finding vary widely.
    """

    GRIDS: ClassVar = {
        "no finding: classifier, no box": (
            ("classifier_weight", "no_box_weight"),
            ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (0.5, 0.5), (0.3, 0.7)),
        ),
        "box_power": (("box_power",), (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)),
        "least_abnormal": (("least_abnormal",), (0.0, 0.02, 0.05, 0.08, 0.15, 0.3)),
    }

    BOX_IOUS: ClassVar = (0.3, 0.35, 0.4, 0.45, 0.5, 0.6)

    box_iou: Probability = 0.4
    # `No finding` is the weighted mean of the available ones of two parts; these are the parts' weights:
    classifier_weight: NotNegative = 1.0  # its probability as a classifier of images predicts it
    no_box_weight: NotNegative = 0.0  # 1 - the highest box score, the rule of the 37th place
    box_power: NotNegative = 0.0  # box score = score * (1 - no finding)^box_power
    # Boxes of images in which 1 - no finding is lower are dropped; published with a two-class classifier: 0.08
    least_abnormal: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classifier_weight + self.no_box_weight:
            raise SettingsError("VinBigDataFusion needs a classifier_weight or no_box_weight above 0")


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame, masks: Any) -> BoxTruth:
    """Return the ground truth of the prepared `images`: their boxes; an image without boxes gets the box of `No finding`."""
    drawn = boxes.loc[boxes["image_id"].isin(images["image_id"]), ["image_id", "finding", *BOX]]
    healthy = images.loc[~images["image_id"].isin(drawn["image_id"]), ["image_id"]]
    healthy = healthy.assign(finding=NO_FINDING, **dict(zip(BOX, ONE_PIXEL, strict=True)))
    return BoxTruth(tuple(images["image_id"]), pd.concat([drawn, healthy], ignore_index=True))


def _weigh(merged: MergedPredictions, settings: VinBigDataFusion) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's probability of `No finding`, NaN if unknown, and each box's new score, 0 if the box is dropped."""
    parts = np.stack([merged.probability(NO_FINDING), merged.no_box()])
    no_finding = weighted_mean(parts, np.array([settings.classifier_weight, settings.no_box_weight]))
    abnormal = (1 - no_finding)[merged.boxes["row"].to_numpy()]
    score = merged.boxes["score"].to_numpy() * abnormal**settings.box_power
    return no_finding, np.where(abnormal < settings.least_abnormal, 0.0, score)


def decide(merged: MergedPredictions, settings: VinBigDataFusion) -> pd.DataFrame:
    """Return a table of the boxes to submit: image_id, finding, score, xmin, ymin, xmax and ymax.

    Each image whose probability of `No finding` is known also has a row of this class, even if it has boxes.
    """
    no_finding, score = _weigh(merged, settings)
    boxes = merged.detections().assign(score=score)
    healthy = merged.images[["image_id"]].assign(finding=NO_FINDING, score=no_finding)
    healthy = healthy.assign(**dict(zip(BOX, ONE_PIXEL, strict=True)))[~np.isnan(no_finding)]
    columns = ["image_id", "finding", "score", *BOX]
    return pd.concat([boxes.loc[score > 0, columns].astype({"finding": object}), healthy[columns]], ignore_index=True)


def judge(truth: BoxTruth, merged: MergedPredictions, settings: VinBigDataFusion) -> float:
    """Return the score (0..1) of the boxes from `decide`; `merged.boxes` needs the column `match` (see Competition)."""
    no_finding, score = _weigh(merged, settings)
    is_known = ~np.isnan(no_finding)
    is_healthy = merged.images["image_id"].isin(truth.boxes.loc[truth.boxes["finding"] == NO_FINDING, "image_id"]).to_numpy()
    code, true_code = (
        pd.Categorical(table["finding"], categories=CLASSES).codes.astype(int) for table in (merged.boxes, truth.boxes)
    )
    # An image has at most one true `No finding`; its number is one that no matched box has.
    match = np.where(score > 0, merged.boxes["match"].to_numpy(), -1)
    alone = np.where(is_healthy, match.max(initial=-1) + 1 + np.arange(len(is_healthy)), -1)
    parts = _precisions(
        np.concatenate([score, no_finding[is_known]]),
        np.concatenate([match, alone[is_known]]),
        np.concatenate([code, np.full(is_known.sum(), len(FINDINGS))]),
        true_code,
    )
    return float(np.nanmean(list(parts.values())))


def fill(ids: list[str], detections: pd.DataFrame) -> tuple[list[list[str]], list[str]]:
    """Return the submission's rows for `ids`, and the ids that `detections` lacks, which get the baseline's row."""
    boxes = detections.assign(label=detections["finding"].map(dict(zip(CLASSES, LABELS, strict=True))))
    return fill_rows(baseline_rows(ids), {name: [" ".join(groups)] for name, groups in box_groups(boxes, BOXLESS).items()})


VINBIGDATA = Competition.with_rows(
    ROWS,
    name="vinbigdata",
    slug="vinbigdata-chest-xray-abnormalities-detection",
    title="VinBigData Chest X-ray Abnormalities Detection",
    read_truth=read_truth,
    truth_ids=lambda truth: truth.image_ids,
    read_submission=read_submission,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="vinbigdata",
    settings=VinBigDataFusion,
    truth_of=truth_of,
    decide=decide,
    fill=fill,
    judge=judge,
    hit_iou=OVERLAP,
    image_classes=(NO_FINDING,),
    box_classes=FINDINGS,
)
