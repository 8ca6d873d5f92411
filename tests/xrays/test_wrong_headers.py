"""DICOM files whose header contradicts their pixel data: the right picture, or a refusal, and a warning that says so."""

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import decode_xray, read_stored_values
from kitlib.xrays.encapsulation import DELIMITER, ITEM
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.writing import write_xray

RNG = np.random.default_rng(7)
COMPRESSED = [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless]
STORED = RNG.integers(0, 4096, (48, 40), dtype=np.uint16)


def write(path, stored=STORED, syntax=ExplicitVRLittleEndian, bits=12, **elements):
    """Write a DICOM file whose elements may contradict its pixels; return its path."""
    write_xray(path, stored, transfer_syntax=syntax, bits_stored=bits)
    if elements:
        dataset = pydicom.dcmread(path)
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


def add_padding(path, value, limit=None, vr="US"):
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", vr, value)
    if limit is not None:
        dataset.add_new("PixelPaddingRangeLimit", vr, limit)
    dataset.save_as(path)


def stretched(values):
    values = values.astype(float) - values.min()
    return (values / values.max() * 255).astype(np.uint8)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize(
    ("signed", "padding"),
    # The last but one has bits below the shifted value, the others have not.
    [(False, None), (True, None), (False, 0xFFF0), (False, 0xFFFF), (True, -32768)],
)
def test_left_aligned_values_are_shifted_to_high_bit(tmp_path, syntax, signed, padding):
    stored = RNG.integers(*((-2000, 2000) if signed else (0, 4000)), (48, 40)).astype("i2" if signed else "u2")
    written = stored << 4
    if padding is not None:
        written[:8] = padding
    path = write(tmp_path / "x.dcm", written, syntax, bits=16, BitsStored=12, HighBit=15)
    first = 0
    if padding is not None:
        add_padding(path, padding, vr="SS" if signed else "US")
        first = 8
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels[first:], stretched(stored[first:]))
    assert not xray.pixels[:first].any() and xray.warnings == ()


def test_an_impossible_high_bit_is_ignored(tmp_path):
    xray = decode_xray(write(tmp_path / "x.dcm", HighBit=31))
    np.testing.assert_array_equal(xray.pixels, stretched(STORED))
    assert xray.warnings == ("HighBit is 31, but BitsStored is 12 of 16; HighBit is ignored",)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_the_precision_of_the_frame_counts_if_values_exceed_bits_stored(tmp_path, syntax):
    stored = RNG.integers(0, 2**14, (48, 40), dtype=np.uint16)
    xray = decode_xray(write(tmp_path / "x.dcm", stored, syntax, bits=14, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(xray.pixels, stretched(stored))
    precision = 16 if syntax == JPEGLSLossless else 14  # pydicom encodes JPEG-LS at the allocated bits
    assert xray.warnings == (f"BitsStored is 12, but the frame has {precision} bits, which are used",)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("damage", ["two entries", "garbage", "not from 0", "no table", "no delimiter", "cut table"])
def test_every_fragment_belongs_to_the_one_frame(tmp_path, syntax, damage):
    path = write(tmp_path / "x.dcm", syntax=syntax)
    dataset = pydicom.dcmread(path)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    frame += b"\0" * (len(frame) % 2)
    half = len(frame) // 4 * 2
    parts = [frame[:half], frame[half:]]
    entries = {"two entries": [0, half + 8], "garbage": [123456789], "not from 0": [64], "cut table": None}.get(damage, [])
    table = b"\1\2\3\4\5\6" if entries is None else b"".join(entry.to_bytes(4, "little") for entry in entries)
    items = parts if damage == "no table" else [table, *parts]
    content = b"".join(ITEM + len(item).to_bytes(4, "little") + item for item in items)
    whole = path.read_bytes()
    start = whole.rindex(b"\xe0\x7f\x10\x00") + 12
    path.write_bytes(whole[:start] + content + (b"" if damage == "no delimiter" else DELIMITER))
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, stretched(STORED))
    assert len(xray.warnings) == (damage == "no delimiter")


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_a_file_that_ends_inside_its_frame_is_refused(tmp_path, syntax):
    path = write(tmp_path / "x.dcm", syntax=syntax)
    whole = path.read_bytes()
    start = whole.rindex(b"\xe0\x7f\x10\x00")
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(whole[: start + int(share * (len(whole) - start))])
        with pytest.raises(UnreadableXray, match=r"the pixel data end after \d+ of \d+ bytes"):
            read_xray(path)


def test_the_frames_bytes_decide_between_compressed_syntaxes(tmp_path):
    for actual in (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless):
        for stated in (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless):
            path = write(tmp_path / "x.dcm", syntax=actual)
            path.write_bytes(path.read_bytes().replace(actual.encode(), stated.encode()))
            xray = decode_xray(path)
            np.testing.assert_array_equal(xray.pixels, stretched(STORED))
            assert len(xray.warnings) == (actual != stated)


ODD = STORED[:5, :7].astype(np.uint8)  # 35 bytes, so that the element has one more


def write_plain_as_compressed(path, stored, **elements):
    """Write uncompressed pixels, and state the transfer syntax RLE Lossless, 1.2.840.10008.1.2.5."""
    write(path, stored, bits=min(12, 8 * stored.itemsize), **elements)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    return path


@pytest.mark.parametrize("stored", [STORED, ODD], ids=["even", "odd"])
def test_plain_pixels_under_a_compressed_syntax_are_read_as_plain(tmp_path, stored):
    xray = decode_xray(write_plain_as_compressed(tmp_path / "x.dcm", stored))
    np.testing.assert_array_equal(xray.pixels, stretched(stored))
    (warning,) = xray.warnings
    assert "contradicts the pixel data, which are decoded as 1.2.840.10008.1.2.1" in warning


@pytest.mark.parametrize("stored", [STORED, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("added", [-2, 2])
def test_pixels_of_another_length_under_a_compressed_syntax_are_refused(tmp_path, stored, added):
    content = stored.tobytes() + b"\0" * (stored.size % 2) + b"\0\0"
    path = write_plain_as_compressed(tmp_path / "x.dcm", stored, PixelData=content[: len(content) - 2 + added])
    with pytest.raises(UnreadableXray, match=r"1\.2\.840\.10008\.1\.2\.5 contradicts the uncompressed pixel data"):
        read_xray(path)


def test_compressed_pixels_under_a_plain_syntax_are_decoded(tmp_path):
    path = write(tmp_path / "x.dcm", syntax=JPEGLosslessSV1)
    dataset = pydicom.dcmread(path)
    stated = JPEGLosslessSV1.encode()
    assert len(stated) == 22 and dataset.PixelData
    path.write_bytes(path.read_bytes().replace(stated, b"1.2.840.10008.1.2.1".ljust(22, b"\0")))
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, stretched(STORED))
    assert "contradicts the pixel data" in xray.warnings[0]


def test_an_unknown_frame_under_a_plain_syntax_is_refused(tmp_path):
    path = write(tmp_path / "x.dcm", syntax=RLELossless)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([b"neither JPEG nor RLE"])
    dataset.save_as(path)
    with pytest.raises(UnreadableXray):
        read_xray(path)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(65535, None), (0, None), (65000, 65535), (65535, 65000)])
def test_padding_is_black_and_does_not_affect_the_range(tmp_path, photometric, value, limit):
    stored = RNG.integers(100, 4000, (48, 40), dtype=np.uint16)
    inside = stored.copy()
    lowest, highest = sorted((value, value if limit is None else limit))
    stored[:8] = RNG.integers(lowest, highest + 1, (8, 40))
    stored[0, :2] = lowest, highest
    path = write(tmp_path / "x.dcm", stored, bits=16, BitsStored=12, HighBit=11, PhotometricInterpretation=photometric)
    add_padding(path, value, limit)
    xray = decode_xray(path)
    greys = inside[8:].astype(float)
    expected = stretched(greys if photometric == "MONOCHROME2" else greys.max() - greys)
    np.testing.assert_array_equal(xray.pixels[8:], expected)
    assert not xray.pixels[:8].any() and xray.warnings == ()


def test_an_image_of_nothing_but_padding_is_shown(tmp_path):
    stored = np.full((8, 8), 5, np.uint16)
    path = write(tmp_path / "x.dcm", stored)
    add_padding(path, 5)
    assert not read_xray(path).any()


@pytest.mark.parametrize("center", ["127", "4198"], ids=["white", "black"])
def test_a_window_that_shows_one_end_is_ignored(tmp_path, center):
    # A window for 8 bits on 12-bit values: 25 of 3,866 values are at most 254, and 25 at least 4071.
    stored = np.arange(230, 4096, dtype=np.uint16).repeat(2).reshape(4, -1)
    xray = decode_xray(write(tmp_path / "x.dcm", stored, WindowCenter=center, WindowWidth="255"))
    np.testing.assert_array_equal(xray.pixels, stretched(stored))
    assert "maps nearly every pixel to one grey" in xray.warnings[0]


def test_a_nearly_black_image_keeps_its_window(tmp_path):
    stored = np.zeros((100, 100), np.uint16)
    stored[0, :50] = np.arange(1, 51) * 80
    xray = decode_xray(write(tmp_path / "x.dcm", stored, WindowCenter="2000", WindowWidth="4000"))
    assert xray.warnings == () and (xray.pixels[1:] == 0).all() and xray.pixels.max() == 255


@pytest.mark.parametrize(
    ("syntax", "vr", "dtype", "first", "intercept"),
    [
        # An explicit VR says whether the first value, EA60, is 60000 or -5536, whatever the pixels are.
        (ExplicitVRLittleEndian, "US", "u2", 60000, 0),
        (ExplicitVRLittleEndian, "US", "i2", 60000, 65536),
        (ExplicitVRLittleEndian, "SS", "u2", -5536, 0),
        (ExplicitVRLittleEndian, "SS", "u2", -5536, -1024),
        (ExplicitVRLittleEndian, "SS", "i2", -5536, 0),
        # Otherwise it is signed if the pixels are, or if rescaled values may be negative (PS3.3 C.11.2.1.1).
        (ImplicitVRLittleEndian, "US", "u2", 60000, 0),
        (ImplicitVRLittleEndian, "US", "u2", 60000, 1024),
        (ImplicitVRLittleEndian, "SS", "u2", -5536, -1024),
        (ImplicitVRLittleEndian, "SS", "i2", -5536, 0),
    ],
)
def test_the_first_value_of_a_lut_is_signed_if_its_representation_or_its_input_is(
    tmp_path, syntax, vr, dtype, first, intercept
):
    values = RNG.integers(max(first, 2000), max(first, 2000) + 2000, (48, 40))
    stored = (values - intercept).astype(dtype)
    entries = np.linspace(0, 255, 10_000) ** 2
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", vr, [len(entries), first, 16])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    path = tmp_path / "x.dcm"
    rescale = {"RescaleSlope": "1", "RescaleIntercept": str(intercept)} if intercept else {}
    write_xray(path, stored, transfer_syntax=syntax, extra={**rescale, "VOILUTSequence": [item]})
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, stretched(entries.astype("u2")[values - first]))
    assert xray.warnings == ()
    np.testing.assert_array_equal(read_stored_values(path), stored)


@pytest.mark.parametrize("signed", [False, True])
def test_a_high_bit_that_the_values_contradict_is_ignored(tmp_path, signed):
    stored = STORED.astype(np.int16) - 2048 if signed else STORED
    xray = decode_xray(write(tmp_path / "x.dcm", stored, HighBit=15))
    np.testing.assert_array_equal(xray.pixels, stretched(stored))
    assert xray.warnings == ("HighBit is 15, but the values occupy the low 12 bits; HighBit is ignored",)


@pytest.mark.parametrize(
    ("value", "limit", "wrong"),
    [
        (65535, None, "PixelPaddingValue is 65535"),
        (256, None, "PixelPaddingValue is 256"),
        (-129, None, "PixelPaddingValue is -129"),
        (0, 300, "PixelPaddingRangeLimit is 300"),
        (-128, None, ""),  # signed or unsigned is unknown
        (255, None, ""),
    ],
)
def test_a_padding_value_that_the_pixels_cannot_hold_is_ignored(tmp_path, value, limit, wrong):
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write(tmp_path / "x.dcm", stored, bits=8)
    add_padding(path, value, limit, vr="SS" if value < 0 else "US")
    xray = decode_xray(path)
    assert xray.warnings == ((f"{wrong}, which 8 bits cannot hold; it is ignored",) if wrong else ())
    if wrong:
        np.testing.assert_array_equal(xray.pixels, stored)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, *COMPRESSED])
@pytest.mark.parametrize(("value", "limit"), [(-2000, None), (-100, 100), (100, -100)])
def test_signed_padding_is_compared_by_value(tmp_path, syntax, value, limit):
    stored = RNG.integers(200, 2000, (48, 40)).astype(np.int16)
    inside = stored[8:].copy()
    stored[:8] = value
    path = write(tmp_path / "x.dcm", stored, syntax)
    add_padding(path, value, limit, vr="SS")
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels[8:], stretched(inside))
    assert not xray.pixels[:8].any()


def test_overlay_bits_of_a_compressed_frame_are_no_values(tmp_path):
    dirty = STORED | (RNG.integers(0, 2, STORED.shape) << 15).astype(np.uint16)
    path = write(tmp_path / "x.dcm", dirty, JPEGLosslessSV1, bits=16, BitsStored=12, HighBit=11)
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x60000102, "US", 15)
    dataset.save_as(path)
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, stretched(STORED))
    assert xray.warnings == ()


def test_plain_pixels_under_a_private_syntax_are_refused(tmp_path):
    path = write(tmp_path / "x.dcm")
    stated = ExplicitVRLittleEndian.encode() + b"\0"
    path.write_bytes(path.read_bytes().replace(stated, b"1.2.840.113619.5.2".ljust(len(stated), b"\0")))
    with pytest.raises(UnreadableXray, match=r"transfer syntax 1\.2\.840\.113619\.5\.2 contradicts"):
        read_xray(path)
