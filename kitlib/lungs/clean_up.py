"""Converts a segmenter's probability maps to masks, and cleans up lung masks.

The clean-up removes islands, dilates, closes, and decides whether the lungs can be used.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.letterbox import PLACEMENTS, Placement
from kitlib.lungs.equalise import adjust_grey
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.scoring.metrics import threshold_map
from kitlib.xrays.cache import CachedXray

# Version of the clean-up. Increase it whenever the same maps may give other lungs: runs and models of other versions are
# then refused, because in a submission a model would get other lungs than those it was trained on.
CLEAN_UP = 2
CLEAN_SIDE = 512  # canvas side in pixels during the clean-up; the published dilations and closings refer to this size
# Verdicts: the lungs can be used, or the reason why not.
FOUND = "found"
BLANK, EMPTY, SMALL, NARROW = "blank image", "no lung found", "too small", "too narrow for two lungs"
BLANK_SPREAD = 8  # grey levels; an image with a smaller range is blank, but a network would still find lungs in it


@dataclass(frozen=True)
class Cleaned:
    """Lungs of one image after the clean-up: their mask, their frame, and a verdict on whether they can be used."""

    image_id: str
    verdict: str  # FOUND, BLANK, EMPTY, SMALL or NARROW
    area: float  # of the cleaned lungs, as a share of the canvas
    frame: np.ndarray  # (4,) xmin, ymin, xmax, ymax in original pixels; the whole image unless the verdict is FOUND
    mask: np.ndarray  # bool, of the shape of the cached pixels


def place_image(xray: CachedXray, recipe: SegmenterRecipe) -> Placement:
    """Return the Placement of the whole image on the segmenter's input, a canvas of the recipe's `image_size`."""
    return PLACEMENTS[recipe.placement](xray.rows, xray.columns, recipe.image_size)


def make_input(xray: CachedXray, place: Placement, recipe: SegmenterRecipe) -> np.ndarray:
    """Return the segmenter's input, uint8 (side, side): the image with adjusted grey levels, on a black canvas."""
    # Grey levels are adjusted first, so that the histogram does not include the canvas's padding.
    return place.image(adjust_grey(xray.pixels, recipe.equalise, recipe.gamma))


def decode_maps(maps: np.ndarray, place: Placement, shape: tuple[int, int], recipe: SegmenterRecipe) -> np.ndarray:
    """Convert the probability maps of one image to a label image, uint8 (rows, columns), with a code at each pixel.

    `maps`, from `TrainedSegmenter.maps`, has one map (0..255) per structure of the recipe, on the canvas of `place`. Maps
    are interpolated linearly to `shape`, the shape of the cached image and of the result. A pixel gets the code of its most
    probable structure (see MASK_CODES), or 0 if the background is more probable. If the recipe is a SparseSegmenterRecipe,
    the recipe's thresholds decide instead (see `threshold_map`).
    """
    if isinstance(recipe, SparseSegmenterRecipe):
        mask = threshold_map(place.back(maps[0], *shape), recipe.top, recipe.least_area * shape[0] * shape[1], recipe.bottom)
        return mask * np.uint8(MASK_CODES[recipe.structures[0]])
    codes, is_single = np.zeros(shape, np.uint8), len(maps) == 1
    # With a single structure, a pixel belongs to it above one half, so the background's map is not needed.
    best = np.uint8(127) if is_single else place.back(255 - maps.sum(axis=0).clip(max=255).astype(np.uint8), *shape)
    for name, probabilities in zip(recipe.structures, maps, strict=True):
        likely = place.back(probabilities, *shape)
        codes[likely > best] = MASK_CODES[name]
        best = np.maximum(best, likely)
    return codes


def clean_up_mask(xray: CachedXray, codes: np.ndarray, recipe: SegmenterRecipe) -> Cleaned:
    """Clean up the lungs of one image, and return their mask, frame and verdict.

    `codes` is the network's label image, from `decode_maps`. The lungs are placed on a canvas of 512 pixels a side, small
    islands are removed, and the lungs are dilated and closed by 3 x 3 pixels. These lungs determine frame and verdict. The
    verdict rejects a blank image, an empty mask, an area below a minimum (UNet + HRNet paper, section 3.2), and a frame too
    narrow for two lungs. If the recipe has neither dilations nor closings, the mask returned is the predicted one; otherwise
    it is the mask after the clean-up.
    """
    shape, drawn = xray.pixels.shape, np.isin(codes, LUNG_CODES)
    canvas = PLACEMENTS[recipe.placement](xray.rows, xray.columns, CLEAN_SIDE)
    clean = remove_islands(canvas.image(drawn.astype(np.uint8) * 255) > 127, recipe.least_island)
    clean = dilate_and_close(clean, recipe.dilations, recipe.closings)
    inside, area = canvas.back(clean.astype(np.uint8) * 255, *shape) > 127, float(clean.mean())
    mask = inside if recipe.dilations or recipe.closings else drawn
    frame, verdict = np.array([0.0, 0.0, xray.columns, xray.rows]), FOUND
    tight, wide = (lung_frame(inside, margin) for margin in (0.0, recipe.margin))
    if int(xray.pixels.max()) - int(xray.pixels.min()) < BLANK_SPREAD:
        verdict = BLANK
    elif tight is None or wide is None:
        verdict = EMPTY
    elif area < recipe.least_area:
        verdict = SMALL
    else:
        width, height = np.diff(in_original(tight, xray).reshape(2, 2), axis=0)[0]
        verdict = NARROW if width < recipe.least_width * height else FOUND
        frame = in_original(wide, xray) if verdict == FOUND else frame
    return Cleaned(xray.image_id, verdict, area, frame, mask)


def in_original(box: np.ndarray, xray: CachedXray) -> np.ndarray:
    """Convert a box xmin, ymin, xmax, ymax (4,) from pixels of the cached image to pixels of the original image."""
    height, width = xray.pixels.shape
    # The division comes first, so that a rounding error never moves a frame beyond the right or bottom edge.
    return box / [width, height, width, height] * np.array([xray.columns, xray.rows] * 2)


def remove_islands(lungs: np.ndarray, least: float) -> np.ndarray:
    """Return a bool mask (rows, columns) without its connected parts that cover less than a share `least` of the image."""
    _, places, stats, _ = cv2.connectedComponentsWithStats(lungs.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= least * lungs.size
    large[0] = False  # the background
    return large[places]


def dilate_and_close(lungs: np.ndarray, dilations: int, closings: int) -> np.ndarray:
    """Dilate a bool mask (rows, columns) `dilations` times by 3 x 3 pixels, then close its gaps; return the new mask.

    Closing consists of `closings` dilations, then as many erosions.
    """
    square = np.ones((3, 3), np.uint8)
    clean: np.ndarray = lungs.astype(np.uint8)
    if dilations:
        clean = cv2.dilate(clean, square, iterations=dilations)
    if closings:
        clean = cv2.morphologyEx(clean, cv2.MORPH_CLOSE, square, iterations=closings)
    return clean > 0


def lung_frame(lungs: np.ndarray, margin: float) -> np.ndarray | None:
    """Return the frame around a bool mask (rows, columns): xmin, ymin, xmax, ymax in whole pixels; None for an empty mask.

    On each side, the frame is extended by a share `margin` of its width or height, but not beyond the image.
    """
    across, down = np.flatnonzero(lungs.any(axis=0)), np.flatnonzero(lungs.any(axis=1))
    if not len(across):
        return None
    low, high = np.array([across[0], down[0]]), np.array([across[-1], down[-1]]) + 1
    added = margin * (high - low)
    low, high = np.floor(low - added).clip(min=0), np.ceil(high + added)
    return np.concatenate([low, np.minimum(high, [lungs.shape[1], lungs.shape[0]])])
