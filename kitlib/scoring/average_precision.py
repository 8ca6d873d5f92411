"""PASCAL VOC 2010 average precision: the matching of boxes, and the area under the monotone precision-recall envelope.

Everingham et al., The PASCAL VOC Challenge, IJCV 2010, section 4.2; development kit of 2010 (VOCevaldet.m): a detection
belongs to the true box of its image that it overlaps most; it is a hit if that IoU is above 0.5 and no more confident
detection has claimed the box. IoU is of continuous boxes, without that kit's added pixel: coordinates are no whole numbers.

Detections of equal score enter the curve as one block. Which true box a detection belongs to depends on no other detection,
and true boxes that it overlaps equally are told apart by their coordinates; so the order of rows never matters.
"""

import numpy as np

OVERLAP = 0.5  # a detection is right if its IoU with an unclaimed true box is larger than this


def average_precision(score: np.ndarray, hit: np.ndarray, positives: float, weight: np.ndarray | None = None) -> float:
    """Area (0..1) for detections (n,) with their `score` and whether each is a `hit`; NaN without positives.

    `weight` (n,): how often each detection counts, in a bootstrap; `positives` is then the weighted count.
    """
    if positives <= 0:
        return float("nan")
    precision, recall = precision_recall(score, hit, positives, weight)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def precision_recall(
    score: np.ndarray, hit: np.ndarray, positives: float, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall (k,), 0..1, after each block of equal scores, the highest first; not yet the envelope."""
    score, hit = np.asarray(score, dtype=float), np.asarray(hit, dtype=bool)
    order = np.argsort(-score, kind="stable")
    block_ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)) if len(order) else order
    weight = np.ones(len(order)) if weight is None else np.asarray(weight, dtype=float)[order]
    hits, shown = np.cumsum(weight * hit[order])[block_ends], np.cumsum(weight)[block_ends]
    return np.divide(hits, shown, out=np.zeros(len(hits)), where=shown > 0), hits / positives


def match_boxes(image: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray) -> np.ndarray:
    """For each detection (n,) the row of `true_boxes` that it belongs to, -1 where no IoU is above 0.5.

    `image` and `true_image` are any comparable ids; boxes are (n, 4) and (m, 4) in one coordinate space. A detection's score
    plays no part.
    """
    boxes, true_boxes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(true_boxes, float).reshape(-1, 4)
    best, match = np.full(len(boxes), OVERLAP), np.full(len(boxes), -1)
    if not len(true_boxes) or not len(boxes):
        return match
    names, true_name = np.unique(np.asarray(true_image), return_inverse=True)
    order = np.lexsort((*true_boxes.T[::-1], true_name))
    count = np.bincount(true_name)
    first = np.cumsum(count) - count
    place = np.searchsorted(names, image).clip(max=len(names) - 1)
    count_here = np.where(names[place] == np.asarray(image), count[place], 0)
    for k in range(count.max()):
        rows = np.flatnonzero(count_here > k)
        candidate = order[first[place[rows]] + k]
        overlap = _iou(boxes[rows], true_boxes[candidate])
        better = overlap > best[rows]
        best[rows[better]], match[rows[better]] = overlap[better], candidate[better]
    return match


def first_hits(score: np.ndarray, match: np.ndarray) -> np.ndarray:
    """Which detections (n,) are hits: of those with one `match`, the most confident; a second one is no hit."""
    score, match = np.asarray(score, dtype=float), np.asarray(match)
    order = np.argsort(-score, kind="stable")
    hit = np.zeros(len(order), dtype=bool)
    hit[order[np.unique(match[order], return_index=True)[1]]] = True
    return hit & (match >= 0)


def box_hits(
    image: np.ndarray, score: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray
) -> np.ndarray:
    """Which detections (n,) are hits, by `match_boxes` and `first_hits`."""
    return first_hits(score, match_boxes(image, boxes, true_image, true_boxes))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (..., 4), broadcast; 0 where a box has no area."""
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    shared = sides.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).clip(0).prod(axis=-1) + (b[..., 2:] - b[..., :2]).clip(0).prod(axis=-1) - shared
    return shared / np.maximum(union, np.finfo(float).tiny)
