"""Cached X-rays as training examples: uint8 canvases, targets and augmentation that repeats exactly."""

import os
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# albumentations asks the network for its newest version, for up to ten seconds where there is none.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations

from kitlib.cache import XrayCache
from kitlib.device import derived_seed
from kitlib.geometry import PLACEMENTS, clip_boxes
from kitlib.recipes import TrainingRecipe
from kitlib.tables import BOX

# Canvases stay in memory as long as a data set's fit; decoding a cache entry and resizing it costs more than augmentation.
KEPT_BYTES = 2**29


class XrayDataset(Dataset):
    """One example an image of `images`, in its order.

    An example is a dict: `pixels` uint8 (side, side), grey, on the recipe's canvas; `label` float32 (classes,) in the order
    of the table labels, NaN where unknown; `none` float32, the probability that the image has no opacity: that of a column
    `none` of `images` where it is known, else 1 without a box and 0 with one; `boxes` float32 (k, 4) in canvas pixels,
    moved with the image; `index`, its row in `images`.

    The key is an index, or (epoch, index) as `EpochSampler` gives it: augmentation depends on `seed` and the key alone,
    whatever process draws it, so a resumed training sees what an uninterrupted one sees.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        cache: XrayCache,
        recipe: TrainingRecipe,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.cache, self.side, self.seed = cache, recipe.image_size, seed
        self.image_ids = images.image_id.tolist()
        self.place = _placement(recipe)
        self.label = labels.set_index("id").reindex(images.study_id).to_numpy(np.float32)
        corners = {image_id: rows[list(BOX)].to_numpy(float) for image_id, rows in boxes.groupby("image_id")}
        self.boxes = [corners.get(image_id, np.zeros((0, 4))) for image_id in self.image_ids]
        self.none = np.array([float(not len(each)) for each in self.boxes], dtype=np.float32)
        if "none" in images.columns:
            told = images.none.to_numpy(np.float32)
            if ((told < 0) | (told > 1)).any():
                raise ValueError(f"images, column none: wanted 0..1 or NaN, got {np.nanmin(told)} to {np.nanmax(told)}")
            self.none = np.where(np.isnan(told), self.none, told)
        self.augmentation = augmentation(recipe) if augment else None
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.keep = len(self.image_ids) * self.side**2 <= KEPT_BYTES

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, boxes = self._canvas(index)
        if self.augmentation is not None:
            self.augmentation.set_random_seed(derived_seed(self.seed, epoch, index))
            changed = self.augmentation(image=pixels, bboxes=boxes)
            pixels, boxes = changed["image"], np.asarray(changed["bboxes"]).reshape(-1, 4)
        return {
            "pixels": torch.from_numpy(pixels),
            "label": torch.from_numpy(self.label[index]),
            "none": torch.tensor(self.none[index]),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "index": index,
        }

    def _canvas(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.kept:
            return self.kept[index]
        xray = self.cache.read(self.image_ids[index])
        placement = self.place(xray.rows, xray.columns, self.side)
        boxes, inside = clip_boxes(self.boxes[index], xray.rows, xray.columns)
        canvas = placement.image(xray.pixels), placement.boxes_to_canvas(boxes[inside])
        if self.keep:
            self.kept[index] = canvas
        return canvas


class EpochSampler(Sampler):
    """Keys (epoch, index) in an order that depends on the seed and the epoch alone.

    The epoch travels in the key because worker processes that outlive an epoch hold their own copy of the data set.
    Lightning calls `set_epoch` before each epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


def batches(dataset: XrayDataset, batch_size: int, workers: int = 0, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Batches as `collate` makes them; shuffled ones come in a new order each epoch and leave out the last, smaller one."""
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        sampler=EpochSampler(len(dataset), seed) if shuffle else None,
        # Batch norm fails on a single image, which a last batch may be.
        drop_last=shuffle,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own stream: the seeds of workers would otherwise be drawn from dropout's.
        generator=torch.Generator(),
        worker_init_fn=_one_thread,
    )


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked `pixels` (n, side, side), `label` (n, classes), `none` (n,), `index` (n,); `boxes`, n tensors (k, 4)."""
    batch = {name: torch.stack([each[name] for each in examples]) for name in ("pixels", "label", "none")}
    batch["boxes"] = [each["boxes"] for each in examples]
    batch["index"] = torch.tensor([each["index"] for each in examples])
    return batch


def augmentation(recipe: TrainingRecipe) -> albumentations.Compose:
    """Mirror, turn (half of the images, black around), change brightness and contrast (half), as strongly as `recipe` says.

    A turned box becomes the frame of its inscribed ellipse: that of its corners would be too large for round findings.
    """
    strength = recipe.brightness_contrast
    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=recipe.horizontal_flip),
            albumentations.Affine(
                rotate=(-recipe.rotate_degrees, recipe.rotate_degrees),
                rotate_method="ellipse",
                border_mode=cv2.BORDER_CONSTANT,
                fill=0,
                p=0.5 if recipe.rotate_degrees else 0,
            ),
            albumentations.RandomBrightnessContrast(strength, strength, p=0.5 if strength else 0),
        ],
        bbox_params=albumentations.BboxParams("pascal_voc", label_fields=[], clip=True, min_width=1, min_height=1),
    )


def _placement(recipe: TrainingRecipe):
    if recipe.placement not in PLACEMENTS:
        raise ValueError(f"recipe.placement is {recipe.placement!r}; there are: {', '.join(PLACEMENTS)}")
    return PLACEMENTS[recipe.placement]


def _one_thread(_: int) -> None:
    """A worker a core: more threads in each only get in each other's way."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
