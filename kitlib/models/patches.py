"""Lung patches: the canvas from which they are cut, their random centres, and the combination of their predictions."""

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
    """An image that is resized to a square canvas, from which its patches are cut.

    `pixels` is uint8 (canvas, canvas). `mask`, bool of the same shape, is True inside the lungs. Patch centres are chosen at
    random inside the lungs, and pixels outside the lungs are black. If `mask` is None, the only patch is the whole image,
    resized to `side` x `side` pixels and not masked, in the top left corner of the canvas; the rest is black.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    side: int  # side of a patch, pixels

    def centres(self, patches: int, seed: int) -> np.ndarray:
        """Draw patch centres; return their rows and columns, int64 (patches, 2), or (1, 2) if the image is one patch."""
        if self.mask is None:
            return np.array([[self.side // 2, self.side // 2]])
        return centres(self.mask, patches, seed)


def patch_canvas(xray: CachedXray, lungs: Lungs, recipe: PatchRecipe) -> PatchCanvas:
    """Return an image's PatchCanvas, with its grey levels adjusted by the recipe (Patched FLANNEL, section 2.2).

    The whole image becomes a single patch if it has no lung mask, if the lungs cover less than the share `least_lungs` of
    the canvas, or if a side of the original image is shorter than a patch.
    """
    grey, side = adjust_grey(xray.pixels, recipe.equalise, recipe.gamma), recipe.image_size
    make_placement, bicubic = PLACEMENTS[recipe.placement], recipe.resize == "bicubic"
    if lungs.mask is not None and min(xray.rows, xray.columns) >= side:
        placement = make_placement(xray.rows, xray.columns, recipe.canvas)
        mask = placement.image(lungs.mask.astype(np.uint8) * 255) > 127
        if mask.any() and mask.mean() >= recipe.least_lungs:
            return PatchCanvas(placement.image(grey, bicubic=bicubic) * mask, mask, side)
    pixels = np.zeros((recipe.canvas, recipe.canvas), np.uint8)
    pixels[:side, :side] = make_placement(xray.rows, xray.columns, side).image(grey, bicubic=bicubic)
    return PatchCanvas(pixels, None, side)


def centres(mask: np.ndarray, patches: int, seed: int) -> np.ndarray:
    """Draw patch centres uniformly, with replacement, from the True pixels of `mask`; return int64 (patches, 2).

    The columns are the centre's row and column in the mask. Raises ValueError if no pixel is True.
    """
    inside = np.flatnonzero(mask)
    if not len(inside):
        raise ValueError("no pixel of the mask is True, so patches cannot have centres; use the whole image as one patch")
    drawn = inside[np.random.default_rng(seed).integers(len(inside), size=patches)]
    return np.stack(np.divmod(drawn, mask.shape[1]), axis=1)


def image_seed(image_id: str) -> int:
    """Return a seed, 0..2^32 - 1, derived from the id alone, so that predictions do not depend on other images."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16)


def join_centres(centre_arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Join the patch centres of several canvases into one tensor, int64 (m, 3) for m patches.

    Each array in `centre_arrays` is (k, 2): rows and columns of the centres on one canvas. The result has one row per patch:
    index of the canvas, row and column of the centre.
    """
    canvas_index = np.repeat(np.arange(len(centre_arrays)), [len(array) for array in centre_arrays])
    return torch.from_numpy(np.column_stack([canvas_index, np.concatenate(centre_arrays)]).astype(np.int64))


def cut_patches(canvases: torch.Tensor, where: torch.Tensor, side: int) -> torch.Tensor:
    """Cut m patches out of canvases (n, rows, columns); return them as (m, side, side), on the device of the canvases.

    `where` is int64 (m, 3), one row per patch: index of the canvas, row and column of the patch's centre. Patches that cross
    the canvas's border are padded with 0. If `side` is even, the centre is the pixel to the right of and below the middle.
    Raises IndexError for a centre outside of the canvases.
    """
    before = side // 2
    padded = functional.pad(canvases, (before, side - 1 - before, before, side - 1 - before))
    return padded.unfold(1, side, 1).unfold(2, side, 1)[tuple(where.T)]


def votes(probabilities: torch.Tensor, image_index: torch.Tensor, images: int) -> torch.Tensor:
    """Return the share of each image's patches that vote for each class, float64 (images, classes).

    `images` is the number of images. `probabilities` (m, classes) has one row per patch, and `image_index` (m,) the index of
    each patch's image. A patch votes for its most probable class, or for the first of equally probable ones. Rows sum to 1.
    If an image has no patch, or a patch with a NaN, the image's row is NaN. Source: Patched FLANNEL, section 2.2.
    """
    one_hot = functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).double()
    one_hot[probabilities.isnan().any(dim=1)] = torch.nan
    return _mean(one_hot, image_index, images)


def mean_softmax(probabilities: torch.Tensor, image_index: torch.Tensor, images: int) -> torch.Tensor:
    """Return the mean probabilities of each image's patches, float64 (images, classes).

    The arguments are those of `votes`.
    """
    return _mean(probabilities.double(), image_index, images)


SCORES = {"votes": votes, "mean_softmax": mean_softmax}


def _mean(rows: torch.Tensor, image_index: torch.Tensor, images: int) -> torch.Tensor:
    total = rows.new_zeros(images, rows.shape[1]).index_add_(0, image_index, rows)
    return total / torch.bincount(image_index, minlength=images)[:, None]
