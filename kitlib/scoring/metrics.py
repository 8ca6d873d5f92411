"""Metrics for classes and masks: ROC AUC, F1, accuracy, Dice and Jaccard; and class weights for a loss.

ROC AUC supports weights and is fast enough for a bootstrap over a hundred thousand images and fifteen classes.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

CALL_METRICS = ("accuracy", "precision", "recall", "f1")
DEFAULT_THRESHOLD = 0.5  # probability at which a class counts as predicted, if no better threshold is known


def roc_auc(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the ROC AUC of a class: the probability that a row with the class has a higher score than a row without it.

    A pair of rows with equal scores counts half. `scores` is (n,), `positive` (n,) is True for rows that truly have the
    class, and `weight` (n,) is how often each row counts. The result is NaN if no row has the class, or all rows have it.
    """
    return roc_auc_of_ranks(dense_ranks(scores), positive, weight)


def dense_ranks(scores: np.ndarray) -> np.ndarray:
    """Return the rank of each of the `scores` (n,), from 0; equal scores share a rank, and no rank is skipped.

    A bootstrap computes the ranks once and passes them to `roc_auc_of_ranks`.
    """
    return np.unique(scores, return_inverse=True)[1]


def roc_auc_of_ranks(ranks: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the same as `roc_auc`, but from `dense_ranks(scores)`; fast if the same scores are used with many weights."""
    positive = np.asarray(positive, dtype=float)
    weight = np.ones(len(positive)) if weight is None else weight
    positives = np.bincount(ranks, positive * weight)
    negatives = np.bincount(ranks, (1 - positive) * weight)
    pairs = positives.sum() * negatives.sum()
    if not pairs:
        return float("nan")
    return float((positives * (negatives.cumsum() - negatives / 2)).sum() / pairs)


def mean_auc(truth: np.ndarray, probabilities: np.ndarray, classes: Iterable[str]) -> dict[str, float]:
    """Return the ROC AUC of each class, keyed by name, and their mean as `score`.

    `truth` and `probabilities` are (n, classes). An image has a class if its `truth` is at least 0.5. If `truth` is NaN, the
    image is ignored for this class. If no image has a class or all images have it, its ROC AUC is NaN and ignored in the
    mean. If all are NaN, the mean is NaN.
    """
    scores = {}
    for name, actual, probability in zip(classes, truth.T, probabilities.T, strict=True):
        is_known = ~np.isnan(actual)
        scores[name] = roc_auc(probability[is_known], actual[is_known] >= 0.5) if is_known.any() else float("nan")
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}


def class_weights(label: np.ndarray) -> np.ndarray:
    """Return the loss weight of each class, shape (classes,); `label` is (images, classes), and its rows sum to 1.

    The weight is N / (C n): N is the number of images, n the number of images in the class, and C the number of classes that
    occur. So the mean weight over all images is 1. Classes that do not occur get 0. Rows with a NaN are ignored.
    """
    counts = label[~np.isnan(label).any(axis=1)].astype(float).sum(axis=0)
    occurs = counts > 0
    return np.divide(counts.sum(), occurs.sum() * counts, out=np.zeros(len(counts)), where=occurs)


def exclusive_scores(
    truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], judged_by: str
) -> dict[str, float]:
    """Score the most probable of mutually exclusive classes in each row; return `score` and one value per class.

    `truth` and `probabilities` are (n, classes). Rows with NaN in `truth` are ignored. If `judged_by` is "macro_f1", the
    values are the F1 of each class, and `score` is their mean over the classes that occur in `truth`. Otherwise, the values
    are the recall of each class, and `score` is the accuracy. Classes that do not occur in `truth` get NaN. If no row is
    left, all values are NaN.
    """
    from sklearn.metrics import f1_score, recall_score  # slow to import, and no other metric needs it

    is_known = ~np.isnan(truth).any(axis=1)
    actual, predicted = truth[is_known].argmax(axis=1), probabilities[is_known].argmax(axis=1)
    occurring, class_scores = np.unique(actual), np.full(len(classes), np.nan)
    if not len(occurring):
        return {"score": float("nan"), **dict(zip(classes, class_scores, strict=True))}
    score = f1_score if judged_by == "macro_f1" else recall_score
    class_scores[occurring] = score(actual, predicted, labels=occurring, average=None, zero_division=0)
    total = np.nanmean(class_scores) if judged_by == "macro_f1" else (actual == predicted).mean()
    return {"score": float(total), **{name: float(part) for name, part in zip(classes, class_scores, strict=True)}}


def precision_recall_f1(truth: np.ndarray, called: np.ndarray) -> tuple[float, float, float]:
    """Return precision, recall and F1 of one class. `truth` and `called`, the predictions, are bool arrays (n,).

    If no row of `truth` is True, all three are NaN. If some rows of `truth` are True but none of `called`, all three are 0.
    """
    positives, calls, hits = truth.sum(), called.sum(), (truth & called).sum()
    if not positives:
        return (float("nan"),) * 3
    return float(hits / max(calls, 1)), float(hits / positives), float(2 * hits / (positives + calls))


def most_probable(probabilities: np.ndarray) -> np.ndarray:
    """Return a bool array (n, classes), True at each row's most probable class. If several are equal, the first is True."""
    return np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None]


def call_metrics(truth: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of yes-or-no predictions for several classes, keyed as in CALL_METRICS.

    `truth` (n, classes) is 1, 0 or, if unknown, NaN; `called` (n, classes) is True where a class is predicted. Accuracy is
    the share of rows with all classes predicted correctly, among the rows in which the truth of all classes is known.
    The other metrics are unweighted means over the classes that occur in `truth`. Each class is evaluated on the rows in
    which its truth is known. A metric is NaN if there are no such rows or classes.
    """
    is_known = ~np.isnan(truth)
    parts = [
        precision_recall_f1(actual[known] == 1, call[known])
        for actual, call, known in zip(truth.T, called.T, is_known.T, strict=True)
        if (actual == 1).any()
    ]
    means = np.mean(parts, axis=0) if parts else (float("nan"),) * 3
    whole = is_known.all(axis=1)
    right = (called[whole] == (truth[whole] == 1)).all(axis=1)
    values = (right.mean() if len(right) else float("nan"), *means)
    return dict(zip(CALL_METRICS, map(float, values), strict=True))


def threshold_map(probabilities: np.ndarray, top: float, least_area: float, bottom: float) -> np.ndarray:
    """Return a boolean mask (rows, columns) from a map of probabilities, uint8 (rows, columns), in which 255 means 1.

    The mask has the pixels with a probability above `bottom`. It is empty if fewer than `least_area` pixels have a
    probability above `top`. This is the rule of the 1st place in SIIM-ACR Pneumothorax Segmentation.
    """
    if np.count_nonzero(probabilities > math.floor(255 * top)) < least_area:
        return np.zeros(probabilities.shape, bool)
    return probabilities > math.floor(255 * bottom)  # whole numbers, because NumPy would compare with others in float64


def overlap(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return Dice, 2 |A and B| / (|A| + |B|), and Jaccard, |A and B| / |A or B|, of two boolean masks of the same shape.

    Both are 1 if both masks are empty. Raises ValueError if the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"masks of shape {predicted.shape} and {truth.shape} cannot be compared; they must have the same shape"
        )
    intersection, total = int((predicted & truth).sum()), int(predicted.sum()) + int(truth.sum())
    if not total:
        return 1.0, 1.0
    return 2 * intersection / total, intersection / (total - intersection)
