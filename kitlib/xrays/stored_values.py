"""Decodes the pixel data of a DICOM file to bit patterns, once its header and its codestream agree on a sensible size."""

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

from kitlib.xrays.codestream import Promise, read_promise
from kitlib.xrays.decoders import plugin_for
from kitlib.xrays.header import MAX_SAMPLES, Elements

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@dataclass(frozen=True)
class Stored:
    """The first frame as it is stored: bit patterns (rows, columns[, 3]) of uint8 or uint16, and what they mean."""

    patterns: np.ndarray
    bits: int  # low bits of a pattern that carry the value
    signed: bool
    bits_stored: int
    photometric: str
    warnings: list[str]


def read_stored(elements: Elements, syntax: str) -> Stored:
    """The first frame. Raises ValueError, or whatever a decoder makes of a damaged one."""
    if "PixelData" not in elements:
        other = [name for name in ("FloatPixelData", "DoubleFloatPixelData") if name in elements]
        raise ValueError(f"has {other[0]}, wanted PixelData" if other else "no PixelData: not an image, or cut short")
    rows, columns, samples = elements.whole("Rows", 0), elements.whole("Columns", 0), elements.whole("SamplesPerPixel", 1)
    frames = max(1, elements.whole("NumberOfFrames", 1))
    if not (0 < rows <= 65535 and 0 < columns <= 65535 and samples in (1, 3)):
        raise ValueError(f"Rows {rows}, Columns {columns}, SamplesPerPixel {samples}")
    if rows * columns * samples > MAX_SAMPLES:
        raise ValueError(f"promises {rows} x {columns} x {samples} values, more than {MAX_SAMPLES}")

    warnings = [f"{frames} frames: the first was read"] if frames > 1 else []
    photometric = elements.text("PhotometricInterpretation").upper()
    if photometric == "PALETTE COLOR":
        raise ValueError("PALETTE COLOR is no X-ray")
    known = ("MONOCHROME1", "MONOCHROME2") if samples == 1 else ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
    if photometric not in known:
        fallback = "MONOCHROME2" if samples == 1 else "RGB"
        warnings.append(f"PhotometricInterpretation is {photometric!r}: taken for {fallback}")
        photometric = fallback

    native = syntax in NATIVE
    data = elements.raw("PixelData") if native else bytes(elements.raw("PixelData"))
    if native == elements.is_encapsulated("PixelData"):
        raise ValueError(f"transfer syntax {syntax} does not go with {'encapsulated' if native else 'plain'} pixel data")
    frame = b"" if native else get_frame(bytes(data), 0, number_of_frames=frames)
    promise = None if native else _checked_promise(frame, syntax, rows, columns, samples)
    if promise:
        allocated = elements.whole("BitsAllocated", 8 if promise.precision <= 8 else 16)
    else:
        allocated = elements.whole(
            "BitsAllocated", 16 if native and len(data) >= 2 * rows * columns * samples * frames else 8
        )
    if allocated not in (8, 16) or (promise and promise.precision > allocated):
        raise ValueError(f"BitsAllocated {allocated}" + (f", and {promise.precision} bits in the frame" if promise else ""))
    bits_stored = elements.whole("BitsStored", allocated)
    if not 1 <= bits_stored <= allocated:
        warnings.append(f"BitsStored is {bits_stored} of {allocated}: all bits taken")
        bits_stored = allocated
    if promise and not promise.ends:
        warnings.append("the compressed frame has no end marker: it may be cut short")

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
        "pixel_representation": 0,  # bit patterns; the sign is told from them later
        "pixel_keyword": "PixelData",
        "pixel_vr": elements.vr("PixelData"),
        "correct_unused_bits": False,
    }
    if native and samples == 1:
        patterns = _plain(elements, data, syntax, rows, columns, allocated)
    else:
        decoder = get_decoder(UID(syntax))
        patterns, told = decoder.as_array(
            bytes(data),
            index=0,
            raw=True,
            decoding_plugin="" if native else plugin_for(syntax),
            **layout,
        )
        photometric = str(told["photometric_interpretation"])
    # The codestream of these knows the sign bit better than the header (pydicom's rule as well).
    own = syntax in JPEG2000TransferSyntaxes or (syntax in JPEGLSTransferSyntaxes and signed)
    bits = promise.precision if promise and own else bits_stored
    return Stored(patterns, bits, signed, bits_stored, photometric, warnings)


def _checked_promise(frame: bytes, syntax: str, rows: int, columns: int, samples: int) -> Promise | None:
    promise = read_promise(frame, syntax)
    if promise and (promise.rows, promise.columns, promise.samples) != (rows, columns, samples):
        raise ValueError(
            f"the compressed frame is {promise.rows} x {promise.columns} x {promise.samples}, "
            f"the header says {rows} x {columns} x {samples}"
        )
    return promise


def _plain(elements: Elements, data: bytes | memoryview, syntax: str, rows: int, columns: int, allocated: int) -> np.ndarray:
    """Uncompressed patterns without a copy where the bytes lie as the machine wants them; what follows them is padding."""
    wanted = rows * columns * allocated // 8
    if len(data) < wanted:
        raise ValueError(f"the pixel data ends after {len(data)} of {wanted} bytes")
    if syntax == ExplicitVRBigEndian and allocated == 8 and elements.vr("PixelData") == "OW":
        swapped = np.frombuffer(data[: len(data) // 2 * 2], dtype="u2").byteswap().view(np.uint8)
        return swapped[:wanted].reshape(rows, columns)
    kind = np.dtype(f"u{allocated // 8}").newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
    patterns = np.frombuffer(data, dtype=kind, count=rows * columns).reshape(rows, columns)
    return patterns.astype(kind.newbyteorder("="), copy=False)


def values_of(patterns: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The integers (int64) that bit patterns mean: the low `bits`, of which the highest is the sign if there is one."""
    values = patterns.astype(np.int64) & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits) if signed else values
