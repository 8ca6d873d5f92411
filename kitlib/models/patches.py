"""Patches of the lungs: the canvas that they are cut from, where their centres lie, and how their answers become one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.equalise import adjusted
from kitlib.lungs.finders import Lungs
from kitlib.recipes.fields import PatchRecipe
from kitlib.xrays.cache import CachedXray


@dataclass(frozen=True)
class PatchCanvas:
    """What the patches of one image are cut from.

    `pixels` uint8 (canvas, canvas) are black outside of the lungs' `mask`, bool of the same shape, on which the centres lie.
    Without a mask the image is one patch: all of it, as it is, in the canvas's top left corner, and black beside it.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    side: int  # of a patch, pixels

    def centres(self, patches: int, seed: int) -> np.ndarray:
        """Rows and columns, int64 (patches, 2), of the patches' centres; (1, 2) where the image is one patch."""
        if self.mask is None:
            return np.array([[self.side // 2, self.side // 2]])
        return centres(self.mask, patches, seed)


def patch_canvas(xray: CachedXray, lungs: Lungs, recipe: PatchRecipe) -> PatchCanvas:
    """Image and mask laid on the recipe's canvas, after the image's grey was adjusted (Patched FLANNEL, section 2.2).

    One patch is the whole image where the lungs were not found, where they are less than `least_lungs` of the canvas, and
    where the original is smaller than a patch.
    """
    grey, place, side = adjusted(xray.pixels, recipe.equalise, recipe.gamma), PLACEMENTS[recipe.placement], recipe.image_size
    if lungs.mask is not None and min(xray.rows, xray.columns) >= side:
        on_canvas = place(xray.rows, xray.columns, recipe.canvas)
        mask = on_canvas.image(lungs.mask.astype(np.uint8) * 255) > 127
        if mask.any() and mask.mean() >= recipe.least_lungs:
            return PatchCanvas(on_canvas.image(grey) * mask, mask, side)
    pixels = np.zeros((recipe.canvas, recipe.canvas), np.uint8)
    pixels[:side, :side] = place(xray.rows, xray.columns, side).image(grey)
    return PatchCanvas(pixels, None, side)


def centres(mask: np.ndarray, patches: int, seed: int) -> np.ndarray:
    """Rows and columns, int64 (patches, 2), each drawn evenly from the True pixels of a mask, whatever was drawn before.

    Raises ValueError for a mask without one.
    """
    inside = np.flatnonzero(mask)
    if not len(inside):
        raise ValueError("no pixel of the mask is True, so that no patch has a centre; take the whole image as one patch")
    drawn = inside[np.random.default_rng(seed).integers(len(inside), size=patches)]
    return np.stack(np.divmod(drawn, mask.shape[1]), axis=1)


def image_seed(image_id: str) -> int:
    """A seed (0..2^32 - 1) that follows from the name alone, so that a prediction repeats in any company and order."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16)


def places(drawn: Sequence[np.ndarray]) -> torch.Tensor:
    """The centres of several canvases, an array (k, 2) each, as one int64 tensor (m, 3): which canvas, row, column."""
    which = np.repeat(np.arange(len(drawn)), [len(each) for each in drawn])
    return torch.from_numpy(np.column_stack([which, np.concatenate(drawn)]).astype(np.int64))


def windows(canvases: torch.Tensor, side: int) -> torch.Tensor:
    """A view (n, rows, columns, side, side) of canvases (n, rows, columns): at [i, r, c] the patch around that pixel.

    Patches reach over the canvas's border, where 0 is; they are never stretched. Of an even side the centre is the pixel
    right of and below the middle.
    """
    before = side // 2
    padded = functional.pad(canvases, (before, side - 1 - before, before, side - 1 - before))
    return padded.unfold(1, side, 1).unfold(2, side, 1)


def cut(canvases: torch.Tensor, where: torch.Tensor, side: int) -> torch.Tensor:
    """The patches (m, side, side) at `places` (m, 3) of canvases (n, rows, columns), in one gather on their device.

    Raises IndexError for a centre beyond the canvases.
    """
    return windows(canvases, side)[tuple(where.T)]


def votes(probabilities: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    """Share of an image's patches that name each class, float64 (images, classes); Patched FLANNEL, section 2.2.

    `probabilities` (m, classes) are the patches', `which` (m,) the image of each. A patch names its most probable class,
    of equals the first. Rows sum to 1; NaN for an image without patches, or with one that has no answer.
    """
    named = functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).double()
    named[probabilities.isnan().any(dim=1)] = torch.nan
    return _mean(named, which, images)


def mean_softmax(probabilities: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    """The mean of an image's patches' probabilities, float64 (images, classes); the arguments are those of `votes`."""
    return _mean(probabilities.double(), which, images)


SCORES = {"votes": votes, "mean_softmax": mean_softmax}


def _mean(rows: torch.Tensor, which: torch.Tensor, images: int) -> torch.Tensor:
    total = rows.new_zeros(images, rows.shape[1]).index_add_(0, which, rows)
    return total / torch.bincount(which, minlength=images)[:, None]
