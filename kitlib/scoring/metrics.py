"""Metrics of classes and masks: ROC AUC, scores of exclusive classes, Dice and Jaccard; and a class's weight in a loss.

ROC AUC is weighted, and fast enough for a bootstrap over a hundred thousand images and fifteen classes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.metrics import f1_score, recall_score


def roc_auc(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The chance that a positive scores above a negative, ties half: `scores` (n,), `positive` (n,) bool, `weight` as often.

    NaN without a positive or without a negative.
    """
    return roc_auc_of_ranks(dense_ranks(scores), positive, weight)


def dense_ranks(scores: np.ndarray) -> np.ndarray:
    """Places (n,) of `scores` from 0, equal ones sharing theirs: found once for a bootstrap's many weights."""
    return np.unique(scores, return_inverse=True)[1]


def roc_auc_of_ranks(ranks: np.ndarray, positive: np.ndarray, weight: np.ndarray | None = None) -> float:
    """As `roc_auc`, of `dense_ranks(scores)`."""
    positive = np.asarray(positive, dtype=float)
    weight = np.ones(len(positive)) if weight is None else weight
    above = np.bincount(ranks, positive * weight)
    against = np.bincount(ranks, (1 - positive) * weight)
    pairs = above.sum() * against.sum()
    if not pairs:
        return float("nan")
    return float((above * (against.cumsum() - against / 2)).sum() / pairs)


def mean_auc(truth: np.ndarray, found: np.ndarray, classes: Iterable[str]) -> dict[str, float]:
    """ROC AUC of each class, and `score`, their mean, of truth and scores (n, classes).

    Truth is 0..1, present from one half upwards, or NaN, which does not count. A class without a positive or a negative is
    NaN and not in the mean; all NaN gives NaN.
    """
    scores = {}
    for name, actual, probability in zip(classes, truth.T, found.T, strict=True):
        known = ~np.isnan(actual)
        scores[name] = roc_auc(probability[known], actual[known] >= 0.5) if known.any() else float("nan")
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}


def class_weights(label: np.ndarray) -> np.ndarray:
    """N / (C n) for each class (classes,), of labels (images, classes) that sum to 1; rows with a NaN do not count.

    N images, n of the class, C classes that occur: the mean weight of an image is 1. A class without an image has 0.
    """
    counts = label[~np.isnan(label).any(axis=1)].astype(float).sum(axis=0)
    occurs = counts > 0
    return np.divide(counts.sum(), occurs.sum() * counts, out=np.zeros(len(counts)), where=occurs)


def exclusive_scores(truth: np.ndarray, found: np.ndarray, classes: Sequence[str], judged_by: str) -> dict[str, float]:
    """`score`, the macro F1 or the accuracy of the most probable class, and each class's F1 or recall.

    Truth and probabilities are (n, classes), rows of truth with a NaN do not count. Macro F1 is the mean over the classes
    that occur in the truth; those that do not are NaN. All NaN where nothing is known.
    """
    known = ~np.isnan(truth).any(axis=1)
    actual, called = truth[known].argmax(axis=1), found[known].argmax(axis=1)
    occurring, each = np.unique(actual), np.full(len(classes), np.nan)
    if not len(occurring):
        return {"score": float("nan"), **dict(zip(classes, each, strict=True))}
    score = f1_score if judged_by == "macro_f1" else recall_score
    each[occurring] = score(actual, called, labels=occurring, average=None, zero_division=0)
    whole = np.nanmean(each) if judged_by == "macro_f1" else (actual == called).mean()
    return {"score": float(whole), **{name: float(part) for name, part in zip(classes, each, strict=True)}}


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice 2 |A and B| / (|A| + |B|) and Jaccard |A and B| / |A or B| of two bool arrays of one shape.

    Both are 1 where both masks are empty. Jaccard is Dice / (2 - Dice).
    """
    if found.shape != truth.shape:
        raise ValueError(f"masks of {found.shape} and {truth.shape} pixels cannot be compared")
    shared, total = int((found & truth).sum()), int(found.sum()) + int(truth.sum())
    if not total:
        return 1.0, 1.0
    return 2 * shared / total, shared / (total - shared)
