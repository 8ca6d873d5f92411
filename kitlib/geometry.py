"""Where a pixel of the original image lies on a model's input, and back, exactly and per axis.

All boxes are float arrays (n, 4) of xmin, ymin, xmax, ymax in pixels; a pixel's left edge is its index, so an image of W
columns spans 0..W.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Placement:
    """How an image of `rows` x `columns` is laid on a canvas: resized to `inner_rows` x `inner_columns`, then padded.

    The scale of each axis is inner size / original size *after* rounding to whole pixels, so that the inverse is exact (one
    common scale is off by up to half a pixel of the canvas at the far edge).
    """

    rows: int
    columns: int
    canvas_rows: int
    canvas_columns: int
    inner_rows: int
    inner_columns: int
    top: int
    left: int

    @property
    def scale(self) -> np.ndarray:
        """Canvas pixels an original pixel along x, y, x, y."""
        x, y = self.inner_columns / self.columns, self.inner_rows / self.rows
        return np.array([x, y, x, y])

    @property
    def offset(self) -> np.ndarray:
        return np.array([self.left, self.top, self.left, self.top], dtype=float)

    def image(self, pixels: np.ndarray, fill: int = 0) -> np.ndarray:
        """Lay uint8 `pixels` of any size with this aspect ratio on the canvas.

        The pixels may already be smaller than `rows` x `columns`: the decode-once cache keeps images at a reduced size
        while boxes stay in original pixels.
        """
        shrinks = pixels.shape[0] >= self.inner_rows
        resized = cv2.resize(
            pixels, (self.inner_columns, self.inner_rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        canvas = np.full((self.canvas_rows, self.canvas_columns, *pixels.shape[2:]), fill, dtype=pixels.dtype)
        canvas[self.top : self.top + self.inner_rows, self.left : self.left + self.inner_columns] = resized
        return canvas

    def boxes_to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        return np.asarray(boxes, dtype=float).reshape(-1, 4) * self.scale + self.offset

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        return (np.asarray(boxes, dtype=float).reshape(-1, 4) - self.offset) / self.scale


def letterbox(rows: int, columns: int, size: int | tuple[int, int]) -> Placement:
    """Keep the aspect ratio, centre, pad: the longer side fills the canvas. `size` is a side or (rows, columns)."""
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    scale = min(canvas_rows / rows, canvas_columns / columns)
    inner_rows = min(canvas_rows, max(1, round(rows * scale)))
    inner_columns = min(canvas_columns, max(1, round(columns * scale)))
    top, left = (canvas_rows - inner_rows) // 2, (canvas_columns - inner_columns) // 2
    return Placement(rows, columns, canvas_rows, canvas_columns, inner_rows, inner_columns, top, left)


def stretch(rows: int, columns: int, size: int | tuple[int, int]) -> Placement:
    """Fill the canvas, whatever becomes of the aspect ratio."""
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    return Placement(rows, columns, canvas_rows, canvas_columns, canvas_rows, canvas_columns, 0, 0)


PLACEMENTS = {"letterbox": letterbox, "stretch": stretch}


def clip_boxes(boxes: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes at the image's edges; return them and a mask (n,) of those that keep at least one pixel a side."""
    clipped = np.asarray(boxes, dtype=float).reshape(-1, 4).copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, columns)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, rows)
    return clipped, (clipped[:, 2] - clipped[:, 0] >= 1) & (clipped[:, 3] - clipped[:, 1] >= 1)


def flip_boxes(boxes: np.ndarray, columns: int) -> np.ndarray:
    """Mirror left and right in an image of `columns` columns; its own inverse."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return np.stack([columns - boxes[:, 2], boxes[:, 1], columns - boxes[:, 0], boxes[:, 3]], axis=1)


def _check_size(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {rows} x {columns} pixels has no place on a canvas; read its size first")
