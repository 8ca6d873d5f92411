"""RSNA Pneumonia Detection Challenge (2018), stage 2: boxes of lung opacities.

The metric is a mean over images and over eight IoU thresholds of TP / (TP + FP + FN): every box costs, whatever its
confidence, which only orders the boxes. The rules leave open which of several free true boxes a box takes; here it takes the
one with the largest IoU. Equal confidences, and equal IoUs, are ordered by coordinates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd

from kitlib.classes import ONE_FINDING, RSNA_CLASSES
from kitlib.competitions.contract import BoxTruth, Competition, fill_rows
from kitlib.competitions.csv_files import Rows, join_rows, read_listed, read_numbers, read_truth_table, refuse_rows
from kitlib.competitions.fusion_settings import Confidence, FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.errors import ScoringError
from kitlib.scoring.average_precision import iou
from kitlib.scoring.placeholders import format_confidence
from kitlib.settings import NotNegative, Probability, Range
from kitlib.tables import BOX

THRESHOLDS = tuple(k / 20 for k in range(8, 16))  # 0.40, 0.45 .. 0.75; the IoU of a hit is larger
SIDE = 1024  # pixels a side of every image
SIDES = ("x", "y", "width", "height")


def read_truth(path: Path) -> BoxTruth:
    """Return the ground truth in stage_2_train_labels.csv, which has one row for each box, or for an image without boxes.

    Raises ScoringError unless Target is 1 in rows with a box, 0 in rows without, and the same in all rows of an image.
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
    """Return a table with image_id and kitlib.tables.BOX from `sides` (n, 4): x, y, width and height."""
    corners = np.hstack([sides[:, :2], sides[:, :2] + sides[:, 2:]])
    table = pd.DataFrame(corners, columns=list(BOX))
    table.insert(0, "image_id", image_ids.to_numpy())
    return table


def _parse_row(patient_id: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the groups of a prediction string, (n, 5): confidence, x, y, width and height; and its faults."""
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
    """Return the detections in a submission: a table with image_id, finding, score, and kitlib.tables.BOX."""
    rows = join_rows(ROWS.read(path, ids), ("score", *SIDES))
    table = _as_corners(rows["image_id"], rows[list(SIDES)].to_numpy())
    table.insert(1, "finding", ONE_FINDING)
    table.insert(2, "score", rows["score"])
    return table


def metric(truth: BoxTruth, detections: pd.DataFrame) -> dict[str, float]:
    """Return `score`, the mean over images and thresholds, and the mean over images at each threshold, as `iou_0.40`; 0..1.

    `detections` has image_id, score, and kitlib.tables.BOX. Images with neither a true nor a predicted box are left out; if
    no image remains, all values are NaN. Raises ScoringError for a detection on an image that is not in the truth.
    """
    unknown = detections.loc[~detections["image_id"].isin(truth.image_ids), "image_id"]
    if len(unknown):
        raise ScoringError(f"{len(unknown)} boxes are on images that are not in the truth, such as {unknown.iloc[0]!r}")
    # Ties are broken by coordinates, so that the result does not depend on the order of rows.
    drawn = dict(_group(truth.boxes.sort_values(list(BOX))))
    ranked = detections.sort_values(["score", *BOX], ascending=[False, True, True, True, True])
    found, none = dict(_group(ranked)), np.empty((0, 4))
    images = [name for name in truth.image_ids if name in drawn or name in found]
    scores = [image_scores(drawn.get(name, none), found.get(name, none)) for name in images]
    means = np.mean(scores, axis=0) if scores else np.full(len(THRESHOLDS), np.nan)
    parts = {f"iou_{threshold:.2f}": float(value) for threshold, value in zip(THRESHOLDS, means, strict=True)}
    return {"score": float(means.mean()), **parts}


def _group(table: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each image_id with its boxes (n, 4), in the order of the table."""
    boxes = table[list(BOX)].to_numpy(float)
    for name, rows in table.groupby("image_id", sort=False).indices.items():
        yield name, boxes[rows]


def image_scores(true_boxes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return TP / (TP + FP + FN) of an image at each of THRESHOLDS; (8,), 0..1.

    `true_boxes` (m, 4) and `boxes` (n, 4), the most confident first, are xmin, ymin, xmax and ymax; m + n is at least 1.
    """
    overlap = iou(boxes[:, None], true_boxes[None])
    hits = np.zeros(len(THRESHOLDS))
    for index, threshold in enumerate(THRESHOLDS):
        is_free = np.ones(len(true_boxes), dtype=bool)
        for row in overlap[(overlap > threshold).any(axis=1)]:
            candidates = np.where(is_free, row, 0.0)
            best = candidates.argmax()
            if candidates[best] > threshold:
                is_free[best] = False
                hits[index] += 1
    return hits / (len(true_boxes) + len(boxes) - hits)


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return a row without a box for every image: 77 % have none, and a wrong box on one of them adds a zero to the mean."""
    return [[name, ""] for name in ids]


@dataclass(frozen=True)
class RsnaPneumoniaFusion(FusionSettings):
    """Fusion settings of RSNA Pneumonia: which boxes are answered, because every box costs, and how large they are."""

    GRIDS: ClassVar = {
        "gate_power": (("gate_power",), (0.0, 0.25, 0.5, 1.0)),
        "least_score": (("least_score",), tuple(k / 20 for k in range(1, 19))),
        "box_size": (("box_size",), (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)),
    }

    # A fused box keeps the highest confidence, because least_score is tuned on boxes of one model for each image: in a mean
    # over the models of several folds, boxes that not all of them find would fall below it.
    box_confidence: Confidence = "max"
    gate_power: NotNegative = 0.0  # box score = score * P(Lung Opacity)^gate_power, if a classifier predicts it
    least_score: Probability = 0.3  # boxes with a lower score are not answered
    # Factor of the sides of each box. The test set's boxes are tighter than those of the training set: winners used 0.875
    box_size: Annotated[float, Range(above=0, at_most=2)] = 1.0


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame, masks: Any) -> BoxTruth:
    """Return the ground truth of prepared images."""
    drawn = boxes.loc[boxes["image_id"].isin(images["image_id"]), ["image_id", "finding", *BOX]].reset_index(drop=True)
    corners = _on_published_side(drawn[list(BOX)].to_numpy(), images.set_index("image_id").loc[drawn["image_id"]])
    return BoxTruth(tuple(images["image_id"]), drawn.assign(**dict(zip(BOX, corners.T, strict=True))))


def _on_published_side(corners: np.ndarray, images: pd.DataFrame) -> np.ndarray:
    """Return boxes (n, 4) in pixels of the published images of SIDE pixels; those of `corners` may be of resized images.

    `images` has the rows and columns of each box's image, (n,).
    """
    return corners * (SIDE / images[["columns", "rows", "columns", "rows"]].to_numpy(float))


def decide(merged: MergedPredictions, settings: RsnaPneumoniaFusion) -> pd.DataFrame:
    """Return the boxes to answer, in pixels of the published images: image_id, finding, score, and kitlib.tables.BOX.

    `attrs["answered"]` of the table lists the images that a detector has predicted: the others keep the baseline's row.
    """
    gate = np.nan_to_num(merged.probability(RSNA_CLASSES[-1]), nan=1.0)[merged.boxes["row"].to_numpy()]
    boxes = merged.detections().assign(score=merged.boxes["score"].to_numpy() * gate**settings.gate_power)
    is_answered = (boxes["score"] >= settings.least_score).to_numpy()
    sizes = merged.images.iloc[merged.boxes["row"].to_numpy()[is_answered]]
    boxes = boxes[is_answered].reset_index(drop=True)
    corners = _on_published_side(boxes[list(BOX)].to_numpy(), sizes)
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    half = settings.box_size * (corners[:, 2:] - corners[:, :2]) / 2
    boxes[list(BOX)] = np.hstack([middle - half, middle + half]).clip(0, SIDE)
    boxes.attrs["answered"] = merged.images["image_id"][merged.seen].tolist()
    return boxes


def fill(ids: list[str], boxes: pd.DataFrame) -> tuple[list[list[str]], list[str]]:
    """Return the submission's rows for `ids`, and the ids of those that are the baseline's."""
    groups: dict[str, list[str]] = {name: [] for name in boxes.attrs["answered"]}
    ranked = boxes.sort_values("score", ascending=False, kind="stable")
    values = ranked[["score", *BOX]].to_numpy(float).tolist()
    for name, (score, xmin, ymin, xmax, ymax) in zip(ranked["image_id"], values, strict=True):
        groups[name].append(f"{format_confidence(score)} {xmin:.1f} {ymin:.1f} {xmax - xmin:.1f} {ymax - ymin:.1f}")
    return fill_rows(baseline_rows(ids), {name: [" ".join(parts)] for name, parts in groups.items()})


RSNA_PNEUMONIA = Competition(
    name="rsna-pneumonia",
    slug="rsna-pneumonia-detection-challenge",
    title="RSNA Pneumonia Detection Challenge",
    header=ROWS.header,
    read_truth=read_truth,
    truth_ids=lambda truth: truth.image_ids,
    read_sample=ROWS.read_sample,
    read_submission=read_submission,
    find_faults=ROWS.find_faults,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="rsna",
    settings=RsnaPneumoniaFusion,
    truth_of=truth_of,
    decide=decide,
    fill=fill,
    read_test=read_listed(ROWS),
    sample=ROWS.sample,
    helping_classes=RSNA_CLASSES[-1:],
    side=SIDE,
    box_classes=(ONE_FINDING,),
)
