"""Area under the ROC curve, weighted: fast enough for a bootstrap over a hundred thousand images and fifteen classes."""

from collections.abc import Iterable

import numpy as np


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
