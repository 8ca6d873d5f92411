"""One image's boxes: several lists become one, by ensemble-boxes, and scores become probabilities, by Platt's sigmoid.

Platt, Probabilistic outputs for support vector machines, 1999: p = 1 / (1 + exp(-(slope * logit(score) + offset))), fitted
by maximum likelihood to smoothed targets, so that detectors of different families compare. The order of one detector's boxes
stays as it is.
"""

from typing import Literal, get_args

import numpy as np
from ensemble_boxes import non_maximum_weighted, weighted_boxes_fusion
from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float, nms
from scipy.special import expit, logit

Method = Literal["wbf", "nms", "soft_nms", "nmw"]
Confidence = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
METHODS, CONFIDENCES = get_args(Method), get_args(Confidence)
# What float32 can tell from 0 and 1, about; a logit has to be finite.
NEAREST = 1e-7


def merge_boxes(
    boxes: list[np.ndarray],
    scores: list[np.ndarray],
    weights: np.ndarray,
    method: str = "wbf",
    iou: float = 0.6,
    confidence: str = "avg",
    min_score: float = 0.001,
) -> tuple[np.ndarray, np.ndarray]:
    """Merge one image's lists of boxes (k, 4) and scores (k,), all in 0..1, into (n, 4) and (n,).

    `weights` has one entry a list; entries beyond them stand for lists that are empty. A single list stays as it is. Boxes
    are one if their IoU is above `iou`; `confidence` is of wbf alone, `min_score` of soft_nms, whose decay ends there.
    Raises ValueError for what ensemble-boxes would swap, clamp or leave the process for.
    """
    weights = np.asarray(weights, dtype=float)
    if len(boxes) != len(scores) or len(weights) < len(boxes) or not (weights > 0).all():
        raise ValueError(f"{len(boxes)} lists of boxes, {len(scores)} of scores, weights {weights}: want as many, above 0")
    for box, score in zip(boxes, scores, strict=True):
        if box.shape != (len(score), 4):
            raise ValueError(f"boxes {box.shape} and scores {score.shape} do not fit; want (k, 4) and (k,)")
        # A NaN fails every comparison.
        if not ((box >= 0) & (box <= 1)).all() or not (box[:, :2] < box[:, 2:]).all():
            raise ValueError(f"boxes must lie in 0..1 with xmin < xmax and ymin < ymax; got {box.tolist()}")
        if not ((score > 0) & (score <= 1)).all():
            raise ValueError(f"scores must lie in 0..1 and not be 0; got {score.tolist()}")
    if len(weights) == 1:
        return boxes[0], scores[0]
    if not any(len(score) for score in scores):
        return np.empty((0, 4)), np.empty(0)
    empty = len(weights) - len(boxes)
    boxes, scores = [*boxes, *[np.empty((0, 4))] * empty], [*scores, *[np.empty(0)] * empty]
    labels = [np.zeros(len(score)) for score in scores]
    if method == "wbf":
        merged, score, _ = weighted_boxes_fusion(boxes, scores, labels, weights, iou_thr=iou, conf_type=confidence)
    elif method == "nmw":
        merged, score, _ = non_maximum_weighted(boxes, scores, labels, weights, iou_thr=iou)
    else:
        # The package divides by the sum of weights, which would shrink the scores by the number of models.
        scores = [score * weight / weights.max() for score, weight in zip(scores, weights, strict=True)]
        if method == "nms":
            merged, score, _ = nms(boxes, scores, labels, iou_thr=iou)
        else:
            # The package's soft_nms gives scores back undecayed; what it calls sorts and decays them in place.
            merged, score = np.concatenate(boxes), np.concatenate(scores)
            kept = cpu_soft_nms_float(merged, score, Nt=iou, sigma=0.5, thresh=min_score, method=1)
            merged, score = merged[kept], score[score > min_score]
    # "avg" passes 1 where one list has several boxes in a cluster and more than its share of the weight.
    merged, score = np.clip(merged, 0, 1), np.clip(score, 0, 1)
    whole = (merged[:, :2] < merged[:, 2:]).all(axis=1)
    return merged[whole].astype(float), score[whole].astype(float)


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
