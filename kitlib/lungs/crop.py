"""How a model looks at lungs: cropped to their frame, and black outside of their mask where its recipe says so.

Training and prediction share it, so that a model predicts on what it has learnt from.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kitlib.letterbox import Placement, clip_boxes, within
from kitlib.lungs.finders import DarkLungs, LungFinder, Lungs
from kitlib.recipes.fields import VIEWS, WithBackbone
from kitlib.xrays.cache import CachedXray


class NobodysLungs:
    """Finds none: every image is seen whole."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        return [Lungs(None)] * len(xrays)


def finder_for(recipe_lungs: str, given: LungFinder | None) -> LungFinder:
    """Who finds the lungs for a recipe's field `lungs`: its "darkness" alone, or for "masks" who is given, if anybody."""
    if recipe_lungs == "darkness":
        return DarkLungs()
    return NobodysLungs() if given is None else given


def looks_at_lungs(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Whether a model of `recipe`, as a bundle's record has it, asks where the lungs are; `views` instead of its own."""
    shown = views or recipe.get("views") or ("full",)
    by_mask = recipe.get("masked", False) or recipe.get("probe") == "outside_lungs"
    return by_mask or any(VIEWS[view][0] == "lungs" for view in shown if view in VIEWS)


def wants_masks(recipe: dict[str, Any], views: Sequence[str] = ()) -> bool:
    """Whether such a model asks a segmenter for them."""
    return recipe.get("lungs", "darkness") == "masks" and looks_at_lungs(recipe, views)


def check_finder(recipe: WithBackbone, given: LungFinder | None, model: str) -> None:
    """Raise ValueError where a training of `recipe` lacks the masks it asks for, or would not heed those it is given."""
    if recipe.lungs == "masks" and given is None:
        raise ValueError(
            f'{model}: the recipe\'s lungs are "masks", and no run has them; set lungs_run to a run of notebook 14, or give '
            'overrides {"lungs": "darkness"}'
        )
    if recipe.lungs == "darkness" and given is not None:
        raise ValueError(
            f'{model}: a run of masks is given, and the recipe\'s lungs are "darkness", which heeds none; give overrides '
            '{"lungs": "masks"}, or leave lungs_run empty'
        )


def seen_lungs(finder: LungFinder, xrays: Sequence[CachedXray], masked: bool) -> list[Lungs]:
    """What a model takes of what is found: where it wants masks and an image has none, nothing, and otherwise no mask."""
    found = finder.find(xrays)
    if not masked:
        return [Lungs(lungs.frame) for lungs in found]
    return [lungs if lungs.frame is not None and lungs.mask is not None else Lungs(None) for lungs in found]


def crop(place: Callable[..., Placement], frame: np.ndarray | None, rows: int, columns: int, side: int) -> Placement:
    """`place` (see kitlib.letterbox.PLACEMENTS) of the frame, in original pixels, on a square canvas; None: of the whole."""
    return place(rows, columns, side) if frame is None else within(place, frame, rows, columns, side)


def only_lungs(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """uint8 (height, width) with 0 where the bool mask of the same shape is False; as they are where there is no mask."""
    return pixels if mask is None else pixels * mask


def boxes_shown(place: Placement, boxes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) in original pixels on the canvas of `place`, float (k, 4) in its pixels.

    They are cut at the edges of the frame and of the canvas, and gone where less than a pixel a side is left of either.
    """
    xmin, ymin, xmax, ymax = place.frame or (0.0, 0.0, float(place.columns), float(place.rows))
    corner = np.array([xmin, ymin] * 2)
    cut, inside = clip_boxes(np.asarray(boxes, dtype=float).reshape(-1, 4) - corner, ymax - ymin, xmax - xmin)
    cut, seen = clip_boxes(place.boxes_to_canvas(cut[inside] + corner), place.canvas_rows, place.canvas_columns)
    return cut[seen]
