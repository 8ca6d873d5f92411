"""Palettes, masks, 32-bit and float pixels, further transfer syntaxes: the right greys, or a reason that says why not."""

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import HTJ2K, MPEG4HP41, ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2KLossless

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import decode_xray, read_stored_values
from kitlib.xrays.writing import write_xray
from tests.small_frames import replace_pixels

RNG = np.random.default_rng(11)
INDICES = RNG.integers(0, 256, (24, 20), dtype=np.uint8)
GREYS = RNG.permutation(256).astype(np.uint16) * 257  # a palette that is not monotonic
PARTS = ("Red", "Green", "Blue")


def stretched(values):
    values = values.astype(float) - values.min()
    return (values / values.max() * 255).astype(np.uint8)


def write(path, stored=INDICES, syntax=ExplicitVRLittleEndian, **extra):
    write_xray(path, stored, transfer_syntax=syntax, extra=extra)
    return path


def write_palette(path, tables, bits, segmented=False):
    path = write(path, PhotometricInterpretation="PALETTE COLOR")
    dataset = dcmread(path)
    prefix = "Segmented" if segmented else ""
    for part, table in zip(PARTS, tables, strict=True):
        dataset.add_new(f"{part}PaletteColorLookupTableDescriptor", "US", [256, 0, bits])
        dataset.add_new(f"{prefix}{part}PaletteColorLookupTableData", "OW", table.tobytes())
    dataset.save_as(path)
    return path


def write_pixels(path, values, keyword, vr, bits, syntax=ExplicitVRLittleEndian, **extra):
    """Write a DICOM file with pixel data that write_xray does not write."""
    path = write(
        path, np.zeros(values.shape, np.uint8), syntax, BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, **extra
    )
    dataset = dcmread(path)
    del dataset.PixelData
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.add_new(keyword, vr, values.astype(values.dtype.newbyteorder(order)).tobytes())
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_palette_is_applied(tmp_path, bits):
    table = GREYS if bits == 16 else (GREYS >> 8).astype(np.uint8)
    xray = decode_xray(write_palette(tmp_path / "x.dcm", [table] * 3, bits))
    np.testing.assert_array_equal(xray.pixels, stretched(table[INDICES]))
    assert xray.warnings == ()


def test_a_segmented_grey_palette_is_applied(tmp_path):
    # PS3.3 C.7.9.2: a discrete segment of one entry, then a linear one of 255 entries up to 65535.
    table = np.array([0, 1, 0, 1, 255, 65535], dtype=np.uint16)
    pixels = decode_xray(write_palette(tmp_path / "x.dcm", [table] * 3, 16, segmented=True)).pixels
    np.testing.assert_array_equal(pixels, stretched(INDICES))


def test_a_palette_of_colours_is_refused(tmp_path):
    path = write_palette(tmp_path / "x.dcm", [GREYS, GREYS, GREYS[::-1].copy()], 16)
    with pytest.raises(UnreadableXray, match="PALETTE COLOR with a palette of colours; expected"):
        decode_xray(path)
    with pytest.raises(UnreadableXray):
        decode_xray(write(tmp_path / "y.dcm", PhotometricInterpretation="PALETTE COLOR"))  # without a palette


def test_a_mask_of_two_values_is_refused(tmp_path):
    with pytest.raises(UnreadableXray, match="BitsAllocated is 1, a mask of two values; an X-ray has"):
        decode_xray(write(tmp_path / "x.dcm", BitsAllocated=1, BitsStored=1, HighBit=0))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", ["u4", "i4"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_32_bit_integers(tmp_path, syntax, dtype, photometric):
    lowest = -(2**31) if dtype == "i4" else 0
    values = RNG.integers(lowest, lowest + 2**32, (24, 20)).astype(dtype)
    sign = {"PixelRepresentation": int(dtype == "i4"), "PhotometricInterpretation": photometric}
    path = write_pixels(tmp_path / "x.dcm", values, "PixelData", "OW", 32, syntax, **sign)
    np.testing.assert_array_equal(read_stored_values(path), values)
    xray = decode_xray(path)
    greys = values.astype(float)
    np.testing.assert_array_equal(xray.pixels, stretched(greys if photometric == "MONOCHROME2" else -greys))
    assert xray.warnings == ()


def test_the_window_and_the_padding_of_32_bit_integers(tmp_path):
    values = np.arange(480, dtype=np.uint32).reshape(24, 20) * 1_000_000
    values[0] = 2**31
    window = {"WindowCenter": "200000000", "WindowWidth": "200000001", "VOILUTFunction": "LINEAR"}
    path = write_pixels(tmp_path / "x.dcm", values, "PixelData", "OW", 32, **window)
    dataset = dcmread(path)
    dataset.add_new("PixelPaddingValue", "UL", 2**31)
    dataset.save_as(path)
    xray = decode_xray(path)
    expected = stretched(values[1:].astype(float).clip(1e8, 3e8))
    assert not xray.pixels[0].any() and np.abs(xray.pixels[1:].astype(int) - expected).max() <= 1 and xray.warnings == ()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(
    ("keyword", "vr", "dtype", "scale"), [("FloatPixelData", "OF", "f4", 1e-6), ("DoubleFloatPixelData", "OD", "f8", 1e200)]
)
@pytest.mark.parametrize("limited", [False, True])
def test_float_pixels(tmp_path, syntax, keyword, vr, dtype, scale, limited):
    values = (RNG.normal(0, scale, (24, 20))).astype(dtype)
    path = write_pixels(tmp_path / "x.dcm", values, keyword, vr, 8 * values.itemsize, syntax)
    np.testing.assert_array_equal(read_stored_values(path), values)
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, stretched(values.astype(float)))
    assert xray.warnings == ()
    broken = values.copy()
    broken[0, :3] = np.nan, np.inf, -np.inf
    broken[1] = np.linspace(7, 9 if limited else 7, 20) * scale
    path = write_pixels(tmp_path / "y.dcm", broken, keyword, vr, 8 * values.itemsize, syntax)
    dataset = dcmread(path)
    prefix = keyword.removesuffix("Data")
    dataset.add_new(f"{prefix}PaddingValue", "FL" if dtype == "f4" else "FD", float(broken[1, -1]))
    if limited:
        dataset.add_new(f"{prefix}PaddingRangeLimit", "FL" if dtype == "f4" else "FD", float(broken[1, 0]))
    dataset.save_as(path)
    xray = decode_xray(path)
    assert not xray.pixels[0, :3].any() and not xray.pixels[1].any()
    inside = np.append(values[0, 3:], values[2:]).astype(float)
    np.testing.assert_array_equal(xray.pixels[2:], stretched(inside)[17:].reshape(22, 20))
    assert xray.warnings == ("pixels whose values are not finite numbers are black",)
    path = write_pixels(tmp_path / "z.dcm", np.full_like(values, np.nan), keyword, vr, 8 * values.itemsize, syntax)
    with pytest.raises(UnreadableXray, match="no pixel has a finite value"):
        decode_xray(path)


def test_float_pixels_that_are_too_short_or_in_colour_are_refused(tmp_path):
    path = write_pixels(tmp_path / "x.dcm", np.zeros((24, 20), "f4"), "FloatPixelData", "OF", 32, Rows=25)
    with pytest.raises(UnreadableXray, match="end after 1920 of 2000 bytes"):
        decode_xray(path)
    path = write_pixels(tmp_path / "x.dcm", np.zeros((24, 20), "f4"), "FloatPixelData", "OF", 32, SamplesPerPixel=3)
    with pytest.raises(UnreadableXray, match="FloatPixelData with SamplesPerPixel 3"):
        decode_xray(path)


def write_frame(path, frame, syntax, stored):
    path = write(path, stored, BitsStored=12, HighBit=11)
    return replace_pixels(path, frame, syntax)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2K])
def test_high_throughput_jpeg_2000(tmp_path, syntax):
    stored = RNG.integers(0, 4096, (48, 40), dtype=np.uint16)
    path = write_frame(tmp_path / "x.dcm", imagecodecs.htj2k_encode(stored, reversible=True), syntax, stored)
    np.testing.assert_array_equal(read_stored_values(path), stored)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.110", "JPEG XL"),
        ("1.2.840.10008.1.2.4.111", "JPEG XL"),
        ("1.2.840.10008.1.2.4.112", "JPEG XL"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.2.840.10008.1.2.4.108", "HEVC"),
    ],
)
def test_other_transfer_syntaxes_are_named(tmp_path, syntax, name):
    frame = b"\xff\x0a of some other format"
    path = write_frame(tmp_path / "x.dcm", frame, MPEG4HP41, np.zeros((8, 8), np.uint16))
    path.write_bytes(path.read_bytes().replace(MPEG4HP41.encode(), syntax.encode()))
    with pytest.raises(UnreadableXray, match=rf"{syntax} \({name}.*\) is not supported; convert the file to JPEG 2000"):
        decode_xray(path)
