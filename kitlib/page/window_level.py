"""Window and level: renders a DICOM file in a window (centre and width) that the visitor chooses."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitlib.xrays.dicom import decode_xray, read_header, read_stored_values
from kitlib.xrays.header import read_elements
from kitlib.xrays.voi_lut import Display, Lut, Window, read_display
from kitlib.xrays.worker import shrink


@dataclass(frozen=True)
class Windowed:
    """The pixel values of an X-ray at a reduced resolution, after the modality LUT or rescale and before any window.

    The values of a chest X-ray have no physical unit, so the windows of two files cannot be compared. Every centre and width
    here is a parameter of DICOM's window function LINEAR.
    """

    values: np.ndarray  # float32 (h, w), area averages of the original pixels
    inverted: bool  # MONOCHROME1: the lowest value is white
    lowest: float  # lowest value of the original image
    highest: float  # highest value of the original image
    file_window: tuple[float, float] | None  # centre and width of the file's first window; None if it has no window
    has_curve: bool  # whether the file has a VOI LUT, which the decoded copy uses and no window can reproduce

    @property
    def full_range(self) -> tuple[float, float]:
        """Centre and width of the window that reaches from the lowest to the highest value."""
        return (self.lowest + self.highest + 1) / 2, self.highest - self.lowest + 1

    @property
    def default(self) -> tuple[float, float]:
        """Centre and width of the file's window, or of the full range if the file has no window."""
        return self.file_window or self.full_range

    def render(self, center: float, width: float) -> np.ndarray:
        """Return the X-ray in this window as a uint8 array (h, w), in which 255 is what a radiologist sees as white.

        Follows DICOM PS3.3 C.11.2.1.2.1 with the output range 0..255, inverted for MONOCHROME1. Values are rounded to the
        nearest grey level (in decoded copies of files, down). A window outside the range of values makes the image all black
        or all white. Raises ValueError if the width is below 1, or if the centre or the width is not finite.
        """
        if not (np.isfinite(center) and np.isfinite(width) and width >= 1):
            raise ValueError(f"The window's width must be 1 or more and its centre a number, not {width} and {center}.")
        grey = Window(center, width, "LINEAR", 0.0, 255.0)(self.values.astype(np.float64))
        return np.rint(255 - grey if self.inverted else grey).astype(np.uint8)


def read_windowed(path: str | Path, longest_side: int) -> Windowed:
    """Return a DICOM file's values before windowing, in the size of its decoded copy with this `longest_side` in pixels.

    Decodes in this process, so it must be used only for a file that a separate decoding process has read before. If the file
    has colours, a palette or float values, `values` are the grey levels that `decode_xray` returns, and `file_window` is
    None. Raises UnreadableXray if the file cannot be decoded.
    """
    stored, photometric = read_stored_values(path), read_header(path).photometric.upper()
    if stored.ndim == 3 or stored.dtype.kind == "f" or photometric == "PALETTE COLOR":
        stored, display = decode_xray(path).pixels, Display()
    else:
        elements, _ = read_elements(path, with_pixels=False)  # readable, because read_header has read them
        display = read_display(elements, 8 * stored.itemsize, stored.dtype.kind == "i", photometric == "MONOCHROME1")
    modality = display.modality
    if isinstance(modality, Lut):
        # A lookup table is applied before shrinking, because it is not linear. A rescale is linear, and cheaper afterwards.
        stored, modality = modality(stored), None
    values, ends = shrink(stored.astype(np.float32), longest_side), np.array([stored.min(), stored.max()], dtype=np.float64)
    if modality is not None:
        values, ends = modality(values.astype(np.float64)).astype(np.float32), modality(ends)
    has_curve = isinstance(display.voi, Lut)
    return Windowed(values, display.inverted, float(ends.min()), float(ends.max()), _as_linear(display.voi), has_curve)


def _as_linear(voi: Lut | Window | None) -> tuple[float, float] | None:
    """Return centre and width of the LINEAR window with the same effect as `voi`, or None if `voi` is not a window.

    A SIGMOID window is replaced by the tangent of the curve at the window's centre.
    """
    if not isinstance(voi, Window):
        return None
    if voi.function == "LINEAR":
        return voi.center, voi.width
    # LINEAR subtracts 0.5 from the centre and 1 from the width; LINEAR_EXACT and SIGMOID do not.
    return voi.center + 0.5, voi.width + 1
