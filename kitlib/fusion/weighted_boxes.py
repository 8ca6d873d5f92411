"""Weighted boxes fusion (WBF) for many images in one call, compiled with Numba, with the same results as ensemble-boxes.

Solovyev et al., Weighted boxes fusion: Ensembling boxes from different object detection models, 2021. The results equal
those of weighted_boxes_fusion in ensemble-boxes 1.0.9 to the last digit, because the same operations are done in the same
order: merged boxes are summed in float32, weights are added in NumPy's order, and NumPy sorts the boxes image by image.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from ensemble_boxes import weighted_boxes_fusion
from numba import njit
from numba.core.errors import NumbaError

from kitlib.competitions.fusion_settings import CONFIDENCES

logger = logging.getLogger(__name__)

# Compiling takes 3 s, unless another process has stored the compiled code, so it starts only after this process has merged
# more than this number of boxes in total, which takes ensemble-boxes about 1 s.
FEW_BOXES = 40_000
COMPILES = not numba.config.DISABLE_JIT
_merged_sizes: deque[int] = deque(maxlen=1000)  # number of boxes in the latest calls
MOST_LISTS = 128  # per image; NumPy adds more numbers than this in another order


@dataclass(frozen=True)
class ImageLists:
    """Box lists to be merged, several per image, as flat arrays: n boxes in m images.

    Boxes are sorted by image and, within an image, by list. `corners` (n, 4) has xmin, ymin, xmax and ymax of each box as
    shares of the image's width and height, 0..1. `score` (n,) has each box's score, 0..1. `ends` (m,) has for each image the
    index after its last box. `list_of` (n,) has the number of each box's list, counted from 0 in each image. `weights` has
    one entry for each list, image after image; in each image, lists without boxes come last. `list_ends` (m,) has for each
    image the index after its last list in `weights`.
    """

    corners: np.ndarray
    score: np.ndarray
    ends: np.ndarray
    list_of: np.ndarray
    weights: np.ndarray
    list_ends: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """Index of the image of each box, an int array (n,)."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    @property
    def list_counts(self) -> np.ndarray:
        """Number of box lists that each of the m images has, an int array (m,)."""
        return np.diff(self.list_ends, prepend=0)

    def split(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield four arrays per image: boxes (k, 4), scores (k,), each box's list number (k,), and each list's weight."""
        start, list_start = 0, 0
        for end, list_end in zip(self.ends.tolist(), self.list_ends.tolist(), strict=True):
            rows = slice(start, end)
            yield self.corners[rows], self.score[rows], self.list_of[rows], self.weights[list_start:list_end]
            start, list_start = end, list_end

    def images(self, chosen: np.ndarray) -> "ImageLists":
        """Return an ImageLists with only the images for which the boolean mask `chosen` (m,) is True."""
        rows, lists = np.repeat(chosen, np.diff(self.ends, prepend=0)), np.repeat(chosen, self.list_counts)
        ends, list_ends = (np.cumsum(np.diff(each, prepend=0)[chosen]) for each in (self.ends, self.list_ends))
        return ImageLists(self.corners[rows], self.score[rows], ends, self.list_of[rows], self.weights[lists], list_ends)


def merge_weighted(lists: ImageLists, iou: float, confidence: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the boxes of each image by WBF; return merged boxes (k, 4), their scores (k,) and their images' indices (k,).

    A box joins a cluster if its IoU with the cluster's merged box is above `iou`. `confidence`, one of CONFIDENCES, decides
    how the scores of a cluster are combined. The merged boxes of each image are sorted by score, the highest first. Boxes
    without an area are dropped.
    """
    sides = lists.corners[:, 2:] - lists.corners[:, :2]
    has_area = sides[:, 0] * sides[:, 1] > 0
    if not has_area.all():
        corners, score, list_of = lists.corners[has_area], lists.score[has_area], lists.list_of[has_area]
        ends = np.append(0, np.cumsum(has_area))[lists.ends]
        lists = replace(lists, corners=corners, score=score, list_of=list_of, ends=ends)
    largest = lists.list_counts.max(initial=0)
    _merged_sizes.append(len(lists.score))
    merged = None
    if COMPILES and largest <= MOST_LISTS and sum(_merged_sizes) > FEW_BOXES:
        merged = _merge_compiled(lists, iou, confidence, largest)
    corners, score, counts = merged or _merge_one_by_one(lists, iou, confidence)
    return corners, score, np.repeat(np.arange(len(counts)), counts)


def descending(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return indices (n,) to sort each segment of `values` (n,), highest first; `ends` has the index after each segment."""
    # Sorted exactly as in ensemble-boxes, so that equal values get the same order, which depends on NumPy.
    order, start = np.empty(len(values), dtype=np.intp), 0
    for end in ends.tolist():
        order[start:end] = values[start:end].argsort()[::-1] + start
        start = end
    return order


def _merge_one_by_one(lists: ImageLists, iou: float, confidence: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge with ensemble-boxes, image by image; return boxes (k, 4), scores (k,) and the number of boxes per image (m,)."""
    merged = []
    for corners, score, list_of, weights in lists.split():
        bounds = np.searchsorted(list_of, np.arange(1, len(weights)))
        boxes, scores = np.split(corners, bounds), np.split(score, bounds)
        labels = [np.zeros(len(score)) for score in scores]
        merged.append(weighted_boxes_fusion(boxes, scores, labels, weights, iou_thr=iou, conf_type=confidence)[:2])
    corners, score = (np.concatenate([part[k] for part in merged]) for k in range(2))
    return corners, score, np.array([len(part[1]) for part in merged])


def _merge_compiled(
    lists: ImageLists, iou: float, confidence: str, most_lists: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Merge with compiled code; return what `_merge_one_by_one` returns. If this fails, log a warning and return None.

    `most_lists` is the largest number of lists that an image has.
    """
    first_list = lists.list_ends - lists.list_counts
    list_of = lists.list_of + first_list[lists.image]
    score, most_boxes = lists.score * lists.weights[list_of], np.diff(lists.ends, prepend=0).max(initial=0)
    corners, merged_score, counts = np.empty((len(score), 4)), np.empty(len(score)), np.empty(len(lists.ends), np.intp)
    try:
        _merge(
            *(lists.ends, descending(score, lists.ends), np.ascontiguousarray(lists.corners), score, list_of),
            *(lists.list_ends, lists.weights, float(iou), CONFIDENCES.index(confidence), corners, merged_score, counts),
            *(np.empty((most_boxes, 4)), np.empty((most_boxes, 4), np.float32)),
            *(np.empty((most_boxes, most_lists), np.bool_), np.empty(most_lists)),
        )
    except (NumbaError, RuntimeError, OSError) as error:
        logger.warning(
            "numba cannot compile the merging of boxes (%s: %s). The package ensemble-boxes merges them instead, with the "
            "same results but about a hundred times slower",
            *(type(error).__name__, error),
        )
        return None
    order = descending(merged_score[: counts.sum()], np.cumsum(counts))
    return corners[order], merged_score[order], counts


def _jit(function: Callable[..., Any]) -> Any:
    """Return a version of `function` that is compiled at its first call, without changing how results are rounded.

    The compiled code is stored on disk for later processes if a cache folder is writable.
    """
    try:
        return njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the folder of this file nor the user's cache folder can be written
        return njit(error_model="numpy")(function)


@_jit
def _numpy_sum(values: np.ndarray, start: int, count: int) -> float:
    """Return the sum of `count` values, beginning with index `start`, added in the same order as in `numpy.sum`."""
    total, rest = 0.0, 0
    if count >= 8:
        rest = count - count % 8
        a, b, c, d = values[start], values[start + 1], values[start + 2], values[start + 3]
        e, f, g, h = values[start + 4], values[start + 5], values[start + 6], values[start + 7]
        for k in range(start + 8, start + rest, 8):
            a += values[k]
            b += values[k + 1]
            c += values[k + 2]
            d += values[k + 3]
            e += values[k + 4]
            f += values[k + 5]
            g += values[k + 6]
            h += values[k + 7]
        total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for k in range(start + rest, start + count):
        total += values[k]
    return total


@_jit
def _merge(
    ends: np.ndarray,
    order: np.ndarray,
    corners: np.ndarray,
    score: np.ndarray,
    list_of: np.ndarray,
    list_ends: np.ndarray,
    weights: np.ndarray,
    iou: float,
    confidence: int,
    merged: np.ndarray,
    merged_score: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    corner_sums: np.ndarray,
    has_list: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Merge the boxes of all images into clusters, and write the results into arrays passed as arguments.

    `ends`, `corners`, `list_ends` and `weights` are as in ImageLists. `order` (n,) has the indices of the boxes, image by
    image, by falling score. `score` (n,) has the scores, already multiplied by the weights of their lists. `list_of` (n,)
    has the index in `weights` of each box's list. `confidence` is an index in CONFIDENCES. The merged boxes are written to
    `merged` (n, 4), their scores to `merged_score` (n,), and the number of merged boxes of each image to `counts` (m,).

    Four arrays are working memory for one image. `chosen` has weights of lists. The others have one row per cluster: `sums`
    (sum of scores, sum of weights, highest score, number of boxes), `corner_sums` (float32), and `has_list` (bool: whether
    the cluster has boxes from each list).
    """
    start, first, written = 0, 0, 0
    for image in range(len(ends)):
        end, lists, clusters = ends[image], list_ends[image] - first, 0
        for position in range(start, end):
            row = order[position]
            x1, y1, x2, y2 = corners[row, 0], corners[row, 1], corners[row, 2], corners[row, 3]
            area = (x2 - x1) * (y2 - y1)
            cluster, best = -1, -1.0
            for k in range(clusters):
                width = max(min(merged[written + k, 2], x2) - max(merged[written + k, 0], x1), 0.0)
                height = max(min(merged[written + k, 3], y2) - max(merged[written + k, 1], y1), 0.0)
                shared = width * height
                other = (merged[written + k, 2] - merged[written + k, 0]) * (merged[written + k, 3] - merged[written + k, 1])
                overlap = shared / (other + area - shared)
                if overlap > best:
                    cluster, best = k, overlap
            if cluster < 0 or best <= iou:
                cluster = clusters
                clusters += 1
                for k in range(4):
                    merged[written + cluster, k] = corners[row, k]
                    corner_sums[cluster, k] = score[row] * corners[row, k]
                sums[cluster, 0] = score[row]
                sums[cluster, 1] = weights[list_of[row]]
                sums[cluster, 2] = score[row]
                sums[cluster, 3] = 1.0
                for k in range(lists):
                    has_list[cluster, k] = False
            else:
                sums[cluster, 0] += score[row]
                sums[cluster, 1] += weights[list_of[row]]
                sums[cluster, 2] = max(sums[cluster, 2], score[row])
                sums[cluster, 3] += 1.0
                for k in range(4):
                    corner_sums[cluster, k] += score[row] * corners[row, k]
                    merged[written + cluster, k] = np.float32(corner_sums[cluster, k] / sums[cluster, 0])
            has_list[cluster, list_of[row] - first] = True
        total = _numpy_sum(weights, first, lists)
        largest = weights[first]
        for k in range(first, first + lists):
            largest = max(largest, weights[k])
        for k in range(clusters):
            weight, count = sums[k, 1], sums[k, 3]
            value = sums[k, 2] if confidence == 1 else sums[k, 0] / count
            if count > 1:
                value, weight = np.float64(np.float32(value)), np.float64(np.float32(weight))
            number = 0
            for m in range(lists):
                if has_list[k, m] == (confidence == 2):
                    chosen[number] = weights[first + m]
                    number += 1
            if confidence == 0:
                value = value * min(lists, count) / total
            elif confidence == 1:
                value = value / largest
            elif confidence == 2:
                value = value * count / weight * _numpy_sum(chosen, 0, number) / total
            else:
                value = value * count / (weight + _numpy_sum(chosen, 0, number))
            merged_score[written + k] = value
        counts[image] = clusters
        written += clusters
        start, first = end, list_ends[image]
