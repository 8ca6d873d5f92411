"""Time and memory to score a submission of VinBigData's size, from CSV files to the score: 3,000 images, 14 classes.

python benchmarks/competitions.py
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from kitlib.competitions.vinbigdata import FINDINGS, VINBIGDATA

BAR_SECONDS = 20.0
# Arguments of `main` for the tests, with which it takes less than a second.
SMALLEST = {"images": 30, "boxes": 5}


def write_case(folder: Path, images: int, boxes: int, seed: int = 0) -> None:
    """Write a random train.csv, with three true boxes on half of the images, and submission.csv, `boxes` on each image."""
    rng = np.random.default_rng(seed)
    names = [f"{number:032x}" for number in range(images)]
    corner, side = rng.uniform(0, 1500, (images, 3, 2)), rng.uniform(300, 1000, (images, 3, 2))
    finding = rng.integers(len(FINDINGS), size=(images, 3))
    rows = []
    for index, name in enumerate(names):
        if index % 2:
            rows.append((name, len(FINDINGS), *[""] * 4))
            continue
        for code, start, size in zip(finding[index], corner[index], side[index], strict=True):
            rows.append((name, code, *start.round(), *(start + size).round()))
    columns = ["image_id", "class_id", "x_min", "y_min", "x_max", "y_max"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "train.csv", index=False)
    with open(folder / "submission.csv", "w") as file:
        file.write("image_id,PredictionString\n")
        for index, name in enumerate(names):
            # Half of the boxes have a class and a place near a true box, so that many of them match.
            near = rng.integers(3, size=boxes)
            code = np.where(rng.random(boxes) < 0.5, finding[index, near], rng.integers(len(FINDINGS), size=boxes))
            start = (corner[index, near] + rng.normal(0, 100, (boxes, 2))).clip(min=0)
            end = start + rng.uniform(300, 1000, (boxes, 2))
            numbers = np.column_stack([code, rng.random(boxes).round(5), start.round(1), end.round(1)])
            groups = " ".join(f"{row[0]:.0f} {' '.join(map(str, row[1:]))}" for row in numbers.tolist())
            file.write(f"{name},{groups} 14 {rng.random():.5f} 0 0 1 1\n")


def main(images: int = 3000, boxes: int = 100) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        write_case(folder, images, boxes)
        written = time.perf_counter()
        scores = VINBIGDATA.score_files(folder, folder / "submission.csv")
        scored = time.perf_counter()
        faults = VINBIGDATA.validate_file(folder / "submission.csv", truth=folder)
        validated = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{images} images with {boxes} boxes each (scoring should take at most {BAR_SECONDS:.0f} s)")
    print(f"make and write {written - start:6.1f} s")
    print(f"score          {scored - written:6.1f} s, {scores['score']:.4f}")
    print(f"validate       {validated - scored:6.1f} s, {len(faults)} faults")
    print(f"peak memory    {memory:6.0f} MB")


if __name__ == "__main__":
    typer.run(main)
