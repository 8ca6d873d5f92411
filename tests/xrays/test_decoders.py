"""The faster decoders give pylibjpeg's pixels, and pylibjpeg is used if imagecodecs is missing."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from kitlib.errors import UnreadableXray
from kitlib.xrays.codestream import FrameHeader, has_component_transform, read_frame_header
from kitlib.xrays.decoders import PLUGIN, plugin_for
from kitlib.xrays.dicom import decode_xray, read_stored_values
from kitlib.xrays.writing import write_xray
from tests import PROJECT

STORED = np.random.default_rng(0).integers(0, 4096, (50, 37)).astype(np.uint16)
LOSSLESS = [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless]


def written(folder: Path, syntax: str, stored: np.ndarray = STORED) -> Path:
    write_xray(
        folder / "x.dcm", stored, transfer_syntax=syntax, bits_stored=8 * stored.itemsize if stored.itemsize == 1 else 12
    )
    return folder / "x.dcm"


@pytest.mark.parametrize("syntax", [*LOSSLESS, JPEG2000])
def test_the_faster_decoder_gives_the_fall_backs_pixels(tmp_path, syntax):
    dataset = dcmread(written(tmp_path, syntax))
    decode = get_decoder(syntax).as_array
    faster, _ = decode(dataset, decoding_plugin=PLUGIN, raw=True)
    fall_back, _ = decode(dataset, decoding_plugin="pylibjpeg", raw=True)
    np.testing.assert_array_equal(faster, fall_back)


def test_jpeg_baseline_gives_the_fall_backs_pixels(tmp_path):
    dataset = dcmread(written(tmp_path, JPEGBaseline8Bit, (STORED >> 4).astype(np.uint8)))
    decode = get_decoder(JPEGBaseline8Bit).as_array
    np.testing.assert_array_equal(
        decode(dataset, decoding_plugin=PLUGIN, raw=True)[0], decode(dataset, decoding_plugin="pillow", raw=True)[0]
    )


def test_one_decoder_is_named_for_each_syntax():
    assert {plugin_for(syntax) for syntax in (*LOSSLESS, JPEG2000, JPEGBaseline8Bit)} == {PLUGIN}
    assert {plugin_for(syntax) for syntax in (JPEGExtended12Bit, RLELossless)} == {"pylibjpeg"}


def test_without_imagecodecs_the_pixels_are_the_same(tmp_path):
    paths, expected = [], []
    for number, syntax in enumerate([*LOSSLESS, RLELossless]):
        path = tmp_path / f"{number}.dcm"
        written(tmp_path, syntax).rename(path)
        paths.append(str(path))
        expected.append(int(read_stored_values(path).astype(np.int64).sum()))
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'imagecodecs' else find(name, *rest)\n"
        "sys.modules['imagecodecs'] = None\n"
        "from kitlib.xrays.dicom import read_stored_values\n"
        "print([int(read_stored_values(path).sum()) for path in sys.argv[1:]])\n"
    )
    root = PROJECT
    ran = subprocess.run([sys.executable, "-c", program, *paths], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(expected)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_truncated_frame_is_refused_or_warned_about(tmp_path, syntax):
    """Without an end marker, CharLS reads on for half a minute past the end of such a frame."""
    path = written(tmp_path, syntax)
    whole = get_frame(dcmread(path).PixelData, 0, number_of_frames=1)
    for share in (0.3, 0.6, 0.95):
        cut = whole[: int(len(whole) * share) // 2 * 2]
        dataset = dcmread(path)
        head, tail = dataset.PixelData[:8], b"\xfe\xff\xdd\xe0\0\0\0\0"
        dataset.PixelData = head + b"\xfe\xff\x00\xe0" + len(cut).to_bytes(4, "little") + cut + tail
        dataset.save_as(tmp_path / "cut.dcm")
        try:
            assert any("truncated" in warning for warning in decode_xray(tmp_path / "cut.dcm").warnings)
        except UnreadableXray as error:
            assert error.reason


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless])
def test_a_frame_and_pixel_data_without_an_end_have_their_own_warnings(tmp_path, syntax):
    path = written(tmp_path, syntax)
    whole, delimiter, end = path.read_bytes(), b"\xfe\xff\xdd\xe0\0\0\0\0", b"\xff\xd9"
    padding = whole.removesuffix(delimiter).rpartition(end)[2]
    assert padding in (b"", b"\0")
    frame_without_end = whole.removesuffix(end + padding + delimiter) + b"\0\0" + padding + delimiter  # of the same length
    for damaged, warning in (
        (whole, ()),
        (whole.removesuffix(delimiter), ("the compressed pixel data have no end and may be truncated",)),
        (frame_without_end, ("the compressed frame has no end marker and may be truncated",)),
    ):
        path.write_bytes(damaged)
        xray = decode_xray(path)
        assert xray.warnings == warning and np.array_equal(read_stored_values(path), STORED)


def test_codestream_headers(tmp_path):
    for syntax in LOSSLESS:
        frame = get_frame(dcmread(written(tmp_path, syntax)).PixelData, 0, number_of_frames=1)
        header = read_frame_header(frame, syntax)
        assert (header.rows, header.columns, header.samples) == (50, 37, 1)
        # imagecodecs writes JPEG-LS with the precision of the dtype.
        assert header.precision == (16 if syntax == JPEGLSLossless else 12)
        assert header.has_end_marker
        # Before a JPEG's marker there may be any number of bytes FF, before a JPEG 2000's codestream boxes of a JP2 file.
        boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)
        padded = boxes + frame if syntax == JPEG2000Lossless else frame[:2] + b"\xff\xff" + frame[2:]
        assert read_frame_header(padded, syntax) == header


@pytest.mark.parametrize("kind", [0xC4, 0xC8, 0xCC])
def test_tables_between_frame_headers_are_no_frame_header(tmp_path, kind):
    """0xC4, 0xC8 and 0xCC are tables and an extension (ITU-T T.81, table B.1)."""
    frame = get_frame(dcmread(written(tmp_path, JPEGLosslessSV1)).PixelData, 0, number_of_frames=1)
    with_table = frame[:2] + bytes([0xFF, kind, 0, 4, 0, 0]) + frame[2:]
    assert read_frame_header(with_table, JPEGLosslessSV1) == read_frame_header(frame, JPEGLosslessSV1)


def jpeg_2000(area, tile, components=((7, 1, 1),), blocks=4, transform=0) -> bytes:
    """Return the SIZ and COD segments of a JPEG 2000 codestream (ITU-T T.800, A.5.1 and A.6.1).

    `area` is the image's left, top, right and bottom on the reference grid, `tile` the left, top, width and height of the
    first tile, a component its precision - 1 and subsampling, `blocks` the exponent - 2 of a code-block's sides.
    """
    left, top, right, bottom = area
    tile_left, tile_top, width, height = tile
    numbers = (right, bottom, left, top, width, height, tile_left, tile_top)
    sizes = struct.pack(">4sHH8IH", b"\xff\x4f\xff\x51", 38 + 3 * len(components), 0, *numbers, len(components))
    style = struct.pack(">2sHBBHBBBBBB", b"\xff\x52", 12, 0, 0, 1, transform, 5, blocks, blocks, 0, 1)
    return sizes + b"".join(map(bytes, components)) + style + b"\xff\xd9"


GREY, ONE_TILE = ((7, 1, 1),), (0, 0, 9000, 9000)


@pytest.mark.parametrize(
    ("frame", "rows", "columns", "samples", "precision"),
    [
        (jpeg_2000((3, 10, 40, 60), ONE_TILE), 50, 37, 1, 8),
        (jpeg_2000((0, 0, 1, 1), ONE_TILE), 1, 1, 1, 8),
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, ((7, 1, 1), (0x8B, 1, 1), (8, 1, 1))), 50, 37, 3, 12),  # 0x80: signed
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, GREY * 4), 50, 37, 4, 8),
        (jpeg_2000((12, 22, 265, 277), (10, 20, 1, 1)), 255, 253, 1, 8),  # 255 x 257 tiles
        (jpeg_2000((0, 0, 509, 770), (0, 0, 2, 3)), 770, 509, 1, 8),  # also, with incomplete ones
        (jpeg_2000((8, 16, 4104, 4112), ONE_TILE, blocks=0), 4096, 4096, 1, 8),  # 2^20 blocks of 4 x 4
    ],
)
def test_a_jpeg_2000_states_its_size(frame, rows, columns, samples, precision):
    header = FrameHeader(rows, columns, samples, precision, has_end_marker=True)
    assert read_frame_header(frame, JPEG2000Lossless) == header


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (jpeg_2000((40, 10, 40, 60), ONE_TILE), "size: 50 x 0 pixels"),
        (jpeg_2000((3, 60, 40, 60), ONE_TILE), "size: 0 x 37 pixels"),
        (jpeg_2000((0, 0, 37, 50), (0, 0, 0, 50)), "invalid JPEG 2000 size"),
        (jpeg_2000((0, 0, 37, 50), (0, 0, 37, 0)), "invalid JPEG 2000 size"),
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, ()), r"0 component\(s\)"),
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, GREY * 5), r"5 component\(s\)"),
        (jpeg_2000((10, 20, 266, 276), (10, 20, 1, 1)), "65536 tiles"),
        (jpeg_2000((0, 0, 509, 769), (0, 0, 1, 3)), "130813 tiles"),
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, GREY * 2 + ((7, 2, 1),)), "subsampled"),
        (jpeg_2000((0, 0, 37, 50), ONE_TILE, ((7, 1, 2), *GREY * 2)), "subsampled"),
        (jpeg_2000((0, 0, 4112, 4096), ONE_TILE, blocks=0), "4096 x 4112 pixels has blocks of 4 x 4"),
    ],
)
def test_an_invalid_or_costly_jpeg_2000_is_refused(frame, reason):
    with pytest.raises(ValueError, match=reason):
        read_frame_header(frame, JPEG2000Lossless)


def test_a_jpeg_2000_states_its_colour_transform():
    stated = [has_component_transform(jpeg_2000((0, 0, 37, 50), ONE_TILE, GREY * 3, transform=n)) for n in (0, 1)]
    assert stated == [False, True] and not has_component_transform(b"\xff\x4f\xff\x51")


def test_progressive_frames_and_tiny_blocks_are_refused(tmp_path):
    frame = bytearray(get_frame(dcmread(written(tmp_path, JPEGLosslessSV1)).PixelData, 0, number_of_frames=1))
    frame[frame.index(b"\xff\xc3") + 1] = 0xC2
    with pytest.raises(ValueError, match="0xc2"):
        read_frame_header(bytes(frame), JPEGLosslessSV1)
    frame = bytearray(get_frame(dcmread(written(tmp_path, JPEG2000Lossless)).PixelData, 0, number_of_frames=1))
    size, style = frame.index(b"\xff\x51"), frame.index(b"\xff\x52")
    frame[size + 6 : size + 14] = (8000).to_bytes(4, "big") * 2
    frame[size + 22 : size + 30] = (8000).to_bytes(4, "big") * 2
    assert read_frame_header(bytes(frame), JPEG2000Lossless).rows == 8000
    frame[style + 10 : style + 12] = b"\0\0"  # code-blocks of 4 x 4
    with pytest.raises(ValueError, match="8000 x 8000 pixels has blocks of 4 x 4, more than 1048576"):
        read_frame_header(bytes(frame), JPEG2000Lossless)
    # Blocks are no larger than precincts, whose sizes follow for each resolution, the full one last (ITU-T T.800 A.6.1).
    frame[style + 10 : style + 12] = b"\4\4"
    frame[style + 4] |= 1
    levels = frame[style + 9]
    for small, size in ((0x22, "4 x 4"), (0x23, "8 x 4"), (0x32, "4 x 8")):  # exponents of height and width
        stated = bytearray(frame)
        stated[style + 14 : style + 14] = bytes([small] * levels + [0x88])
        assert read_frame_header(bytes(stated), JPEG2000Lossless).rows == 8000
        stated[style + 14 : style + 15 + levels] = bytes([0x88] * levels + [small])
        with pytest.raises(ValueError, match=f"blocks of {size}"):
            read_frame_header(bytes(stated), JPEG2000Lossless)
