"""Metrics of classes and masks: ROC AUC, F1, accuracy, Dice and Jaccard; and class weights for a loss.

ROC AUC supports weights and is fast enough for a bootstrap over a hundred thousand images and fifteen classes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.metrics import f1_score, recall_score


def roc_auc(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the ROC AUC: the probability that a positive scores higher than a negative, where ties count half.

    `scores` (n,), `positive` (n,) bool, `weight` (n,) how often each row counts. NaN without a positive or without a
    negative.
    """
    return roc_auc_of_ranks(dense_ranks(scores), positive, weight)


def dense_ranks(scores: np.ndarray) -> np.ndarray:
    """Return the dense ranks (n,) of `scores` from 0, equal scores sharing a rank; compute them once per bootstrap."""
    return np.unique(scores, return_inverse=True)[1]


def roc_auc_of_ranks(ranks: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the ROC AUC of scores given as `dense_ranks(scores)`, which is faster for many weights; see `roc_auc`."""
    positive = np.asarray(positive, dtype=float)
    weight = np.ones(len(positive)) if weight is None else weight
    above = np.bincount(ranks, positive * weight)
    against = np.bincount(ranks, (1 - positive) * weight)
    pairs = above.sum() * against.sum()
    if not pairs:
        return float("nan")
    return float((above * (against.cumsum() - against / 2)).sum() / pairs)


def mean_auc(truth: np.ndarray, probabilities: np.ndarray, classes: Iterable[str]) -> dict[str, float]:
    """Return the ROC AUC of each class, and their mean as `score`, for truth and scores (n, classes).

    Truth is 0..1, positive from 0.5 up; NaN is ignored. A class without a positive or without a negative is NaN and ignored
    in the mean, which is NaN if all classes are.
    """
    scores = {}
    for name, actual, probability in zip(classes, truth.T, probabilities.T, strict=True):
        known = ~np.isnan(actual)
        scores[name] = roc_auc(probability[known], actual[known] >= 0.5) if known.any() else float("nan")
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}


def class_weights(label: np.ndarray) -> np.ndarray:
    """Return the weight N / (C n) of each class (classes,) for labels (images, classes) that sum to 1.

    N is the number of images, n that of the class, and C counts the classes that occur, so that the mean weight of an image
    is 1. Classes that do not occur get 0. Rows with a NaN are ignored.
    """
    counts = label[~np.isnan(label).any(axis=1)].astype(float).sum(axis=0)
    occurs = counts > 0
    return np.divide(counts.sum(), occurs.sum() * counts, out=np.zeros(len(counts)), where=occurs)


def exclusive_scores(
    truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], judged_by: str
) -> dict[str, float]:
    """Return as `score` the macro F1 or accuracy of the most probable class, and the F1 or recall of each class.

    Truth and probabilities are (n, classes); rows with NaN in the truth are ignored. `judged_by` "macro_f1" is the mean F1
    over the classes that occur in the truth; otherwise `score` is the accuracy. Classes that do not occur are NaN, and
    everything is NaN if no row is known.
    """
    known = ~np.isnan(truth).any(axis=1)
    actual, predicted = truth[known].argmax(axis=1), probabilities[known].argmax(axis=1)
    occurring, class_scores = np.unique(actual), np.full(len(classes), np.nan)
    if not len(occurring):
        return {"score": float("nan"), **dict(zip(classes, class_scores, strict=True))}
    score = f1_score if judged_by == "macro_f1" else recall_score
    class_scores[occurring] = score(actual, predicted, labels=occurring, average=None, zero_division=0)
    total = np.nanmean(class_scores) if judged_by == "macro_f1" else (actual == predicted).mean()
    return {"score": float(total), **{name: float(part) for name, part in zip(classes, class_scores, strict=True)}}


def overlap(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return Dice 2 |A and B| / (|A| + |B|) and Jaccard |A and B| / |A or B| of two bool arrays of the same shape.

    Both are 1 if both masks are empty. Jaccard is Dice / (2 - Dice). Raises ValueError if the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"masks of shape {predicted.shape} and {truth.shape} cannot be compared; they must have the same shape"
        )
    intersection, total = int((predicted & truth).sum()), int(predicted.sum()) + int(truth.sum())
    if not total:
        return 1.0, 1.0
    return 2 * intersection / total, intersection / (total - intersection)
