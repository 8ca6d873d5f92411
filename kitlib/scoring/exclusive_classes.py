"""Classes of which exactly one is true: how much each weighs in a loss, and the score of an epoch."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score, recall_score


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
