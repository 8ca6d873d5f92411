"""Letterbox, stretch and centre crop: map original pixels to a model's canvas and back, exactly.

Boxes are float arrays (n, 4) of xmin, ymin, xmax, ymax in pixels. A pixel's left edge is its index, so an image of W columns
spans 0..W.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

# `centre_crop` resizes the shorter side to 256 pixels for a canvas of 224, as is usual for ImageNet and as Heidelberg did.
CROPPED_FROM = 256 / 224


@dataclass(frozen=True)
class Placement:
    """How an image of `rows` x `columns` pixels, or the part of it inside `frame`, is drawn on a canvas.

    The image or part is resized to `inner_rows` x `inner_columns`, then padded, or cropped where `top` or `left` is
    negative. The inner size is in whole pixels, so rows and columns have separate scales: inner size divided by original
    size. With two scales, mapping back is exact; with a single scale, the far edge could be off by half a canvas pixel.
    """

    rows: float
    columns: float
    canvas_rows: int
    canvas_columns: int
    inner_rows: int
    inner_columns: int
    top: int
    left: int
    frame: tuple[float, float, float, float] | None = None  # xmin, ymin, xmax, ymax in original pixels; None: whole image

    @property
    def scale(self) -> np.ndarray:
        """Canvas pixels per original pixel, as an array (4,): x, y, x, y, to multiply boxes by."""
        xmin, ymin, xmax, ymax = self._frame
        x, y = self.inner_columns / (xmax - xmin), self.inner_rows / (ymax - ymin)
        return np.array([x, y, x, y])

    @property
    def offset(self) -> np.ndarray:
        """Position of the original's top left corner in canvas pixels, possibly negative, as an array (4,): x, y, x, y."""
        padding = np.array([self.left, self.top, self.left, self.top], dtype=float)
        return padding - self.scale * (self._frame[:2] * 2)

    @property
    def _frame(self) -> tuple[float, float, float, float]:
        return self.frame or (0.0, 0.0, float(self.columns), float(self.rows))

    def image(self, pixels: np.ndarray, fill: int = 0, bicubic: bool = False) -> np.ndarray:
        """Draw `pixels` on a new canvas and return the canvas (uint8).

        `pixels` is the whole image in 8 bits (uint8). It may be smaller than `rows` x `columns`, because the cache of
        decoded X-rays stores them reduced. `fill` is the grey level of the padding. Pixels are reduced by area averaging and
        enlarged by linear interpolation; with `bicubic`, Pillow's bicubic filter does both.
        """
        if self.frame:
            xmin, ymin, xmax, ymax = self.frame
            x, y = pixels.shape[1] / self.columns, pixels.shape[0] / self.rows
            top, left = round(ymin * y), round(xmin * x)
            top, left = min(top, pixels.shape[0] - 1), min(left, pixels.shape[1] - 1)
            pixels = pixels[top : max(top + 1, round(ymax * y)), left : max(left + 1, round(xmax * x))]
        size = (self.inner_columns, self.inner_rows)
        if bicubic:
            resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        else:
            shrinks = pixels.shape[0] >= self.inner_rows
            resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        canvas = np.full((self.canvas_rows, self.canvas_columns, *pixels.shape[2:]), fill, dtype=pixels.dtype)
        shown = resized[max(0, -self.top) :, max(0, -self.left) :][: self.canvas_rows, : self.canvas_columns]
        top, left = max(0, self.top), max(0, self.left)
        canvas[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return canvas

    def back(self, canvas: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Return the whole image, in `rows` x `columns` pixels, from a canvas (uint8), such as a predicted mask.

        This is the inverse of `image`, with linear interpolation. Pixels that the canvas does not show are 0.
        """
        x, y = self.scale[:2] * [self.columns / columns, self.rows / rows]
        # OpenCV places the centre of the first pixel at 0; here its left edge is at 0.
        to_canvas = np.array([[x, 0, self.offset[0] + x / 2 - 0.5], [0, y, self.offset[1] + y / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        mapped = cv2.warpAffine(canvas, to_canvas, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        # BORDER_REPLICATE also fills pixels beyond the canvas.
        canvas_x = x * (np.arange(columns) + 0.5) + self.offset[0]
        canvas_y = y * (np.arange(rows) + 0.5) + self.offset[1]
        mapped[:, (canvas_x < 0) | (canvas_x > self.canvas_columns)] = 0
        mapped[(canvas_y < 0) | (canvas_y > self.canvas_rows)] = 0
        return mapped

    def shown(self, canvas: np.ndarray) -> np.ndarray:
        """Return the part of a canvas (rows, columns) that shows the image, without the padding."""
        top, left = max(0, self.top), max(0, self.left)
        return canvas[top : self.top + self.inner_rows, left : self.left + self.inner_columns]

    def boxes_to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes from original pixels to canvas pixels, without clipping at the frame or the canvas."""
        return np.asarray(boxes, dtype=float).reshape(-1, 4) * self.scale + self.offset

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes from canvas pixels to original pixels, without clipping at the edges of the image."""
        return (np.asarray(boxes, dtype=float).reshape(-1, 4) - self.offset) / self.scale


def letterbox(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Return a Placement of the whole image, undistorted, centred and padded.

    `size` is the side length of a square canvas, or its (rows, columns), in pixels.
    """
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    scale = min(canvas_rows / rows, canvas_columns / columns)
    inner_rows = min(canvas_rows, max(1, round(rows * scale)))
    inner_columns = min(canvas_columns, max(1, round(columns * scale)))
    top, left = (canvas_rows - inner_rows) // 2, (canvas_columns - inner_columns) // 2
    return Placement(rows, columns, canvas_rows, canvas_columns, inner_rows, inner_columns, top, left)


def stretch(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Return a Placement that stretches the image over a canvas of `size` pixels: a side length or (rows, columns)."""
    _check_size(rows, columns)
    canvas_rows, canvas_columns = (size, size) if isinstance(size, int) else size
    return Placement(rows, columns, canvas_rows, canvas_columns, canvas_rows, canvas_columns, 0, 0)


def centre_crop(rows: float, columns: float, size: int | tuple[int, int]) -> Placement:
    """Return a Placement that shows the middle of an image on a canvas, as with "resize to 256, crop to 224".

    The image is resized, keeping its aspect ratio, until it covers 256/224 of the canvas's height and width; then its middle
    is cut out. Source: the Heidelberg SIIM report, section 3.1. `size` is the canvas's side length or (rows, columns).
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
    """Return a Placement of only the part of an image inside `frame`, placed by the function `place`, such as `letterbox`.

    `frame` is an array (4,): xmin, ymin, xmax, ymax in original pixels. `Placement.image` rounds the frame to whole pixels
    of the decoded image, which may be reduced. Raises ValueError if the frame has no area or extends beyond the image.
    """
    xmin, ymin, xmax, ymax = map(float, frame)
    if not (0 <= xmin < xmax <= columns and 0 <= ymin < ymax <= rows):
        raise ValueError(f"frame {[xmin, ymin, xmax, ymax]} must have an area and lie in the {rows} x {columns} pixel image")
    return replace(place(ymax - ymin, xmax - xmin, size), rows=rows, columns=columns, frame=(xmin, ymin, xmax, ymax))


def clip_boxes(boxes: np.ndarray, rows: float, columns: float) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (n, 4) clipped to the image, and a bool array (n,), True for a width and height of at least 1 pixel."""
    clipped = np.asarray(boxes, dtype=float).reshape(-1, 4).copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, columns)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, rows)
    return clipped, (clipped[:, 2] - clipped[:, 0] >= 1) & (clipped[:, 3] - clipped[:, 1] >= 1)


def flip_boxes(boxes: np.ndarray, columns: int) -> np.ndarray:
    """Return boxes (n, 4) mirrored left to right in an image of `columns` columns. Doing it twice restores the boxes."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return np.stack([columns - boxes[:, 2], boxes[:, 1], columns - boxes[:, 0], boxes[:, 3]], axis=1)


def _check_size(rows: float, columns: float) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {rows} x {columns} pixels cannot be drawn; read its size from the file first")
