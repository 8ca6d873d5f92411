"""Maps stored values to 8-bit grey for display: modality LUT, VOI LUT or window, inversion.

The formulas are those of DICOM PS3.3 C.11.1 and C.11.2, in pydicom's order of operations, so that the results equal those of
`apply_modality_lut` and `apply_voi_lut` bit for bit. Two differences are intended. A negative RescaleSlope does not invert
the window; in pydicom, such a slope reverses the window's output range. An 8-bit LUT may have more than 256 entries; in
pydicom, the index wraps around.
"""

from dataclasses import dataclass, field

import numpy as np

from kitlib.xrays.header import Elements, InvalidElement

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
# A LUT or window that makes more than this share of the pixels black, or white, is ignored. For example, a window left over
# from a conversion to 8 bits made 99.8 % of a 12-bit image white.
ONE_END = 0.99


@dataclass(frozen=True)
class Lut:
    """A lookup table. Values up to `first` are mapped to the first entry, values past the end to the last entry."""

    first: int
    entries: np.ndarray  # (n,) float64
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.entries[np.clip(values - self.first, 0, len(self.entries) - 1).astype(np.int64)]


@dataclass(frozen=True)
class Rescale:
    """The linear modality transform: values * slope + intercept."""

    slope: float
    intercept: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values * self.slope + self.intercept


@dataclass(frozen=True)
class Window:
    """A VOI window, which maps values around `center` to the range from `lowest` to `highest`."""

    center: float
    width: float
    function: str  # one of FUNCTIONS
    lowest: float  # output range
    highest: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        center, width, span = self.center, self.width, self.highest - self.lowest
        if self.function == "SIGMOID":
            with np.errstate(over="ignore"):  # exp overflows to infinity, and 1 / infinity is correctly 0
                return span / (1 + np.exp(-4 * (values - center) / width)) + self.lowest
        if self.function == "LINEAR":
            center, width = center - 0.5, width - 1
        below, above = values <= center - width / 2, values > center + width / 2
        shown = np.where(below, self.lowest, self.highest)
        between = ~below & ~above
        shown[between] = ((values[between] - center) / width + 0.5) * span + self.lowest
        return shown


@dataclass(frozen=True)
class Display:
    """The display transforms of a DICOM file, in order of application, and warnings about the file's invalid elements."""

    modality: Lut | Rescale | None = None
    voi: Lut | Window | None = None
    inverted: bool = False
    warnings: list[str] = field(default_factory=list)


def read_display(elements: Elements, bits_stored: int, signed: bool, inverted: bool) -> Display:
    """Return a DICOM file's display transforms: its first modality LUT or rescale, and its first VOI LUT or window.

    A LUT is preferred to a rescale or a window. `inverted` says whether to invert the greys, as for MONOCHROME1. Invalid
    elements are ignored, with a warning.
    """
    warnings: list[str] = []
    modality, voi = None, None
    try:
        modality = _lut(elements, "ModalityLUTSequence", signed) or _rescale(elements)
    except InvalidElement as error:
        warnings.append(f"{error}; it is ignored")
    try:
        # The LUT's input is signed as well if rescaling can make it negative (PS3.3 C.11.2.1.1).
        negative = isinstance(modality, Rescale) and min(_output_range(modality, bits_stored, signed)) < 0
        voi = _lut(elements, "VOILUTSequence", signed or negative) or _window(elements, modality, bits_stored, signed)
    except InvalidElement as error:
        warnings.append(f"{error}; it is ignored, and the image's own range is used")
    return Display(modality, voi, inverted, warnings)


def to_grey(values: np.ndarray, display: Display, counts: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """Return the uint8 grey of each stored value (n,), and warnings about transforms that were ignored.

    `values` are the distinct values that occur in the image; `counts` (n,) is the number of pixels with each value. After
    the transforms, the minimum becomes 0, the maximum 255, and fractions are truncated (as in `(255 * x).astype(uint8)`). If
    there is only one value, its grey is 0. A transform that maps all values to one grey is ignored. A VOI LUT or window is
    also ignored if it makes nearly all pixels (a share above ONE_END) black, or white, although their stored values differ.
    """
    stored = values.astype(np.float64)
    if len(values) < 2:
        return np.zeros(len(values), dtype=np.uint8), ["all pixels of the image have the same value"]
    warnings = []
    with np.errstate(
        over="ignore", invalid="ignore", divide="ignore"
    ):  # transforms with non-finite results are ignored below
        calibrated = display.modality(stored) if display.modality else stored
        shown = display.voi(calibrated) if display.voi else calibrated
        if display.voi and (not _varies(shown) or _shows_one_end(shown, counts)):
            share = "every pixel" if not _varies(shown) else "nearly every pixel"
            warnings.append(
                f"{_name(display.voi)} maps {share} to one grey; it is ignored, and the image's own range is used"
            )
            shown = calibrated
        if not _varies(shown):
            warnings.append(f"{_name(display.modality)} maps every pixel to one value; it is ignored")
            shown = stored
    if display.inverted:
        shown = shown.max() - shown
    shown = shown - shown.min()
    return (shown / shown.max() * 255).astype(np.uint8), warnings


def _shows_one_end(shown: np.ndarray, counts: np.ndarray | None) -> bool:
    """Return whether a share above ONE_END of all pixels is black, or is white, although their stored values differ.

    `shown` (n,) is the grey of each stored value, `counts` (n,) the number of pixels with this value.
    """
    if counts is None:
        return False
    for end in (shown.min(), shown.max()):
        at_end = counts[shown == end]
        if at_end.sum() > ONE_END * counts.sum() and at_end.max() < ONE_END * counts.sum():
            return True
    return False


def _varies(values: np.ndarray) -> bool:
    """Return whether all values are finite and at least two differ."""
    return bool(np.isfinite(values).all() and np.isfinite(span := values.max() - values.min()) and span > 0)


def _name(step: Lut | Rescale | Window | None) -> str:
    if isinstance(step, Window):
        return f"the window {step.center} / {step.width} {step.function}"
    return f"the rescale {step.slope} / {step.intercept}" if isinstance(step, Rescale) else "the LUT"


def _rescale(elements: Elements) -> Rescale | None:
    slope, intercept = elements.number("RescaleSlope"), elements.number("RescaleIntercept")
    if slope is None or intercept is None:
        return None
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise InvalidElement(f"invalid RescaleSlope {slope}, RescaleIntercept {intercept}")
    return Rescale(slope, intercept)


def _window(elements: Elements, modality: Lut | Rescale | None, bits_stored: int, signed: bool) -> Window | None:
    center, width = elements.number("WindowCenter"), elements.number("WindowWidth")
    if center is None or width is None:
        return None
    function = elements.text("VOILUTFunction").upper() or "LINEAR"
    if function not in FUNCTIONS:
        raise InvalidElement(f"invalid VOILUTFunction {function!r} (valid: {', '.join(FUNCTIONS)})")
    if not np.isfinite([center, width]).all() or width < (1 if function == "LINEAR" else np.nextafter(0, 1)):
        raise InvalidElement(f"invalid WindowCenter {center}, WindowWidth {width} ({function})")
    return Window(center, width, function, *map(float, _output_range(modality, bits_stored, signed)))


def _output_range(modality: Lut | Rescale | None, bits_stored: int, signed: bool) -> list[float]:
    """Return the lowest and the highest value that `modality` can produce from stored values of `bits_stored` bits."""
    if isinstance(modality, Lut):
        return [0, 2**modality.bits - 1]
    ends: list[float] = [-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1] if signed else [0, 2**bits_stored - 1]
    return sorted(end * modality.slope + modality.intercept for end in ends) if modality else ends


def _lut(elements: Elements, keyword: str, signed: bool) -> Lut | None:
    items = elements.items(keyword)
    if not items or (not items[0].raw("LUTDescriptor") and not items[0].raw("LUTData")):
        return None
    item = items[0]
    if "LUTDescriptor" not in item:
        raise InvalidElement(f"invalid {keyword} (LUTDescriptor is missing)")
    order = "<" if item.is_little_endian("LUTDescriptor") else ">"
    described = np.frombuffer(bytes(item.raw("LUTDescriptor")[:6]).ljust(6, b"\0"), dtype=f"{order}u2")
    length, first, bits = int(described[0]) or 2**16, int(described[1]), int(described[2])
    # In the standard, the VR is "US or SS"; an explicit VR decides, otherwise the pixel representation.
    if item.vr("LUTDescriptor") == "SS" or (item.vr("LUTDescriptor") != "US" and signed):
        first = int(np.int16(np.uint16(first)))
    raw = item.raw("LUTData")
    if not 8 <= bits <= 16:
        raise InvalidElement(f"invalid {keyword} ({bits} bits per entry, expected 8..16)")
    if len(raw) >= 2 * length:
        entries = np.frombuffer(raw[: 2 * length], dtype=f"{order}u2")
    elif bits == 8 and len(raw) >= length:  # two entries per 16-bit word
        entries = np.frombuffer(raw[:length], dtype=np.uint8)
    else:
        raise InvalidElement(f"invalid {keyword} ({len(raw)} bytes are too few for {length} entries)")
    return Lut(first, entries.astype(np.float64), bits)
