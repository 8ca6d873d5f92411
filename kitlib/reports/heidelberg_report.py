"""Answers side by side with the Heidelberg project's published figures, on its scale and on the competition's.

Its 859 held-out images all have a box (facts: no healthy image can produce a false positive there), so figures of boxes are
given on such images alone and, for what a detector is worth to the competition, on all.
"""

import math

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_fscore_support

from kitlib.classes import STUDY_CLASSES
from kitlib.fusion.model_fusion import Fused
from kitlib.reports.findings_report import PLAIN_THRESHOLD, Answers, precision_recall_f1
from kitlib.reports.published_tables import published
from kitlib.scoring.average_precision import precision_recall
from kitlib.scoring.score import class_precision, opacity_precisions, table_hits

COLUMNS = (
    *("images", "boxed_images", "ap", "ap_boxed", "confidence", "f1", "recall", "precision", "precision_all"),
    *("studies", "study_accuracy", "study_recall", "study_precision", "study_f1", "study_map", "study_map_hard"),
)


def heidelberg_table(
    answers: dict[str, Fused],
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame | None = None,
    confidences: dict[str, float] | None = None,
) -> pd.DataFrame:
    """A row an answer, then the published ones; COLUMNS, NaN where an answer or the report says nothing.

    Judged are those of `images` that the answer's detectors have seen and those studies that it has answered, priors not
    counted: compare the counts `images`, `boxed_images` and `studies` before the figures. `ap` is the competition's VOC 2010
    AP of boxes on all images, `ap_boxed` the same on images with a box. `f1`, `recall` and `precision` are of all boxes of
    confidence `confidence` or more on images with a box, `precision_all` on all images.

    The confidence is never chosen on the images it judges: it is an answer's in `confidences`, else for each fold of `folds`
    the one with the highest F1 on the other folds, and the mean of these is shown; NaN where there are no other folds.

    Study figures are of studies; recall, precision and F1 are means over the classes. `study_map` is the mean AP of the
    probabilities, `study_map_hard` that of the most probable class alone as 1 and the others as 0, as the report has it.
    Raises ValueError for an answer with neither folds nor a confidence.
    """
    confidences = confidences or {}
    rows = {}
    for name, answer in answers.items():
        if folds is None and name not in confidences:
            raise ValueError(f"answer {name!r} needs a confidence, or the table folds to choose it out of fold")
        chosen = _confidence_by_fold(answer, images, boxes, folds) if name not in confidences else confidences[name]
        rows[name] = _box_figures(answer, images, boxes, chosen) | _study_figures(answer, images, labels)
    told = published("heidelberg").rows
    table = pd.concat([pd.DataFrame(rows).T, told.rename("Heidelberg, published: {}".format)]).reindex(columns=list(COLUMNS))
    return table.rename_axis("answer").astype(float)


def heidelberg_figures(given: Answers, thresholds: np.ndarray, exclusive: bool = False) -> pd.DataFrame:
    """Precision, recall, accuracy and F1 in one row each: as published, here from one half on, here from `thresholds` on.

    Precision, recall and F1 are the plain means over the classes that occur; accuracy is the share of images with all
    classes right, among those with all known. With `exclusive` classes the most probable one is called, in one row. The
    published row is of another split of the whole NIH set: it tells the scale, not a rank. The report does not say how it
    averages; this is how scikit-learn does for several labels an image.
    """
    calls = {
        f"here, from {PLAIN_THRESHOLD} on": given.found >= PLAIN_THRESHOLD,
        "here, from thresholds of other images on": given.found >= thresholds,
    }
    if exclusive:
        calls = {"here, most probable class": given.found.argmax(axis=1)[:, None] == np.arange(len(given.classes))}
    table = published("heidelberg_nih").rows
    rows = {"published (NIH, Heidelberg report 4.1)": table.loc["backbone"].to_dict()}
    whole = ~np.isnan(given.truth).any(axis=1)
    for name, called in calls.items():
        told = [~np.isnan(column) for column in given.truth.T]
        each = [
            precision_recall_f1(truth[known] == 1, call[known])
            for truth, call, known in zip(given.truth.T, called.T, told, strict=True)
            if (truth[known] == 1).any()
        ]
        precision, recall, f1 = np.mean(each, axis=0) if each else (float("nan"),) * 3
        right = (called[whole] == (given.truth[whole] == 1)).all(axis=1)
        accuracy = right.mean() if len(right) else float("nan")
        rows[name] = {"precision": precision, "recall": recall, "accuracy": accuracy, "f1": f1}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(table.columns))


def best_confidence(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame) -> float:
    """The confidence with the highest F1 of the answer's boxes on those of `images` that have a box; NaN without any box."""
    found, true = _on_boxed(answer, _seen(answer, images), boxes)
    if found.empty or true.empty:
        return float("nan")
    hits = table_hits(found, "image_id", true)
    precision, recall = precision_recall(found["score"], hits, len(true))
    f1 = _harmonic_mean(precision, recall)
    # One entry a block of equal scores, the highest first.
    return float(np.unique(found["score"])[::-1][f1.argmax()])


def _confidence_by_fold(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame) -> dict[str, float]:
    """image_id -> the confidence chosen on the images of other folds."""
    seen = _seen(answer, images)
    fold = seen["image_id"].map(folds.set_index("id")["fold"])
    if fold.isna().any():
        raise ValueError(f"image {seen['image_id'][fold.isna()].iloc[0]} is in no fold; judge images of the folds alone")
    chosen: dict[str, float] = {}
    for number in fold.unique():
        best = best_confidence(answer, seen[fold != number], boxes)
        chosen |= dict.fromkeys(seen.loc[fold == number, "image_id"], best)
    return chosen


def _box_figures(
    answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame, confidence: float | dict[str, float]
) -> dict[str, float]:
    seen = _seen(answer, images)
    found = answer.detections[answer.detections["image_id"].isin(seen["image_id"])].reset_index(drop=True)
    true = boxes[boxes["image_id"].isin(seen["image_id"])]
    figures = {"images": len(seen), "boxed_images": true["image_id"].nunique()}
    if true.empty:
        return figures
    hits = table_hits(found, "image_id", true)
    figures |= dict(zip(("ap", "ap_boxed"), opacity_precisions(found, hits, true), strict=True))
    if isinstance(confidence, dict):
        least, figures["confidence"] = found["image_id"].map(confidence), float(np.mean(list(confidence.values())))
    else:
        least, figures["confidence"] = confidence, confidence
    if math.isnan(figures["confidence"]):
        return figures
    shown = (found["score"] >= least).to_numpy()
    boxed = shown & found["image_id"].isin(true["image_id"]).to_numpy()
    # A box less confident than the threshold takes no hit from one above it, so hits stay what they are.
    precision, everywhere = (hits[some].sum() / some.sum() if some.any() else 0.0 for some in (boxed, shown))
    recall = hits[boxed].sum() / len(true)
    f1 = float(_harmonic_mean(precision, recall))
    return figures | {"f1": f1, "recall": recall, "precision": precision, "precision_all": everywhere}


def _study_figures(answer: Fused, images: pd.DataFrame, labels: pd.DataFrame) -> dict[str, float]:
    studies = answer.studies[~answer.studies["prior"] & answer.studies["study_id"].isin(images["study_id"])]
    true = labels.set_index("id").reindex(studies["study_id"])[list(STUDY_CLASSES)]
    if true.isna().any(axis=None):
        raise ValueError(f"study {true.index[true.isna().any(axis=1)][0]} has an answer but no label")
    if studies.empty:
        return {"studies": 0}
    positive, probability = true.to_numpy() == 1, studies[list(STUDY_CLASSES)].to_numpy()
    actual, predicted = positive.argmax(axis=1), probability.argmax(axis=1)
    hard = np.eye(len(STUDY_CLASSES))[predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(
        actual, predicted, labels=range(len(STUDY_CLASSES)), average="macro", zero_division=0.0
    )
    mean = {
        name: float(np.nanmean([class_precision(scores[:, k], positive[:, k]) for k in range(len(STUDY_CLASSES))]))
        for name, scores in (("study_map", probability), ("study_map_hard", hard))
    }
    return {
        "studies": len(studies),
        "study_accuracy": float((actual == predicted).mean()),
        "study_recall": recall,
        "study_precision": precision,
        "study_f1": f1,
        **mean,
    }


def _seen(answer: Fused, images: pd.DataFrame) -> pd.DataFrame:
    return images[images["image_id"].isin(answer.nones.loc[answer.nones["seen"], "image_id"])]


def _on_boxed(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    true = boxes[boxes["image_id"].isin(images["image_id"])]
    return answer.detections[answer.detections["image_id"].isin(true["image_id"])], true


def _harmonic_mean(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return np.divide(2 * a * b, a + b, out=np.zeros_like(a + b), where=a + b > 0)
