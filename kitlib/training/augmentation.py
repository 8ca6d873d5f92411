"""Augmentation of a training canvas: geometric transforms of the canvas and its boxes or mask, then pixel transforms."""

import os

import cv2
import numpy as np

# Without this, importing albumentations checks online for a newer version, which takes up to ten seconds without a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations

from kitlib.device import derived_seed
from kitlib.lungs.canvas import read_canvas
from kitlib.recipes.fields import TrainingRecipe, WithDistortions, WithOcclusions

# Sigma of the Gaussian blur of recipes with blur_pixels, in pixels; UNet + HRNet paper, Table 3.
BLUR_SIGMA = 0.5


class Augmentation:
    """Augments a canvas and its boxes: geometric transforms of both, then pixel transforms of the canvas alone.

    Areas outside a rotated or shifted image are black. A rotated box becomes the bounding box of its inscribed ellipse
    (Kalra et al., Towards Rotation Invariance in Object Detection, 2021), since the bounding box of its rotated corners is
    too large for round findings. If the recipe's `canvas` is larger than its `image_size`, a random square of `image_size`
    pixels a side is cropped. Cut-outs and erased rectangles are black; boxes that they cover stay in the ground truth.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        transforms = _geometric_transforms(recipe)
        if read_canvas(recipe).whole > recipe.image_size:
            # Cropped last, so that less of the black around a rotated image remains.
            transforms.append(albumentations.RandomCrop(recipe.image_size, recipe.image_size))
        self.geometry = albumentations.Compose(
            transforms,
            bbox_params=albumentations.BboxParams("pascal_voc", label_fields=[], clip=True, min_width=1, min_height=1),
        )
        # Applied without the boxes, because albumentations' cut-outs would remove the boxes that they cover.
        self.pixels = albumentations.Compose(_pixel_transforms(recipe))

    def __call__(self, pixels: np.ndarray, boxes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return augmented copies of the canvas `pixels` and of its `boxes`.

        `pixels` is uint8 (side, side); `boxes` is (k, 4 or more): xmin, ymin, xmax, ymax in canvas pixels; further columns
        are kept. Boxes that are less than a pixel wide or high after clipping are removed. The same seed always gives the
        same augmentation.
        """
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, bboxes=boxes)
        return self.pixels(image=moved["image"])["image"], np.asarray(moved["bboxes"], dtype=float).reshape(
            -1, boxes.shape[1]
        )


class MaskAugmentation:
    """Augments a canvas and its mask: the same geometric transforms of both, then pixel transforms of the canvas alone.

    Areas outside a rotated or shrunk image are black in the canvas and background in the mask. The recipe `unet_lungs` has
    the settings of the UNet + HRNet paper, Table 3; `resunet_lungs` has those of ResUNet + ensembles, section 4.1.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        self.geometry = albumentations.Compose(_geometric_transforms(recipe))
        self.pixels = albumentations.Compose(_pixel_transforms(recipe))

    def __call__(self, pixels: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return augmented copies of the canvas `pixels` and of its mask `truth`, both uint8 (side, side).

        The same seed always gives the same augmentation.
        """
        self.geometry.set_random_seed(seed)
        self.pixels.set_random_seed(derived_seed(seed, 1))
        moved = self.geometry(image=pixels, mask=truth)
        return self.pixels(image=moved["image"])["image"], moved["mask"]


def _geometric_transforms(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    transforms = [
        albumentations.HorizontalFlip(p=recipe.horizontal_flip),
        albumentations.VerticalFlip(p=recipe.vertical_flip),
    ]
    affine_options = {
        "rotate_method": "ellipse",
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": 0,
        "fill_mask": 0,
        "mask_interpolation": cv2.INTER_NEAREST,
    }
    # Recipes without these fields get the defaults, which switch the transforms off.
    distortions = recipe if isinstance(recipe, WithDistortions) else WithDistortions()
    scales, shifts = {"x": distortions.scale_x, "y": distortions.scale_y}, (-recipe.shift, recipe.shift)
    if recipe.rotate_degrees or recipe.shift or set(distortions.scale_x + distortions.scale_y) != {1.0}:
        transforms.append(
            albumentations.Affine(
                scale=scales,
                translate_percent={"x": shifts, "y": shifts},
                rotate=(-recipe.rotate_degrees, recipe.rotate_degrees),
                p=recipe.turn_p,
                **affine_options,
            )
        )
    if distortions.shear_p and distortions.shear_degrees:
        shear = {"x": (-distortions.shear_degrees, distortions.shear_degrees), "y": (0.0, 0.0)}
        transforms.append(albumentations.Affine(shear=shear, p=distortions.shear_p, **affine_options))
    return transforms


def _pixel_transforms(recipe: TrainingRecipe) -> list[albumentations.BasicTransform]:
    transforms, strength, hole_side = [], recipe.brightness_contrast, max(1, recipe.image_size // 16)
    distortions = recipe if isinstance(recipe, WithDistortions) else WithDistortions()
    occlusions = recipe if isinstance(recipe, WithOcclusions) else WithOcclusions()
    lowest, highest = distortions.gamma_drawn
    if (lowest, highest) != (1.0, 1.0):
        transforms.append(albumentations.RandomGamma(gamma_limit=(100 * lowest, 100 * highest), p=1.0))
    if strength:
        transforms.append(albumentations.RandomBrightnessContrast(strength, strength, p=recipe.brightness_contrast_p))
    if distortions.salt_pepper_p:
        amount = (distortions.salt_pepper, distortions.salt_pepper)
        transforms.append(albumentations.SaltAndPepper(amount=amount, p=distortions.salt_pepper_p))
    if occlusions.sharpen_p or recipe.blur_p:
        # OneOf chooses between the two in proportion to their probabilities.
        alternatives = [
            albumentations.Sharpen(p=occlusions.sharpen_p),
            _blur_transform(recipe.blur_p, distortions.blur_pixels),
        ]
        transforms.append(albumentations.OneOf(alternatives, p=occlusions.sharpen_p + recipe.blur_p))
    if distortions.noise_p:
        transforms.append(albumentations.GaussNoise(std_range=(distortions.noise, distortions.noise), p=distortions.noise_p))
    if occlusions.cutouts:
        square = {"hole_height_range": (hole_side, hole_side), "hole_width_range": (hole_side, hole_side)}
        transforms.append(
            albumentations.CoarseDropout(num_holes_range=(1, occlusions.cutouts), **square, p=occlusions.cutouts_p)
        )
    if occlusions.erase_p:
        transforms.append(albumentations.Erasing(scale=(0.01, 0.1), p=occlusions.erase_p))
    return transforms


def _blur_transform(p: float, pixels: int) -> albumentations.BasicTransform:
    if not pixels:
        return albumentations.Blur(p=p)
    return albumentations.GaussianBlur(blur_limit=(pixels, pixels), sigma_limit=(BLUR_SIGMA, BLUR_SIGMA), p=p)
