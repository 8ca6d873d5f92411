"""What a compressed frame promises about itself, read from its own header before a decoder allocates for it."""

import struct
from dataclasses import dataclass

from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes, RLELossless

# Start-of-frame markers: baseline, extended, lossless Huffman; JPEG-LS. Progressive ones may hide any number of scans.
JPEG_FRAMES = (0xC0, 0xC1, 0xC3)
JPEG_LS_FRAMES = (0xF7,)
MAX_BLOCKS = 2**20
END = b"\xff\xd9"


@dataclass(frozen=True)
class Promise:
    rows: int
    columns: int
    samples: int
    precision: int  # bits a sample
    ends: bool  # has its end marker


def read_promise(frame: bytes, transfer_syntax: str) -> Promise | None:
    """None for RLE, which promises nothing of the kind. Raises ValueError for a header that no decoder should see."""
    if transfer_syntax == RLELossless:
        return None
    if transfer_syntax in JPEG2000TransferSyntaxes:
        return _jpeg_2000(frame)
    if transfer_syntax in JPEGLSTransferSyntaxes:
        return _jpeg(frame, JPEG_LS_FRAMES)
    if transfer_syntax in JPEGTransferSyntaxes:
        return _jpeg(frame, JPEG_FRAMES)
    raise ValueError(f"transfer syntax {transfer_syntax} is not one of an X-ray")


def _jpeg(frame: bytes, wanted: tuple[int, ...]) -> Promise:
    if frame[:2] != b"\xff\xd8":
        raise ValueError(f"the frame begins with {frame[:4].hex()}, not with a JPEG's ffd8")
    at, found = 2, None
    while True:
        while frame[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        marker, length = struct.unpack_from(">HH", _enough(frame, at, 4), 0)
        kind = marker & 0xFF
        if marker >> 8 != 0xFF or length < 2:
            raise ValueError(f"no JPEG marker at byte {at} of the frame")
        if kind == 0xDA:  # the scan: nothing but coded pixels from here
            break
        if (kind in range(0xC0, 0xD0) and kind not in (0xC4, 0xC8, 0xCC)) or kind == 0xF7:
            if kind not in wanted or found:
                raise ValueError(f"JPEG frame of kind {kind:#x}, wanted one of {', '.join(map(hex, wanted))}, once")
            precision, rows, columns, samples = struct.unpack_from(">BHHB", _enough(frame, at + 4, 6), 0)
            found = Promise(rows, columns, samples, precision, ends=END in frame[-64:])
        at += 2 + length
    if not found:
        raise ValueError("the JPEG's scan comes before its size")
    return found


def _jpeg_2000(frame: bytes) -> Promise:
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 file's boxes may go before it
    if start < 0:
        raise ValueError("no JPEG 2000 codestream in the frame")
    fields = struct.unpack_from(">HH8IH", _enough(frame, start + 4, 38), 0)
    (_, _, right, bottom, left, top, tile_columns, tile_rows, tile_left, tile_top, samples) = fields
    if not (left < right and top < bottom and tile_columns and tile_rows and 1 <= samples <= 4):
        raise ValueError(f"JPEG 2000 of {bottom - top} x {right - left} in {samples} component(s)")
    tiles = -(-(right - tile_left) // tile_columns) * -(-(bottom - tile_top) // tile_rows)
    if tiles > 65535:
        raise ValueError(f"JPEG 2000 of {tiles} tiles")
    components = _enough(frame, start + 42, 3 * samples)
    if any(components[3 * n + 1 : 3 * n + 3] != b"\x01\x01" for n in range(samples)):
        raise ValueError("JPEG 2000 with subsampled components")
    _check_blocks(frame, start + 42 + 3 * samples, bottom - top, right - left)
    precision = 1 + max(components[3 * n] & 0x7F for n in range(samples))
    return Promise(bottom - top, right - left, samples, precision, ends=END in frame[-64:])


def _check_blocks(frame: bytes, at: int, rows: int, columns: int) -> None:
    """A decoder keeps a hundred bytes and more for every code-block and precinct, and they may be of 4 x 4 pixels."""
    at = frame.find(b"\xff\x52", at, at + 4096)
    if at < 0:
        raise ValueError("JPEG 2000 without a coding style")
    style, levels, width, height = (_enough(frame, at, 14)[n] for n in (4, 9, 10, 11))
    width, height = (width & 15) + 2, (height & 15) + 2
    if style & 1:  # precincts are told, one byte a resolution, the full one last
        largest = _enough(frame, at + 14, levels + 1)[-1]
        width, height = min(width, largest & 15), min(height, largest >> 4)
    if rows * columns >> (width + height) > MAX_BLOCKS:
        raise ValueError(f"JPEG 2000 of {rows} x {columns} in blocks of {2**width} x {2**height}")


def _enough(frame: bytes, at: int, length: int) -> bytes:
    part = frame[at : at + length]
    if len(part) < length:
        raise ValueError(f"the frame ends at byte {len(frame)}, inside its own header")
    return part
