"""Merges an image's box lists (one per model and fold) into one list, and calibrates box scores with Platt's sigmoid.

Platt, Probabilistic outputs for support vector machines, 1999: p = 1 / (1 + exp(-(slope * logit(score) + offset))), fitted
by maximum likelihood to smoothed targets. Calibration makes the scores of different detector families comparable and
preserves the ranking of each detector's boxes.
"""

import numpy as np
from ensemble_boxes import non_maximum_weighted
from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float, nms_float_fast
from scipy.special import expit, logit

from kitlib.fusion.weighted_boxes import ImageLists, merge_weighted

# Scores are clipped to NEAREST..1 - NEAREST, about float32's resolution, so that their logit stays finite.
NEAREST = 1e-7
# The confidence "agreed" is that of "avg" divided by AGREEMENT, and at most 1. So a merged box keeps the mean of its scores
# if this share of the lists contains it. A score threshold tuned on single lists, such as out-of-fold detections, then
# fits any number of lists. In simulations with 2 to 5 folds, shares of 0.5 to 0.7 were best.
AGREEMENT = 0.6


def merge_boxes(
    boxes: list[np.ndarray],
    scores: list[np.ndarray],
    weights: np.ndarray,
    method: str = "wbf",
    iou: float = 0.6,
    confidence: str = "avg",
    min_score: float = 0.001,
) -> tuple[np.ndarray, np.ndarray]:
    """Merge one image's box lists, one per model and fold; return the merged boxes (n, 4) and their scores (n,).

    `boxes` contains one array (k, 4) per list: xmin, ymin, xmax and ymax as shares of the image's width and height, 0..1.
    `scores` contains one array (k,) per list, 0..1. `weights` has one weight above 0 per list; any further weights are those
    of lists without boxes. If there is only one weight, the boxes are returned unchanged. Boxes are merged if their IoU is
    above `iou`. For `method` see FusionSettings.box_method, for `confidence` FusionSettings.box_confidence. `confidence`
    applies only to wbf. `min_score` applies only to soft_nms, which lowers scores and drops boxes with a score below
    `min_score`. Raises ValueError unless the shapes match, weights are above 0, boxes lie in 0..1 with xmin < xmax and
    ymin < ymax, and scores are above 0 and at most 1.
    """
    weights = np.asarray(weights, dtype=float)
    if len(boxes) != len(scores) or len(weights) < len(boxes) or not (weights > 0).all():
        raise ValueError(
            f"got {len(boxes)} box arrays, {len(scores)} score arrays and the weights {weights}; each box array needs one "
            "score array and one weight above 0"
        )
    for box, score in zip(boxes, scores, strict=True):
        if box.shape != (len(score), 4):
            raise ValueError(f"boxes have shape {box.shape} and scores {score.shape}; expected (k, 4) and (k,)")
    counts = [len(score) for score in scores]
    lists = ImageLists(
        corners=np.concatenate([np.empty((0, 4)), *boxes]),
        score=np.concatenate([np.empty(0), *scores]),
        ends=np.array([sum(counts)]),
        list_of=np.repeat(np.arange(len(counts)), counts),
        weights=weights,
        list_ends=np.array([len(weights)]),
    )
    return merge_lists(lists, method, iou, confidence, min_score)[:2]


def merge_lists(
    lists: ImageLists, method: str = "wbf", iou: float = 0.6, confidence: str = "avg", min_score: float = 0.001
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the boxes of each image; return merged boxes (k, 4), scores (k,) and the index of each box's image (k,).

    `lists` has the boxes of all images, in one list per image, model and fold; see ImageLists. The other arguments and the
    errors are those of `merge_boxes`. The boxes of an image with a single list are returned unchanged.
    """
    # Written so that NaN, which fails every comparison, is refused too.
    is_box = ((lists.corners >= 0) & (lists.corners <= 1)).all(axis=1)
    is_box &= (lists.corners[:, :2] < lists.corners[:, 2:]).all(axis=1)
    if not is_box.all():
        first = lists.corners[~is_box][0].tolist()
        raise ValueError(f"boxes must lie in 0..1 with xmin < xmax and ymin < ymax; got {first}")
    is_score = (lists.score > 0) & (lists.score <= 1)
    if not is_score.all():
        raise ValueError(f"scores must be above 0 and at most 1; got {lists.score[~is_score][0]}")
    is_alone, image = lists.list_counts == 1, lists.image
    unchanged = is_alone[image]
    if unchanged.all():
        return lists.corners, lists.score, image
    several = lists.images(~is_alone) if is_alone.any() else lists
    if method == "wbf":
        merged, score, of_image = merge_weighted(several, iou, "avg" if confidence == "agreed" else confidence)
        score = score / AGREEMENT if confidence == "agreed" else score
    else:
        merged, score, of_image = _merge_one_by_one(several, method, iou, min_score)
    # An "avg" score exceeds 1 if a list with an above-average weight has several boxes in a cluster. "agreed" often does.
    merged, score = np.clip(merged.astype(float), 0, 1), np.clip(score.astype(float), 0, 1)  # nmw returns float32
    has_area = (merged[:, :2] < merged[:, 2:]).all(axis=1)
    if not has_area.all():
        merged, score, of_image = merged[has_area], score[has_area], of_image[has_area]
    if several is lists:
        return merged, score, of_image
    corners = np.concatenate([lists.corners[unchanged], merged])
    image = np.concatenate([image[unchanged], np.flatnonzero(~is_alone)[of_image]])
    order = np.argsort(image, kind="stable")
    return corners[order], np.concatenate([lists.score[unchanged], score])[order], image[order]


def _merge_one_by_one(
    lists: ImageLists, method: str, iou: float, min_score: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the boxes of each image by nms, soft_nms or nmw; arguments and results are those of `merge_lists`."""
    merged, scores = [], []
    for corners, score, list_of, weights in lists.split():
        if method == "nmw":
            parts = [list_of == number for number in range(len(weights))]
            labels = [np.zeros(part.sum()) for part in parts]
            boxes = [corners[part] for part in parts], [score[part] for part in parts]
            box, confidence, _ = non_maximum_weighted(*boxes, labels, weights, iou_thr=iou)
        else:
            # ensemble-boxes divides by the sum of the weights, which would shrink scores by the number of models.
            weighted = score * weights[list_of] / weights.max()
            if method == "nms":
                box, confidence = suppress_overlaps(corners, weighted, iou)
            else:
                # ensemble-boxes' soft_nms returns undecayed scores; this function sorts and decays them in place.
                kept = cpu_soft_nms_float(corners.copy(), weighted, Nt=iou, sigma=0.5, thresh=min_score, method=1)
                box, confidence = corners[kept], weighted[weighted > min_score]
        merged.append(box)
        scores.append(confidence)
    image = np.repeat(np.arange(len(merged)), [len(score) for score in scores])
    return np.concatenate(merged), np.concatenate(scores), image


def suppress_overlaps(boxes: np.ndarray, scores: np.ndarray, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Apply non-maximum suppression to one image's boxes (n, 4) and scores (n,); return the boxes and scores that remain.

    A box is dropped if its IoU with a remaining box of higher score is above `iou`. Boxes are xmin, ymin, xmax and ymax as
    shares of the image's sides, 0..1. The results are sorted by score, the highest first.
    """
    if not len(boxes):
        return boxes, scores
    kept = nms_float_fast(boxes, scores, iou)
    return boxes[kept], scores[kept]


def calibrate_scores(score: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """Calibrate box scores (n,) in 0..1 by Platt's sigmoid; return probabilities (n,), strictly between 0 and 1."""
    return expit(slope * _logit(score) + offset).clip(np.finfo(float).tiny, 1 - np.finfo(float).epsneg)


def fit_calibration(score: np.ndarray, hit: np.ndarray) -> tuple[float, float] | None:
    """Fit Platt's sigmoid to the out-of-fold scores `score` (n,) of boxes, 0..1; return the sigmoid's slope and offset.

    `hit` (n,) is True for boxes that match a ground-truth box. Returns None if all entries of `hit` are equal, or if a
    higher score does not make a match more likely.
    """
    # Imported here because the import takes a second and a submission never fits a calibration.
    from sklearn.linear_model import LogisticRegression

    hit = np.asarray(hit, dtype=bool)
    hits, misses = int(hit.sum()), int((~hit).sum())
    if not hits or not misses:
        return None
    # Platt's targets (section 2.2) keep the fit finite where the score separates hits from misses perfectly. Each soft
    # target becomes two weighted rows, one per class.
    target = np.where(hit, (hits + 1) / (hits + 2), 1 / (misses + 2))
    # Sorted, so that not even the last digit of the result depends on the order of rows.
    order = np.lexsort((target, score))
    target, feature = target[order], np.tile(_logit(score)[order], 2)[:, None]
    label, weight = np.repeat([1, 0], len(hit)), np.concatenate([target, 1 - target])
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(feature, label, sample_weight=weight)
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    return (slope, offset) if slope > 0 else None


def _logit(score: np.ndarray) -> np.ndarray:
    return logit(np.asarray(score, dtype=float).clip(NEAREST, 1 - NEAREST))
