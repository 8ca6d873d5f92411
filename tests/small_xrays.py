"""A synthetic data set in memory: grey images whose brightness encodes their study's class, with a white block per box."""

import time
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from kitlib.classes import STUDY_CLASSES
from kitlib.letterbox import letterbox
from kitlib.recipes.fields import StudyRecipe
from kitlib.training import kept_memory
from kitlib.xrays.cache import CachedXray

ROWS, COLUMNS = 80, 100  # original size; the decoded copies have half of it
BOX = (20.0, 10.0, 60.0, 50.0)

RECIPE = StudyRecipe(
    backbone="test_resnet", image_size=32, epochs=3, batch_size=4, optimizer="adamw", learning_rate=1e-3, hidden=16
)


@dataclass
class SmallXrays:
    """Tables and decoded images: two images a study, two studies a patient, classes in turn, one box unless negative."""

    count: int = 32
    folds: int = 2
    pixels: dict[str, np.ndarray] = field(init=False)
    longest_side: int = max(ROWS, COLUMNS) // 2

    def __post_init__(self) -> None:
        numbers = np.arange(self.count)
        self.image_ids = [f"image{number:03d}" for number in numbers]
        kinds = numbers // 2 % 4
        study_ids = [f"study{number // 2:03d}" for number in numbers]
        self.images = pd.DataFrame(
            {
                "image_id": self.image_ids,
                "study_id": study_ids,
                "patient_id": [f"patient{number // 4:03d}" for number in numbers],
                "path": "",
                "rows": ROWS,
                "columns": COLUMNS,
                "source": "small",
                "view": "",
            }
        )
        self.labels = pd.DataFrame(np.eye(4)[kinds[::2]], columns=list(STUDY_CLASSES))
        self.labels.insert(0, "id", study_ids[::2])
        self.boxes = pd.DataFrame(
            [(image_id, *BOX) for image_id, kind in zip(self.image_ids, kinds, strict=True) if kind],
            columns=["image_id", "xmin", "ymin", "xmax", "ymax"],
        )
        # The fold changes after every second patient, so that each fold has all four classes.
        self.fold_table = pd.DataFrame({"id": self.image_ids, "fold": numbers // 8 % self.folds})
        self.pixels = {}
        placement = letterbox(ROWS, COLUMNS, (ROWS // 2, COLUMNS // 2))
        for image_id, kind in zip(self.image_ids, kinds, strict=True):
            noise = np.random.default_rng(int(image_id[5:])).integers(0, 20, (ROWS // 2, COLUMNS // 2))
            picture = (noise + 50 * kind).astype(np.uint8)
            if kind:
                xmin, ymin, xmax, ymax = placement.boxes_to_canvas(np.array(BOX))[0].round().astype(int)
                picture[ymin:ymax, xmin:xmax] = 255
            self.pixels[image_id] = picture

    def tables(self) -> dict[str, pd.DataFrame]:
        return {"images": self.images, "labels": self.labels, "boxes": self.boxes, "folds": self.fold_table}

    def read(self, image_id: str) -> CachedXray:
        return CachedXray(image_id=image_id, pixels=self.pixels[image_id], rows=ROWS, columns=COLUMNS)

    def stream(self):
        return (self.read(image_id) for image_id in self.image_ids)


class TwoFindings(SmallXrays):
    """SmallXrays with black discs and white squares at random places: of four images, one each has none, either and both."""

    CLASSES = ("disc", "square")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = []
        for number, image_id in enumerate(self.image_ids):
            rng = np.random.default_rng(number)
            picture = rng.integers(90, 130, (ROWS // 2, COLUMNS // 2)).astype(np.uint8)
            # The disc is in the left half or the right one, the square in the other.
            left = rng.permutation([2, COLUMNS // 4 + 2])
            for code, (name, grey) in enumerate(zip(self.CLASSES, (0, 255), strict=True)):
                x, y = left[code] + rng.integers(0, 8), rng.integers(0, ROWS // 2 - 13)
                if number % 4 & 1 << code:
                    near = np.hypot(*(np.mgrid[:13, :13] - 6)) < 6.5 if name == "disc" else np.ones((13, 13), bool)
                    picture[y : y + 13, x : x + 13][near] = grey
                    rows.append((image_id, name, 2 * x, 2 * y, 2 * x + 26, 2 * y + 26))
            self.pixels[image_id] = picture
        self.boxes = pd.DataFrame(rows, columns=["image_id", "finding", "xmin", "ymin", "xmax", "ymax"])


def wait_for_a_minute(*_):
    """Stand in for a worker's task with a file that takes long; at module level, so that a new process can import it."""
    time.sleep(60)


def fail_to_train(*_):
    """Stand in for train_fold; at module level, like `wait_for_a_minute`."""
    raise ValueError("out of luck")


def limit_kept(monkeypatch, size: int) -> None:
    """Let data sets keep canvases of `size` bytes in all."""
    monkeypatch.setattr(kept_memory, "CANVASES", kept_memory.KeptMemory(lambda: int(size / kept_memory.SHARE)))
