"""Seconds and memory to score a submission of SIIM's size: 6,334 images with 100 boxes each, from CSV files to the score.

python benchmarks/scoring.py
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from kitlib.classes import STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.scoring.score import score_files
from kitlib.scoring.submission_csv import submission_ids, write_submission
from kitlib.scoring.validate import validate
from kitlib.tables import BOX

BAR_SECONDS = 10.0
# Arguments of `main` with which it takes about a second: the tests run it so.
SMALLEST = {"images": 30, "boxes": 3}


def write_case(folder: Path, images: int, boxes: int, seed: int = 0) -> None:
    """Truth and submission.csv of random answers in `folder`; one study an image, two boxes on two thirds of the images."""
    rng = np.random.default_rng(seed)
    names = [f"{number:012x}" for number in range(images)]
    classes = rng.integers(4, size=images)
    truth = pd.DataFrame({"id": [f"{name}_study" for name in names]})
    for place, column in enumerate(STUDY_LABEL_COLUMNS):
        truth[column] = (classes == place).astype(int)
    truth.to_csv(folder / "train_study_level.csv", index=False)
    corner, side = rng.uniform(0, 1500, (images, 2, 2)), rng.uniform(300, 1000, (images, 2, 2))
    drawn_boxes = np.concatenate([corner, side], axis=2).tolist()
    drawn = [
        [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in found] if positive else []
        for found, positive in zip(drawn_boxes, classes, strict=True)
    ]
    pd.DataFrame(
        {
            "id": [f"{name}_image" for name in names],
            "boxes": [str(found) if found else "" for found in drawn],
            "label": ["opacity" if found else "none" for found in drawn],
            "StudyInstanceUID": names,
        }
    ).to_csv(folder / "train_image_level.csv", index=False)
    start = np.repeat(corner[:, 0], boxes, axis=0) + rng.normal(0, 100, (images * boxes, 2))
    found = pd.DataFrame(np.hstack([start, start + rng.uniform(300, 1000, start.shape)]), columns=list(BOX))
    found.insert(0, "image_id", np.repeat(names, boxes))
    found.insert(1, "score", rng.uniform(0.001, 1, len(found)))
    studies = pd.DataFrame(rng.dirichlet(np.ones(4), images), columns=list(STUDY_CLASSES)).assign(study_id=names)
    nones = pd.DataFrame({"image_id": names, "none": rng.uniform(size=images)})
    write_submission(folder / "submission.csv", submission_ids(names, names), studies, nones, found)


def main(images: int = 6334, boxes: int = 100) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        write_case(folder, images, boxes)
        written = time.perf_counter()
        score_files(folder, folder / "submission.csv")
        scored = time.perf_counter()
        faults = validate(folder / "submission.csv", folder / "submission.csv")
        validated = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{images} images with {boxes} boxes each (bar for scoring: {BAR_SECONDS:.0f} s)")
    print(f"make and write {written - began:6.1f} s")
    print(f"score          {scored - written:6.1f} s")
    print(f"validate       {validated - scored:6.1f} s, {len(faults)} faults")
    print(f"peak memory    {memory:6.0f} MB")


if __name__ == "__main__":
    typer.run(main)
