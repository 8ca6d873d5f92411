"""Reads the DICOM file of an X-ray: pixels for display, stored values, or header. Every error becomes UnreadableXray."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from kitlib.errors import UnreadableXray
from kitlib.xrays.header import InvalidElement, XrayHeader, header_of, read_elements
from kitlib.xrays.stored_values import StoredFrame, is_padding, read_stored, values_of
from kitlib.xrays.voi_lut import Display, read_display, to_grey

T = TypeVar("T")


def _raises_unreadable_xray(read: Callable[[str | Path], T]) -> Callable[[str | Path], T]:
    """Return a version of `read`, a function that reads a file, that raises UnreadableXray for any error in it."""

    @wraps(read)
    def wrapper(path: str | Path) -> T:
        try:
            return read(path)
        except Exception as error:
            is_plain = type(error) is ValueError or isinstance(error, InvalidElement)
            reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
        except BaseException as error:
            # A panic of a Rust decoder is not an Exception. Neither is KeyboardInterrupt, which must not be caught.
            if type(error).__name__ != "PanicException":
                raise
            reason = f"the decoder panicked: {error}"
        # Raised without "from error", because the traceback would keep the file's bytes and pixels in memory.
        raise UnreadableXray(path, " ".join(reason.split()))

    return wrapper


@dataclass(frozen=True)
class Xray:
    """A decoded X-ray at full resolution."""

    pixels: np.ndarray  # uint8 (rows, columns) for display: 255 is white (bone), 0 is black (air)
    warnings: tuple[str, ...]  # invalid header elements, and what was done instead


def read_xray(path: str | Path) -> np.ndarray:
    """Decode a DICOM file to uint8 pixels (rows, columns) for display, where 255 is white, and log warnings.

    `decode_xray` describes the decoding and returns the warnings instead of logging them. Raises UnreadableXray if the file
    cannot be read as an X-ray.
    """
    xray = decode_xray(path)
    if xray.warnings:
        logging.getLogger(__name__).warning("%s: %s", path, "; ".join(xray.warnings))
    return xray.pixels


@_raises_unreadable_xray
def decode_xray(path: str | Path) -> Xray:
    """Decode a DICOM file; returns an Xray with pixels for display, and warnings about the file.

    Applies the modality LUT and the VOI LUT, inverts MONOCHROME1 images, then maps minimum..maximum to 0..255. Only the
    first frame, the first VOI LUT and the first window are used; a VOI LUT is preferred to a window. PresentationLUTShape
    INVERSE belongs to MONOCHROME1 and is ignored. Pixels with PixelPaddingValue are black and do not affect the minimum or
    maximum. Colour images are converted to luma. A constant image becomes black. Invalid header elements are ignored, with a
    warning. Raises UnreadableXray if the file cannot be read as an X-ray.
    """
    elements, syntax = read_elements(path)
    stored = read_stored(elements, syntax)
    if stored.patterns.ndim == 3:
        luma = stored.patterns[..., 0] if stored.photometric.startswith("YBR") else _luma(stored.patterns)
        stored = replace(stored, patterns=np.ascontiguousarray(luma))
        display = Display()
    else:
        display = read_display(elements, stored.bits_stored, stored.signed, stored.photometric == "MONOCHROME1")
    pixels, warnings = _to_pixels(stored, display)
    return Xray(pixels, tuple([*stored.warnings, *display.warnings, *warnings]))


@_raises_unreadable_xray
def read_stored_values(path: str | Path) -> np.ndarray:
    """Return the stored values of a DICOM file's first frame, before any LUT is applied.

    The array is uint8, int8, uint16 or int16 with shape (rows, columns) or (rows, columns, 3). Bits above BitsStored are
    cleared or, for signed images, set to the sign bit. Raises UnreadableXray if the file cannot be read as an X-ray.
    """
    stored = read_stored(*read_elements(path))
    kind = np.dtype(f"{'i' if stored.signed else 'u'}{stored.patterns.itemsize}")
    return values_of(stored.patterns, stored.bits, stored.signed).astype(kind)


@_raises_unreadable_xray
def read_header(path: str | Path) -> XrayHeader:
    """Return the ids, size, view and other header fields of a DICOM file, without reading its pixels.

    Raises UnreadableXray if the file cannot be read or has none of an X-ray's elements.
    """
    return header_of(*read_elements(path, with_pixels=False))


def _luma(patterns: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(patterns), cv2.COLOR_RGB2GRAY)


def _to_pixels(stored: StoredFrame, display: Display) -> tuple[np.ndarray, list[str]]:
    """Return the pixels for display, uint8 (rows, columns), and a list of warnings.

    The grey of each bit pattern is looked up in a table, which is faster than applying the display transforms to every pixel
    and has the same result. Greys are computed only for the patterns that occur in the image.
    """
    size = 256**stored.patterns.itemsize
    histogram = cv2.calcHist([stored.patterns], [0], None, [size], [0, size]).ravel()
    if stored.padding:
        frame_bits = 8 * stored.patterns.itemsize
        outside = is_padding(np.arange(size), frame_bits, stored.bits, stored.signed, stored.padding)
        if histogram[~outside].any():  # otherwise the padding is the image
            histogram[outside] = 0
    occurring = np.flatnonzero(histogram)
    table = np.zeros(size, dtype=np.uint8)
    values = values_of(occurring, stored.bits, stored.signed)
    table[occurring], warnings = to_grey(values, display, histogram[occurring])
    return cv2.LUT(stored.patterns, table), warnings
