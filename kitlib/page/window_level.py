"""Other windows on a DICOM file's values than the one that its decoded copy is shown with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitlib.xrays.dicom import decode_xray, read_header, read_stored_values
from kitlib.xrays.header import read_elements
from kitlib.xrays.voi_lut import Display, Lut, Window, read_display
from kitlib.xrays.worker import shrink


@dataclass(frozen=True)
class Windowed:
    """A shrunken X-ray with all of its values, which are what windows are about: after the modality LUT or rescale.

    A chest X-ray's values have no physical unit: two files' windows cannot be compared. Centres and widths are those of
    DICOM's function LINEAR.
    """

    values: np.ndarray  # float32 (h, w), the means of areas
    inverted: bool  # MONOCHROME1: the lowest value is white
    lowest: float  # of the whole image, before it was shrunk
    highest: float
    own: tuple[float, float] | None  # the file's first window (centre, width); None where it has none
    has_curve: bool  # the file brings a VOI LUT, which its decoded copy follows and no window equals

    @property
    def whole(self) -> tuple[float, float]:
        """Centre and width of the window whose ends are the lowest and the highest value."""
        return (self.lowest + self.highest + 1) / 2, self.highest - self.lowest + 1

    @property
    def default(self) -> tuple[float, float]:
        """The file's own window, or the whole range."""
        return self.own or self.whole

    def shown(self, center: float, width: float) -> np.ndarray:
        """uint8 (h, w), 255 = white as a radiologist sees it. Raises ValueError unless the width is at least 1.

        DICOM PS3.3 C.11.2.1.2.1 over 0..255, turned round for MONOCHROME1, to the nearest grey (decoded copies: the one
        below). The window may be anywhere: beside all values it shows black or white alone.
        """
        if not (np.isfinite(center) and np.isfinite(width) and width >= 1):
            raise ValueError(f"The window's width must be 1 or more and its centre a number; they are {width} and {center}.")
        grey = Window(center, width, "LINEAR", 0.0, 255.0)(self.values.astype(np.float64))
        return np.rint(255 - grey if self.inverted else grey).astype(np.uint8)


def read_windowed(path: str | Path, longest_side: int) -> Windowed:
    """The values of a DICOM file, at most `longest_side` pixels a side: the very size of its decoded copy.

    Decodes in this process: only for a file that a decoding process has survived. Of a colour file the luma as
    `decode_xray` shows it, without a window of its own. Raises UnreadableXray.
    """
    stored = read_stored_values(path)
    if stored.ndim == 3:
        stored, display = decode_xray(path).pixels, Display()
    else:
        inverted = read_header(path).photometric.upper() == "MONOCHROME1"
        elements, _ = read_elements(path, with_pixels=False)  # which read_header has shown to be readable
        display = read_display(elements, 8 * stored.itemsize, stored.dtype.kind == "i", inverted)
    modality = display.modality
    if isinstance(modality, Lut):
        # Before shrinking: a curve of means is not the mean of a curve. A rescale may wait, and has less to do then.
        stored, modality = modality(stored), None
    values, ends = shrink(stored.astype(np.float32), longest_side), np.array([stored.min(), stored.max()], dtype=np.float64)
    if modality is not None:
        values, ends = modality(values.astype(np.float64)).astype(np.float32), modality(ends)
    has_curve = isinstance(display.voi, Lut)
    return Windowed(values, display.inverted, float(ends.min()), float(ends.max()), _as_linear(display.voi), has_curve)


def _as_linear(voi: Lut | Window | None) -> tuple[float, float] | None:
    """The centre and width with which LINEAR shows what `voi` shows; of a SIGMOID the line through its middle."""
    if not isinstance(voi, Window):
        return None
    if voi.function == "LINEAR":
        return voi.center, voi.width
    # LINEAR takes a half from the centre and one from the width, LINEAR_EXACT and SIGMOID do not.
    return voi.center + 0.5, voi.width + 1
