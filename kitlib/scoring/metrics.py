"""Metrics for classes and masks: ROC AUC, F1, accuracy, Dice and Jaccard; and class weights for a loss.

ROC AUC supports weights and is fast enough for a bootstrap over a hundred thousand images and fifteen classes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.metrics import f1_score, recall_score


def roc_auc(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the ROC AUC: the probability that a positive scores higher than a negative, where ties count half.

    `scores` and `positive`, a boolean mask, are (n,); `weight` (n,) is how often each row counts. Returns NaN without
    positives or without negatives.
    """
    return roc_auc_of_ranks(dense_ranks(scores), positive, weight)


def dense_ranks(scores: np.ndarray) -> np.ndarray:
    """Return the dense ranks (n,) of `scores`, from 0; equal scores share a rank. A bootstrap computes them only once."""
    return np.unique(scores, return_inverse=True)[1]


def roc_auc_of_ranks(ranks: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the ROC AUC like `roc_auc`, for `dense_ranks` of the scores, which is faster if many weights are tried."""
    positive = np.asarray(positive, dtype=float)
    weight = np.ones(len(positive)) if weight is None else weight
    positives = np.bincount(ranks, positive * weight)
    negatives = np.bincount(ranks, (1 - positive) * weight)
    pairs = positives.sum() * negatives.sum()
    if not pairs:
        return float("nan")
    return float((positives * (negatives.cumsum() - negatives / 2)).sum() / pairs)


def mean_auc(truth: np.ndarray, probabilities: np.ndarray, classes: Iterable[str]) -> dict[str, float]:
    """Return the ROC AUC of each class, keyed by name, and their mean as `score`, for arrays (n, classes).

    `truth` is 0..1, and positive from 0.5 up; NaN is ignored. A class without positives or without negatives gets NaN and is
    ignored in the mean, which is NaN if all classes are NaN.
    """
    scores = {}
    for name, actual, probability in zip(classes, truth.T, probabilities.T, strict=True):
        is_known = ~np.isnan(actual)
        scores[name] = roc_auc(probability[is_known], actual[is_known] >= 0.5) if is_known.any() else float("nan")
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}


def class_weights(label: np.ndarray) -> np.ndarray:
    """Return the weight N / (C n) of each class, shape (classes,), for labels (images, classes) whose rows sum to 1.

    N is the number of images, n the number in the class, and C the number of classes that occur, so that images' mean weight
    is 1. Classes that do not occur get 0. Rows with a NaN are ignored.
    """
    counts = label[~np.isnan(label).any(axis=1)].astype(float).sum(axis=0)
    occurs = counts > 0
    return np.divide(counts.sum(), occurs.sum() * counts, out=np.zeros(len(counts)), where=occurs)


def exclusive_scores(
    truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], judged_by: str
) -> dict[str, float]:
    """Return macro F1 or accuracy of the most probable class as `score`, and F1 or recall of each class, keyed by name.

    `truth` and `probabilities` are (n, classes); rows with NaN in the truth are ignored. If `judged_by` is "macro_f1",
    `score` is the mean F1 over the classes that occur in the truth, and classes get their F1; otherwise it is the accuracy,
    and classes get their recall. Classes that do not occur are NaN; if no row is left, all values are NaN.
    """
    is_known = ~np.isnan(truth).any(axis=1)
    actual, predicted = truth[is_known].argmax(axis=1), probabilities[is_known].argmax(axis=1)
    occurring, class_scores = np.unique(actual), np.full(len(classes), np.nan)
    if not len(occurring):
        return {"score": float("nan"), **dict(zip(classes, class_scores, strict=True))}
    score = f1_score if judged_by == "macro_f1" else recall_score
    class_scores[occurring] = score(actual, predicted, labels=occurring, average=None, zero_division=0)
    total = np.nanmean(class_scores) if judged_by == "macro_f1" else (actual == predicted).mean()
    return {"score": float(total), **{name: float(part) for name, part in zip(classes, class_scores, strict=True)}}


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
