"""Cached X-rays with their masks as training examples: both on one canvas, moved together, the mask's places kept whole."""

from typing import Any

import albumentations
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from kitlib.cache import CachedXray, XrayCache
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.device import derived_seed
from kitlib.geometry import Placement
from kitlib.mask_store import MaskError, MaskStore
from kitlib.recipes import SegmenterRecipe
from kitlib.segment_lungs import on_canvas, placement
from kitlib.xray_dataset import KEPT_BYTES, KeptCanvases


class MaskDataset(Dataset):
    """One example an image of `images`, in its order.

    An example is a dict: `pixels` uint8 (side, side), grey, as the recipe adjusts it, on its canvas; `truth` uint8 (side,
    side), 0 where nothing is, k for the recipe's structure k; `index`, its row in `images`. The key is an index, or (epoch,
    index) as `EpochSampler` gives it, and with the seed it alone decides the augmentation. Raises MaskError for images
    without a mask.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        cache: XrayCache,
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
        self.kept = tuple(KeptCanvases(len(self), self.side) for _ in range(2)) if fits else None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, truth = self._canvas(index)
        if self.augmentation is not None:
            pixels, truth = self.augmentation(pixels, truth, derived_seed(self.seed, epoch, index))
        return {"pixels": torch.from_numpy(pixels), "truth": torch.from_numpy(truth), "index": index}

    def _canvas(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kept and (truth := self.kept[1].get(index)):
            return self.kept[0].get(index)[0], truth[0]
        xray = self.cache.read(self.image_ids[index])
        place = placement(xray, self.recipe)
        pixels = on_canvas(xray, place, self.recipe)
        truth = truth_on_canvas(self.masks.read(xray.image_id), place, self.recipe, xray)
        if self.kept:
            for kept, canvas in zip(self.kept, (pixels, truth), strict=True):
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


class MaskAugmentation:
    """What a recipe does to a training canvas and its mask: turns both alike, then changes the pixels alone.

    Around a turned or smaller image all is black, and no structure. Table 3 of the UNet + HRNet paper, and sections 4.1 of
    ResUNet + ensembles, as `unet_lungs` and `resunet_lungs` give them. Raises ValueError for probabilities that are none.
    """

    def __init__(self, recipe: SegmenterRecipe) -> None:
        for name in ("horizontal_flip", "vertical_flip", "turn_p", "shear_p", "brightness_contrast_p", "salt_pepper_p"):
            _check_probability(recipe, name)
        for name in ("blur_p", "noise_p"):
            _check_probability(recipe, name)
        self.geometry = albumentations.Compose(_moving(recipe))
        self.pixels = albumentations.Compose(_grey_changes(recipe))

    def __call__(self, pixels: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Both uint8 (side, side), changed as `seed` alone decides; the arguments stay."""
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, mask=truth)
        return self.pixels(image=moved["image"])["image"], moved["mask"]


def _check_probability(recipe: SegmenterRecipe, name: str) -> None:
    if not 0 <= getattr(recipe, name) <= 1:
        raise ValueError(f"recipe.{name} is {getattr(recipe, name)}, wanted a probability, 0..1")


def _moving(recipe: SegmenterRecipe) -> list[albumentations.BasicTransform]:
    moving = [albumentations.HorizontalFlip(p=recipe.horizontal_flip), albumentations.VerticalFlip(p=recipe.vertical_flip)]
    border = {"border_mode": cv2.BORDER_CONSTANT, "fill": 0, "fill_mask": 0, "mask_interpolation": cv2.INTER_NEAREST}
    side_ways = (-recipe.shift, recipe.shift)
    moving.append(
        albumentations.Affine(
            scale={"x": recipe.scale_x, "y": recipe.scale_y},
            translate_percent={"x": side_ways, "y": side_ways},
            rotate=(-recipe.rotate_degrees, recipe.rotate_degrees),
            p=recipe.turn_p,
            **border,
        )
    )
    if recipe.shear_p:
        sheared = {"x": (-recipe.shear_degrees, recipe.shear_degrees), "y": (0.0, 0.0)}
        moving.append(albumentations.Affine(shear=sheared, p=recipe.shear_p, **border))
    return moving


def _grey_changes(recipe: SegmenterRecipe) -> list[albumentations.BasicTransform]:
    changes, strength = [], recipe.brightness_contrast
    low, high = recipe.gamma_drawn
    if (low, high) != (1.0, 1.0):
        changes.append(albumentations.RandomGamma(gamma_limit=(100 * low, 100 * high), p=1.0))
    if strength:
        changes.append(albumentations.RandomBrightnessContrast(strength, strength, p=recipe.brightness_contrast_p))
    if recipe.salt_pepper_p:
        amount = (recipe.salt_pepper, recipe.salt_pepper)
        changes.append(albumentations.SaltAndPepper(amount=amount, p=recipe.salt_pepper_p))
    if recipe.blur_p:
        changes.append(albumentations.GaussianBlur(blur_limit=(11, 11), sigma_limit=(0.5, 0.5), p=recipe.blur_p))
    if recipe.noise_p:
        changes.append(albumentations.GaussNoise(std_range=(recipe.noise, recipe.noise), p=recipe.noise_p))
    return changes
