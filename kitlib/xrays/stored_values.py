"""Decodes the pixel data of a DICOM file to bit patterns, after checking that header and codestream have the same size."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
)

from kitlib.xrays.codestream import FrameHeader, read_frame_header
from kitlib.xrays.decoders import plugin_for
from kitlib.xrays.header import MAX_SAMPLES, Elements

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@dataclass(frozen=True)
class StoredFrame:
    """Bit patterns of the first frame, and how to interpret them."""

    patterns: np.ndarray  # uint8 or uint16 (rows, columns) or (rows, columns, 3)
    bits: int  # number of low bits of a pattern that contain the value
    signed: bool
    bits_stored: int
    photometric: str
    warnings: list[str]


def read_stored(elements: Elements, syntax: str) -> StoredFrame:
    """Decode the first frame. Raises ValueError for invalid pixel data, or any exception that the decoder raises."""
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

    native = syntax in NATIVE
    data = elements.raw("PixelData") if native else bytes(elements.raw("PixelData"))
    if native == elements.is_encapsulated("PixelData"):
        raise ValueError(
            f"transfer syntax {syntax} contradicts the {'encapsulated' if native else 'uncompressed'} pixel data"
        )
    frame = b"" if native else get_frame(bytes(data), 0, number_of_frames=frames)
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

    signed = elements.whole("PixelRepresentation", 0) == 1
    layout: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "samples_per_pixel": samples,
        "number_of_frames": frames,
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
            bytes(data),
            index=0,
            raw=True,
            decoding_plugin="" if native else plugin_for(syntax),
            **layout,
        )
        photometric = str(properties["photometric_interpretation"])
    # For these syntaxes the codestream's precision, not BitsStored, determines the sign bit, as in pydicom.
    trusts_frame = syntax in JPEG2000TransferSyntaxes or (syntax in JPEGLSTransferSyntaxes and signed)
    bits = frame_header.precision if frame_header and trusts_frame else bits_stored
    return StoredFrame(patterns, bits, signed, bits_stored, photometric, warnings)


def _read_checked_frame_header(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> FrameHeader | None:
    """Return the frame's own header, None for RLE. Raises ValueError if its size differs from that in the DICOM header."""
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
    """Return the patterns (rows, columns) of uncompressed pixel data, as a view if its byte order is the machine's.

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
    """Convert bit patterns to int64 values from their low `bits`, the highest of which is the sign bit if `signed`."""
    values = patterns.astype(np.int64) & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits) if signed else values
