"""RSNA Pneumonia Detection Challenge (2018), stage 2: boxes of lung opacities.

The metric is TP / (TP + FP + FN), averaged over images and eight IoU thresholds. Every false box lowers the score, whatever
its confidence; confidences only decide the order in which predicted boxes are matched. The rules do not say which true box
is hit if a predicted box overlaps several; here, of those not hit before, the true box with the largest IoU is hit. Boxes
with equal confidence, or with equal IoU, are ordered by their coordinates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

from kitlib.classes import ONE_FINDING, RSNA_CLASSES
from kitlib.competitions.contract import BoxTruth, Competition, fill_rows
from kitlib.competitions.csv_files import Rows, join_rows, read_numbers, read_truth_table, refuse_rows
from kitlib.competitions.fusion_settings import AnyConfidence, FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.errors import ScoringError
from kitlib.scoring.average_precision import iou
from kitlib.scoring.placeholders import format_confidence
from kitlib.settings import NotNegative, Probability, Range
from kitlib.tables import BOX

THRESHOLDS = tuple(k / 20 for k in range(8, 16))  # 0.40, 0.45 .. 0.75; a hit needs a larger IoU
SIDE = 1024  # pixels a side of every image
SIDES = ("x", "y", "width", "height")


def read_truth(path: Path) -> BoxTruth:
    """Return the ground truth in stage_2_train_labels.csv, which has one row per box, and one per image without boxes.

    Raises ScoringError unless Target is 1 in rows with a box, 0 in rows without, and equal in all rows of an image.
    """
    table = read_truth_table(path, ("stage_2_train_labels.csv",), ("patientId", *SIDES, "Target"))
    sides = read_numbers(table, SIDES)
    is_boxed = (table["Target"] == "1").to_numpy()
    refuse_rows(table, ~is_boxed & (table["Target"] != "0").to_numpy(), "Target must be 0 or 1")
    refuse_rows(table, ~is_boxed & ~np.isnan(sides).all(axis=1), "Target is 0, but there is a box")
    refuse_rows(table, is_boxed & ~(sides[:, 2:] > 0).all(axis=1), "Target is 1, but there is no box with an area")
    refuse_rows(table, is_boxed & np.isnan(sides).any(axis=1), "Target is 1, but the box is incomplete")
    is_mixed = table.groupby("patientId")["Target"].transform("nunique") > 1
    refuse_rows(table, is_mixed.to_numpy(), "the image has rows with Target 0 and rows with Target 1")
    boxes = _as_corners(table.loc[is_boxed, "patientId"], sides[is_boxed])
    boxes.insert(1, "finding", ONE_FINDING)
    return BoxTruth(tuple(table["patientId"].unique()), boxes)


def _as_corners(image_ids: pd.Series, sides: np.ndarray) -> pd.DataFrame:
    """Return a table with image_id, xmin, ymin, xmax and ymax of n boxes; `sides` (n, 4) has x, y, width and height."""
    corners = np.hstack([sides[:, :2], sides[:, :2] + sides[:, 2:]])
    table = pd.DataFrame(corners, columns=list(BOX))
    table.insert(0, "image_id", image_ids.to_numpy())
    return table


def _parse_row(patient_id: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """Parse a prediction string; return its boxes, float (n, 5): confidence, x, y, width, height; and a list of faults."""
    words = cells[0].split()
    if len(words) % 5:
        hint = "; an image without a box has an empty string" if len(words) == 1 else ""
        return np.empty((0, 5)), [f"{len(words)} words are not groups of five (confidence x y width height){hint}"]
    groups, faults = np.empty((len(words) // 5, 5)), []
    for index in range(len(groups)):
        group = words[5 * index : 5 * index + 5]
        try:
            # float() would accept 1_0 as ten.
            confidence, x, y, width, height = groups[index] = [float(word.replace("_", "?")) for word in group]
        except ValueError:
            faults.append(f"group {index + 1}: {' '.join(group)!r} is not five numbers")
            continue
        box = f"group {index + 1}: box {' '.join(group[1:])}"
        if not 0 <= confidence <= 1:
            faults.append(f"group {index + 1}: confidence {group[0]} is not in 0..1")
        if not np.isfinite([x, y, width, height]).all():
            faults.append(f"{box} is not finite")
        elif width <= 0 or height <= 0:
            faults.append(f"{box} has no area (x y width height)")
        elif min(x, y) < -1 or max(x + width, y + height) > SIDE + 1:  # rounded numbers may be a pixel off
            faults.append(f"{box} reaches beyond the image of {SIDE} x {SIDE} pixels (x y width height, not two corners)")
    return groups, faults


ROWS = Rows(("patientId", "PredictionString"), _parse_row, "stage_2_sample_submission.csv")


def read_submission(path: Path, ids: list[str]) -> pd.DataFrame:
    """Read a submission file; return a table of its boxes: image_id, finding, score, xmin, ymin, xmax and ymax."""
    rows = join_rows(ROWS.read(path, ids), ("score", *SIDES))
    table = _as_corners(rows["image_id"], rows[list(SIDES)].to_numpy())
    table.insert(1, "finding", ONE_FINDING)
    table.insert(2, "score", rows["score"])
    return table


def metric(truth: BoxTruth, detections: pd.DataFrame) -> dict[str, float]:
    """Return a dict: `score`, the mean of TP / (TP + FP + FN) over images and IoU thresholds, and a mean per threshold.

    All values are 0..1. The keys for the thresholds are like `iou_0.40`. `detections` has the columns image_id, score, xmin,
    ymin, xmax and ymax. An image with neither a true nor a predicted box does not count; all values are NaN if no image
    counts. Raises ScoringError for a detection on an image that is not in the truth.
    """
    images = pd.Index(truth.image_ids)
    true_image, image = (images.get_indexer(table["image_id"]) for table in (truth.boxes, detections))
    if (image < 0).any():
        first = detections["image_id"].iloc[image.argmin()]
        raise ScoringError(f"{(image < 0).sum()} boxes are on images without ground truth, such as {first!r}; remove them")
    drawn, found = np.bincount(true_image, minlength=len(images)), np.bincount(image, minlength=len(images))
    true_boxes, boxes = (table[list(BOX)].to_numpy(float) for table in (truth.boxes, detections))
    hits = _count_hits(true_image, true_boxes, image, boxes, detections["score"].to_numpy(float), len(images))
    has_box = drawn + found > 0
    scores = hits[has_box] / ((drawn + found)[:, None] - hits)[has_box]
    means = scores.mean(axis=0) if len(scores) else np.full(len(THRESHOLDS), np.nan)
    parts = {f"iou_{threshold:.2f}": float(value) for threshold, value in zip(THRESHOLDS, means, strict=True)}
    return {"score": float(means.mean()), **parts}


def _count_hits(
    true_image: np.ndarray, true_boxes: np.ndarray, image: np.ndarray, boxes: np.ndarray, score: np.ndarray, images: int
) -> np.ndarray:
    """Return the number of true boxes that are hit in each image at each IoU threshold; an int array (images, 8).

    The predicted `boxes` (n, 4) and the `true_boxes` (m, 4) have the columns xmin, ymin, xmax and ymax. The index of each
    box's image is in `image` (n,) or `true_image` (m,). `score` (n,) has the confidences of `boxes`.
    """
    # Ties are broken by coordinates, so that the result does not depend on the order of rows.
    order = np.lexsort((*true_boxes.T[::-1], true_image))
    true_boxes, drawn = true_boxes[order], np.bincount(true_image, minlength=images)
    hits = np.zeros((images, len(THRESHOLDS)), int)
    # Only boxes on images with a true box can hit; a row of `overlap` has a box's IoU with each true box, 0 beyond the last.
    on_drawn = np.flatnonzero(drawn[image])
    order = on_drawn[np.lexsort((*boxes[on_drawn].T[::-1], -score[on_drawn], image[on_drawn]))]
    image, boxes = image[order], boxes[order]
    place = np.arange(drawn.max(initial=0))
    true_row = (np.cumsum(drawn) - drawn)[image][:, None] + place
    is_true = place < drawn[image][:, None]
    overlap = np.where(is_true, iou(boxes[:, None], true_boxes[np.where(is_true, true_row, 0)]), 0.0)
    may_hit = (overlap > THRESHOLDS[0]).any(axis=1)
    image, overlap = image[may_hit], overlap[may_hit]
    first = np.flatnonzero(np.diff(image, prepend=-1))
    rank = np.arange(len(image)) - np.repeat(first, np.diff(np.append(first, len(image))))
    is_free = np.ones((images, len(THRESHOLDS), len(place)), bool)
    # In turn, the best remaining box of every image at once takes the free true box with the largest IoU.
    for turn in range(rank.max(initial=-1) + 1):
        rows = np.flatnonzero(rank == turn)
        candidates = np.where(is_free[image[rows]], overlap[rows, None], 0.0)
        best = candidates.argmax(axis=2)
        is_hit = np.take_along_axis(candidates, best[..., None], axis=2)[..., 0] > THRESHOLDS
        hit, threshold = np.nonzero(is_hit)
        is_free[image[rows][hit], threshold, best[hit, threshold]] = False
        hits[image[rows]] += is_hit
    return hits


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return a row without a box for every id: 77 % of the images have no box, and score 0 if a box is predicted."""
    return [[name, ""] for name in ids]


@dataclass(frozen=True)
class RsnaPneumoniaFusion(FusionSettings):
    """Fusion settings of RSNA Pneumonia: which boxes are submitted, and a factor for the width and height of each box."""

    GRIDS: ClassVar = {
        "gate_power": (("gate_power",), (0.0, 0.25, 0.5, 1.0)),
        "least_score": (("least_score",), tuple(k / 20 for k in range(1, 19))),
        "box_size": (("box_size",), (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)),
    }
    FIRST: ClassVar = ("least_score",)  # with a bad value, no setting of box merging makes a difference
    BOX_METHODS: ClassVar = ("wbf",)
    BOX_CONFIDENCES: ClassVar = ("agreed",)

    # least_score is tuned on images with the boxes of one fold, but in the test set the boxes of several folds are fused.
    # With "avg" too few fused boxes reach it, with "max" (and nms) every fold's false positives do; "agreed" lies between.
    box_confidence: AnyConfidence = "agreed"
    gate_power: NotNegative = 0.0  # box score = score * P(Lung Opacity)^gate_power, if a classifier predicts it
    least_score: Probability = 0.3  # boxes with a lower score are not submitted
    # Factor of the sides of each box. The test set's boxes are tighter than those of the training set: winners used 0.875
    box_size: Annotated[float, Range(above=0, at_most=2)] = 1.0


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame, masks: Any) -> BoxTruth:
    """Return the ground truth of the prepared `images`, with boxes converted to pixels of the published images."""
    drawn = boxes.loc[boxes["image_id"].isin(images["image_id"]), ["image_id", "finding", *BOX]].reset_index(drop=True)
    corners = _on_published_side(drawn[list(BOX)].to_numpy(), images.set_index("image_id").loc[drawn["image_id"]])
    return BoxTruth(tuple(images["image_id"]), drawn.assign(**dict(zip(BOX, corners.T, strict=True))))


def _on_published_side(corners: np.ndarray, images: pd.DataFrame) -> np.ndarray:
    """Convert boxes (n, 4) from pixels of the prepared images to pixels of the published images, 1024 x 1024 (SIDE).

    `images` has one row per box, with the size of the box's prepared image in the columns rows and columns.
    """
    return corners * (SIDE / images[["columns", "rows", "columns", "rows"]].to_numpy(float))


def decide(merged: MergedPredictions, settings: RsnaPneumoniaFusion) -> pd.DataFrame:
    """Return a table of the boxes to submit: image_id, finding, score, xmin, ymin, xmax and ymax in published pixels.

    The column image_id is categorical. Its categories are the ids of all images on which a detector was run, also
    those without a box. For all other images, `fill` writes the baseline's row.
    """
    row, score = merged.boxes["row"].to_numpy(), merged.boxes["score"].to_numpy()
    if settings.gate_power:
        score = score * np.nan_to_num(merged.probability(RSNA_CLASSES[-1]), nan=1.0)[row] ** settings.gate_power
    is_answered = score >= settings.least_score
    boxes, row = merged.boxes[is_answered], row[is_answered]
    corners = _on_published_side(boxes[list(BOX)].to_numpy(), merged.images.iloc[row])
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    half = settings.box_size * (corners[:, 2:] - corners[:, :2]) / 2
    corners = np.hstack([middle - half, middle + half]).clip(0, SIDE)
    ids = merged.images["image_id"].to_numpy()[merged.seen]
    image_id = pd.Categorical.from_codes((np.cumsum(merged.seen) - 1)[row], categories=ids)
    table = pd.DataFrame({"image_id": image_id, "finding": boxes["finding"].to_numpy(object), "score": score[is_answered]})
    return table.assign(**dict(zip(BOX, corners.T, strict=True)))


def fill(ids: list[str], boxes: pd.DataFrame) -> tuple[list[list[str]], list[str]]:
    """Return two lists: the rows of the submission, and the ids of images that no detector processed (baseline rows)."""
    groups: dict[str, list[str]] = {name: [] for name in boxes["image_id"].cat.categories}
    ranked = boxes.sort_values("score", ascending=False, kind="stable")
    values = ranked[["score", *BOX]].to_numpy(float).tolist()
    for name, (score, xmin, ymin, xmax, ymax) in zip(ranked["image_id"], values, strict=True):
        groups[name].append(f"{format_confidence(score)} {xmin:.1f} {ymin:.1f} {xmax - xmin:.1f} {ymax - ymin:.1f}")
    return fill_rows(baseline_rows(ids), {name: [" ".join(parts)] for name, parts in groups.items()})


RSNA_PNEUMONIA = Competition.with_rows(
    ROWS,
    name="rsna-pneumonia",
    slug="rsna-pneumonia-detection-challenge",
    title="RSNA Pneumonia Detection Challenge",
    read_truth=read_truth,
    truth_ids=lambda truth: truth.image_ids,
    read_submission=read_submission,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="rsna",
    settings=RsnaPneumoniaFusion,
    truth_of=truth_of,
    decide=decide,
    fill=fill,
    helping_classes=RSNA_CLASSES,
    side=SIDE,
    box_classes=(ONE_FINDING,),
)
