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

HASH_SIDE = 16  # 256 bits: with the usual 64, the copies below lie no nearer than 1 in 3,600 pairs of different chests
# Measured on public frontal chest images: copies that are rescaled, re-exposed and noisy are all this near, 99.7 % of those
# also cropped by up to 1 % at each edge (80 % at 2 %), and 2 of the 2.3 million pairs of different patients.
MAX_DISTANCE = 32
BLOCK = 1024  # rows of the distance matrix held at once


def near_duplicate_groups(cache: XrayCache, image_ids: Iterable[str], max_distance: int = MAX_DISTANCE) -> pd.DataFrame:
    """Columns image_id and group for every one of `image_ids` in the cache; near-duplicates share a group, chains included.

    `max_distance` is in bits of 256. An image that is not in the cache (it could not be decoded) is in no group.
    """
    known = [image_id for image_id in image_ids if image_id in cache]
    hashes = [perceptual_hash(cache.read(image_id).pixels) for image_id in known]
    return pd.DataFrame({"image_id": pd.Series(known, dtype=object), "group": group_hashes(hashes, max_distance)})


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """Signs of the 256 lowest spatial frequencies of uint8 (rows, columns): bool (256,). The aspect ratio does not enter."""
    # Four samples a frequency, as imagehash takes them. Every other pixel does where there are plenty, in a quarter of the
    # time: what is lost is noise.
    step = max(1, min(pixels.shape) // (16 * HASH_SIDE))
    small = cv2.resize(pixels[::step, ::step], (4 * HASH_SIDE, 4 * HASH_SIDE), interpolation=cv2.INTER_AREA)
    return imagehash.phash(Image.fromarray(small), hash_size=HASH_SIDE).hash.ravel()


def group_hashes(hashes: list[np.ndarray], max_distance: int) -> np.ndarray:
    """A group number (n,) for each of n bool hashes (256,), joined where they differ in at most `max_distance` bits."""
    if not hashes:
        return np.empty(0, dtype=int)
    signs = np.where(np.stack(hashes), np.float32(1), np.float32(-1))
    bits = signs.shape[1]
    near = []
    for start in range(0, len(signs), BLOCK):
        # Equal bits minus different bits: bits - 2 * distance.
        agreement = signs[start : start + BLOCK] @ signs.T
        rows, columns = np.nonzero(agreement >= bits - 2 * max_distance)
        near.append((rows + start, columns))
    rows, columns = (np.concatenate(part) for part in zip(*near, strict=True))
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(signs), len(signs)))
    return connected_components(graph, directed=False)[1]
