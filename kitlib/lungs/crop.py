"""Crops images to the frame of the lungs, and blackens pixels outside the lung mask, as a model's recipe requires.

Training and prediction share this code, so that a model gets the same kind of input in both.
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
        """Return one Lungs per image, with neither a frame nor a mask."""
        return [Lungs(None)] * len(xrays)


def choose_finder(recipe_lungs: str, finder: LungFinder | None) -> LungFinder:
    """Return the object that finds the lungs for a recipe; `recipe_lungs` is the recipe's field `lungs`.

    Returns DarkLungs if the field is "darkness". Otherwise returns `finder`, or NoLungs if `finder` is None.
    """
    if recipe_lungs == "darkness":
        return DarkLungs()
    return NoLungs() if finder is None else finder


def needs_lungs(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Return whether a model needs to know where the lungs are, to blacken the image or to crop it to the lungs.

    `recipe` is the recipe in the model's bundle, as a dict. `views` are keys of VIEWS, such as "lungs" for the lung crop;
    the predictions for these views of an image are averaged. If `views` is empty, the recipe's views are used.
    """
    shown = views or recipe.get("views") or ("full",)
    by_mask = recipe.get("masked", False) or recipe.get("probe") == "outside_lungs"
    return by_mask or any(VIEWS[view][0] == "lungs" for view in shown if view in VIEWS)


def needs_masks(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Return whether a model needs a segmenter to find the lungs; the arguments are those of `needs_lungs`."""
    return recipe.get("lungs", "darkness") == "masks" and needs_lungs(recipe, views)


def check_finder(recipe: WithBackbone, finder: LungFinder | None, model: str) -> None:
    """Raise ValueError if `recipe` needs a finder but `finder` is None, or if `finder` is given but not needed.

    A recipe needs a finder if its field `lungs` is "masks". The message starts with `model`, the name of the model.
    """
    if recipe.lungs == "masks" and finder is None:
        raise ValueError(
            f'{model}: the recipe has lungs="masks", but there is no run with lung masks; set lungs_run to a run of '
            'notebook 14, or set overrides {"lungs": "darkness"}'
        )
    if recipe.lungs == "darkness" and finder is not None:
        raise ValueError(
            f'{model}: lungs_run is set, but the recipe has lungs="darkness", which ignores the masks of that run; set '
            'overrides {"lungs": "masks"}, or leave lungs_run empty'
        )


def find_lungs(finder: LungFinder, xrays: Sequence[CachedXray], masked: bool) -> list[Lungs]:
    """Return the lungs of each image, found by `finder`: their frame and, if `masked`, their mask.

    If `masked`, lungs without a mask count as not found.
    """
    all_lungs = finder.find(xrays)
    if not masked:
        return [Lungs(lungs.frame) for lungs in all_lungs]
    return [lungs if lungs.frame is not None and lungs.mask is not None else Lungs(None) for lungs in all_lungs]


def crop(place: Callable[..., Placement], frame: np.ndarray | None, rows: int, columns: int, side: int) -> Placement:
    """Return the Placement of an image, cropped to `frame` if it is given, on a square canvas of `side` pixels.

    `frame`, float (4,), is xmin, ymin, xmax, ymax in original pixels; None stands for the whole image of `rows` x `columns`
    pixels. `place` is one of the functions in kitlib.letterbox.PLACEMENTS.
    """
    return place(rows, columns, side) if frame is None else within(place, frame, rows, columns, side)


def blacken_outside(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return `pixels`, uint8 (height, width), with 0 where the bool `mask` is False; unchanged if `mask` is None."""
    return pixels if mask is None else pixels * mask


def clip_boxes_to_canvas(place: Placement, boxes: np.ndarray) -> np.ndarray:
    """Convert boxes from original pixels to canvas pixels, clip them to the canvas of `place`, and drop boxes outside it.

    `boxes` (n, 4 or more) and the result, float (k, 4 or more), have one row per box: xmin, ymin, xmax, ymax; other columns
    are kept. Boxes are clipped to the frame of `place`, then to the canvas. A box whose width or height is below one pixel
    after either step is removed.
    """
    xmin, ymin, xmax, ymax = place.frame or (0.0, 0.0, float(place.columns), float(place.rows))
    corner = np.array([xmin, ymin] * 2)
    boxes = np.atleast_2d(np.asarray(boxes, dtype=float))
    cut, is_inside = clip_boxes(boxes[:, :4] - corner, ymax - ymin, xmax - xmin)
    cut, is_visible = clip_boxes(place.boxes_to_canvas(cut[is_inside] + corner), place.canvas_rows, place.canvas_columns)
    return np.hstack([cut, boxes[is_inside, 4:]])[is_visible]
