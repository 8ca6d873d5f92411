"""Draws predicted or annotated boxes on X-rays; chooses the colours of findings and the positions of labels in pictures."""

from collections.abc import Iterable, Mapping
from itertools import cycle, pairwise
from typing import Any

import cv2
import numpy as np

from kitlib.tables import BOX

COLOUR = "#FFA500"  # orange, of boxes if there is a single finding
SHADOW = (0, 0, 0)
# Bright colours, because X-rays are dark, in an order in which each is as far as possible from those before it, to people
# with any kind of colour blindness (simulated as by Machado et al., 2009). The closest two are 0.13 apart in OKLab to normal
# sight and 0.07 to red-green blindness, where the closest of Okabe and Ito's seven colours are 0.08 apart.
COLOURS = (
    *("#E69F00", "#CC00FF", "#00FFFF", "#9999FF", "#FF3300", "#CC6699", "#66CC99"),
    *("#00FF00", "#0099CC", "#FFCCCC", "#FF33CC", "#66CCFF", "#99FF99", "#999966"),
)


def finding_colours(findings: Iterable[str]) -> dict[str, str]:
    """Return a dict from finding to colour (#RRGGBB), sorted by name; empty for a single finding, which needs no colour.

    `findings` are all findings of a run, including those that a picture does not show, so that a finding has the same colour
    in all pictures of the run. The colours repeat after the 14th finding.
    """
    names = sorted(set(findings))
    return dict(zip(names, cycle(COLOURS), strict=False)) if len(names) > 1 else {}


def place_labels(boxes: np.ndarray, widths: Iterable[float], height: float, rows: float, columns: float) -> np.ndarray:
    """Return where to write the label of each box: x and y of the left end of its baseline, (n, 2), in pixels.

    The picture has `rows` x `columns` pixels. `boxes` (n, 4) are ordered, the most important first. `widths` has the width
    of each label and `height` is the height of the letters, in pixels. A label is above its box or, if there is no room,
    inside the box. If it would cover an earlier label, it moves down to the first free line, if there is one.
    """
    places: list[tuple[float, float, float]] = []
    for (xmin, ymin, *_), width in zip(boxes, widths, strict=True):
        x = min(max(xmin, 0), max(columns - width, 0))
        y = ymin - height / 3 if ymin > 1.3 * height else max(ymin, 0) + 1.1 * height
        lines = np.arange(y, rows, 1.2 * height)
        free = [
            line
            for line in lines
            if all(abs(line - taken) > height or x > left + wide or left > x + width for left, taken, wide in places)
        ]
        places.append((x, free[0] if free else y, width))
    return np.array(places).reshape(-1, 3)[:, :2]


def draw_boxes(
    image: np.ndarray,
    boxes: Any,
    min_score: float = 0.0,
    size: tuple[int, int] | None = None,
    findings: Iterable[str] = (),
) -> np.ndarray:
    """Return a colour picture of a grey X-ray with boxes and their scores drawn on it.

    `image` is uint8 (rows, columns); the result is uint8 (rows, columns, 3) in RGB. `boxes` is a table, or a list of
    dictionaries like the column `boxes` of predictions, with xmin, ymin, xmax, ymax in pixels and optionally finding and
    score. Boxes with a score below `min_score` are not drawn; boxes without a score are always drawn. If `image` is a
    resized copy of the image that the boxes belong to, pass the original size (rows, columns) as `size`.

    `findings` are all findings of the run; by default, the findings in `boxes`. If there is at most one finding, all boxes
    are orange. If there are several, each finding has a colour, its boxes are labelled with its name, and boxes without a
    score are dashed. Raises ValueError if `image` has another shape or type, or if a box lacks a coordinate.
    """
    if image.dtype != np.uint8 or image.ndim != 2 or not image.size:
        raise ValueError(f"expected an image of uint8 (rows, columns), got {image.dtype} {image.shape}; use read_xray")
    rows, columns = size or image.shape
    scale = np.array([image.shape[1] / columns, image.shape[0] / rows] * 2)
    picture = np.repeat(image[..., None], 3, axis=2)
    width = max(1, round(max(image.shape) / 400))
    all_boxes = list(_as_dictionaries(boxes))
    for box in all_boxes:
        if missing := [side for side in BOX if side not in box]:
            raise ValueError(f"a box lacks the keys {missing}; it has the keys {list(box)}")
    colours = finding_colours(findings or {str(box["finding"]) for box in all_boxes if "finding" in box})
    shown = [box for box in all_boxes if float(box.get("score", 1.0)) >= min_score]
    shown.sort(key=lambda box: float(box.get("score", 1.0)), reverse=True)
    corners = [np.array([float(box[side]) for side in BOX]) * scale for box in shown]
    labels = [_label(box, bool(colours)) for box in shown]
    # Names are longer than scores, so they are smaller.
    thick = max(1, round(width * 0.6)) if colours else width
    font = cv2.FONT_HERSHEY_SIMPLEX, 0.45 * thick
    widths = [cv2.getTextSize(label, *font, thick)[0][0] for label in labels]
    places = place_labels(np.array(corners), widths, 10 * thick, *image.shape)
    drawn = [
        (box, edges, label, place, _rgb(colours.get(str(box.get("finding")), COLOUR)))
        for box, edges, label, place in zip(shown, corners, labels, places, strict=True)
    ][::-1]  # the highest score is drawn last, so that it is on top
    for box, edges, _, _, colour in drawn:
        lines = _lines(np.rint(edges).astype(int).tolist(), 6 * width if colours and "score" not in box else 0)
        for paint, thickness in ((SHADOW, width + 2), (colour, width)):
            for first, last in lines:
                cv2.line(picture, first, last, paint, thickness)
    for _, _, label, place, colour in drawn:
        for paint, thickness in ((SHADOW, 3 * thick), (colour, thick)):
            cv2.putText(picture, label, np.rint(place).astype(int).tolist(), *font, paint, thickness, cv2.LINE_AA)
    return picture


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _label(box: Mapping[str, Any], is_named: bool) -> str:
    name = [str(box["finding"])] if is_named and "finding" in box else []
    return " ".join([*name, *([f"{float(box['score']):.2f}"] if "score" in box else [])])


def _lines(box: list[int], dash: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the two end points of each line that draws a box.

    The lines are the box's four sides or, if `dash` is above 0, dashes of this length in pixels.
    """
    xmin, ymin, xmax, ymax = box
    ends = [(xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax), (xmin, ymin)]
    if not dash:
        return list(pairwise(ends))
    across = [(start, min(start + dash, xmax)) for start in range(xmin, xmax, 2 * dash)]
    down = [(start, min(start + dash, ymax)) for start in range(ymin, ymax, 2 * dash)]
    return [
        *(((first, y), (last, y)) for y in (ymin, ymax) for first, last in across),
        *(((x, first), (x, last)) for x in (xmin, xmax) for first, last in down),
    ]


def _as_dictionaries(boxes: Any) -> Iterable[Mapping[str, Any]]:
    return boxes.to_dict("records") if hasattr(boxes, "to_dict") else boxes
