"""Scores of one detector's boxes as probabilities: Platt's sigmoid, so that detectors of different families compare.

Platt, Probabilistic outputs for support vector machines, 1999: p = 1 / (1 + exp(-(slope * logit(score) + offset))), fitted
by maximum likelihood to smoothed targets. The order of one detector's boxes stays as it is.
"""

import numpy as np
from scipy.special import expit, logit

# What float32 can tell from 0 and 1, about; a logit has to be finite.
NEAREST = 1e-7


def calibrated(score: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """Probabilities (n,) in 0..1, both ends excluded, for scores (n,) in 0..1."""
    return expit(slope * _logit(score) + offset).clip(np.finfo(float).tiny, 1 - np.finfo(float).epsneg)


def fit_calibration(score: np.ndarray, hit: np.ndarray) -> tuple[float, float] | None:
    """Slope and offset for scores (n,) in 0..1 and whether each box was a `hit` (n,), out of fold.

    None where nothing can be learnt: no hits, only hits, or hits that do not grow with the score.
    """
    # Only here: a submission calibrates but never fits, and this import takes a second.
    from sklearn.linear_model import LogisticRegression

    hit = np.asarray(hit, dtype=bool)
    hits, misses = int(hit.sum()), int((~hit).sum())
    if not hits or not misses:
        return None
    # Platt's targets (section 2.2) keep the fit finite where the classes can be told apart without a fault. A soft target
    # is a weighted pair of both answers.
    target = np.where(hit, (hits + 1) / (hits + 2), 1 / (misses + 2))
    # Sorted, so that the order of rows does not even touch the last digit.
    order = np.lexsort((target, score))
    target, feature = target[order], np.tile(_logit(score)[order], 2)[:, None]
    answer, weight = np.repeat([1, 0], len(hit)), np.concatenate([target, 1 - target])
    fitted = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(feature, answer, sample_weight=weight)
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return (slope, offset) if slope > 0 else None


def _logit(score: np.ndarray) -> np.ndarray:
    return logit(np.asarray(score, dtype=float).clip(NEAREST, 1 - NEAREST))
