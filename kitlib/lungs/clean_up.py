"""From a segmenter's maps of one image to its lungs: islands dropped, dilated, closed, and taken only where plausible."""

from dataclasses import dataclass

import cv2
import numpy as np

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.letterbox import PLACEMENTS, Placement
from kitlib.lungs.equalise import adjusted
from kitlib.lungs.finders import FOUND, in_original
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.xrays.cache import CachedXray

# Raise it whenever the same maps may become other lungs: masks made before are then made anew, since a submission would crop
# by this version's.
CLEAN_UP = 1
CLEAN_SIDE = 512  # pixels of the canvas at which masks are cleaned up: what was published counts these
# Why lungs are not taken as found.
BLANK, EMPTY, SMALL, NARROW = "blank image", "no lung found", "too small", "too narrow for two lungs"
BLANK_SPREAD = 8  # grey levels from the darkest to the brightest pixel; a network finds lungs even in less


@dataclass(frozen=True)
class Segmented:
    """What was found in one image."""

    image_id: str
    verdict: str  # FOUND, BLANK, EMPTY, SMALL or NARROW
    area: float  # of the cleaned lungs, share of the canvas
    frame: np.ndarray  # (4,) xmin, ymin, xmax, ymax in original pixels; the whole image where not found
    codes: np.ndarray  # uint8 of MASK_CODES, of the shape of the cached pixels; "lungs" is what the clean-up has added


def placement(xray: CachedXray, recipe: SegmenterRecipe) -> Placement:
    """Where the whole image lies on the recipe's canvas."""
    return PLACEMENTS[recipe.placement](xray.rows, xray.columns, recipe.image_size)


def on_canvas(xray: CachedXray, place: Placement, recipe: SegmenterRecipe) -> np.ndarray:
    """What the network sees, uint8 (side, side): the image's grey adjusted, then laid on the canvas, black around it."""
    # In this order: the canvas's padding is no part of the image's histogram.
    return place.image(adjusted(xray.pixels, recipe.equalise, recipe.gamma))


def on_copy(maps: np.ndarray, place: Placement, shape: tuple[int, int], recipe: SegmenterRecipe) -> np.ndarray:
    """Maps as of `LungSegmenter.maps` as a label image of the decoded copy, uint8 `shape`, of MASK_CODES.

    Probabilities are linear between the canvas's pixels; the most probable of background and structures counts.
    """
    codes, alone = np.zeros(shape, np.uint8), len(maps) == 1
    # One structure alone has to be more probable than not, which saves the background's map.
    best = np.uint8(127) if alone else place.back(255 - maps.sum(axis=0).clip(max=255).astype(np.uint8), *shape)
    for name, each in zip(recipe.structures, maps, strict=True):
        likely = place.back(each, *shape)
        codes[likely > best] = MASK_CODES[name]
        best = np.maximum(best, likely)
    return codes


def segmented(xray: CachedXray, maps: np.ndarray, place: Placement, recipe: SegmenterRecipe) -> Segmented:
    """The verdict on the maps of one image, which lie on the canvas as `place` says.

    The lungs are dilated and closed by 3 x 3 pixels on a canvas of 512 pixels a side, and not trusted below an area: UNet +
    HRNet paper, section 3.2. Nor are a frame narrower than two lungs and, before all that, small islands.
    """
    shape, whole = xray.pixels.shape, np.array([0.0, 0.0, xray.columns, xray.rows])
    if int(xray.pixels.max()) - int(xray.pixels.min()) < BLANK_SPREAD:
        return Segmented(xray.image_id, BLANK, 0.0, whole, np.zeros(shape, np.uint8))
    sides = [number for number, name in enumerate(recipe.structures) if MASK_CODES[name] in LUNG_CODES]
    # By way of the copy: the two canvases round their bars each for itself.
    likely = place.back(maps[sides].sum(axis=0, dtype=np.uint16).clip(max=255).astype(np.uint8), *shape)
    large = PLACEMENTS[recipe.placement](xray.rows, xray.columns, CLEAN_SIDE)
    clean = without_islands(large.image(likely) > 127, recipe.least_island)
    clean = cleaned(clean, recipe.dilations, recipe.closings)
    area = float(clean.mean())
    raw, inside = on_copy(maps, place, shape, recipe), large.back(clean.astype(np.uint8) * 255, *shape) > 127
    kept = np.where(np.isin(raw, LUNG_CODES), raw, MASK_CODES["lungs"])
    codes = np.where(inside, kept, np.where(raw == MASK_CODES["heart"], raw, 0)).astype(np.uint8)
    tight, wide = (lung_frame(inside, margin) for margin in (0.0, recipe.margin))
    if tight is None or wide is None:
        return Segmented(xray.image_id, EMPTY, area, whole, codes)
    width, height = np.diff(in_original(tight, xray).reshape(2, 2), axis=0)[0]
    verdict = SMALL if area < recipe.least_area else NARROW if width < recipe.least_width * height else FOUND
    frame = in_original(wide, xray) if verdict == FOUND else whole
    return Segmented(xray.image_id, verdict, area, frame, codes)


def without_islands(lungs: np.ndarray, least: float) -> np.ndarray:
    """A bool mask (rows, columns) less its connected parts of less than a share of its pixels."""
    count, places, stats, _ = cv2.connectedComponentsWithStats(lungs.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= least * lungs.size
    large[0] = False  # what is around them
    return large[places] if count > 1 else lungs


def cleaned(lungs: np.ndarray, dilations: int, closings: int) -> np.ndarray:
    """A bool mask (rows, columns), dilated and then closed so many times by 3 x 3 pixels."""
    square = np.ones((3, 3), np.uint8)
    clean: np.ndarray = lungs.astype(np.uint8)
    if dilations:
        clean = cv2.dilate(clean, square, iterations=dilations)
    if closings:
        clean = cv2.morphologyEx(clean, cv2.MORPH_CLOSE, square, iterations=closings)
    return clean > 0


def lung_frame(lungs: np.ndarray, margin: float) -> np.ndarray | None:
    """xmin, ymin, xmax, ymax around a bool mask (rows, columns), on whole pixels, with a share of its sides added around.

    None for an empty mask.
    """
    across, down = np.flatnonzero(lungs.any(axis=0)), np.flatnonzero(lungs.any(axis=1))
    if not len(across):
        return None
    low, high = np.array([across[0], down[0]]), np.array([across[-1], down[-1]]) + 1
    added = margin * (high - low)
    low, high = np.floor(low - added).clip(min=0), np.ceil(high + added)
    return np.concatenate([low, np.minimum(high, [lungs.shape[1], lungs.shape[0]])])
