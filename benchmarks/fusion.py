"""Time to fuse 100 boxes of each of three detectors on 200 images, and its extrapolation to the public test set's 1,263.

python benchmarks/fusion.py
"""

import time

import numpy as np
import pandas as pd
import typer

from kitlib.competitions.fusion_settings import METHODS, FusionSettings
from kitlib.fusion.model_fusion import BoxLists, fuse_boxes
from kitlib.tables import BOX

PUBLIC_TEST = 1263  # images
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"images": 2, "boxes": 3}


def case(images: int, models: int, boxes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return tables `images` and `detections`: random boxes around two points per image, most of them with low scores."""
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


def main(images: int = 200, models: int = 3, boxes: int = 100) -> None:
    image_table, detections = case(images, models, boxes)
    for method in METHODS:
        settings = FusionSettings(box_method=method)
        fuse_boxes(BoxLists.of(detections, image_table), settings)  # compiles
        start = time.perf_counter()
        fused = fuse_boxes(BoxLists.of(detections, image_table), settings)
        seconds = time.perf_counter() - start
        whole = seconds * PUBLIC_TEST / images
        print(f"{method:<9}{seconds:6.1f} s, {PUBLIC_TEST} images {whole:6.1f} s; {len(detections)} boxes to {len(fused)}")


if __name__ == "__main__":
    typer.run(main)
