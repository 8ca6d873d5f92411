"""Crops images to the lungs' frame, and blackens what is outside of their mask, as a model's recipe requires.

Training and prediction share this code, so that a model sees the same kind of input in both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kitlib.letterbox import Placement, clip_boxes, within
from kitlib.lungs.finders import DarkLungs, LungFinder, Lungs
from kitlib.recipes.fields import VIEWS, WithBackbone
from kitlib.xrays.cache import CachedXray


class NoLungs:
    """A finder that never finds lungs, so that every image is used whole."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return Lungs without frame and mask for each image."""
        return [Lungs(None)] * len(xrays)


def choose_finder(recipe_lungs: str, finder: LungFinder | None) -> LungFinder:
    """Return the finder for a recipe's field `lungs`: DarkLungs for "darkness", else `finder`, or NoLungs if it is None."""
    if recipe_lungs == "darkness":
        return DarkLungs()
    return NoLungs() if finder is None else finder


def needs_lungs(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Return whether a model needs to know where the lungs are, because it masks the image or crops a view to them.

    `recipe` is the recipe in a bundle's record; nonempty `views` replace the recipe's.
    """
    shown = views or recipe.get("views") or ("full",)
    by_mask = recipe.get("masked", False) or recipe.get("probe") == "outside_lungs"
    return by_mask or any(VIEWS[view][0] == "lungs" for view in shown if view in VIEWS)


def needs_masks(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Return whether a model needs a segmenter's lung masks; the arguments are those of `needs_lungs`."""
    return recipe.get("lungs", "darkness") == "masks" and needs_lungs(recipe, views)


def check_finder(recipe: WithBackbone, finder: LungFinder | None, model: str) -> None:
    """Raise ValueError if a training of `recipe` needs masks but has no finder, or has a finder but would ignore it."""
    if recipe.lungs == "masks" and finder is None:
        raise ValueError(
            f'{model}: the recipe has lungs="masks", but there is no run with masks; set lungs_run to a run of notebook 14, '
            'or set overrides {"lungs": "darkness"}'
        )
    if recipe.lungs == "darkness" and finder is not None:
        raise ValueError(
            f'{model}: lungs_run names a run with masks, but the recipe has lungs="darkness", which ignores them; set '
            'overrides {"lungs": "masks"}, or leave lungs_run empty'
        )


def find_lungs(finder: LungFinder, xrays: Sequence[CachedXray], masked: bool) -> list[Lungs]:
    """Return the lungs of each image as far as a model uses them: the frame, and the mask if the model is `masked`.

    For a masked model, lungs without a mask count as not found.
    """
    all_lungs = finder.find(xrays)
    if not masked:
        return [Lungs(lungs.frame) for lungs in all_lungs]
    return [lungs if lungs.frame is not None and lungs.mask is not None else Lungs(None) for lungs in all_lungs]


def crop(place: Callable[..., Placement], frame: np.ndarray | None, rows: int, columns: int, side: int) -> Placement:
    """Return the placement of a frame, or of the whole image if it is None, on a square canvas of `side` pixels.

    `frame` (4,) is xmin, ymin, xmax, ymax in original pixels; `place` is a value of kitlib.letterbox.PLACEMENTS.
    """
    return place(rows, columns, side) if frame is None else within(place, frame, rows, columns, side)


def blacken_outside(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return uint8 pixels (height, width), set to 0 where the bool mask of that shape is False; unchanged without a mask."""
    return pixels if mask is None else pixels * mask


def clip_boxes_to_canvas(place: Placement, boxes: np.ndarray) -> np.ndarray:
    """Convert boxes (n, 4) from original pixels to pixels of the canvas of `place`; returns float (k, 4).

    Boxes are cut at the edges of the frame and of the canvas; those with less than a pixel a side in either are removed.
    """
    xmin, ymin, xmax, ymax = place.frame or (0.0, 0.0, float(place.columns), float(place.rows))
    corner = np.array([xmin, ymin] * 2)
    cut, is_inside = clip_boxes(np.asarray(boxes, dtype=float).reshape(-1, 4) - corner, ymax - ymin, xmax - xmin)
    cut, is_visible = clip_boxes(place.boxes_to_canvas(cut[is_inside] + corner), place.canvas_rows, place.canvas_columns)
    return cut[is_visible]
