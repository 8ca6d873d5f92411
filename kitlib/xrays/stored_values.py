"""Decodes the pixel data of a DICOM file to bit patterns, after checking that header and codestream state the same size."""

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
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from kitlib.xrays.codestream import FrameHeader, find_syntax, read_frame_header
from kitlib.xrays.decoders import plugin_for
from kitlib.xrays.encapsulation import encapsulate_frame, read_first_frame
from kitlib.xrays.header import MAX_SAMPLES, OVERLAYS, Elements, InvalidElement

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


COMPRESSED = (RLELossless, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes)
# Share of bytes after the image that is tolerated. A readable file of SIIM's has 216,296 bytes there, 1.6 % of its pixels.
MAX_EXTRA = 0.1


@dataclass(frozen=True)
class StoredFrame:
    """The bit patterns of a DICOM file's first frame, and how to interpret them."""

    patterns: np.ndarray  # uint8 or uint16 (rows, columns) or (rows, columns, 3)
    bits: int  # number of low bits of a pattern that contain the value
    signed: bool
    bits_stored: int
    photometric: str
    warnings: list[str]
    padding: tuple[int, int] | None = None  # lowest and highest value of pixels outside the image


def read_stored(elements: Elements, syntax: str) -> StoredFrame:
    """Return the first frame of a DICOM file from its elements and the transfer syntax that it states.

    Raises ValueError if the pixel data are invalid, or any exception that the decoder raises.
    """
    if "PixelData" not in elements:
        other = [name for name in ("FloatPixelData", "DoubleFloatPixelData") if name in elements]
        raise ValueError(
            f"{other[0]} instead of PixelData is not supported" if other else "no PixelData; not an image, or truncated"
        )
    rows, columns, samples = elements.whole("Rows", 0), elements.whole("Columns", 0), elements.whole("SamplesPerPixel", 1)
    frames = max(1, elements.whole("NumberOfFrames", 1))
    if not (0 < rows <= 65535 and 0 < columns <= 65535 and samples in (1, 3)):
        raise ValueError(f"invalid size: Rows {rows}, Columns {columns}, SamplesPerPixel {samples}")
    if rows * columns * samples > MAX_SAMPLES:
        raise ValueError(f"the header states {rows} x {columns} x {samples} values, more than the limit of {MAX_SAMPLES}")

    warnings = [f"the file has {frames} frames; only the first is used"] if frames > 1 else []
    photometric = elements.text("PhotometricInterpretation").upper()
    if photometric == "PALETTE COLOR":
        raise ValueError("PhotometricInterpretation PALETTE COLOR is not supported for X-rays")
    expected = ("MONOCHROME1", "MONOCHROME2") if samples == 1 else ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
    if photometric not in expected:
        fallback = "MONOCHROME2" if samples == 1 else "RGB"
        warnings.append(f"PhotometricInterpretation {photometric!r} is treated as {fallback}")
        photometric = fallback

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
    if frame_header:
        allocated = elements.whole("BitsAllocated", 8 if frame_header.precision <= 8 else 16)
    else:
        allocated = elements.whole(
            "BitsAllocated", 16 if native and len(data) >= 2 * rows * columns * samples * frames else 8
        )
    if allocated not in (8, 16) or (frame_header and frame_header.precision > allocated):
        raise ValueError(
            f"invalid BitsAllocated {allocated}"
            + (f" for {frame_header.precision} bits in the frame" if frame_header else "")
        )
    bits_stored = elements.whole("BitsStored", allocated)
    if not 1 <= bits_stored <= allocated:
        warnings.append(f"BitsStored is {bits_stored}, but BitsAllocated is {allocated}; all allocated bits are used")
        bits_stored = allocated
    if frame_header and not frame_header.has_end_marker:
        warnings.append("the compressed frame has no end marker and may be truncated")

    if native:
        warnings += _check_length(len(data), rows * columns * samples * frames * allocated // 8)
    signed = elements.whole("PixelRepresentation", 0) == 1
    layout: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "samples_per_pixel": samples,
        "number_of_frames": frames if native else 1,
        "photometric_interpretation": photometric,
        "planar_configuration": elements.whole("PlanarConfiguration", 0) & 1,
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
        patterns, properties = decoder.as_array(
            bytes(data) if native else encapsulate_frame(frame),
            index=0,
            raw=True,
            decoding_plugin="" if native else plugin_for(syntax),
            **layout,
        )
        photometric = str(properties["photometric_interpretation"])
    bits = bits_stored
    padding = None if samples == 3 else _read_padding(elements, 8 * patterns.itemsize, signed, warnings)
    if frame_header:
        # For these syntaxes the codestream's precision, not BitsStored, determines the sign bit, as in pydicom.
        trusts_frame = syntax in JPEG2000TransferSyntaxes or (syntax in JPEGLSTransferSyntaxes and signed)
        # Lossy JPEG stores 10 bits in 12; only values that do not fit show that BitsStored is wrong.
        if samples == 1 and frame_header.precision > bits_stored and _exceeds(elements, patterns, bits_stored, padding):
            warnings.append(f"BitsStored is {bits_stored}, but the frame has {frame_header.precision} bits, which are used")
            bits = bits_stored = frame_header.precision
        bits = frame_header.precision if trusts_frame else bits
    elif samples == 1:
        shift = _find_shift(elements, patterns, bits_stored, signed, padding, warnings)
        if shift:
            patterns = patterns >> shift
            padding = (padding[0] >> shift, padding[1] >> shift) if padding else None
        elif not signed and _exceeds(elements, patterns, bits_stored, padding):
            bits = 8 * patterns.itemsize
            warnings.append(f"BitsStored is {bits_stored}, but values reach {patterns.max()}; all {bits} bits are used")
            bits_stored = bits
    return StoredFrame(patterns, bits, signed, bits_stored, photometric, warnings, padding)


def _plain_syntax(elements: Elements, syntax: str, values: int) -> str:
    """Return the transfer syntax of pixel data that are not encapsulated: `syntax`, the stated one, unless it is wrong.

    If the stated one is for compressed data, but the data are as long as `values` uncompressed values, the result is
    Explicit VR Little Endian.
    """
    allocated, length = elements.whole("BitsAllocated", 16), len(elements.raw("PixelData"))
    is_plain = syntax in COMPRESSED and 0 <= length - values * allocated // 8 <= 1
    return str(ExplicitVRLittleEndian) if is_plain else syntax


def _check_length(length: int, expected: int) -> list[str]:
    """Return a list with a warning if uncompressed pixel data are a little too long, otherwise an empty list.

    `length` and `expected` are in bytes. Raises ValueError if the data are too long by more than a share of MAX_EXTRA,
    because the rows, columns, samples or bits in the header are then wrong.
    """
    extra = length - expected
    if extra <= 1:  # data of odd length are padded
        return []
    if extra > MAX_EXTRA * expected:
        raise ValueError(
            f"the pixel data have {length} bytes, but the header describes {expected}; its size or bits are wrong"
        )
    return [f"the pixel data have {extra} bytes more than the header describes; they are ignored"]


def _read_padding(elements: Elements, allocated: int, signed: bool, warnings: list[str]) -> tuple[int, int] | None:
    """Return the lowest and the highest value that mean padding, or None if PixelPaddingValue is absent or invalid.

    They are PixelPaddingValue and PixelPaddingRangeLimit; without a limit, both are PixelPaddingValue. `allocated` is the
    number of bits per value. Invalid padding adds an entry to `warnings`.
    """
    try:
        value = elements.number("PixelPaddingValue")
        limit = elements.number("PixelPaddingRangeLimit")
        if value is None:
            return None
        numbers = sorted((value, value if limit is None else limit))
        if not (np.isfinite(numbers).all() and -(2 ** (allocated - 1)) <= numbers[0] and numbers[1] < 2**allocated):
            raise InvalidElement(f"PixelPaddingValue is {value}, which {allocated} bits cannot hold")
    except InvalidElement as error:
        warnings.append(f"{error}; it is ignored")
        return None
    # An implicit VR is read as unsigned.
    numbers = [number - 2**allocated if signed and number >= 2 ** (allocated - 1) else number for number in numbers]
    return int(min(numbers)), int(max(numbers))


def is_padding(patterns: np.ndarray, frame_bits: int, bits: int, signed: bool, padding: tuple[int, int]) -> np.ndarray:
    """Return a bool array (n,) that says which of the bit patterns (n,) mean padding.

    A pattern means padding if its value, read from its low `bits` or from all of its `frame_bits`, is in the range `padding`
    (lowest and highest value).
    """
    lowest, highest = padding
    values, whole = values_of(patterns, bits, signed), values_of(patterns, frame_bits, signed)
    return ((values >= lowest) & (values <= highest)) | ((whole >= lowest) & (whole <= highest))


def _exceeds(elements: Elements, patterns: np.ndarray, bits_stored: int, padding: tuple[int, int] | None) -> bool:
    """Return whether any bit pattern other than padding needs more than `bits_stored` bits.

    Always False if the file has overlays, which may use the other bits.
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

    A HighBit that is invalid, or that the patterns contradict because they occupy the low bits, is ignored: the shift is 0,
    and a warning is added to `warnings`.
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
    """Return a compressed frame's own header, None for RLE.

    Raises ValueError if it is damaged, or if it states another size than the DICOM header (`rows`, `columns`, `samples`).
    """
    frame_header = read_frame_header(frame, syntax)
    if frame_header and (frame_header.rows, frame_header.columns, frame_header.samples) != (rows, columns, samples):
        raise ValueError(
            f"the compressed frame is {frame_header.rows} x {frame_header.columns} x {frame_header.samples}, "
            f"but the header says {rows} x {columns} x {samples}"
        )
    return frame_header


def _read_uncompressed(
    elements: Elements, data: bytes | memoryview, syntax: str, rows: int, columns: int, allocated: int
) -> np.ndarray:
    """Return the bit patterns of uncompressed pixel data, uint8 or uint16 (rows, columns); a view of `data` if possible.

    Trailing bytes are ignored as padding. Raises ValueError if the data are too short.
    """
    size = rows * columns * allocated // 8
    if len(data) < size:
        raise ValueError(f"the pixel data end after {len(data)} of {size} bytes")
    if syntax == ExplicitVRBigEndian and allocated == 8 and elements.vr("PixelData") == "OW":
        swapped = np.frombuffer(data[: len(data) // 2 * 2], dtype="u2").byteswap().view(np.uint8)
        return swapped[:size].reshape(rows, columns)
    kind = np.dtype(f"u{allocated // 8}").newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
    patterns = np.frombuffer(data, dtype=kind, count=rows * columns).reshape(rows, columns)
    return patterns.astype(kind.newbyteorder("="), copy=False)


def values_of(patterns: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Return the values, int64, in the low `bits` of bit patterns; if `signed`, the highest of these bits is the sign."""
    values = patterns.astype(np.int64) & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits) if signed else values
