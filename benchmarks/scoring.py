"""Time and memory to score a submission of SIIM's size, from CSV files to the score: 6,334 images with 100 boxes each.

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
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"images": 30, "boxes": 3}


def write_case(folder: Path, images: int, boxes: int, seed: int = 0) -> None:
    """Write a random ground truth and submission.csv: one image per study, two true boxes on three of four images."""
    rng = np.random.default_rng(seed)
    names = [f"{number:012x}" for number in range(images)]
    classes = rng.integers(4, size=images)
    truth = pd.DataFrame({"id": [f"{name}_study" for name in names]})
    for index, column in enumerate(STUDY_LABEL_COLUMNS):
        truth[column] = (classes == index).astype(int)
    truth.to_csv(folder / "train_study_level.csv", index=False)
    corner, side = rng.uniform(0, 1500, (images, 2, 2)), rng.uniform(300, 1000, (images, 2, 2))
    random_boxes = np.concatenate([corner, side], axis=2).tolist()
    true_boxes = [
        [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in two_boxes] if positive else []
        for two_boxes, positive in zip(random_boxes, classes, strict=True)
    ]
    pd.DataFrame(
        {
            "id": [f"{name}_image" for name in names],
            "boxes": [str(image_boxes) if image_boxes else "" for image_boxes in true_boxes],
            "label": ["opacity" if image_boxes else "none" for image_boxes in true_boxes],
            "StudyInstanceUID": names,
        }
    ).to_csv(folder / "train_image_level.csv", index=False)
    start = np.repeat(corner[:, 0], boxes, axis=0) + rng.normal(0, 100, (images * boxes, 2))
    detections = pd.DataFrame(np.hstack([start, start + rng.uniform(300, 1000, start.shape)]), columns=list(BOX))
    detections.insert(0, "image_id", np.repeat(names, boxes))
    detections.insert(1, "score", rng.uniform(0.001, 1, len(detections)))
    studies = pd.DataFrame(rng.dirichlet(np.ones(4), images), columns=list(STUDY_CLASSES)).assign(study_id=names)
    nones = pd.DataFrame({"image_id": names, "none": rng.uniform(size=images)})
    write_submission(folder / "submission.csv", submission_ids(names, names), studies, nones, detections)


def main(images: int = 6334, boxes: int = 100) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        write_case(folder, images, boxes)
        written = time.perf_counter()
        score_files(folder, folder / "submission.csv")
        scored = time.perf_counter()
        faults = validate(folder / "submission.csv", folder / "submission.csv")
        validated = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{images} images with {boxes} boxes each (scoring should take at most {BAR_SECONDS:.0f} s)")
    print(f"make and write {written - start:6.1f} s")
    print(f"score          {scored - written:6.1f} s")
    print(f"validate       {validated - scored:6.1f} s, {len(faults)} faults")
    print(f"peak memory    {memory:6.0f} MB")


if __name__ == "__main__":
    typer.run(main)
