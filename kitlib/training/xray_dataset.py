"""Cached X-rays as training examples: uint8 canvases, targets and augmentation that repeats exactly."""

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kitlib.device import derived_seed
from kitlib.letterbox import PLACEMENTS, Placement
from kitlib.lungs.canvas import canvas_of
from kitlib.lungs.crop import boxes_shown, crop, finder_for, seen_lungs
from kitlib.lungs.finders import LungFinder, Lungs
from kitlib.recipes.fields import WithBackbone
from kitlib.tables import BOX
from kitlib.training import data_parallel
from kitlib.training.augmentation import Augmentation
from kitlib.xrays.cache import CachedXray, DecodedXrays

# Canvases stay in memory where a data set's fit: reading a cache entry and resizing it costs more than augmentation. SIIM's
# at 512 pixels a side take 1.6 GB, at 1024 they are too many. Crops of lungs are kept beside whole images while both fit.
KEPT_BYTES = 2**32
# What a recipe's `trained_on` shows of an image.
SHOWN = {"full": ("full",), "lungs": ("lungs",), "either": ("full", "lungs")}


class Examples(Dataset[dict[str, Any]]):
    """One example an image, in the order of `image_ids`; a key is an index, or (epoch, index) from `EpochSampler`."""

    image_ids: list[str]

    def __len__(self) -> int:
        return len(self.image_ids)


class XrayDataset(Examples):
    """One example an image of `images`, in its order.

    An example is a dict: `pixels` uint8 (side, side), grey, on the recipe's canvas; `label` float32 (classes,) in the order
    of the table labels, NaN where unknown; `none` float32, the probability that the image has no opacity: that of a column
    `none` of `images` where it is known, else 1 without a box and 0 with one, or NaN where a column `boxes_known` is False
    (nobody has marked opacities there); `boxes` float32 (k, 4) in canvas pixels, moved with the image; `index`, its row in
    `images`.

    The key is an index, or (epoch, index) as `EpochSampler` gives it: augmentation depends on `seed` and the key alone,
    whatever process draws it, so a resumed training sees what an uninterrupted one sees.

    A recipe trained on "lungs" sees their frame in place of the whole image; one trained on "either" sees the one or the
    other as seed and key decide, and the whole for an index alone, as in validation. A masked one sees black outside of
    their mask, and the probe "outside_lungs" black inside (see kitlib.lungs.canvas). `lungs` finds them where the recipe's
    lungs are "masks" (see kitlib.lungs.crop). Where they are not found, frame or, where the mask counts, mask, the whole
    image is seen as it is; `lungs_missed` counts these.

    Of a recipe's larger `canvas`, which is what is kept, training sees a square of image_size anywhere, and what is not
    augmented the one in the middle.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        cache: DecodedXrays,
        recipe: WithBackbone,
        augment: bool = False,
        seed: int = 0,
        lungs: LungFinder | None = None,
    ) -> None:
        self.cache, self.side, self.seed, self.canvas = cache, recipe.image_size, seed, canvas_of(recipe)
        self.image_ids = images.image_id.tolist()
        self.place = PLACEMENTS[recipe.placement]
        self.label = labels.set_index("id").reindex(images.study_id).to_numpy(np.float32)
        corners = {image_id: rows[list(BOX)].to_numpy(float) for image_id, rows in boxes.groupby("image_id")}
        self.boxes = [corners.get(image_id, np.zeros((0, 4))) for image_id in self.image_ids]
        self.none = np.array([float(not len(each)) for each in self.boxes], dtype=np.float32)
        if "boxes_known" in images.columns:
            self.none[images.boxes_known.eq(False).to_numpy()] = np.nan
        if "none" in images.columns:
            told = images.none.to_numpy(np.float32)
            if ((told < 0) | (told > 1)).any():
                raise ValueError(f"images, column none: wanted 0..1 or NaN, got {np.nanmin(told)} to {np.nanmax(told)}")
            self.none = np.where(np.isnan(told), self.none, told)
        self.augmentation = Augmentation(recipe) if augment else None
        self.finder, self.shown = finder_for(recipe.lungs, lungs), SHOWN[recipe.trained_on]
        self.frames = KeptFrames(len(self))
        fitting = min(len(self.shown), KEPT_BYTES // max(1, len(self) * self.canvas.whole**2))
        self.kept = KeptCanvases(fitting * len(self), self.canvas.whole)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, place = self._laid(index, self._drawn(key))
        # Boxes are cut at the canvas's edges, and gone where less than a pixel a side is left.
        if self.augmentation is None:
            pixels, boxes = self.canvas.middle_of(pixels), boxes_shown(self.canvas.middle(place), self.boxes[index])
        else:
            boxes = boxes_shown(place, self.boxes[index])
            pixels, boxes = self.augmentation(pixels, boxes, derived_seed(self.seed, epoch, index))
        return {
            "pixels": torch.from_numpy(pixels),
            "label": torch.from_numpy(self.label[index]),
            "none": torch.tensor(self.none[index]),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "index": index,
        }

    def lungs_missed(self) -> int:
        """How many of all images are seen whole for want of their lungs, found out now for those that none has asked for."""
        if not self.canvas.needs_mask and "lungs" not in self.shown:
            return 0
        for index in np.flatnonzero(self.frames.asked == 0).tolist():
            self._lungs(index, self.cache.read(self.image_ids[index]))
        return int((self.frames.asked == KeptFrames.MISSED).sum())

    def _drawn(self, key: int | tuple[int, int]) -> str:
        """The canvas of `shown` that the key shows."""
        return self.shown[derived_seed(self.seed, *key, 2) % len(self.shown) if isinstance(key, tuple) else 0]

    def _laid(self, index: int, canvas: str) -> tuple[np.ndarray, Placement]:
        """The whole canvas with the image on it, and where it lies there."""
        kept_at = self.shown.index(canvas) * len(self) + index
        keeps = kept_at < len(self.kept.pixels)
        kept = self.kept.get(kept_at) if keeps else None
        if kept is not None:
            pixels, rows, columns = kept
            return pixels, self._whole(canvas, self.frames.get(index), rows, columns)
        xray = self.cache.read(self.image_ids[index])
        looks = self.canvas.needs_mask or canvas == "lungs"
        lungs = self._lungs(index, xray) if looks else Lungs(None)
        place = self._whole(canvas, lungs, xray.rows, xray.columns)
        pixels = self.canvas.lay(self.canvas.grey(xray.pixels, lungs.mask), place)
        if keeps:
            self.kept.put(kept_at, pixels, xray.rows, xray.columns)
        return pixels, place

    def _whole(self, canvas: str, lungs: Lungs, rows: int, columns: int) -> Placement:
        """Where an image lies on the whole canvas."""
        return crop(self.place, lungs.frame if canvas == "lungs" else None, rows, columns, self.canvas.whole)

    def _lungs(self, index: int, xray: CachedXray) -> Lungs:
        """What the recipe takes of the image's lungs. Frames are kept; masks, which are large, are found each time."""
        if not self.canvas.needs_mask and self.frames.asked[index]:
            return self.frames.get(index)
        (lungs,) = seen_lungs(self.finder, [xray], self.canvas.needs_mask)
        self.frames.put(index, lungs.frame)
        return lungs


class KeptFrames:
    """Frames of lungs, in original pixels, in memory that forked workers share; `asked` (n,) says what is known of each."""

    FOUND, MISSED = 1, 2

    def __init__(self, count: int) -> None:
        self.frames = np.frombuffer(mmap.mmap(-1, max(32, count * 32)), np.float64)[: count * 4].reshape(count, 4)
        self.asked = np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]

    def get(self, index: int) -> Lungs:
        return Lungs(self.frames[index].copy() if self.asked[index] == self.FOUND else None)

    def put(self, index: int, frame: np.ndarray | None) -> None:
        if frame is not None:
            self.frames[index] = frame
        self.asked[index] = self.MISSED if frame is None else self.FOUND  # last, as in KeptCanvases


class KeptCanvases:
    """Canvases uint8 (side, side) and the original sizes of their images, in memory that forked workers share.

    Each canvas is there once, whichever worker made it; the system gives the memory as it is filled.
    """

    def __init__(self, count: int, side: int) -> None:
        # Anonymous and not in /dev/shm, which containers keep small.
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, count * side**2)), np.uint8)[: count * side**2]
        self.pixels = self.pixels.reshape(count, side, side)
        self.sizes = np.frombuffer(mmap.mmap(-1, max(8, count * 8)), np.int32)[: count * 2].reshape(count, 2)

    def get(self, index: int) -> tuple[np.ndarray, int, int] | None:
        """Pixels, which must not be written to, rows and columns; None where nothing was put."""
        columns, rows = self.sizes[index].tolist()
        return (self.pixels[index], rows, columns) if rows else None

    def put(self, index: int, pixels: np.ndarray, rows: int, columns: int) -> None:
        self.pixels[index] = pixels
        self.sizes[index, 0] = columns
        self.sizes[index, 1] = rows  # last: it tells the other workers that the canvas is whole


class EpochSampler(Sampler[tuple[int, int]]):
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


def batches(
    dataset: Examples,
    batch_size: int,
    workers: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    joined: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader:
    """Batches as `joined` makes them of examples, by default `collate`.

    Shuffled ones come in a new order each epoch and leave out the last, smaller one.

    Where several processes train together, each gets its share of every shuffled batch, or every so-manieth image.
    """
    (rank, processes), batch_size = data_parallel.share(), min(batch_size, len(dataset))
    if shuffle:
        # A last batch may be a single image, on which batch norm fails: it is left out.
        chosen: dict[str, Any] = {"batch_sampler": data_parallel.SharedBatches(EpochSampler(len(dataset), seed), batch_size)}
    else:
        chosen = {"sampler": range(rank, len(dataset), processes), "batch_size": max(1, batch_size // processes)}
    return DataLoader(
        dataset,
        **chosen,
        collate_fn=joined or collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Kept canvases are shared with forked processes alone.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Its own stream: the seeds of workers would otherwise be drawn from dropout's.
        generator=torch.Generator(),
        worker_init_fn=_one_thread,
    )


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked `pixels` (n, side, side), `label` (n, classes), `none` (n,), `index` (n,); `boxes`, n tensors (k, 4)."""
    stacked = {name: torch.stack([each[name] for each in examples]) for name in ("pixels", "label", "none")}
    index = torch.tensor([each["index"] for each in examples])
    return {**stacked, "boxes": [each["boxes"] for each in examples], "index": index}


def _one_thread(_: int) -> None:
    """A worker a core: more threads in each only get in each other's way."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
