"""What a recipe does to a training canvas: moves it with its boxes or its mask, then changes its pixels alone."""

import os

import cv2
import numpy as np

# albumentations asks the network for its newest version, for up to ten seconds where there is none.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations

from kitlib.device import derived_seed
from kitlib.lungs.canvas import canvas_of
from kitlib.recipes.fields import TrainingRecipe, WithDistortions, WithOcclusions

# Only of a Gaussian blur; UNet + HRNet paper, Table 3.
BLUR_SIGMA = 0.5


class Augmentation:
    """Canvases with boxes: mirrored, turned and cropped together, then the pixels changed alone.

    Turned and shifted images are black where nothing was. A turned box becomes the frame of its inscribed ellipse (Kalra
    et al., Towards Rotation Invariance in Object Detection, 2021): that of its corners would be too large for round
    findings. Of a larger `canvas` a square of image_size is left, anywhere. Cut-outs and erased rectangles are black, and
    hide no box from the loss.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        moves = _moves(recipe)
        if canvas_of(recipe).whole > recipe.image_size:
            # Last, so that less of the black around a turned image is seen.
            moves.append(albumentations.RandomCrop(recipe.image_size, recipe.image_size))
        self.geometry = albumentations.Compose(
            moves,
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
    ResUNet + ensembles, as `unet_lungs` and `resunet_lungs` give them.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        self.geometry = albumentations.Compose(_moves(recipe))
        self.pixels = albumentations.Compose(_grey_changes(recipe))

    def __call__(self, pixels: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Both uint8 (side, side), changed as `seed` alone decides; the arguments stay."""
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, mask=truth)
        return self.pixels(image=moved["image"])["image"], moved["mask"]


def _moves(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    moves = [albumentations.HorizontalFlip(p=recipe.horizontal_flip), albumentations.VerticalFlip(p=recipe.vertical_flip)]
    shared = {
        "rotate_method": "ellipse",
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": 0,
        "fill_mask": 0,
        "mask_interpolation": cv2.INTER_NEAREST,
    }
    # A family without these fields has none of these moves.
    distorted = recipe if isinstance(recipe, WithDistortions) else WithDistortions()
    scales, sideways = {"x": distorted.scale_x, "y": distorted.scale_y}, (-recipe.shift, recipe.shift)
    if recipe.rotate_degrees or recipe.shift or set(distorted.scale_x + distorted.scale_y) != {1.0}:
        moves.append(
            albumentations.Affine(
                scale=scales,
                translate_percent={"x": sideways, "y": sideways},
                rotate=(-recipe.rotate_degrees, recipe.rotate_degrees),
                p=recipe.turn_p,
                **shared,
            )
        )
    if distorted.shear_p and distorted.shear_degrees:
        sheared = {"x": (-distorted.shear_degrees, distorted.shear_degrees), "y": (0.0, 0.0)}
        moves.append(albumentations.Affine(shear=sheared, p=distorted.shear_p, **shared))
    return moves


def _grey_changes(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    changes, strength, hole = [], recipe.brightness_contrast, max(1, recipe.image_size // 16)
    distorted = recipe if isinstance(recipe, WithDistortions) else WithDistortions()
    occluded = recipe if isinstance(recipe, WithOcclusions) else WithOcclusions()
    darkest, brightest = distorted.gamma_drawn
    if (darkest, brightest) != (1.0, 1.0):
        changes.append(albumentations.RandomGamma(gamma_limit=(100 * darkest, 100 * brightest), p=1.0))
    if strength:
        changes.append(albumentations.RandomBrightnessContrast(strength, strength, p=recipe.brightness_contrast_p))
    if distorted.salt_pepper_p:
        amount = (distorted.salt_pepper, distorted.salt_pepper)
        changes.append(albumentations.SaltAndPepper(amount=amount, p=distorted.salt_pepper_p))
    if occluded.sharpen_p or recipe.blur_p:
        # OneOf chooses by the share of each in the sum.
        either = [albumentations.Sharpen(p=occluded.sharpen_p), _blur(recipe.blur_p, distorted.blur_pixels)]
        changes.append(albumentations.OneOf(either, p=occluded.sharpen_p + recipe.blur_p))
    if distorted.noise_p:
        changes.append(albumentations.GaussNoise(std_range=(distorted.noise, distorted.noise), p=distorted.noise_p))
    if occluded.cutouts:
        square = {"hole_height_range": (hole, hole), "hole_width_range": (hole, hole)}
        changes.append(albumentations.CoarseDropout(num_holes_range=(1, occluded.cutouts), **square, p=occluded.cutouts_p))
    if occluded.erase_p:
        changes.append(albumentations.Erasing(scale=(0.01, 0.1), p=occluded.erase_p))
    return changes


def _blur(p: float, pixels: int) -> albumentations.BasicTransform:
    if not pixels:
        return albumentations.Blur(p=p)
    return albumentations.GaussianBlur(blur_limit=(pixels, pixels), sigma_limit=(BLUR_SIGMA, BLUR_SIGMA), p=p)
