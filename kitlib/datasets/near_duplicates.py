"""Finds images that are nearly the same (re-encoded, rescaled, slightly cropped, other contrast) by perceptual hash."""

from collections.abc import Iterable

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
BLOCK = 1024  # rows of the distance matrix that are in memory at once


def group_near_duplicates(cache: XrayCache, image_ids: Iterable[str], max_distance: int = MAX_DISTANCE) -> pd.DataFrame:
    """Return a table that assigns each image to a group of near-duplicates, found by perceptual hash.

    The columns are image_id and group (a number). Images whose hashes differ in at most `max_distance` of 256 bits, directly
    or through others, share a group; every other image is a group of its own. Images that are not in the cache, because they
    could not be decoded, are left out of the table.
    """
    available = [image_id for image_id in image_ids if image_id in cache]
    hashes = [perceptual_hash(cache.read(image_id).pixels) for image_id in available]
    return pd.DataFrame({"image_id": pd.Series(available, dtype=object), "group": group_hashes(hashes, max_distance)})


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

    Hashes that differ in at most `max_distance` bits, directly or through others, get the same number.
    """
    if not hashes:
        return np.empty(0, dtype=int)
    signs = np.where(np.stack(hashes), np.float32(1), np.float32(-1))
    bits = signs.shape[1]
    near_pairs = []
    for start in range(0, len(signs), BLOCK):
        # The product counts equal bits minus different bits, that is bits - 2 * distance.
        agreement = signs[start : start + BLOCK] @ signs.T
        rows, columns = np.nonzero(agreement >= bits - 2 * max_distance)
        near_pairs.append((rows + start, columns))
    rows, columns = (np.concatenate(part) for part in zip(*near_pairs, strict=True))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(signs), len(signs)))
    return connected_components(graph, directed=False)[1]
