"""Reads the DICOM file of an X-ray: pixels for display, stored values, or header. Every error becomes UnreadableXray."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from pydicom.pixels import apply_color_lut

from kitlib.errors import UnreadableXray
from kitlib.xrays.header import Elements, InvalidElement, XrayHeader, header_of, read_elements
from kitlib.xrays.modality import modality_warnings
from kitlib.xrays.stored_values import StoredFrame, is_padding, read_stored, read_stored_array, values_of
from kitlib.xrays.voi_lut import Display, read_display, to_grey

T = TypeVar("T")


def _raises_unreadable_xray(read: Callable[[str | Path], T]) -> Callable[[str | Path], T]:
    """Return `read`, a function that reads a file, wrapped so that UnreadableXray replaces every other error."""

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


@_raises_unreadable_xray
def decode_xray(path: str | Path) -> Xray:
    """Decode the first frame of a DICOM file; return an Xray with pixels for display, and warnings about the file.

    Applies the modality LUT, then the first VOI LUT or, if there is none, the first window; inverts MONOCHROME1 images; then
    maps minimum..maximum to 0..255. PresentationLUTShape is ignored: its value INVERSE only repeats MONOCHROME1. Padding
    (PixelPaddingValue) and float values that are not finite become black, and do not affect the minimum and maximum. A
    constant image becomes black. Colour images are converted to luma. PALETTE COLOR is read if the palette is grey. Invalid
    header elements are ignored, with a warning. Images of other modalities, such as CT, are decoded, with a warning (see
    kitlib.xrays.modality). Raises UnreadableXray if the file cannot be read as an X-ray.
    """
    elements, syntax = read_elements(path)
    return _show(elements, read_stored(elements, syntax))


@_raises_unreadable_xray
def read_stored_values(path: str | Path) -> np.ndarray:
    """Return the stored values of a DICOM file's first frame, before any LUT is applied.

    The array has integers of 8, 16 or 32 bits or, for float pixel data, float32 or float64; its shape is (rows, columns) or
    (rows, columns, 3). Bits above BitsStored are cleared or, for signed images, set to the sign bit. Raises UnreadableXray
    if the file cannot be read as an X-ray.
    """
    stored = read_stored(*read_elements(path))
    if stored.patterns.dtype.kind == "f":
        return stored.patterns
    kind = np.dtype(f"{'i' if stored.signed else 'u'}{stored.patterns.itemsize}")
    return values_of(stored.patterns, stored.bits, stored.signed).astype(kind)


@_raises_unreadable_xray
def read_header(path: str | Path) -> XrayHeader:
    """Return the ids, size, view and other header fields of a DICOM file, without reading its pixels.

    Raises UnreadableXray if the file cannot be read or has none of an X-ray's elements.
    """
    return header_of(*read_elements(path, with_pixels=False))


def show_stored(patterns: np.ndarray, elements: Elements) -> Xray:
    """Convert stored grey values that were extracted from a DICOM file to an Xray, which has pixels for display.

    `patterns` are the stored values, uint16 (rows, columns), for example from a 16-bit PNG; `elements` is the DICOM header.
    Raises ValueError, or any exception of pydicom, if the header is invalid or has a colour palette.
    """
    return _show(elements, read_stored_array(elements, patterns))


def _show(elements: Elements, stored: StoredFrame) -> Xray:
    """Return an Xray for the stored values `stored`, with the display transforms in the header `elements` applied.

    The transforms are described in `decode_xray`. Raises ValueError for a palette in colour, and if no value is finite.
    """
    display = Display()
    if stored.patterns.ndim == 3:
        luma = stored.patterns[..., 0] if stored.photometric.startswith("YBR") else _luma(stored.patterns)
        stored = replace(stored, patterns=np.ascontiguousarray(luma))
    elif stored.photometric == "PALETTE COLOR":
        stored = _through_palette(elements, stored)
    else:
        display = read_display(elements, stored.bits_stored, stored.signed, stored.photometric == "MONOCHROME1")
    pixels, warnings = _to_pixels(stored, display)
    return Xray(pixels, (*modality_warnings(elements), *stored.warnings, *display.warnings, *warnings))


def _luma(patterns: np.ndarray) -> np.ndarray:
    if patterns.itemsize > 2:  # not supported by OpenCV
        return patterns @ np.array([0.299, 0.587, 0.114])
    return cv2.cvtColor(np.ascontiguousarray(patterns), cv2.COLOR_RGB2GRAY)


def _through_palette(elements: Elements, stored: StoredFrame) -> StoredFrame:
    """Return a PALETTE COLOR frame with its indices replaced by greys. Raises ValueError if the palette has colours."""
    colours = apply_color_lut(values_of(stored.patterns, stored.bits, stored.signed), elements.dataset)
    if (colours != colours[..., :1]).any():
        raise ValueError("PALETTE COLOR with a palette of colours; expected grey values, or a palette of greys")
    greys = np.ascontiguousarray(colours[..., 0])
    return replace(stored, patterns=greys, bits=8 * greys.itemsize, signed=False, padding=None)


def _to_pixels(stored: StoredFrame, display: Display) -> tuple[np.ndarray, list[str]]:
    """Return the pixels for display, uint8 (rows, columns), and a list of warnings.

    The grey of each bit pattern is looked up in a table, which is faster than applying the display transforms to every pixel
    and has the same result. Greys are computed only for the patterns that occur in the image.
    """
    patterns = stored.patterns
    if patterns.itemsize > 2:  # too many patterns for a table
        occurring, places, counts = np.unique(patterns, return_inverse=True, return_counts=True)
        greys, warnings = _find_greys(occurring, counts, stored, display)
        return greys[places].reshape(patterns.shape), warnings
    size = 256**patterns.itemsize
    histogram = cv2.calcHist([patterns], [0], None, [size], [0, size]).ravel()
    occurring = np.flatnonzero(histogram)
    table = np.zeros(size, dtype=np.uint8)
    table[occurring], warnings = _find_greys(occurring, histogram[occurring], stored, display)
    return cv2.LUT(patterns, table), warnings


def _find_greys(
    occurring: np.ndarray, counts: np.ndarray, stored: StoredFrame, display: Display
) -> tuple[np.ndarray, list[str]]:
    """Return the grey level, uint8 (n,), of each bit pattern in `occurring` (n,), and a list of warnings.

    `counts` (n,) has the number of pixels with each pattern. Padding and values that are not finite become black. Raises
    ValueError if no value is finite.
    """
    values = values_of(occurring, stored.bits, stored.signed)
    shown = np.isfinite(2.0 * values)  # a span of finite values might be infinite
    if not shown.any():
        raise ValueError("no pixel has a finite value")
    warnings = [] if shown.all() else ["pixels whose values are not finite numbers are black"]
    if stored.padding:
        inside = shown & ~is_padding(occurring, 8 * stored.patterns.itemsize, stored.bits, stored.signed, stored.padding)
        shown = inside if inside.any() else shown  # otherwise the padding is the image
    greys = np.zeros(len(occurring), dtype=np.uint8)
    greys[shown], ignored = to_grey(values[shown], display, counts[shown])
    return greys, warnings + ignored
