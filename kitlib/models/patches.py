"""Lung patches: the canvas that they are cut from, their random centres, and how patch predictions are combined."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.equalise import adjust_grey
from kitlib.lungs.finders import Lungs
from kitlib.recipes.fields import PatchRecipe
from kitlib.xrays.cache import CachedXray


@dataclass(frozen=True)
class PatchCanvas:
    """The canvas of one image from which patches are cut.

    `pixels` uint8 (canvas, canvas) are black outside of the lungs' `mask`, bool of the same shape, on which the centres lie.
    If `mask` is None the image is a single patch: the whole image, unmasked, in the canvas's top left corner; the remaining
    canvas is black.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    side: int  # side of a patch, pixels

    def centres(self, patches: int, seed: int) -> np.ndarray:
        """Return the row and column of each patch's centre, int64 (patches, 2); (1, 2) if the image is a single patch."""
        if self.mask is None:
            return np.array([[self.side // 2, self.side // 2]])
        return centres(self.mask, patches, seed)


def patch_canvas(xray: CachedXray, lungs: Lungs, recipe: PatchRecipe) -> PatchCanvas:
    """Adjust an image's grey levels and place it and its lung mask on the recipe's canvas (Patched FLANNEL, section 2.2).

    The whole image becomes a single patch if it has no lung mask, if the lungs are less than `least_lungs` of the canvas, or
    if the original is smaller than a patch.
    """
    grey, side = adjust_grey(xray.pixels, recipe.equalise, recipe.gamma), recipe.image_size
    make_placement = PLACEMENTS[recipe.placement]
    if lungs.mask is not None and min(xray.rows, xray.columns) >= side:
        placement = make_placement(xray.rows, xray.columns, recipe.canvas)
        mask = placement.image(lungs.mask.astype(np.uint8) * 255) > 127
        if mask.any() and mask.mean() >= recipe.least_lungs:
            return PatchCanvas(placement.image(grey) * mask, mask, side)
    pixels = np.zeros((recipe.canvas, recipe.canvas), np.uint8)
    pixels[:side, :side] = make_placement(xray.rows, xray.columns, side).image(grey)
    return PatchCanvas(pixels, None, side)


def centres(mask: np.ndarray, patches: int, seed: int) -> np.ndarray:
    """Draw the row and column of patch centres, int64 (patches, 2), uniformly with replacement from a mask's True pixels.

    Raises ValueError if no pixel is True.
    """
    inside = np.flatnonzero(mask)
    if not len(inside):
        raise ValueError("no pixel of the mask is True, so patches cannot have centres; use the whole image as one patch")
    drawn = inside[np.random.default_rng(seed).integers(len(inside), size=patches)]
    return np.stack(np.divmod(drawn, mask.shape[1]), axis=1)


def image_seed(image_id: str) -> int:
    """Return a seed (0..2^32 - 1) derived from the id alone, so that predictions do not depend on other images or order."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16)


def join_centres(centre_arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Join the centres of several canvases, an array (k, 2) each, into an int64 tensor (m, 3): canvas index, row, column."""
    canvas_index = np.repeat(np.arange(len(centre_arrays)), [len(each) for each in centre_arrays])
    return torch.from_numpy(np.column_stack([canvas_index, np.concatenate(centre_arrays)]).astype(np.int64))


def windows(canvases: torch.Tensor, side: int) -> torch.Tensor:
    """Return a view (n, rows, columns, side, side) of canvases (n, rows, columns): [i, r, c] is the patch around that pixel.

    Patches that cross the canvas's border are padded with 0. If the side is even, the centre is the pixel to the right of
    and below the middle.
    """
    before = side // 2
    padded = functional.pad(canvases, (before, side - 1 - before, before, side - 1 - before))
    return padded.unfold(1, side, 1).unfold(2, side, 1)


def cut_patches(canvases: torch.Tensor, where: torch.Tensor, side: int) -> torch.Tensor:
    """Cut the patches (m, side, side) around the centres `where` (m, 3) from canvases (n, rows, columns), on their device.

    Raises IndexError for a centre outside of the canvases.
    """
    return windows(canvases, side)[tuple(where.T)]


def votes(probabilities: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    """Return the share of each image's patches that vote for each class, float64 (images, classes).

    `probabilities` (m, classes) are those of the patches, `which` (m,) the index of each patch's image. A patch votes for
    its most probable class, the first if several are equal. Rows sum to 1; a row is NaN if the image has no patches, or a
    patch with NaN. Patched FLANNEL, section 2.2.
    """
    one_hot = functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).double()
    one_hot[probabilities.isnan().any(dim=1)] = torch.nan
    return _mean(one_hot, which, images)


def mean_softmax(probabilities: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    """Return the mean probabilities of each image's patches, float64 (images, classes).

    `probabilities` (m, classes) are those of the patches, `which` (m,) the index of each patch's image.
    """
    return _mean(probabilities.double(), which, images)


SCORES = {"votes": votes, "mean_softmax": mean_softmax}


def _mean(rows: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    total = rows.new_zeros(images, rows.shape[1]).index_add_(0, which, rows)
    return total / torch.bincount(which, minlength=images)[:, None]
