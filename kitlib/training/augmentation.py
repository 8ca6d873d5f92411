"""What a recipe does to a training canvas: moves it with its boxes or its mask, then changes its pixels alone."""

import os

import cv2
import numpy as np

# albumentations asks the network for its newest version, for up to ten seconds where there is none.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations

from kitlib.device import derived_seed
from kitlib.recipes.fields import TrainingRecipe

PROBABILITIES = (
    *("horizontal_flip", "vertical_flip", "turn_p", "shear_p", "brightness_contrast_p", "salt_pepper_p", "sharpen_p"),
    *("blur_p", "noise_p", "cutouts_p", "erase_p"),
)
# Only of a Gaussian blur; UNet + HRNet paper, Table 3.
BLUR_SIGMA = 0.5


class Augmentation:
    """Canvases with boxes: mirrored, turned and cropped together, then the pixels changed alone.

    Turned and shifted images are black where nothing was. A turned box becomes the frame of its inscribed ellipse (Kalra
    et al., Towards Rotation Invariance in Object Detection, 2021): that of its corners would be too large for round
    findings. Of a larger `canvas` a square of image_size is left, anywhere. Cut-outs and erased rectangles are black, and
    hide no box from the loss. Raises ValueError for probabilities that are none.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        check_probabilities(recipe)
        self.geometry = albumentations.Compose(
            _moves(recipe),
            bbox_params=albumentations.BboxParams("pascal_voc", label_fields=[], clip=True, min_width=1, min_height=1),
        )
        # Apart from the boxes, which albumentations' cut-outs would filter.
        self.pixels = albumentations.Compose(_grey_changes(recipe))

    def __call__(self, pixels: np.ndarray, boxes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (whole, whole) and boxes (k, 4) in its pixels, changed as `seed` alone decides; the arguments stay."""
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, bboxes=boxes)
        return self.pixels(image=moved["image"])["image"], np.asarray(moved["bboxes"], dtype=float).reshape(-1, 4)


class MaskAugmentation:
    """Canvases with their masks: both turned alike, then the pixels changed alone.

    Around a turned or smaller image all is black, and no structure. Table 3 of the UNet + HRNet paper, and sections 4.1 of
    ResUNet + ensembles, as `unet_lungs` and `resunet_lungs` give them. Raises ValueError for probabilities that are none.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        check_probabilities(recipe)
        self.geometry = albumentations.Compose(_moves(recipe))
        self.pixels = albumentations.Compose(_grey_changes(recipe))

    def __call__(self, pixels: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Both uint8 (side, side), changed as `seed` alone decides; the arguments stay."""
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, mask=truth)
        return self.pixels(image=moved["image"])["image"], moved["mask"]


def check_probabilities(recipe: TrainingRecipe) -> None:
    """Raise ValueError where a probability is none, or where sharpened and blurred images are more than all."""
    for name in PROBABILITIES:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"recipe.{name} is {getattr(recipe, name)}, wanted a probability, 0..1")
    if recipe.sharpen_p + recipe.blur_p > 1:
        raise ValueError(
            f"recipe.sharpen_p {recipe.sharpen_p} and recipe.blur_p {recipe.blur_p} add to more than 1: an image is "
            "sharpened or blurred, never both"
        )


def _moves(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    moves = [albumentations.HorizontalFlip(p=recipe.horizontal_flip), albumentations.VerticalFlip(p=recipe.vertical_flip)]
    shared = {
        "rotate_method": "ellipse",
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": 0,
        "fill_mask": 0,
        "mask_interpolation": cv2.INTER_NEAREST,
    }
    scales, side_ways = {"x": recipe.scale_x, "y": recipe.scale_y}, (-recipe.shift, recipe.shift)
    if recipe.rotate_degrees or recipe.shift or set(recipe.scale_x + recipe.scale_y) != {1.0}:
        moves.append(
            albumentations.Affine(
                scale=scales,
                translate_percent={"x": side_ways, "y": side_ways},
                rotate=(-recipe.rotate_degrees, recipe.rotate_degrees),
                p=recipe.turn_p,
                **shared,
            )
        )
    if recipe.shear_p and recipe.shear_degrees:
        sheared = {"x": (-recipe.shear_degrees, recipe.shear_degrees), "y": (0.0, 0.0)}
        moves.append(albumentations.Affine(shear=sheared, p=recipe.shear_p, **shared))
    if recipe.canvas > recipe.image_size:
        # Last, so that less of the black around a turned image is seen.
        moves.append(albumentations.RandomCrop(recipe.image_size, recipe.image_size))
    return moves


def _grey_changes(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    changes, strength, hole = [], recipe.brightness_contrast, max(1, recipe.image_size // 16)
    darkest, brightest = recipe.gamma_drawn
    if (darkest, brightest) != (1.0, 1.0):
        changes.append(albumentations.RandomGamma(gamma_limit=(100 * darkest, 100 * brightest), p=1.0))
    if strength:
        changes.append(albumentations.RandomBrightnessContrast(strength, strength, p=recipe.brightness_contrast_p))
    if recipe.salt_pepper_p:
        amount = (recipe.salt_pepper, recipe.salt_pepper)
        changes.append(albumentations.SaltAndPepper(amount=amount, p=recipe.salt_pepper_p))
    if recipe.sharpen_p or recipe.blur_p:
        # OneOf chooses by the share of each in the sum.
        either = [albumentations.Sharpen(p=recipe.sharpen_p), _blur(recipe)]
        changes.append(albumentations.OneOf(either, p=recipe.sharpen_p + recipe.blur_p))
    if recipe.noise_p:
        changes.append(albumentations.GaussNoise(std_range=(recipe.noise, recipe.noise), p=recipe.noise_p))
    if recipe.cutouts:
        square = {"hole_height_range": (hole, hole), "hole_width_range": (hole, hole)}
        changes.append(albumentations.CoarseDropout(num_holes_range=(1, recipe.cutouts), **square, p=recipe.cutouts_p))
    if recipe.erase_p:
        changes.append(albumentations.Erasing(scale=(0.01, 0.1), p=recipe.erase_p))
    return changes


def _blur(recipe: TrainingRecipe) -> albumentations.BasicTransform:
    if not recipe.blur_pixels:
        return albumentations.Blur(p=recipe.blur_p)
    side, spread = (recipe.blur_pixels, recipe.blur_pixels), (BLUR_SIGMA, BLUR_SIGMA)
    return albumentations.GaussianBlur(blur_limit=side, sigma_limit=spread, p=recipe.blur_p)
