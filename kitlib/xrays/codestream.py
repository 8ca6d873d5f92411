"""Reads the size and bit depth in a compressed frame's own header, before a decoder allocates memory for the frame."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

# Accepted start-of-frame markers: baseline, extended, lossless Huffman; JPEG-LS. Progressive frames are refused, because
# they may contain any number of scans.
JPEG_FRAMES = (0xC0, 0xC1, 0xC3)
JPEG_LS_FRAMES = (0xF7,)
MAX_BLOCKS = 2**20
END = b"\xff\xd9"


@dataclass(frozen=True)
class FrameHeader:
    """Size and bit depth of a compressed frame, as stated in its own header."""

    rows: int
    columns: int
    samples: int  # per pixel
    precision: int  # bits per sample
    has_end_marker: bool


# The transfer syntaxes of each kind of frame; the decoder of the first one decodes all frames of this kind.
LOSSY_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit)
LOSSLESS_JPEG = (JPEGLossless, JPEGLosslessSV1)
JPEG_2000_SYNTAXES = (JPEG2000, *JPEG2000TransferSyntaxes, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
FAMILIES = {
    0xC0: LOSSY_JPEG,
    0xC1: LOSSY_JPEG,
    0xC3: LOSSLESS_JPEG,
    0xF7: (JPEGLSNearLossless, *JPEGLSTransferSyntaxes),
}
# pydicom does not know the names of these transfer syntaxes.
JPEG_XL = {f"1.2.840.10008.1.2.4.{number}": "JPEG XL" for number in (110, 111, 112)}


def find_syntax(frame: bytes, stated: str) -> str:
    """Return the transfer syntax with which to decode a frame: `stated`, or another one if the frame's bytes contradict it.

    `stated` is the transfer syntax in the DICOM file; it is also returned if the bytes are not recognised.
    """
    if frame[:2] == b"\xff\xd8":
        family = next((FAMILIES[kind] for kind, _ in jpeg_segments(frame) if kind in FAMILIES), (stated,))
    elif b"\xff\x4f\xff\x51" in frame[:4096]:
        family = JPEG_2000_SYNTAXES
    else:
        family = (stated,)
    return stated if stated in family else family[0]


def jpeg_segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """Yield each segment of a JPEG before its first scan: low byte of the segment's marker, and position of the marker.

    Raises ValueError if there is no marker where a segment should start.
    """
    position = 2
    while True:
        while frame[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        marker, length = struct.unpack_from(">HH", _read_bytes(frame, position, 4), 0)
        if marker >> 8 != 0xFF or length < 2:
            raise ValueError(f"no JPEG marker at byte {position} of the frame")
        if marker == 0xFFDA:  # start of scan: only coded pixels follow
            return
        yield marker & 0xFF, position
        position += 2 + length


def read_frame_header(frame: bytes, transfer_syntax: str) -> FrameHeader | None:
    """Return the header of a compressed frame, or None for RLE, whose frames do not contain their size.

    Raises ValueError if the header is damaged, if decoding this kind of frame is not safe, or if the transfer syntax is not
    supported.
    """
    if transfer_syntax == RLELossless:
        return None
    if transfer_syntax in JPEG_2000_SYNTAXES:
        return _jpeg_2000(frame)
    if transfer_syntax in JPEGLSTransferSyntaxes:
        return _jpeg(frame, JPEG_LS_FRAMES)
    if transfer_syntax in JPEGTransferSyntaxes:
        return _jpeg(frame, JPEG_FRAMES)
    name = JPEG_XL.get(transfer_syntax, UID(transfer_syntax).name)
    raise ValueError(
        f"transfer syntax {transfer_syntax} ({name}) is not supported; convert the file to JPEG 2000, JPEG-LS, JPEG, RLE or "
        "uncompressed pixels"
    )


def _jpeg(frame: bytes, allowed_kinds: tuple[int, ...]) -> FrameHeader:
    if frame[:2] != b"\xff\xd8":
        raise ValueError(f"the frame starts with {frame[:4].hex()}; a JPEG starts with ffd8")
    header = None
    for kind, position in jpeg_segments(frame):
        if (kind in range(0xC0, 0xD0) and kind not in (0xC4, 0xC8, 0xCC)) or kind == 0xF7:
            if kind not in allowed_kinds or header:
                allowed = " or ".join(map(hex, allowed_kinds))
                raise ValueError(f"unexpected JPEG frame header {kind:#x}; expected a single header, {allowed}")
            precision, rows, columns, samples = struct.unpack_from(">BHHB", _read_bytes(frame, position + 4, 6), 0)
            header = FrameHeader(rows, columns, samples, precision, has_end_marker=END in frame[-64:])
    if not header:
        raise ValueError("invalid JPEG frame: its pixels start before a header states its size")
    return header


def _jpeg_2000(frame: bytes) -> FrameHeader:
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 file may have boxes before its codestream
    if start < 0:
        raise ValueError("no JPEG 2000 codestream in the frame")
    fields = struct.unpack_from(">HH8IH", _read_bytes(frame, start + 4, 38), 0)
    (_, _, right, bottom, left, top, tile_columns, tile_rows, tile_left, tile_top, samples) = fields
    if not (left < right and top < bottom and tile_columns and tile_rows and 1 <= samples <= 4):
        raise ValueError(f"invalid JPEG 2000 size: {bottom - top} x {right - left} pixels, {samples} component(s)")
    tiles = -(-(right - tile_left) // tile_columns) * -(-(bottom - tile_top) // tile_rows)
    if tiles > 65535:
        raise ValueError(f"JPEG 2000 with {tiles} tiles; at most 65535 are valid")
    components = _read_bytes(frame, start + 42, 3 * samples)
    if any(components[3 * n + 1 : 3 * n + 3] != b"\x01\x01" for n in range(samples)):
        raise ValueError("JPEG 2000 with subsampled components is not supported")
    _check_blocks(frame, start + 42 + 3 * samples, bottom - top, right - left)
    precision = 1 + max(components[3 * n] & 0x7F for n in range(samples))
    return FrameHeader(bottom - top, right - left, samples, precision, has_end_marker=END in frame[-64:])


def has_component_transform(frame: bytes) -> bool:
    """Return whether a JPEG 2000 frame has a colour transform (RCT or ICT); decoders undo such a transform."""
    position = frame.find(b"\xff\x52", max(0, frame.find(b"\xff\x4f\xff\x51")))
    return position >= 0 and frame[position + 8 : position + 9] == b"\x01"


def _check_blocks(frame: bytes, position: int, rows: int, columns: int) -> None:
    """Raise ValueError if a JPEG 2000 frame has more than MAX_BLOCKS code-blocks or precincts.

    `position` is the first byte after the size segment; `rows` and `columns` are the image's size. There is a limit because
    a decoder allocates a hundred bytes or more for each block, and a block may be as small as 4 x 4 pixels.
    """
    position = frame.find(b"\xff\x52", position, position + 4096)
    if position < 0:
        raise ValueError("JPEG 2000 without a coding style (COD marker)")
    style, levels, width, height = (_read_bytes(frame, position, 14)[n] for n in (4, 9, 10, 11))
    width, height = (width & 15) + 2, (height & 15) + 2
    if style & 1:  # precinct sizes follow, one byte per resolution, full resolution last
        largest = _read_bytes(frame, position + 14, levels + 1)[-1]
        width, height = min(width, largest & 15), min(height, largest >> 4)
    if rows * columns >> (width + height) > MAX_BLOCKS:
        raise ValueError(
            f"JPEG 2000 of {rows} x {columns} pixels has blocks of {2**width} x {2**height}, more than {MAX_BLOCKS} of them"
        )


def _read_bytes(frame: bytes, position: int, length: int) -> bytes:
    """Return `length` bytes of a frame, starting at `position`. Raises ValueError if the frame is too short."""
    part = frame[position : position + length]
    if len(part) < length:
        raise ValueError(f"the frame ends at byte {len(frame)}, inside its own header")
    return part
