"""Reads a chest X-ray from a DICOM file: pixels as a radiologist sees them, or one error that names file and reason."""

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
from kitlib.xrays.stored_values import Stored, read_stored, values_of
from kitlib.xrays.voi_lut import Display, read_display, to_grey

T = TypeVar("T")


def _one_error(read: Callable[[str | Path], T]) -> Callable[[str | Path], T]:
    """Whatever goes wrong with a damaged file inside pydicom or a decoder, in one class."""

    @wraps(read)
    def reading(path: str | Path) -> T:
        try:
            return read(path)
        except Exception as error:
            told = type(error) is ValueError or isinstance(error, InvalidElement)
            reason = str(error) if told else f"{type(error).__name__}: {error}"
        except BaseException as error:
            # A Rust decoder's panic is no Exception; KeyboardInterrupt is none either and must pass.
            if type(error).__name__ != "PanicException":
                raise
            reason = f"the decoder panicked: {error}"
        # Not "from error": a kept traceback would keep the file's bytes and pixels in memory.
        raise UnreadableXray(path, " ".join(reason.split()))

    return reading


@dataclass(frozen=True)
class Xray:
    pixels: np.ndarray  # uint8 (rows, columns), 255 = white as a radiologist sees it
    warnings: tuple[str, ...]  # what the file says and cannot be, and what was done instead


def read_xray(path: str | Path) -> np.ndarray:
    """uint8 (rows, columns), 255 = white as a radiologist sees it; its warnings go to the log. Raises UnreadableXray.

    See `decode_xray`, which logs nothing.
    """
    xray = decode_xray(path)
    if xray.warnings:
        logging.getLogger(__name__).warning("%s: %s", path, "; ".join(xray.warnings))
    return xray.pixels


@_one_error
def decode_xray(path: str | Path) -> Xray:
    """Modality LUT, VOI LUT, one inversion for MONOCHROME1, minimum..maximum to 0..255.

    Of several VOI LUTs or windows the first is taken, a LUT before a window; of several frames the first.
    PresentationLUTShape INVERSE belongs to MONOCHROME1 and inverts nothing by itself. PixelPaddingValue is a value like any
    other. Colour becomes its luma. An image of one value is black. What a header says and cannot be is left out, with a
    warning. Raises UnreadableXray.
    """
    elements, syntax = read_elements(path)
    stored = read_stored(elements, syntax)
    if stored.patterns.ndim == 3:
        luma = stored.patterns[..., 0] if stored.photometric.startswith("YBR") else _luma(stored.patterns)
        stored = replace(stored, patterns=np.ascontiguousarray(luma))
        display = Display()
    else:
        display = read_display(elements, stored.bits_stored, stored.signed, stored.photometric == "MONOCHROME1")
    pixels, warnings = _shown(stored, display)
    return Xray(pixels, tuple([*stored.warnings, *display.warnings, *warnings]))


@_one_error
def read_stored_values(path: str | Path) -> np.ndarray:
    """The first frame's stored values, before any LUT: (rows, columns) or (rows, columns, 3), uint8, int8, uint16 or int16.

    Bits above BitsStored are cut off or, for signed images, filled with the sign. Raises UnreadableXray.
    """
    stored = read_stored(*read_elements(path))
    kind = np.dtype(f"{'i' if stored.signed else 'u'}{stored.patterns.itemsize}")
    return values_of(stored.patterns, stored.bits, stored.signed).astype(kind)


@_one_error
def read_header(path: str | Path) -> XrayHeader:
    """Ids, size and view, without the pixels. Raises UnreadableXray, also for a file with none of an X-ray's elements."""
    return header_of(*read_elements(path, with_pixels=False))


def _luma(patterns: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(patterns), cv2.COLOR_RGB2GRAY)


def _shown(stored: Stored, display: Display) -> tuple[np.ndarray, list[str]]:
    """Each pattern through one table of 256 or 65,536 greys, made for the patterns that occur: exact, in two passes."""
    size = 256**stored.patterns.itemsize
    occurring = np.flatnonzero(cv2.calcHist([stored.patterns], [0], None, [size], [0, size]))
    table = np.zeros(size, dtype=np.uint8)
    table[occurring], warnings = to_grey(values_of(occurring, stored.bits, stored.signed), display)
    return cv2.LUT(stored.patterns, table), warnings
