"""Where a pixel of the original image lies on a model's input, and back, exactly and per axis.

All boxes are float arrays (n, 4) of xmin, ymin, xmax, ymax in pixels; a pixel's left edge is its index, so an image of W
columns spans 0..W.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

# Shorter side of an image, in pixels, of which `centre_crop` keeps the middle 224: ImageNet's habit, and Heidelberg's.
CROPPED_FROM = 256 / 224


@dataclass(frozen=True)
class Placement:
    """How a frame of an image of `rows` x `columns` is laid on a canvas: resized to `inner_rows` x `inner_columns`, then
    padded, or cut where `top` or `left` are negative. The frame is the whole image, unless `within` names a part.

    The scale of each axis is inner size / frame size *after* rounding to whole pixels, so that the inverse is exact (one
    common scale is off by up to half a pixel of the canvas at the far edge).
    """

    rows: float
    columns: float
    canvas_rows: int
    canvas_columns: int
    inner_rows: int
    inner_columns: int
    top: int
    left: int
    frame: tuple[float, float, float, float] | None = None  # xmin, ymin, xmax, ymax in original pixels; None: the whole

    @property
    def scale(self) -> np.ndarray:
        """Canvas pixels an original pixel along x, y, x, y."""
        xmin, ymin, xmax, ymax = self._frame
        x, y = self.inner_columns / (xmax - xmin), self.inner_rows / (ymax - ymin)
        return np.array([x, y, x, y])

    @property
    def offset(self) -> np.ndarray:
        """Where the original's corner lies on the canvas, or outside of it: x, y, x, y."""
        padding = np.array([self.left, self.top, self.left, self.top], dtype=float)
        return padding - self.scale * (self._frame[:2] * 2)

    @property
    def _frame(self) -> tuple[float, float, float, float]:
        return self.frame or (0.0, 0.0, float(self.columns), float(self.rows))

    def image(self, pixels: np.ndarray, fill: int = 0) -> np.ndarray:
        """Lay uint8 `pixels` of any size with the original's aspect ratio on the canvas.

        The pixels may already be smaller than `rows` x `columns`: the decode-once cache keeps images at a reduced size
        while boxes stay in original pixels.
        """
        if self.frame:
            xmin, ymin, xmax, ymax = self.frame
            x, y = pixels.shape[1] / self.columns, pixels.shape[0] / self.rows
            top, left = round(ymin * y), round(xmin * x)
            top, left = min(top, pixels.shape[0] - 1), min(left, pixels.shape[1] - 1)
            pixels = pixels[top : max(top + 1, round(ymax * y)), left : max(left + 1, round(xmax * x))]
        shrinks = pixels.shape[0] >= self.inner_rows
        resized = cv2.resize(
            pixels, (self.inner_columns, self.inner_rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        canvas = np.full((self.canvas_rows, self.canvas_columns, *pixels.shape[2:]), fill, dtype=pixels.dtype)
        shown = resized[max(0, -self.top) :, max(0, -self.left) :][: self.canvas_rows, : self.canvas_columns]
        top, left = max(0, self.top), max(0, self.left)
        canvas[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return canvas

    def back(self, canvas: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """The canvas's pixels, uint8, where the original's lie, on a copy of it of `rows` x `columns`; 0 beyond the canvas.

        The inverse of `image`, between pixels linear.
        """
        x, y = self.scale[:2] * [self.columns / columns, self.rows / rows]
        # From a pixel's middle on the copy to its place on the canvas, whose pixels' middles count from 0.
        place = np.array([[x, 0, self.offset[0] + x / 2 - 0.5], [0, y, self.offset[1] + y / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        laid = cv2.warpAffine(canvas, place, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        # The border's pixels reach to the canvas's edge, and no farther.
        across = x * (np.arange(columns) + 0.5) + self.offset[0]
        down = y * (np.arange(rows) + 0.5) + self.offset[1]
        laid[:, (across < 0) | (across > self.canvas_columns)] = 0
        laid[(down < 0) | (down > self.canvas_rows)] = 0
        return laid

    def boxes_to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Original pixels to the canvas's; what lies outside of frame or canvas keeps its place there."""
        return np.asarray(boxes, dtype=float).reshape(-1, 4) * self.scale + self.offset

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        return (np.asarray(boxes, dtype=float).reshape(-1, 4) - self.offset) / self.scale


def letterbox(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Keep the aspect ratio, centre, pad: the longer side fills the canvas. `size` is a side or (rows, columns)."""
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    scale = min(canvas_rows / rows, canvas_columns / columns)
    inner_rows = min(canvas_rows, max(1, round(rows * scale)))
    inner_columns = min(canvas_columns, max(1, round(columns * scale)))
    top, left = (canvas_rows - inner_rows) // 2, (canvas_columns - inner_columns) // 2
    return Placement(rows, columns, canvas_rows, canvas_columns, inner_rows, inner_columns, top, left)


def stretch(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Fill the canvas, whatever becomes of the aspect ratio."""
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    return Placement(rows, columns, canvas_rows, canvas_columns, canvas_rows, canvas_columns, 0, 0)


def centre_crop(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Keep the aspect ratio and the middle: the shorter side is resized to 256/224 of the canvas, the rest is cut.

    Heidelberg SIIM report, section 3.1 (256 and 224 pixels).
    """
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    scale = CROPPED_FROM * max(canvas_rows / rows, canvas_columns / columns)
    inner_rows, inner_columns = max(canvas_rows, round(rows * scale)), max(canvas_columns, round(columns * scale))
    top, left = (canvas_rows - inner_rows) // 2, (canvas_columns - inner_columns) // 2
    return Placement(rows, columns, canvas_rows, canvas_columns, inner_rows, inner_columns, top, left)


Place = Callable[[float, float, int | tuple[int, int]], Placement]
PLACEMENTS: dict[str, Place] = {"letterbox": letterbox, "stretch": stretch, "centre_crop": centre_crop}


def within(place: Place, frame: np.ndarray, rows: int, columns: int, size: int | tuple[int, int]) -> Placement:
    """`place` for a part of the image alone: `frame` (4,) xmin, ymin, xmax, ymax in original pixels.

    Where the pixels are a reduced copy, a frame on that copy's own grid is cut exactly. Raises ValueError for a frame
    without area or beyond the image.
    """
    xmin, ymin, xmax, ymax = map(float, frame)
    if not (0 <= xmin < xmax <= columns and 0 <= ymin < ymax <= rows):
        raise ValueError(f"frame {[xmin, ymin, xmax, ymax]} is no part of an image of {rows} x {columns} pixels")
    return replace(place(ymax - ymin, xmax - xmin, size), rows=rows, columns=columns, frame=(xmin, ymin, xmax, ymax))


def clip_boxes(boxes: np.ndarray, rows: float, columns: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes at the image's edges; return them and a mask (n,) of those that keep at least one pixel a side."""
    clipped = np.asarray(boxes, dtype=float).reshape(-1, 4).copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, columns)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, rows)
    return clipped, (clipped[:, 2] - clipped[:, 0] >= 1) & (clipped[:, 3] - clipped[:, 1] >= 1)


def flip_boxes(boxes: np.ndarray, columns: int) -> np.ndarray:
    """Mirror left and right in an image of `columns` columns; its own inverse."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return np.stack([columns - boxes[:, 2], boxes[:, 1], columns - boxes[:, 0], boxes[:, 3]], axis=1)


def _check_size(rows: float, columns: float) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {rows} x {columns} pixels has no place on a canvas; read its size first")
