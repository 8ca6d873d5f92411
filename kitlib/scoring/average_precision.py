"""PASCAL VOC 2010 average precision: matches boxes, and integrates the monotone envelope of the precision-recall curve.

Everingham et al., The PASCAL VOC Challenge, IJCV 2010, section 4.2; development kit of 2010 (VOCevaldet.m). A detection is
matched to the box with the largest IoU among the ground-truth boxes of its image. This IoU must be above 0.5, or above a
competition's own limit. Of the detections that are matched to the same ground-truth box, only the most confident is a hit.
The development kit adds a pixel to widths and heights; this module does not, because coordinates are not integers.

Detections with equal scores enter the curve as one block. A detection's match does not depend on other detections. Of
several ground-truth boxes with equal IoU, the first by coordinates is matched. So the result never depends on the order of
rows.
"""

import numpy as np

OVERLAP = 0.5  # the IoU of a hit with its ground-truth box is larger than this, unless a competition sets another


def average_precision(score: np.ndarray, hit: np.ndarray, positives: float, weight: np.ndarray | None = None) -> float:
    """Return the average precision of n detections, 0..1, or NaN if there is no ground-truth box.

    `score` (n,) holds their scores, `hit` (n,) is True for detections that are hits, and `positives` is the number of
    ground-truth boxes. For a bootstrap sample, `weight` (n,) is how often each detection occurs in the sample, and
    `positives` is the number of ground-truth boxes in the sample.
    """
    ranking = Ranking(score, hit)
    return ranking.average_precision(positives, None if weight is None else np.asarray(weight, float)[ranking.order])


class Ranking:
    """Sorts n detections once, to compute several average precisions quickly, such as those of bootstrap samples.

    `score` (n,) has the scores of the detections, and `hit` (n,) is True for detections that are hits. The attribute `order`
    (n,) has the indices that sort the detections, the highest score first.
    """

    def __init__(self, score: np.ndarray, hit: np.ndarray) -> None:
        score, hit = np.asarray(score, dtype=float), np.asarray(hit, dtype=bool)
        self.order = np.argsort(-score, kind="stable")
        ends = _block_ends(score[self.order])
        # Precision falls in blocks without a hit, so the envelope and the recall change only at blocks with a hit.
        self._hits = np.flatnonzero(hit[self.order])
        blocks, self._first_hits = np.unique(np.searchsorted(ends, self._hits), return_index=True)
        self._ends = ends[blocks] + 1

    def average_precision(self, positives: float, weight: np.ndarray | None = None) -> float:
        """Return the average precision, 0..1, or NaN if `positives`, the number of ground-truth boxes, is 0.

        For a bootstrap sample, `weight` (n,) is how often each detection occurs, in the order of `order`, and `positives` is
        the number of ground-truth boxes in the sample.
        """
        if positives <= 0:
            return float("nan")
        if not len(self._ends):
            return 0.0
        if weight is None:
            hits, detected = np.append(self._first_hits[1:], len(self._hits)), self._ends
        else:
            hits = np.cumsum(np.add.reduceat(weight[self._hits], self._first_hits))
            detected = np.cumsum(np.add.reduceat(weight[: self._ends[-1]], np.append(0, self._ends[:-1])))
        precision = np.divide(hits, detected, out=np.zeros(len(hits)), where=detected > 0)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float(np.sum(np.diff(hits / positives, prepend=0.0) * envelope))


def precision_recall(score: np.ndarray, hit: np.ndarray, positives: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the precision-recall curve of n detections: two arrays (k,), precision and recall, both 0..1.

    There are k different scores. Each entry belongs to one of them, the highest first: the precision or recall of all
    detections with at least this score. Precision is not replaced by its envelope. `average_precision` describes the
    arguments.
    """
    score, hit = np.asarray(score, dtype=float), np.asarray(hit, dtype=bool)
    order = np.argsort(-score, kind="stable")
    ends = _block_ends(score[order])
    hits = np.cumsum(hit[order])[ends]
    return hits / (ends + 1), hits / positives


def _block_ends(ranked: np.ndarray) -> np.ndarray:
    """Return the index of the last element of each run of equal values in the sorted array `ranked` (n,)."""
    return np.flatnonzero(np.append(np.diff(ranked) != 0, np.ones(min(1, len(ranked)), bool)))


def match_boxes(
    image: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray, overlap: float = OVERLAP
) -> np.ndarray:
    """Return an int array (n,): for each detection, the row of the true box with the largest IoU above `overlap`, or -1.

    `boxes` (n, 4) are the detections and `true_boxes` (m, 4) the ground truth, as xmin, ymin, xmax and ymax in the same
    coordinates. `image` (n,) and `true_image` (m,) are the ids of their images, of any type that can be compared. Several
    detections can match the same ground-truth box, whatever their scores.
    """
    boxes, true_boxes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(true_boxes, float).reshape(-1, 4)
    best, match = np.full(len(boxes), overlap), np.full(len(boxes), -1)
    if not len(true_boxes) or not len(boxes):
        return match
    names, true_name = np.unique(np.asarray(true_image), return_inverse=True)
    order = np.lexsort((*true_boxes.T[::-1], true_name))
    count = np.bincount(true_name)
    first = np.cumsum(count) - count
    image_index = np.searchsorted(names, image).clip(max=len(names) - 1)
    candidates = np.where(names[image_index] == np.asarray(image), count[image_index], 0)
    for k in range(count.max()):
        rows = np.flatnonzero(candidates > k)
        candidate = order[first[image_index[rows]] + k]
        candidate_iou = iou(boxes[rows], true_boxes[candidate])
        better = candidate_iou > best[rows]
        best[rows[better]], match[rows[better]] = candidate_iou[better], candidate[better]
    return match


def first_hits(score: np.ndarray, match: np.ndarray) -> np.ndarray:
    """Return a bool array (n,), True for hits: for each ground-truth box, the most confident detection that matches it.

    `score` (n,) holds the detections' scores, and `match` (n,) the index of the ground-truth box that each matches, or -1.
    """
    score, match = np.asarray(score, dtype=float), np.asarray(match)
    matched = np.flatnonzero(match >= 0)
    order = matched[np.argsort(-score[matched], kind="stable")]
    hit = np.zeros(len(score), dtype=bool)
    hit[order[np.unique(match[order], return_index=True)[1]]] = True
    return hit


def box_hits(
    image: np.ndarray, score: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray
) -> np.ndarray:
    """Return a bool array (n,), True for detections that are hits; `match_boxes` and `first_hits` describe the arguments."""
    return first_hits(score, match_boxes(image, boxes, true_image, true_boxes))


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of each box in `a` (..., 4) with the box at the same place in `b`: (...), 0 if a box has no area."""
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    intersection = sides.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).clip(0).prod(axis=-1) + (b[..., 2:] - b[..., :2]).clip(0).prod(axis=-1) - intersection
    return intersection / np.maximum(union, np.finfo(float).tiny)
