"""Seconds to fuse the boxes of three detectors, 100 each, on 200 images; from that, on the 1,263 of the public test set.

python benchmarks/fusion.py
"""

import time

import numpy as np
import pandas as pd

from kitlib.fusion.fuse import BOX_METHODS, FusionSettings, fuse_boxes
from kitlib.tables import BOX

IMAGES, PUBLIC_TEST, MODELS, BOXES_A_LIST = 200, 1263, 3, 100


def case(images: int = IMAGES, models: int = MODELS, boxes: int = BOXES_A_LIST) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables images and detections: boxes strewn around two places an image, most of them with low scores."""
    rng = np.random.default_rng(0)
    names = np.array([f"{number:012x}" for number in range(images)], dtype=object)
    n = images * models * boxes
    image = np.repeat(np.arange(images), models * boxes)
    centre = rng.uniform(700, 1800, (images, 2, 2))[image, rng.integers(2, size=n)] + rng.normal(0, 250, (n, 2))
    half = rng.uniform(100, 500, (n, 2))
    table = pd.DataFrame(np.hstack([centre - half, centre + half]), columns=list(BOX))
    table.insert(0, "image_id", names[image])
    table.insert(1, "model", np.tile(np.repeat([f"model{k}" for k in range(models)], boxes), images))
    table.insert(2, "fold", 0)
    table.insert(3, "score", rng.uniform(0.001 ** (1 / 4), 1, n) ** 4)
    return pd.DataFrame({"image_id": names, "study_id": names, "rows": 2500, "columns": 2500}), table


def main() -> None:
    images, table = case()
    for method in BOX_METHODS:
        settings = FusionSettings(box_method=method)
        fuse_boxes(table.iloc[: MODELS * BOXES_A_LIST], images, settings)  # compiles
        began = time.perf_counter()
        found = fuse_boxes(table, images, settings)
        seconds = time.perf_counter() - began
        whole = seconds * PUBLIC_TEST / IMAGES
        print(f"{method:<9}{seconds:6.1f} s, {PUBLIC_TEST} images {whole:6.1f} s; {len(table)} boxes to {len(found)}")


if __name__ == "__main__":
    main()
