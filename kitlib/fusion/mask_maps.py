"""Averages the mask probability maps of several models and folds into one map per image and finding."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
import pandas as pd

from kitlib.tables import check_table
from kitlib.xrays.cache import usable_cores
from kitlib.xrays.mask_store import decode_grey, encode_grey

COLUMNS = ["image_id", "finding", "map"]


def fuse_maps(maps: pd.DataFrame, weight: Callable[[str], float]) -> pd.DataFrame:
    """Return one probability map per image and finding: the average over each model's folds, then over the models.

    `maps` is a `mask_maps` table. `weight` is a function that returns a model's weight in the average. The result has the
    columns image_id, finding and `map` (a grey PNG, in which 255 is a probability of 1). It has one row for each image and
    finding that a model with a weight above 0 has predicted. If the maps of an image differ in size, all are resized to the
    size of the largest. Raises MaskError if a map is damaged.
    """
    maps = check_table(maps, "mask_maps")
    weights = {model: weight(model) for model in maps["model"].unique()}
    groups: dict[tuple[str, str], dict[str, list[bytes]]] = {}
    for image_id, finding, model, png in zip(*(maps[name] for name in ("image_id", "finding", "model", "map")), strict=True):
        if weights[model] > 0:
            groups.setdefault((image_id, finding), {}).setdefault(model, []).append(png)
    with ThreadPoolExecutor(usable_cores()) as pool:  # OpenCV works outside Python's lock
        fused = list(pool.map(partial(_fuse_image, weights), groups.values()))
    return pd.DataFrame([(*key, png) for key, png in zip(groups, fused, strict=True)], columns=COLUMNS)


def _fuse_image(weights: Mapping[str, float], pngs: Mapping[str, list[bytes]]) -> bytes:
    """Return the average map of one image and finding as a PNG; `pngs` maps each model to the PNG maps of its folds."""
    if sum(map(len, pngs.values())) == 1:
        return next(iter(pngs.values()))[0]
    maps = {model: [decode_grey(png) for png in folds] for model, folds in pngs.items()}
    rows, columns = max((each.shape for folds in maps.values() for each in folds), key=lambda shape: shape[0] * shape[1])
    total = np.zeros((rows, columns), np.float32)
    for model, folds in maps.items():
        for each in folds:
            total += cv2.resize(each, (columns, rows), interpolation=cv2.INTER_LINEAR) * np.float32(
                weights[model] / len(folds)
            )
    return encode_grey((total / sum(weights[model] for model in maps)).round())
