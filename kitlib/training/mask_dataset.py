"""Cached X-rays with their masks as training examples: both on one canvas, moved together, the mask's places kept whole."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.device import derived_seed
from kitlib.errors import MaskError
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import on_canvas, placement
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.training.augmentation import MaskAugmentation
from kitlib.training.xray_dataset import KEPT_BYTES, Examples, KeptCanvases
from kitlib.xrays.cache import CachedXray, DecodedXrays
from kitlib.xrays.mask_store import MaskStore


class MaskDataset(Examples):
    """One example an image of `images`, in its order.

    An example is a dict: `pixels` uint8 (side, side), grey, as the recipe adjusts it, on its canvas; `truth` uint8 (side,
    side), 0 where nothing is, k for the recipe's structure k; `index`, its row in `images`. The key is an index, or (epoch,
    index) as `EpochSampler` gives it, and with the seed it alone decides the augmentation. Raises MaskError for images
    without a mask.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        cache: DecodedXrays,
        masks: MaskStore,
        recipe: SegmenterRecipe,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.cache, self.masks, self.recipe, self.seed = cache, masks, recipe, seed
        self.image_ids, self.side = images.image_id.tolist(), recipe.image_size
        missing = [image_id for image_id in self.image_ids if image_id not in masks]
        if missing:
            raise MaskError(f"{len(missing)} of {len(self)} images have no mask in {masks.folder}, first {missing[0]}")
        self.augmentation = MaskAugmentation(recipe) if augment else None
        fits = 2 * len(self) * self.side**2 <= KEPT_BYTES
        self.kept = [KeptCanvases(len(self), self.side) for _ in range(2)] if fits else []

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, truth = self._canvas(index)
        if self.augmentation is not None:
            pixels, truth = self.augmentation(pixels, truth, derived_seed(self.seed, epoch, index))
        return {"pixels": torch.from_numpy(pixels), "truth": torch.from_numpy(truth), "index": index}

    def _canvas(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kept:
            # The mask is put last: where it is whole, the image is.
            drawn, shown = (each.get(index) for each in reversed(self.kept))
            if drawn and shown:
                return shown[0], drawn[0]
        xray = self.cache.read(self.image_ids[index])
        place = placement(xray, self.recipe)
        pixels = on_canvas(xray, place, self.recipe)
        truth = truth_on_canvas(self.masks.read(xray.image_id), place, self.recipe, xray)
        for kept, canvas in zip(self.kept, (pixels, truth), strict=False):
            kept.put(index, canvas, xray.rows, xray.columns)
        return pixels, truth


def truth_on_canvas(codes: np.ndarray, place: Placement, recipe: SegmenterRecipe, xray: CachedXray) -> np.ndarray:
    """A label image of the decoded copy's size as places in the recipe's structures, uint8 (side, side).

    Each structure is shrunk by area and cut at one half. Structure "lungs" takes either side. Raises MaskError where the
    mask has another size, or only both lungs as one while the recipe tells the sides apart.
    """
    if codes.shape != xray.pixels.shape:
        raise MaskError(
            f"the mask of {xray.image_id} has {codes.shape} pixels, its image {xray.pixels.shape}; prepare it again"
        )
    if (codes == MASK_CODES["lungs"]).any() and "lungs" not in recipe.structures:
        raise MaskError(
            f"the mask of {xray.image_id} has both lungs as one, the recipe asks for {', '.join(recipe.structures)}; "
            'give overrides {"structures": ["lungs"]}'
        )
    truth = np.zeros((place.canvas_rows, place.canvas_columns), np.uint8)
    for number, name in enumerate(recipe.structures, start=1):
        inside = np.isin(codes, LUNG_CODES) if name == "lungs" else codes == MASK_CODES[name]
        truth[place.image(inside.astype(np.uint8) * 255) > 127] = number
    return truth


def collate_masks(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacked `pixels` and `truth` (n, side, side), and `index` (n,)."""
    batch = {name: torch.stack([each[name] for each in examples]) for name in ("pixels", "truth")}
    return batch | {"index": torch.tensor([each["index"] for each in examples])}
