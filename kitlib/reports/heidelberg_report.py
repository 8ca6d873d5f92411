"""Compares predictions with the Heidelberg project's published metrics, on images with an annotated box and on all images.

The project's 859 held-out images all have an annotated box, so no healthy image can produce a false positive. Box metrics
are computed on such images and, to show a detector's value in the competition, on all images.
"""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_fscore_support

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused
from kitlib.errors import RunError
from kitlib.reports.findings_report import Answers
from kitlib.reports.published_tables import find_published
from kitlib.scoring.average_precision import precision_recall
from kitlib.scoring.metrics import DEFAULT_THRESHOLD, call_metrics, most_probable
from kitlib.scoring.score import class_precision, opacity_precisions, table_hits

COLUMNS = (
    *("images", "boxed_images", "ap", "ap_boxed", "confidence", "f1", "recall", "precision", "precision_all"),
    *("studies", "study_accuracy", "study_recall", "study_precision", "study_f1", "study_map", "study_map_hard"),
)
PUBLISHED = "Heidelberg, published: {}"
COUNTS = ("images", "boxed_images", "studies")
# The report's table 1 and table 2, with the counts to compare first.
TABLE_1, TABLE_2 = COLUMNS[:9], COLUMNS[9:]
# Published row -> prefix of the names of our predictions that are listed below it.
UNDER = {"ensemble": "fused", "Faster R-CNN": "faster_rcnn", "YOLO": "yolo", "study model": "study"}


def heidelberg_table(
    answers: dict[str, Fused],
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame | None = None,
    confidences: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Return a table that compares our predictions with the published rows of the Heidelberg report.

    `answers` maps names to predictions. The table has one row per published model and one per name in `answers`. A row
    whose name starts with "fused", "faster_rcnn", "yolo" or "study" follows the published row of this kind; other rows come
    last. The columns are COLUMNS; missing values are NaN.

    Box metrics are computed on those of `images` that the detectors have predicted, study metrics on the studies that have
    predictions. Class frequencies that stand in for missing predictions do not count. Before comparing metrics, compare the
    counts `images`, `boxed_images` and `studies`. `ap` is the competition's VOC 2010 AP of boxes on all images, `ap_boxed`
    the AP on images with an annotated box. The column `confidence` is the least confidence of the boxes that count for `f1`,
    `recall`, `precision` (all on images with an annotated box) and `precision_all` (on all images).

    If `confidences` has the name of an answer, its value there is the least confidence. Otherwise each fold of `folds` has
    the least confidence with the highest F1 on the other folds, so that no image is evaluated with a confidence that was
    chosen on it; the table shows the mean over images. If all predicted images are from a single fold, two halves of its
    patients are used as folds.

    Study recall, precision and F1 are means over the classes. `study_map` is the mean AP of the probabilities.
    `study_map_hard` is, as in the report, the mean AP when the most probable class has probability 1 and all other classes
    0. Raises ValueError for an answer without a value in `confidences` if `folds` is None, for an image that is in no fold,
    and for a study without a label.
    """
    confidences = confidences or {}
    rows = {}
    for name, answer in answers.items():
        if folds is None and name not in confidences:
            raise ValueError(
                f"{name!r} is not in `confidences`; add it, or pass `folds`, to choose each fold's confidence on other folds"
            )
        chosen = _confidence_by_fold(answer, images, boxes, folds) if name not in confidences else confidences[name]
        rows[name] = _box_figures(answer, images, boxes, chosen) | _study_figures(answer, images, labels)
    published_rows = find_published("heidelberg").rows
    table = pd.concat([pd.DataFrame(rows).T, published_rows.rename(PUBLISHED.format)]).reindex(columns=list(COLUMNS))
    order = []
    for name in published_rows.index:
        order += [PUBLISHED.format(name), *(ours for ours in rows if ours.startswith(UNDER[name]))]
    order += [name for name in rows if name not in order]
    return table.loc[order].rename_axis("answer").astype(float)


def check_filled(table: pd.DataFrame) -> None:
    """Raise RunError if `table`, a `heidelberg_table`, lacks a metric of images or studies that our models predicted."""
    ours = table[~table.index.str.startswith(PUBLISHED.format(""))]
    gaps = []
    for count, columns in (("images", TABLE_1), ("studies", TABLE_2)):
        for name, row in ours[ours[count] > 0].iterrows():
            if empty := [column for column in columns if math.isnan(row[column])]:
                gaps.append(f"{name}: {', '.join(empty)}")
    if gaps:
        raise RunError(
            f"the comparison with the published table lacks values ({'; '.join(gaps)}). The images that a confidence is "
            "chosen on must include one with predicted and annotated boxes; train longer, or evaluate more images"
        )


def readable(table: pd.DataFrame, columns: Iterable[str] = COLUMNS) -> pd.DataFrame:
    """Return `columns` of a `heidelberg_table` as texts (counts without decimals), without the rows that have no metric."""
    table = table[[name for name in columns if name in table]]
    table = table[table.drop(columns=[*COUNTS, "confidence"], errors="ignore").notna().any(axis=1)]
    texts = {
        name: table[name].map(
            lambda value, form=",.0f" if name in COUNTS else ".3f": "" if math.isnan(value) else f"{value:{form}}"
        )
        for name in table
    }
    return pd.DataFrame(texts)


def document_tables(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Split the result of `heidelberg_table` into the report's table 1 (boxes) and table 2 (studies), both as text."""
    return [readable(table, TABLE_1), readable(table, TABLE_2)]


def confidence_note(answers: dict[str, Fused], images: pd.DataFrame, folds: pd.DataFrame) -> str:
    """Return a note for the `heidelberg_table` that says on which images the confidence of each answer was chosen."""
    fold = images["image_id"].map(folds.set_index("id")["fold"])
    seen = {name: images["image_id"].isin(_predicted_images(answer, images)["image_id"]) for name, answer in answers.items()}
    alone = [name for name, is_seen in seen.items() if len(set(fold[is_seen])) == 1]
    text = "Each fold is judged at the confidence with the highest F1 on the other folds."
    if alone:
        text += (
            f" These have predicted a single fold: {'; '.join(alone)}. The fold's patients are divided into two halves, and "
            "each half is judged at the confidence with the highest F1 on the other half."
        )
    return text


def seen_by_all(answers: dict[str, Fused], images: pd.DataFrame, boxes: pd.DataFrame) -> list[str]:
    """Return the ids of the images that have an annotated box and were predicted by every detector in `answers`.

    Returns [] if fewer than two of the `answers` are from detectors.
    """
    detectors = [set(answer.nones.loc[answer.nones["seen"], "image_id"]) for answer in answers.values()]
    detectors = [seen for seen in detectors if seen]
    if len(detectors) < 2:
        return []
    return sorted(set(images["image_id"]).intersection(boxes["image_id"], *detectors))


def heidelberg_figures(predictions: Answers, thresholds: np.ndarray, exclusive: bool = False) -> pd.DataFrame:
    """Return precision, recall, accuracy and F1 in three rows: as published, at the threshold 0.5, and at `thresholds`.

    If `exclusive`, there are two rows: as published, and when only the most probable class is predicted. `thresholds` is an
    array (n, classes) or (classes,). Precision, recall and F1 are unweighted means over the classes that occur in the ground
    truth. Accuracy is the share of images for which all classes are right, among images whose labels are all known. The
    published row is for another split of the whole NIH set, so it cannot be ranked with the other rows. The report does not
    say how it averages; this function follows scikit-learn's convention for several labels per image.
    """
    calls = {
        f"here, from {DEFAULT_THRESHOLD} on": predictions.probabilities >= DEFAULT_THRESHOLD,
        "here, from thresholds of other images on": predictions.probabilities >= thresholds,
    }
    if exclusive:
        calls = {"here, most probable class": most_probable(predictions.probabilities)}
    table = find_published("heidelberg_nih").rows
    rows = {"published (NIH, Heidelberg report 4.1)": table.loc["backbone"].to_dict()}
    rows |= {name: call_metrics(predictions.truth, called) for name, called in calls.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(table.columns))


def best_confidence(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame) -> float:
    """Return the confidence limit with the highest F1 of predicted boxes on those of `images` that have an annotated box.

    Returns NaN if there is no such image, or if no box is predicted on any of them.
    """
    detections, true_boxes = _on_boxed(answer, _predicted_images(answer, images), boxes)
    if detections.empty or true_boxes.empty:
        return float("nan")
    hits = table_hits(detections, "image_id", true_boxes)
    precision, recall = precision_recall(detections["score"], hits, len(true_boxes))
    f1 = _harmonic_mean(precision, recall)
    # precision_recall returns one entry per distinct score, the highest score first.
    return float(np.unique(detections["score"])[::-1][f1.argmax()])


def _confidence_by_fold(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame) -> dict[str, float]:
    """Return a dict that maps each image_id to the confidence limit chosen on the folds that do not contain the image.

    If all images are from a single fold, two halves of its patients are used as folds.
    """
    predicted_images = _predicted_images(answer, images)
    fold = predicted_images["image_id"].map(folds.set_index("id")["fold"])
    if fold.isna().any():
        raise ValueError(
            f"image {predicted_images['image_id'][fold.isna()].iloc[0]!r} is not in `folds`; pass only images that are"
        )
    if len(set(fold)) == 1:
        fold = _half_of_patients(predicted_images, boxes)
    chosen: dict[str, float] = {}
    for number in fold.unique():
        best = best_confidence(answer, predicted_images[fold != number], boxes)
        chosen |= dict.fromkeys(predicted_images.loc[fold == number, "image_id"], best)
    return chosen


def _half_of_patients(images: pd.DataFrame, boxes: pd.DataFrame) -> pd.Series:
    """Assign the patients to two random halves; return 0 or 1 for each row of `images`.

    The halves' numbers of patients with an annotated box differ by at most one.
    """
    has_box = images["image_id"].isin(boxes["image_id"]).groupby(images["patient_id"]).any()
    shuffled = has_box.sort_index().sample(frac=1, random_state=0).sort_values(kind="stable")
    return images["patient_id"].map(pd.Series(np.arange(len(shuffled)) % 2, shuffled.index))


def _box_figures(
    answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame, confidence: float | dict[str, float]
) -> dict[str, float]:
    predicted_images = _predicted_images(answer, images)
    detections = answer.detections[answer.detections["image_id"].isin(predicted_images["image_id"])].reset_index(drop=True)
    true_boxes = boxes[boxes["image_id"].isin(predicted_images["image_id"])]
    figures = {"images": len(predicted_images), "boxed_images": true_boxes["image_id"].nunique()}
    if true_boxes.empty:
        return figures
    hits = table_hits(detections, "image_id", true_boxes)
    figures |= dict(zip(("ap", "ap_boxed"), opacity_precisions(detections, hits, true_boxes), strict=True))
    if isinstance(confidence, dict):
        least, figures["confidence"] = detections["image_id"].map(confidence), float(np.mean(list(confidence.values())))
    else:
        least, figures["confidence"] = confidence, confidence
    if math.isnan(figures["confidence"]):
        return figures
    is_shown = (detections["score"] >= least).to_numpy()
    is_shown_on_boxed = is_shown & detections["image_id"].isin(true_boxes["image_id"]).to_numpy()
    # Removing boxes below the threshold does not change the hits of the boxes above it.
    precision, everywhere = (hits[mask].sum() / mask.sum() if mask.any() else 0.0 for mask in (is_shown_on_boxed, is_shown))
    recall = hits[is_shown_on_boxed].sum() / len(true_boxes)
    f1 = float(_harmonic_mean(precision, recall))
    return figures | {"f1": f1, "recall": recall, "precision": precision, "precision_all": everywhere}


def _study_figures(answer: Fused, images: pd.DataFrame, labels: pd.DataFrame) -> dict[str, float]:
    studies = answer.studies[~answer.studies["prior"] & answer.studies["study_id"].isin(images["study_id"])]
    true_labels = labels.set_index("id").reindex(studies["study_id"])[list(STUDY_CLASSES)]
    if true_labels.isna().any(axis=None):
        unlabelled = true_labels.index[true_labels.isna().any(axis=1)][0]
        raise ValueError(f"study {unlabelled!r} has a prediction but no label; add it to `labels`, or leave out its images")
    if studies.empty:
        return {"studies": 0}
    positive, probability = true_labels.to_numpy() == 1, studies[list(STUDY_CLASSES)].to_numpy()
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


def _predicted_images(answer: Fused, images: pd.DataFrame) -> pd.DataFrame:
    return images[images["image_id"].isin(answer.nones.loc[answer.nones["seen"], "image_id"])]


def _on_boxed(answer: Fused, images: pd.DataFrame, boxes: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    true_boxes = boxes[boxes["image_id"].isin(images["image_id"])]
    return answer.detections[answer.detections["image_id"].isin(true_boxes["image_id"])], true_boxes


def _harmonic_mean(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return np.divide(2 * a * b, a + b, out=np.zeros_like(a + b), where=a + b > 0)
