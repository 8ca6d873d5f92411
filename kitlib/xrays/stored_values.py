"""Decodes a DICOM file's pixel data to bit patterns, after comparing the sizes in its header and in the compressed frame."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from kitlib.xrays.codestream import JPEG_2000_SYNTAXES, FrameHeader, find_syntax, read_frame_header
from kitlib.xrays.colour_space import find_colour_space, without_transform
from kitlib.xrays.decoders import plugin_for
from kitlib.xrays.encapsulation import encapsulate_frame, read_first_frame
from kitlib.xrays.header import MAX_SAMPLES, OVERLAYS, PIXELS, Elements, InvalidElement

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG_2000_SYNTAXES)
GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
FLOATS = {"FloatPixelData": "f4", "DoubleFloatPixelData": "f8"}
# Bytes after the image that are tolerated, as a share of its bytes. A readable file of SIIM's has 216,296, which is 1.6 %.
MAX_EXTRA = 0.1


@dataclass(frozen=True)
class StoredFrame:
    """The bit patterns of a DICOM file's first frame, and how to interpret them."""

    patterns: np.ndarray  # uint8, uint16 or uint32, or the values as float32 or float64; (rows, columns[, 3])
    bits: int  # number of low bits of a pattern that contain the value
    signed: bool
    bits_stored: int
    photometric: str
    warnings: list[str]
    padding: tuple[float, float] | None = None  # lowest and highest value of pixels outside the image


def read_stored(elements: Elements, syntax: str) -> StoredFrame:
    """Return the first frame of a DICOM file. `syntax` is the transfer syntax that the file states.

    Raises ValueError if the pixel data are invalid, or any exception that the decoder raises.
    """
    keyword = next((name for name in PIXELS if name in elements), None)
    if keyword is None:
        raise ValueError("no PixelData: the file is not an image, or is truncated")
    rows, columns, samples = elements.whole("Rows", 0), elements.whole("Columns", 0), elements.whole("SamplesPerPixel", 1)
    frames = max(1, elements.whole("NumberOfFrames", 1))
    if not (0 < rows <= 65535 and 0 < columns <= 65535 and samples in (1, 3)):
        raise ValueError(f"invalid size: Rows {rows}, Columns {columns}, SamplesPerPixel {samples}")
    if rows * columns * samples > MAX_SAMPLES:
        raise ValueError(f"the header states {rows} x {columns} x {samples} values, more than the limit of {MAX_SAMPLES}")

    warnings = [f"the file has {frames} frames; only the first is used"] if frames > 1 else []
    photometric = _read_photometric(elements, samples, warnings)
    if keyword in FLOATS:
        patterns = _read_float(elements, keyword, syntax, rows, columns, samples)
        padding = _read_float_padding(elements, keyword.removesuffix("Data"))
        return StoredFrame(patterns, 8 * patterns.itemsize, True, 16, photometric, warnings, padding)

    native = not elements.is_encapsulated("PixelData")
    data: bytes | memoryview = elements.raw("PixelData")
    frame = b"" if native else read_first_frame(bytes(data), frames)
    actual = _plain_syntax(elements, syntax, rows * columns * samples * frames) if native else find_syntax(frame, syntax)
    if actual != syntax:
        warnings.append(f"transfer syntax {syntax} contradicts the pixel data, which are decoded as {actual}")
        syntax = actual
    if native is not (syntax in NATIVE):
        raise ValueError(
            f"transfer syntax {syntax} contradicts the {'uncompressed' if native else 'encapsulated'} pixel data"
        )
    if elements.unterminated:
        warnings.append("the compressed pixel data have no end and may be truncated")
    frame_header = None if native else _read_checked_frame_header(frame, syntax, rows, columns, samples)
    values = rows * columns * samples * frames
    allocated = _read_bits_allocated(elements, frame_header, len(data) // values if native else 1)
    bits_stored = _read_bits_stored(elements, allocated, warnings)
    if frame_header and not frame_header.has_end_marker:
        warnings.append("the compressed frame has no end marker and may be truncated")

    if native:
        warnings += _check_length(len(data), values * allocated // 8)
    if samples == 3 and not native:
        colour_space = find_colour_space(frame, syntax, photometric)
        if colour_space[:3] != photometric[:3] and photometric not in ("YBR_ICT", "YBR_RCT"):  # these become RGB
            warnings.append(f"PhotometricInterpretation is {photometric}, but the frame's samples are {colour_space}")
        photometric = colour_space
        frame = without_transform(frame) if syntax in JPEGTransferSyntaxes else frame
    signed = elements.whole("PixelRepresentation", 0) == 1
    layout: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "samples_per_pixel": samples,
        "number_of_frames": frames if native else 1,
        "photometric_interpretation": photometric,
        # Decoders return the samples of a pixel together; the one for RLE, which does not, tells pydicom so.
        "planar_configuration": elements.whole("PlanarConfiguration", 0) & 1 if native else 0,
        "bits_allocated": allocated,
        "bits_stored": bits_stored,
        "pixel_representation": 0,  # decode to bit patterns; `values_of` applies the sign later
        "pixel_keyword": "PixelData",
        "pixel_vr": elements.vr("PixelData"),
        "correct_unused_bits": False,
    }
    if native and samples == 1:
        patterns = _read_uncompressed(elements, data, syntax, rows, columns, allocated)
    else:
        decoder = get_decoder(UID(syntax))
        patterns, _ = decoder.as_array(
            bytes(data) if native else encapsulate_frame(frame),
            index=0,
            raw=True,
            decoding_plugin="" if native else plugin_for(syntax),
            **layout,
        )
    if samples == 3:
        return StoredFrame(patterns, bits_stored, signed, bits_stored, photometric, warnings)
    return _find_bits(elements, patterns, bits_stored, signed, photometric, warnings, frame_header, syntax)


def read_stored_array(elements: Elements, patterns: np.ndarray) -> StoredFrame:
    """Return the StoredFrame of bit patterns that were extracted from a DICOM file. `patterns` is uint16 (rows, columns).

    `elements` has the header of this file. Raises InvalidElement if an element that must be a number is not a number.
    """
    warnings: list[str] = []
    photometric = _read_photometric(elements, 1, warnings)
    bits_stored = _read_bits_stored(elements, 8 * patterns.itemsize, warnings)
    signed = elements.whole("PixelRepresentation", 0) == 1
    return _find_bits(elements, patterns, bits_stored, signed, photometric, warnings)


def _read_photometric(elements: Elements, samples: int, warnings: list[str]) -> str:
    """Return PhotometricInterpretation; if it is invalid, MONOCHROME2 for one sample per pixel or RGB for three.

    An invalid value adds a warning to `warnings`.
    """
    photometric = elements.text("PhotometricInterpretation").upper()
    if photometric in (GREY if samples == 1 else COLOUR):
        return photometric
    fallback = "MONOCHROME2" if samples == 1 else "RGB"
    warnings.append(f"PhotometricInterpretation {photometric!r} is treated as {fallback}")
    return fallback


def _read_bits_stored(elements: Elements, allocated: int, warnings: list[str]) -> int:
    """Return BitsStored, or `allocated` if BitsStored is absent or impossible.

    An impossible value adds a warning to `warnings`.
    """
    bits_stored = elements.whole("BitsStored", allocated)
    if 1 <= bits_stored <= allocated:
        return bits_stored
    warnings.append(f"BitsStored is {bits_stored}, but BitsAllocated is {allocated}; all allocated bits are used")
    return allocated


def _find_bits(
    elements: Elements,
    patterns: np.ndarray,
    bits_stored: int,
    signed: bool,
    photometric: str,
    warnings: list[str],
    frame_header: FrameHeader | None = None,
    syntax: str = "",
) -> StoredFrame:
    """Return the StoredFrame of grey bit patterns (rows, columns), after checking which bits of a pattern contain its value.

    `frame_header` is the header of a compressed frame that was decoded with the transfer syntax `syntax`, None for other
    pixel data. If the patterns or the frame header contradict the DICOM header, a warning is added to `warnings`.
    """
    bits = bits_stored
    padding = _read_padding(elements, 8 * patterns.itemsize, signed, warnings)
    if frame_header:
        # For these syntaxes the codestream's precision, not BitsStored, determines the sign bit, as in pydicom.
        trusts_frame = syntax in JPEG_2000_SYNTAXES or (syntax in JPEGLSTransferSyntaxes and signed)
        # Lossy JPEG stores 10 bits in 12; only values that do not fit show that BitsStored is wrong.
        if frame_header.precision > bits_stored and _exceeds(elements, patterns, bits_stored, padding):
            warnings.append(f"BitsStored is {bits_stored}, but the frame has {frame_header.precision} bits, which are used")
            bits = bits_stored = frame_header.precision
        bits = frame_header.precision if trusts_frame else bits
    elif shift := _find_shift(elements, patterns, bits_stored, signed, padding, warnings):
        patterns = patterns >> shift
        padding = (padding[0] >> shift, padding[1] >> shift) if padding else None
    elif not signed and _exceeds(elements, patterns, bits_stored, padding):
        bits = 8 * patterns.itemsize
        warnings.append(f"BitsStored is {bits_stored}, but values reach {patterns.max()}; all {bits} bits are used")
        bits_stored = bits
    return StoredFrame(patterns, bits, signed, bits_stored, photometric, warnings, padding)


def _read_bits_allocated(elements: Elements, frame_header: FrameHeader | None, bytes_per_value: int) -> int:
    """Return BitsAllocated; if it is absent, 8 or 16, derived from the frame's precision or from `bytes_per_value`.

    Valid are 8, 16 and, without a frame header, 32. Raises ValueError for other numbers or a higher frame precision.
    """
    wide = frame_header.precision > 8 if frame_header else bytes_per_value >= 2
    allocated = elements.whole("BitsAllocated", 16 if wide else 8)
    if allocated == 1:
        raise ValueError("BitsAllocated is 1, a mask of two values; an X-ray has grey values of 8, 16 or 32 bits")
    allowed = (8, 16) if frame_header else (8, 16, 32)
    if allocated not in allowed or (frame_header and frame_header.precision > allocated):
        raise ValueError(
            f"invalid BitsAllocated {allocated}"
            + (f" for {frame_header.precision} bits in the frame" if frame_header else "")
            + f"; expected {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
        )
    return allocated


def _read_float(elements: Elements, keyword: str, syntax: str, rows: int, columns: int, samples: int) -> np.ndarray:
    """Return the values of float pixel data, float32 or float64 (rows, columns). Raises ValueError if they are invalid."""
    if samples != 1 or syntax not in NATIVE:
        raise ValueError(
            f"{keyword} with SamplesPerPixel {samples} and transfer syntax {syntax}; expected SamplesPerPixel 1 and an "
            "uncompressed transfer syntax"
        )
    return _read_values(elements.raw(keyword), FLOATS[keyword], syntax, rows, columns)


def _read_float_padding(elements: Elements, prefix: str) -> tuple[float, float] | None:
    """Return the lowest and the highest value that mean padding in float pixel data, or None if there is no such value."""
    value, limit = elements.number(f"{prefix}PaddingValue"), elements.number(f"{prefix}PaddingRangeLimit")
    if value is None:
        return None
    limit = value if limit is None else limit
    return min(value, limit), max(value, limit)


def _plain_syntax(elements: Elements, syntax: str, values: int) -> str:
    """Return the transfer syntax of pixel data that are not encapsulated: usually `syntax`, which the file states.

    If `syntax` is a compressed one, but the data have the length of uncompressed data, the result is Explicit VR Little
    Endian. `values` is the number of values in all frames.
    """
    allocated, length = elements.whole("BitsAllocated", 16), len(elements.raw("PixelData"))
    is_plain = syntax in COMPRESSED and 0 <= length - values * allocated // 8 <= 1
    return str(ExplicitVRLittleEndian) if is_plain else syntax


def _check_length(length: int, expected: int) -> list[str]:
    """Return a list with a warning if uncompressed pixel data are a little too long, otherwise an empty list.

    `length` and `expected` are in bytes. Raises ValueError if `length` exceeds `expected` by more than 10 % (MAX_EXTRA): the
    rows, columns, samples, frames or bits in the header are then wrong.
    """
    extra = length - expected
    if extra <= 1:  # data of odd length are padded
        return []
    if extra > MAX_EXTRA * expected:
        raise ValueError(
            f"the pixel data have {length} bytes, but the header describes {expected}; Rows, Columns, SamplesPerPixel, "
            "NumberOfFrames or BitsAllocated is wrong"
        )
    return [f"the pixel data have {extra} bytes more than the header describes; they are ignored"]


def _read_padding(elements: Elements, allocated: int, signed: bool, warnings: list[str]) -> tuple[int, int] | None:
    """Return the lowest and the highest value that mean padding, or None if PixelPaddingValue is absent or invalid.

    The two values are PixelPaddingValue and PixelPaddingRangeLimit; without a limit, both are PixelPaddingValue. `allocated`
    is the number of bits per value. Invalid padding adds a warning to `warnings`.
    """
    try:
        value = elements.number("PixelPaddingValue")
        limit = elements.number("PixelPaddingRangeLimit")
        if value is None:
            return None
        numbers = sorted((value, value if limit is None else limit))
        for name, number in (("PixelPaddingValue", value), ("PixelPaddingRangeLimit", limit)):
            if number is not None and not -(2 ** (allocated - 1)) <= number < 2**allocated:  # also refuses NaN
                raise InvalidElement(f"{name} is {number}, which {allocated} bits cannot hold")
    except InvalidElement as error:
        warnings.append(f"{error}; it is ignored")
        return None
    # An implicit VR is read as unsigned.
    numbers = [number - 2**allocated if signed and number >= 2 ** (allocated - 1) else number for number in numbers]
    return int(min(numbers)), int(max(numbers))


def is_padding(patterns: np.ndarray, frame_bits: int, bits: int, signed: bool, padding: tuple[float, float]) -> np.ndarray:
    """Return a bool array (n,) that says which of the bit patterns or float values in `patterns` (n,) mean padding.

    `padding` is the lowest and the highest value that mean padding. A pattern means padding if the value of its low `bits`
    or the value of all its `frame_bits` is in this range.
    """
    lowest, highest = padding
    values, whole = values_of(patterns, bits, signed), values_of(patterns, frame_bits, signed)
    return ((values >= lowest) & (values <= highest)) | ((whole >= lowest) & (whole <= highest))


def _exceeds(elements: Elements, patterns: np.ndarray, bits_stored: int, padding: tuple[int, int] | None) -> bool:
    """Return whether any bit pattern other than padding needs more than `bits_stored` bits.

    Always False if the file has overlays, because overlays may use the higher bits.
    """
    if not int(patterns.max()) >> bits_stored or any(tag in elements for tag in OVERLAYS):
        return False
    above = patterns[patterns >= 2**bits_stored]
    if padding:
        above = above[~is_padding(above, 8 * patterns.itemsize, 8 * patterns.itemsize, False, padding)]
    return above.size > 0


def _find_shift(
    elements: Elements,
    patterns: np.ndarray,
    bits_stored: int,
    signed: bool,
    padding: tuple[int, int] | None,
    warnings: list[str],
) -> int:
    """Return by how many bits to shift uncompressed or RLE bit patterns to the right, according to HighBit; usually 0.

    HighBit is ignored if it is invalid, or if the values are in the low bits already. In both cases the shift is 0, and a
    warning is added to `warnings`.
    """
    allocated, high_bit = 8 * patterns.itemsize, elements.whole("HighBit", bits_stored - 1)
    shift = high_bit + 1 - bits_stored
    if high_bit >= allocated or shift < 0:
        warnings.append(f"HighBit is {high_bit}, but BitsStored is {bits_stored} of {allocated}; HighBit is ignored")
        return 0
    if not shift:
        return 0
    occurring = np.unique(patterns)
    if padding:
        occurring = occurring[~is_padding(occurring, allocated, allocated, signed, padding)]
    whole = values_of(occurring, allocated, signed)
    lowest, highest = (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1)) if signed else (0, 2**bits_stored)
    fits = bool(((whole >= lowest) & (whole < highest)).all())
    if fits and (occurring & ((1 << shift) - 1)).any():
        warnings.append(f"HighBit is {high_bit}, but the values occupy the low {bits_stored} bits; HighBit is ignored")
        return 0
    return shift


def _read_checked_frame_header(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> FrameHeader | None:
    """Return the header of a compressed frame, or None for RLE, whose frames do not contain their size.

    Raises ValueError if the header is damaged, or if it states another size than the DICOM header (`rows`, `columns`,
    `samples`).
    """
    frame_header = read_frame_header(frame, syntax)
    if frame_header and (frame_header.rows, frame_header.columns, frame_header.samples) != (rows, columns, samples):
        raise ValueError(
            f"the compressed frame is {frame_header.rows} x {frame_header.columns} x {frame_header.samples}, "
            f"but the header says {rows} x {columns} x {samples} (rows, columns, samples)"
        )
    return frame_header


def _read_uncompressed(
    elements: Elements, data: bytes | memoryview, syntax: str, rows: int, columns: int, allocated: int
) -> np.ndarray:
    """Return the bit patterns of uncompressed grey pixel data, uint8, uint16 or uint32 (rows, columns)."""
    if syntax == ExplicitVRBigEndian and allocated == 8 and elements.vr("PixelData") == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], dtype="u2").byteswap().tobytes()
    return _read_values(data, f"u{allocated // 8}", syntax, rows, columns)


def _read_values(data: bytes | memoryview, kind: str, syntax: str, rows: int, columns: int) -> np.ndarray:
    """Return uncompressed pixel data as an array (rows, columns) of NumPy's type `kind`; a view of `data` if possible.

    Bytes after the last value are ignored as padding. Raises ValueError if the data are too short.
    """
    dtype = np.dtype(kind).newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
    size = rows * columns * dtype.itemsize
    if len(data) < size:
        raise ValueError(f"the pixel data end after {len(data)} of {size} bytes")
    values = np.frombuffer(data, dtype=dtype, count=rows * columns).reshape(rows, columns)
    return values.astype(dtype.newbyteorder("="), copy=False)


def values_of(patterns: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Return the values, int64, in the low `bits` of bit patterns; if `signed`, the highest of these bits is the sign.

    Float pixel data are values already and are returned as float64.
    """
    if patterns.dtype.kind == "f":
        return patterns.astype(np.float64)
    values = patterns.astype(np.int64) & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits) if signed else values
