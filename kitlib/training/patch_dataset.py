"""Data set of lung patches of cached X-rays: one patch per image for training, several per image for validation."""

import mmap
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.device import derived_seed
from kitlib.lungs.crop import choose_finder, find_lungs
from kitlib.lungs.finders import LungFinder
from kitlib.models.patches import PatchCanvas, cut_patches, image_seed, join_centres, patch_canvas
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override
from kitlib.training import kept_memory
from kitlib.training.augmentation import Augmentation
from kitlib.training.xray_dataset import CanvasCache, Examples, FrameCache
from kitlib.xrays.cache import CachedXray, DecodedXrays


class PatchDataset(Examples):
    """Data set of lung patches: one example per row of `images`, in the same order.

    With `augment`, examples are for training: dicts with the keys of an `XrayDataset` example. `pixels`, uint8 (side, side),
    is one lung patch; the value of `none` is NaN, that of `boxes` empty. The patch's centre and its augmentation depend on
    `seed` and the key (epoch, index) alone.

    Without `augment`, examples are for validation: dicts with `label`, `index`, `canvas` and `centres`. `canvas`, uint8
    (side, side), is the image on the recipe's canvas, black outside the lungs. `centres`, int64 (k, 2), has the row and the
    column of each patch's centre on the canvas; k is the recipe's `validation_patches`. Centres depend on the image_id
    alone.

    The argument `boxes` is ignored; it exists for compatibility with `XrayDataset`. An image without usable lungs is used as
    a single patch (see `kitlib.models.patches.patch_canvas`); `lungs_missed` counts such images.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        cache: DecodedXrays,
        recipe: PatchRecipe,
        augment: bool = False,
        seed: int = 0,
        lungs: LungFinder | None = None,
    ) -> None:
        self.cache, self.recipe, self.seed = cache, recipe, seed
        self.image_ids, side = images.image_id.tolist(), recipe.image_size if augment else recipe.canvas
        self.example_bytes = side**2
        self.label = labels.set_index("id").reindex(images.study_id).to_numpy(np.float32)
        # canvas=image_size, because patches must not be cropped again.
        self.augmentation = Augmentation(override(recipe, canvas=recipe.image_size)) if augment else None
        self.finder = choose_finder(recipe.lungs, lungs)
        self.frame_cache = FrameCache(len(self))
        self.canvas_cache = PatchCanvasCache(len(self), recipe)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        canvas = self._read_canvas(index)
        example = {"label": torch.from_numpy(self.label[index]), "index": index}
        if self.augmentation is None:
            centres = canvas.centres(self.recipe.validation_patches, image_seed(self.image_ids[index]))
            return example | {"canvas": torch.from_numpy(canvas.pixels), "centres": centres}
        # The additional 3 makes this seed differ from that of the augmentation.
        ((row, column),) = canvas.centres(1, derived_seed(self.seed, epoch, index, 3))
        patch = cut_patches(torch.from_numpy(canvas.pixels)[None], torch.tensor([[0, row, column]]), canvas.side)[0].numpy()
        patch, _ = self.augmentation(patch, np.zeros((0, 4)), derived_seed(self.seed, epoch, index))
        unknown = {
            "none": torch.tensor(torch.nan),
            "boxes": torch.zeros(0, 4),
            "findings": torch.zeros(0, dtype=torch.int64),
        }
        return example | unknown | {"pixels": torch.from_numpy(patch)}

    def lungs_missed(self) -> int:
        """Return the number of images that are used as a single patch, because they have no usable lungs.

        Reads all images that have not been read yet.
        """
        for index in np.flatnonzero(self.frame_cache.status == 0).tolist():
            self._read_canvas(index)
        return int((self.frame_cache.status == FrameCache.MISSED).sum())

    def _read_canvas(self, index: int) -> PatchCanvas:
        cached = self.canvas_cache.get(index)
        if cached is not None:
            return cached
        xray = self.cache.read(self.image_ids[index])
        (lungs,) = find_lungs(self.finder, [xray], masked=True)
        canvas = patch_canvas(xray, lungs, self.recipe)
        self.frame_cache.put(index, None if canvas.mask is None else lungs.frame)
        self.canvas_cache.put(index, canvas, xray)
        return canvas


class PatchCanvasCache:
    """In-memory cache of patch canvases and their lung masks, shared by forked workers.

    Masks are stored with one bit per pixel. If memory does not suffice for `count` images, only the first images are cached.
    """

    def __init__(self, count: int, recipe: PatchRecipe) -> None:
        self.side, self.patch = recipe.canvas, recipe.image_size
        packed = -(-(self.side**2) // 8)
        capacity = kept_memory.CANVASES.reserve(self, count, self.side**2 + packed)
        self.canvases = CanvasCache(capacity, self.side)
        self.masks = np.frombuffer(mmap.mmap(-1, max(1, capacity * packed)), np.uint8)[: capacity * packed].reshape(
            capacity, packed
        )

    def get(self, index: int) -> PatchCanvas | None:
        """Return the canvas of image `index`, or None if no canvas is cached. The canvas's pixels must not be changed."""
        cached = self.canvases.get(index) if index < len(self.masks) else None
        if cached is None:
            return None
        mask = np.unpackbits(self.masks[index], count=self.side**2).view(bool).reshape(self.side, self.side)
        return PatchCanvas(cached[0], mask if mask.any() else None, self.patch)

    def put(self, index: int, canvas: PatchCanvas, xray: CachedXray) -> None:
        """Store the canvas of image `index`, made from `xray`. Does nothing if the cache has no space for this index."""
        if index >= len(self.masks):
            return
        if canvas.mask is not None:
            self.masks[index] = np.packbits(canvas.mask)
        self.canvases.put(
            index, canvas.pixels, xray.rows, xray.columns
        )  # written last, because this marks canvas and mask as complete


def collate_canvases(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of n validation examples of a `PatchDataset`, as a dict of tensors.

    `canvases` is uint8 (n, side, side), `label` float32 (n, classes), `index` (n,). `where` is int64 (m, 3), one row per
    patch: index of the canvas in the batch, row and column of the patch's centre on the canvas. For training examples use
    `kitlib.training.xray_dataset.collate`.
    """
    return {
        "canvases": torch.stack([example["canvas"] for example in examples]),
        "where": join_centres([example["centres"] for example in examples]),
        "label": torch.stack([example["label"] for example in examples]),
        "index": torch.tensor([example["index"] for example in examples]),
    }
