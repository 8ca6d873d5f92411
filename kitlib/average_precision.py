"""PASCAL VOC 2010 average precision: the area under the monotone precision-recall envelope, and the matching of boxes.

Everingham et al., The PASCAL VOC Challenge, IJCV 2010, section 4.2; development kit of 2010 for the all-point area.
"""

import numpy as np

OVERLAP = 0.5  # a detection is right if its IoU with an unclaimed true box is larger than this


def average_precision(score: np.ndarray, hit: np.ndarray, positives: int) -> float:
    """Area (0..1) for detections (n,) with their `score` and whether each is a `hit`; NaN without positives.

    Equal scores count as one block, one point of the curve, so that the order of rows never matters.
    """
    if positives == 0:
        return float("nan")
    score, hit = np.asarray(score, dtype=float), np.asarray(hit, dtype=bool)
    order = np.argsort(-score, kind="stable")
    block_ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)) if len(order) else order
    hits = np.cumsum(hit[order])[block_ends]
    recall = hits / positives
    precision = hits / (block_ends + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def box_hits(
    image: np.ndarray, score: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray
) -> np.ndarray:
    """Which detections (n,) are hits: the best-overlapping true box of the same image, IoU > 0.5, not yet claimed.

    `image` and `true_image` are any comparable ids; boxes are (n, 4) and (m, 4) in one coordinate space. Detections claim in
    falling order of score, equal scores by their overlap, so that the order of rows never matters. A second detection of
    a box is no hit.
    """
    image, true_image = np.asarray(image), np.asarray(true_image)
    boxes, true_boxes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(true_boxes, float).reshape(-1, 4)
    score, hit = np.asarray(score, dtype=float), np.zeros(len(boxes), dtype=bool)
    for name in np.unique(true_image):
        found, true = np.flatnonzero(image == name), np.flatnonzero(true_image == name)
        overlap = iou(boxes[found], true_boxes[true])
        best = overlap.argmax(axis=1)
        reach = overlap.max(axis=1)
        claimed = np.zeros(len(true), dtype=bool)
        for row in np.lexsort((-reach, -score[found])):
            if reach[row] > OVERLAP and not claimed[best[row]]:
                claimed[best[row]] = hit[found[row]] = True
    return hit


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m), 0..1, of boxes (n, 4) and others (m, 4)."""
    a, b = boxes[:, None], others[None]
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    shared = sides.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - shared
    return shared / np.maximum(union, np.finfo(float).tiny)
