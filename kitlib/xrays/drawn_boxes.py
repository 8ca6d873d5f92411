"""Draws predicted or annotated boxes, with their scores, on X-rays."""

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

from kitlib.tables import BOX

COLOUR = (255, 165, 0)  # orange, RGB
SHADOW = (0, 0, 0)


def draw_boxes(image: np.ndarray, boxes: Any, min_score: float = 0.0, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return a colour picture of a grey X-ray with boxes and their scores drawn on it.

    `image` is uint8 (rows, columns); the result is uint8 (rows, columns, 3) in RGB. `boxes` is a table, or a list of
    dictionaries like the column `boxes` of predictions, with xmin, ymin, xmax, ymax in pixels and optionally score. Boxes
    with a score below `min_score` are not drawn; boxes without a score are always drawn. If `image` is a resized copy of the
    image that the boxes belong to, pass the original size (rows, columns) as `size`. Raises ValueError if `image` has
    another shape or type, or if a box lacks a coordinate.
    """
    if image.dtype != np.uint8 or image.ndim != 2 or not image.size:
        raise ValueError(f"expected an image of uint8 (rows, columns), got {image.dtype} {image.shape}; see read_xray")
    rows, columns = size or image.shape
    scale = np.array([image.shape[1] / columns, image.shape[0] / rows] * 2)
    picture = np.repeat(image[..., None], 3, axis=2)
    width = max(1, round(max(image.shape) / 400))
    shown = [box for box in _as_dictionaries(boxes) if float(box.get("score", 1.0)) >= min_score]
    # The highest score is drawn last, so that it is on top.
    for box in sorted(shown, key=lambda box: float(box.get("score", 1.0))):
        if missing := [side for side in BOX if side not in box]:
            raise ValueError(f"a box lacks {', '.join(missing)}; it has {', '.join(map(str, box))}")
        xmin, ymin, xmax, ymax = (round(side) for side in np.array([float(box[side]) for side in BOX]) * scale)
        for colour, thickness in ((SHADOW, width + 2), (COLOUR, width)):
            cv2.rectangle(picture, (xmin, ymin), (xmax, ymax), colour, thickness)
        if "score" in box:
            place = xmin, (ymin if ymin > 20 * width else ymin + 14 * width) - 3 * width
            for colour, thickness in ((SHADOW, 3 * width), (COLOUR, width)):
                text, size_of_text = f"{float(box['score']):.2f}", 0.45 * width
                cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, size_of_text, colour, thickness, cv2.LINE_AA)
    return picture


def _as_dictionaries(boxes: Any) -> Iterable[Mapping[str, Any]]:
    return boxes.to_dict("records") if hasattr(boxes, "to_dict") else boxes
