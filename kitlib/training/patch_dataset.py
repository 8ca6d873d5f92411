"""Cached X-rays as patches of their lungs: one an image in training, the canvas with its centres in validation."""

import mmap
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.device import derived_seed
from kitlib.lungs.crop import finder_for, seen_lungs
from kitlib.lungs.finders import LungFinder
from kitlib.models.patches import PatchCanvas, cut_patches, image_seed, join_centres, patch_canvas
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override
from kitlib.training.augmentation import Augmentation
from kitlib.training.xray_dataset import KEPT_BYTES, Examples, KeptCanvases, KeptFrames
from kitlib.xrays.cache import CachedXray, DecodedXrays


class PatchDataset(Examples):
    """One example an image of `images`, in its order.

    A training example is a dict as `XrayDataset` makes it, without boxes and with an unknown `none`: `pixels` uint8 (side,
    side) is one patch of the lungs. Its centre and its augmentation depend on `seed` and the key (epoch, index) alone. A
    validation example (`augment` False) has in place of it `canvas`, uint8 (canvas, canvas), and `centres`, int64 (k, 2), of
    the recipe's `validation_patches`, which follow from the image's name.

    Boxes are taken as `XrayDataset` takes them, and not shown. `lungs_missed` counts the images that are one patch, see
    `kitlib.models.patches.patch_canvas`.
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
        self.image_ids = images.image_id.tolist()
        self.label = labels.set_index("id").reindex(images.study_id).to_numpy(np.float32)
        # It is given patches, not canvases to crop.
        self.augmentation = Augmentation(override(recipe, canvas=recipe.image_size)) if augment else None
        self.finder = finder_for(recipe.lungs, lungs)
        self.frames = KeptFrames(len(self))
        self.kept = KeptPatchCanvases(len(self), recipe)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        canvas = self._canvas(index)
        told = {"label": torch.from_numpy(self.label[index]), "index": index}
        if self.augmentation is None:
            drawn = canvas.centres(self.recipe.validation_patches, image_seed(self.image_ids[index]))
            return told | {"canvas": torch.from_numpy(canvas.pixels), "centres": drawn}
        # Another stream than the augmentation's own.
        ((row, column),) = canvas.centres(1, derived_seed(self.seed, epoch, index, 3))
        patch = cut_patches(torch.from_numpy(canvas.pixels)[None], torch.tensor([[0, row, column]]), canvas.side)[0].numpy()
        patch, _ = self.augmentation(patch, np.zeros((0, 4)), derived_seed(self.seed, epoch, index))
        unknown = {"none": torch.tensor(torch.nan), "boxes": torch.zeros(0, 4)}
        return told | unknown | {"pixels": torch.from_numpy(patch)}

    def lungs_missed(self) -> int:
        """How many of all images are one patch, found out now for those that none has asked for."""
        for index in np.flatnonzero(self.frames.asked == 0).tolist():
            self._canvas(index)
        return int((self.frames.asked == KeptFrames.MISSED).sum())

    def _canvas(self, index: int) -> PatchCanvas:
        kept = self.kept.get(index)
        if kept is not None:
            return kept
        xray = self.cache.read(self.image_ids[index])
        (lungs,) = seen_lungs(self.finder, [xray], masked=True)
        canvas = patch_canvas(xray, lungs, self.recipe)
        self.frames.put(index, None if canvas.mask is None else lungs.frame)
        self.kept.put(index, canvas, xray)
        return canvas


class KeptPatchCanvases:
    """As many canvases with their masks, a bit a pixel, as fit into memory, which forked workers share; the first ones."""

    def __init__(self, count: int, recipe: PatchRecipe) -> None:
        self.side, self.patch = recipe.canvas, recipe.image_size
        packed = -(-(self.side**2) // 8)
        room = min(count, KEPT_BYTES // (self.side**2 + packed))
        self.canvases = KeptCanvases(room, self.side)
        self.masks = np.frombuffer(mmap.mmap(-1, max(1, room * packed)), np.uint8)[: room * packed].reshape(room, packed)

    def get(self, index: int) -> PatchCanvas | None:
        """Its pixels must not be written to; None where nothing was put."""
        kept = self.canvases.get(index) if index < len(self.masks) else None
        if kept is None:
            return None
        mask = np.unpackbits(self.masks[index], count=self.side**2).view(bool).reshape(self.side, self.side)
        return PatchCanvas(kept[0], mask if mask.any() else None, self.patch)

    def put(self, index: int, canvas: PatchCanvas, xray: CachedXray) -> None:
        if index >= len(self.masks):
            return
        if canvas.mask is not None:
            self.masks[index] = np.packbits(canvas.mask)
        self.canvases.put(index, canvas.pixels, xray.rows, xray.columns)  # last: it tells that both are whole


def collate_canvases(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked `canvases` (n, canvas, canvas), `label` (n, classes), `index` (n,); `where` (m, 3), see `join_centres`.

    It joins validation's examples; training's are joined as `XrayDataset`'s are.
    """
    return {
        "canvases": torch.stack([each["canvas"] for each in examples]),
        "where": join_centres([each["centres"] for each in examples]),
        "label": torch.stack([each["label"] for each in examples]),
        "index": torch.tensor([each["index"] for each in examples]),
    }
