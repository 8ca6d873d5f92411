"""Finds images that are nearly the same (re-encoded, rescaled, slightly cropped, other contrast) by perceptual hash."""

from collections.abc import Iterable, Iterator

import cv2
import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kitlib.xrays.cache import XrayCache

# 256 bits. With the usual 64 bits, 1 in 3,600 pairs of different chests are as close as the copies described below.
HASH_SIDE = 16
# In bits, measured on public frontal chest X-rays. All copies that were rescaled, re-exposed and made noisy are within this
# distance, as are 99.7 % of the copies that were also cropped by up to 1 % at each edge (80 % at 2 %), but only 2 of 2.3
# million pairs of images of different patients.
MAX_DISTANCE = 32
BLOCK_ROWS, BLOCK_COLUMNS = 16, 4096  # part of the distance matrix that is in memory at once; fits into a core's cache


def group_near_duplicates(cache: XrayCache, image_ids: Iterable[str], max_distance: int = MAX_DISTANCE) -> pd.DataFrame:
    """Return a table that assigns each image to a group of near-duplicates, found by perceptual hash.

    The columns are image_id and group (a number). Images whose hashes differ in at most `max_distance` of 256 bits, directly
    or through other images, share a group; every other image is a group of its own. Images that are not in the cache,
    because they could not be decoded, are left out of the table.
    """
    available = [image_id for image_id in image_ids if image_id in cache]
    hashes = [perceptual_hash(cache.read(image_id).pixels) for image_id in available]
    return pd.DataFrame({"image_id": available, "group": group_hashes(hashes, max_distance)})


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """Return the perceptual hash, bool (256,), of an image, uint8 (rows, columns); it does not depend on the aspect ratio.

    Each bit says whether the amplitude at one of the 256 lowest spatial frequencies is above the median amplitude.
    """
    # Four samples per frequency, as in imagehash. Large images are subsampled first, which saves three quarters of the time
    # and loses only noise.
    step = max(1, min(pixels.shape) // (16 * HASH_SIDE))
    small = cv2.resize(pixels[::step, ::step], (4 * HASH_SIDE, 4 * HASH_SIDE), interpolation=cv2.INTER_AREA)
    return imagehash.phash(Image.fromarray(small), hash_size=HASH_SIDE).hash.ravel()


def group_hashes(hashes: list[np.ndarray], max_distance: int) -> np.ndarray:
    """Return an int array with a group number for each of `hashes`, which are bool arrays of the same length.

    Hashes that differ in at most `max_distance` bits, directly or through other hashes, get the same number.
    """
    if not hashes:
        return np.empty(0, dtype=int)
    packed = np.stack([np.packbits(bits) for bits in hashes])
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)
    distinct, group_of_hash = np.unique(packed, axis=0, return_inverse=True)
    words = np.ascontiguousarray(distinct.T)
    # Comparing two words of the hashes excludes nearly all pairs, so the words that differ most often are compared first.
    words = words[np.argsort(-np.bitwise_count(words ^ np.roll(words, len(distinct) // 2, axis=1)).mean(axis=1))]
    group, pairs, waiting = np.arange(len(distinct)), [], 0
    for start, first in _blocks(len(distinct)):
        rows, columns = slice(start, start + BLOCK_ROWS), slice(first, first + BLOCK_COLUMNS)
        # A block whose hashes are all in the same group already can be skipped.
        members = np.concatenate([group[rows], group[columns]])
        if members.min() == members.max():
            continue
        distance = np.bitwise_count(words[0, rows, None] ^ words[0, columns])
        for word in words[1:2]:
            distance += np.bitwise_count(word[rows, None] ^ word[columns])
        if distance.min() > max_distance:
            continue
        row, column = np.nonzero(distance <= max_distance)
        row, column = row + start, column + first
        is_open = group[row] != group[column]
        row, column = row[is_open], column[is_open]
        distance = np.bitwise_count(words[:, row] ^ words[:, column]).sum(axis=0)
        pairs.append((row[distance <= max_distance], column[distance <= max_distance]))
        waiting += len(pairs[-1][0])
        if waiting > len(distinct):
            group, pairs, waiting = _join(group, pairs), [], 0
    return _join(group, pairs)[group_of_hash.ravel()]


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the first column of each block of the distance matrix; blocks cover all pairs of hashes."""
    for start in range(0, count, BLOCK_ROWS):
        for first in range(start, count, BLOCK_COLUMNS):
            yield start, first


def _join(group: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return `group`, the group number of each hash, renumbered so that hashes connected by `pairs` have the same number."""
    row, column = (group[np.concatenate([np.empty(0, int), *part])] for part in ([p[k] for p in pairs] for k in range(2)))
    count = group.max() + 1
    graph = coo_array((np.ones(len(row)), (row, column)), shape=(count, count))
    return connected_components(graph)[1][group]
