"""Small synthetic chests in memory (two dark ellipses, a heart between them), with their masks in a folder."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kitlib.classes import MASK_CODES
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.tables import empty_table
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import MaskStore

ROWS, COLUMNS = 120, 100  # original size; the cache holds half of it

# Very narrow, with hardly any augmentation: it learns to tell dark from bright in a few dozen steps.
RECIPE = SegmenterRecipe(
    network="resunet",
    width=0.0625,
    image_size=32,
    epochs=3,
    batch_size=4,
    learning_rate=0.01,
    rotate_degrees=5.0,
    shear_p=0.0,
    gamma_drawn=(0.9, 1.1),
    salt_pepper_p=0.0,
    blur_p=0.0,
    noise_p=0.0,
)
# Learns the black caps of `with_pneumothorax` in seconds.
SPARSE = SparseSegmenterRecipe(
    network="resunet",
    width=0.0625,
    image_size=32,
    epochs=10,
    patience=100,
    positives=(0.4, 0.2),
    learning_rate=0.01,
    schedule="cosine",
    rotate_degrees=5.0,
    shift=0.0,
    scale_x=(1.0, 1.0),
    scale_y=(1.0, 1.0),
    brightness_contrast=0.0,
    top=0.5,
)


@dataclass
class SmallMasks:
    """`count` images, one per study and two per patient, in `folds` alternating folds; `sides`: one mask code per lung.

    If `sparse`, a quarter of the images has a pneumothorax and the masks show nothing else, so that the others are empty.
    """

    folder: Path
    count: int = 16
    folds: int = 2
    sides: bool = False
    sparse: bool = False
    pixels: dict[str, np.ndarray] = field(init=False)
    longest_side: int = max(ROWS, COLUMNS) // 2

    def __post_init__(self) -> None:
        numbers = np.arange(self.count)
        self.image_ids = [f"chest{number:03d}" for number in numbers]
        self.images = pd.DataFrame(
            {
                "image_id": self.image_ids,
                "study_id": self.image_ids,
                "patient_id": [f"patient{number // 2:03d}" for number in numbers],
                "path": "",
                "rows": ROWS,
                "columns": COLUMNS,
                "source": "small",
                "view": "",
                "convention": "lung_fields",
            }
        )
        self.labels = pd.DataFrame({"id": self.image_ids, "ill": numbers // 2 % 2 * 1.0, "well": 1.0 - numbers // 2 % 2})
        self.boxes = empty_table("boxes")
        self.fold_table = pd.DataFrame({"id": self.image_ids, "fold": numbers // 2 % self.folds})
        self.masks, self.pixels, codes = MaskStore(self.folder), {}, {}
        for number, image_id in enumerate(self.image_ids):
            self.pixels[image_id], codes[image_id] = chest(number, self.sides)
            if self.sparse:
                self.pixels[image_id], codes[image_id] = with_pneumothorax(self.pixels[image_id], number)
        self.masks.add(codes)

    def read(self, image_id: str) -> CachedXray:
        return CachedXray(image_id=image_id, pixels=self.pixels[image_id], rows=ROWS, columns=COLUMNS)

    def stream(self):
        return (self.read(image_id) for image_id in self.image_ids)

    def tables(self) -> dict[str, pd.DataFrame]:
        return {"images": self.images, "labels": self.labels, "boxes": self.boxes, "folds": self.fold_table}


def chest(number: int, sides: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and mask codes, each uint8 (60, 50), of a chest; `number` determines its position and its noise."""
    rng = np.random.default_rng(number)
    middle = 25 + int(rng.integers(-2, 3))
    codes = np.zeros((ROWS // 2, COLUMNS // 2), np.uint8)
    cv2.ellipse(codes, (middle + 3, 38), (6, 9), 0, 0, 360, MASK_CODES["heart"], -1)
    for name, x in (("right_lung", middle - 11), ("left_lung", middle + 11)):
        cv2.ellipse(codes, (x, 30), (8, 19), 0, 0, 360, MASK_CODES[name if sides else "lungs"], -1)
    lungs = codes > 0
    lungs &= codes != MASK_CODES["heart"]
    pixels = np.where(lungs, 60, np.where(codes > 0, 230, 170)) + rng.integers(-15, 16, codes.shape)
    return pixels.clip(0, 255).astype(np.uint8), codes if sides else np.where(lungs, codes, 0).astype(np.uint8)


def with_pneumothorax(pixels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and mask codes of a chest; a quarter of them has a black cap at the top of a lung."""
    codes = np.zeros_like(pixels)
    if number % 8 in (1, 3):
        cv2.ellipse(codes, (14 if number % 16 < 8 else 36, 17), (6, 6), 0, 0, 360, MASK_CODES["pneumothorax"], -1)
    return np.where(codes > 0, pixels // 8, pixels).astype(np.uint8), codes
