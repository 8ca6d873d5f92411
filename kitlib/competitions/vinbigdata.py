"""VinBigData Chest X-ray Abnormalities Detection (2021): boxes of 14 findings, and images without any.

The metric is PASCAL VOC 2010's mean average precision at an IoU above 0.4, over the 14 findings and `No finding`, whose box
has one pixel. The rules leave three points open, and this file decides them as kitlib.scoring.average_precision does: no
pixel is added to the sides of a box, equal confidences enter the curve as one block, and a class that is absent from the
ground truth is left out of the mean.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import NO_FINDING, VINBIGDATA_FINDINGS
from kitlib.competitions.contract import BoxTruth, Competition
from kitlib.competitions.csv_files import Rows, join_rows, read_numbers, read_truth_table, refuse_rows
from kitlib.datasets.vinbigdata import CORNERS, PUBLISHED
from kitlib.errors import ScoringError
from kitlib.scoring.average_precision import average_precision, first_hits, match_boxes
from kitlib.scoring.placeholders import format_confidence
from kitlib.scoring.submission_csv import ONE_PIXEL
from kitlib.scoring.validate import READ_AS_NAN, check_groups
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

FINDINGS = VINBIGDATA_FINDINGS
CLASSES = (*FINDINGS, NO_FINDING)
LABELS = tuple(map(str, range(len(CLASSES))))  # of a prediction string
BOXLESS = LABELS[-1:]  # "14"
OVERLAP = 0.4  # the IoU of a hit is larger than this
NO_FINDING_SHARE = PUBLISHED[NO_FINDING] / PUBLISHED["images"]


def read_truth(path: Path) -> BoxTruth:
    """Return the ground truth in train.csv: one box for each row, as the readers drew them, without merging.

    A row of `No finding` has empty corners, or the one-pixel box. In the training data three readers saw each image, so that
    a finding usually has several boxes, and `No finding` has three rows for an image, of which one confidence can only match
    one. A score on these rows is therefore not comparable with one on the test set, whose readers agreed on their boxes.
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
    """Return the groups of a prediction string, (n, 6): class_id, confidence, xmin, ymin, xmax and ymax; and its faults."""
    if cells[0].strip() in READ_AS_NAN:
        return np.empty((0, 6)), ["empty prediction string; an image without a finding has 14 1 0 0 1 1"]
    labels, numbers, faults = check_groups(cells[0], LABELS, BOXLESS)
    return np.column_stack([list(map(int, labels)), numbers]), faults


ROWS = Rows(("image_id", "PredictionString"), _parse_row)


def read_submission(path: Path, ids: list[str]) -> pd.DataFrame:
    """Return the detections in a submission: a table with image_id, finding, score, and kitlib.tables.BOX."""
    table = join_rows(ROWS.read(path, ids), ("finding", "score", *BOX))
    table["finding"] = pd.Categorical.from_codes(table["finding"].astype(int), categories=CLASSES)
    return table


def metric(truth: BoxTruth, detections: pd.DataFrame) -> dict[str, float]:
    """Return `score`, the mean average precision, and the average precision of each class of CLASSES by name, all 0..1.

    `detections` has image_id, finding, score, and kitlib.tables.BOX; the class `No finding` has the box 0 0 1 1. Classes
    that are absent from the truth get NaN and are not in the mean. Raises ScoringError for a detection of an unknown class,
    or of an image that is not in the truth.
    """
    key, true_key = (_keys(truth.image_ids, table) for table in (detections, truth.boxes))
    score = detections["score"].to_numpy(float)
    match = match_boxes(key, detections[list(BOX)], true_key, truth.boxes[list(BOX)], OVERLAP)
    hit, code = first_hits(score, match), key % len(CLASSES)
    positives = np.bincount(true_key % len(CLASSES), minlength=len(CLASSES))
    parts = {
        name: average_precision(score[code == index], hit[code == index], positives[index])
        for index, name in enumerate(CLASSES)
    }
    absent = [name for name, value in parts.items() if np.isnan(value)]
    if absent:
        logger.warning("the truth has no %s; the score is the mean over the other classes", ", ".join(absent))
    return {"score": float(np.nanmean(list(parts.values()))) if len(truth.boxes) else float("nan"), **parts}


def _keys(image_ids: tuple[str, ...], table: pd.DataFrame) -> np.ndarray:
    """Return a number (n,) for the image and class of each row, so that boxes match only within both."""
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
    """Return `No finding` for every image, with its share of the training images as confidence."""
    return [[name, f"{BOXLESS[0]} {format_confidence(NO_FINDING_SHARE)} 0 0 1 1"] for name in ids]


VINBIGDATA = Competition(
    name="vinbigdata",
    slug="vinbigdata-chest-xray-abnormalities-detection",
    title="VinBigData Chest X-ray Abnormalities Detection",
    header=ROWS.header,
    read_truth=read_truth,
    truth_ids=lambda truth: truth.image_ids,
    read_sample=ROWS.read_sample,
    read_submission=read_submission,
    find_faults=ROWS.find_faults,
    metric=metric,
    baseline_rows=baseline_rows,
    image_classes=(NO_FINDING,),
    box_classes=FINDINGS,
)
