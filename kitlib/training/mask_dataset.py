"""Data set of cached X-rays and their masks, which are placed on a canvas and augmented together."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.device import derived_seed
from kitlib.errors import MaskError
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import make_input, place_image
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.training import kept_memory
from kitlib.training.augmentation import MaskAugmentation
from kitlib.training.xray_dataset import CanvasCache, EpochSampler, Examples
from kitlib.xrays.cache import CachedXray, DecodedXrays
from kitlib.xrays.mask_store import MaskStore


class MaskDataset(Examples):
    """Data set of X-rays with their masks: one example per row of `images`, in the same order.

    An example is a dict: `pixels`, uint8 (side, side), is the image on the recipe's canvas, with its grey levels adjusted;
    `truth`, uint8 (side, side), is 0 for background and k for the recipe's k-th structure (from 1); `index` is the row in
    `images`. The key of an example is its index, or (epoch, index) from `EpochSampler`; its augmentation depends on `seed`
    and the key alone. The constructor raises MaskError if an image has no mask.
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
        self.example_bytes = 2 * self.side**2
        missing = [image_id for image_id in self.image_ids if image_id not in masks]
        if missing:
            raise MaskError(
                f"{len(missing)} of {len(self)} images have no mask in {masks.folder}; the first is {missing[0]}"
            )
        self.augmentation = MaskAugmentation(recipe) if augment else None
        self.positives = recipe.positives if isinstance(recipe, SparseSegmenterRecipe) else ()
        self.kept = kept_memory.CANVASES.reserve(self, len(self), 2 * self.side**2)  # number of images
        self.canvas_caches = [CanvasCache(self.kept, self.side) for _ in range(2)]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, truth = self._read_canvas(index)
        if self.augmentation is not None:
            pixels, truth = self.augmentation(pixels, truth, derived_seed(self.seed, epoch, index))
        return {"pixels": torch.from_numpy(pixels), "truth": torch.from_numpy(truth), "index": index}

    def sampler(self, seed: int) -> EpochSampler:
        """Return the sampler that yields the keys (epoch, index) of the training examples.

        If the recipe's `positives` is empty, the sampler is an EpochSampler, which yields each image once per epoch.
        Otherwise, it is a PositivesSampler, in which a given share of the images shows the recipe's structure. Raises
        MaskError if a PositivesSampler is needed, but all images show the structure or none does.
        """
        if not self.positives:
            return super().sampler(seed)
        (name,) = self.recipe.structures
        has = np.array([(self.masks.read(image_id) == MASK_CODES[name]).any() for image_id in self.image_ids])
        if has.all() or not has.any():
            raise MaskError(
                f"{'all' if has.all() else 'none'} of the {len(self)} training images show a {name}; prepare images with "
                f'and without a {name}, or set overrides {{"positives": []}} to use each image once per epoch'
            )
        return PositivesSampler(has, self.positives, self.recipe.epochs, seed)

    def _read_canvas(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index < self.kept:
            # The mask is stored after the image, so if the mask is complete, the image is too.
            cached_truth, cached_pixels = (cache.get(index) for cache in reversed(self.canvas_caches))
            if cached_truth and cached_pixels:
                return cached_pixels[0], cached_truth[0]
        xray = self.cache.read(self.image_ids[index])
        place = place_image(xray, self.recipe)
        pixels = make_input(xray, place, self.recipe)
        truth = truth_on_canvas(self.masks.read(xray.image_id), place, self.recipe, xray)
        if index < self.kept:
            for cache, canvas in zip(self.canvas_caches, (pixels, truth), strict=True):
                cache.put(index, canvas, xray.rows, xray.columns)
        return pixels, truth


class PositivesSampler(EpochSampler):
    """Sampler of the keys (epoch, index) of training examples that controls how many of an epoch's images show a structure.

    `has_structure`, bool (n,), is True for images that show it. `shares` is a pair: the share of such images in the first
    epoch and in the last; in the `epochs` epochs from first to last, the share changes linearly. All epochs have the same
    length: an epoch with the lower share contains each image with the structure once. Within an epoch, all images with the
    structure occur equally often, up to a difference of one; so do all images without the structure.
    """

    def __init__(self, has_structure: np.ndarray, shares: tuple[float, ...], epochs: int, seed: int) -> None:
        super().__init__(round(int(has_structure.sum()) / min(shares)), seed)
        self.with_structure, self.without = np.flatnonzero(has_structure), np.flatnonzero(~has_structure)
        self.shares, self.epochs = shares, epochs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        first, last = self.shares
        count = round(self.length * (first + (last - first) * min(1.0, self.epoch / max(1, self.epochs - 1))))
        drawn = [_draw(self.with_structure, count, rng), _draw(self.without, self.length - count, rng)]
        return ((self.epoch, int(index)) for index in rng.permutation(np.concatenate(drawn)))


def _draw(indices: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permutation(indices) for _ in range(count // len(indices) + 1)])[:count]


def truth_on_canvas(codes: np.ndarray, place: Placement, recipe: SegmenterRecipe, xray: CachedXray) -> np.ndarray:
    """Return the mask of a cached X-ray on the recipe's canvas, uint8 (side, side): 0 for background, k for structure k.

    `codes` is the mask in the size of the cached image: 0 for background, otherwise a code of MASK_CODES. `place` is the
    image's placement on the canvas. Structures are numbered from 1 in the recipe's order. Each structure is resized as a
    mask 0..255, with area interpolation if it shrinks, and thresholded at one half. Where structures overlap, the pixel
    belongs to the last of them. The structure "lungs" includes both lungs. Raises MaskError if `codes` and the cached image
    differ in size, or if the recipe distinguishes the left and right lung but the mask does not.
    """
    if codes.shape != xray.pixels.shape:
        raise MaskError(
            f"the mask of {xray.image_id} has {codes.shape} pixels, but its image has {xray.pixels.shape}; prepare the data "
            "again"
        )
    if (codes == MASK_CODES["lungs"]).any() and {"left_lung", "right_lung"} & set(recipe.structures):
        raise MaskError(
            f"the mask of {xray.image_id} does not distinguish left and right lung, but the structures "
            f'{", ".join(recipe.structures)} do; set overrides {{"structures": ["lungs"]}}'
        )
    truth = np.zeros((place.canvas_rows, place.canvas_columns), np.uint8)
    for number, name in enumerate(recipe.structures, start=1):
        inside = np.isin(codes, LUNG_CODES) if name == "lungs" else codes == MASK_CODES[name]
        truth[place.image(inside.astype(np.uint8) * 255) > 127] = number
    return truth


def collate_masks(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of n examples of a `MaskDataset`, a dict: `pixels` and `truth` (n, side, side), and `index` (n,)."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in ("pixels", "truth")}
    return batch | {"index": torch.tensor([example["index"] for example in examples])}
