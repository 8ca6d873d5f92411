"""The reader against an independent float computation, invalid headers, damaged files, and real X-rays."""

import csv
import hashlib
import random
import struct
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import decode_xray, read_header, read_stored_values
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.stored_values import NATIVE
from kitlib.xrays.writing import WRITABLE, write_xray

LOSSLESS = (*NATIVE, RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)
RNG = np.random.default_rng(0)
SMOOTH = (np.add.outer(np.sin(np.arange(61) / 9), np.cos(np.arange(47) / 7)) + 2) / 4  # 0..1, 61 x 47


def recipe(path) -> np.ndarray:
    """Return the common public float computation over the whole image: pydicom's LUTs, inversion, min-max, uint8."""
    dataset = dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float64)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = shown.max() - shown
    return ((shown - shown.min()) / (shown.max() - shown.min()) * 255).astype(np.uint8)


def image(dtype: str, bits: int) -> np.ndarray:
    """Return a smooth image with noise, over the whole range of `bits`."""
    lowest = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
    values = lowest + SMOOTH * (2**bits - 1) + RNG.normal(0, 2**bits / 200, SMOOTH.shape)
    return values.clip(lowest, lowest + 2**bits - 1).astype(dtype)


def write(path, stored, syntax=ExplicitVRLittleEndian, **options):
    write_xray(path, stored, transfer_syntax=syntax, **options)
    return path


def lut(first: int | None, entries: np.ndarray, bits: int) -> list[Dataset]:
    item = Dataset()
    if first is not None:
        item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return [item]


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name[:24])
@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_lossless_syntaxes_give_back_what_was_stored(tmp_path, syntax, dtype, bits):
    stored = image(dtype, bits)
    path = write(tmp_path / "x.dcm", stored, syntax, bits_stored=bits)
    read = read_stored_values(path)
    np.testing.assert_array_equal(read, stored)
    assert read.dtype == stored.dtype
    np.testing.assert_array_equal(read_xray(path), recipe(path))


def test_lossy_syntaxes_stay_near_what_was_stored(tmp_path):
    stored = image("u1", 8)
    for syntax in set(WRITABLE) - set(LOSSLESS):
        error = read_stored_values(write(tmp_path / "x.dcm", stored, syntax)).astype(int) - stored
        assert np.abs(error).max() <= 12, syntax


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([8, 10, 12, 15, 16]),
    signed=st.booleans(),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    function=st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    center=st.floats(-0.2, 1.2),
    width=st.floats(0.01, 3),
    rescale=st.none() | st.tuples(st.sampled_from(["1", "0.5", "2.25", "0.0371"]), st.sampled_from(["0", "-1024", "17.3"])),
    seed=st.integers(0, 2**32 - 1),
)
def test_table_equals_the_float_recipe_bit_for_bit(
    tmp_path, bits, signed, photometric, function, center, width, rescale, seed
):
    lowest = -(2 ** (bits - 1)) if signed else 0
    dtype = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    stored = np.random.default_rng(seed).integers(lowest, lowest + 2**bits, (40, 33)).astype(dtype)
    slope, intercept = map(float, rescale or (1, 0))
    window = ((lowest + center * 2**bits) * slope + intercept, 1 + width * 2**bits * slope)
    extra = {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]} if rescale else {}
    # DS holds 16 characters; a stricter writer would change a longer number.
    path = write(
        tmp_path / "x.dcm",
        stored,
        bits_stored=bits,
        photometric=photometric,
        window=tuple(round(value, 4) for value in window),
        voi_function=function,
        extra=extra,
    )
    xray = decode_xray(path)
    with np.errstate(invalid="ignore"):
        expected = recipe(path)
    if not xray.warnings:
        np.testing.assert_array_equal(xray.pixels, expected)
    else:  # the window shows one end; the recipe divides by zero if it maps the whole image to one grey
        assert "one grey" in xray.warnings[0]
        assert not expected.any() or max((expected == expected.min()).mean(), (expected == 255).mean()) > 0.99


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_lut_sequences_equal_the_float_recipe(tmp_path, syntax, photometric):
    stored = image("u2", 12)
    curve = (np.linspace(0, 1, 3000) ** 0.5 * 65535).astype(np.uint16)
    dips = np.abs(np.arange(4096) - 1500).astype(np.uint16)  # not monotonic: the ends are not the extremes
    for extra in (
        {"VOILUTSequence": lut(400, curve, 16)},
        {"ModalityLUTSequence": lut(0, dips, 16)},
        {"ModalityLUTSequence": lut(100, dips, 16), "VOILUTSequence": lut(0, curve, 16)},
        {"ModalityLUTSequence": lut(0, dips, 16), "WindowCenter": "900", "WindowWidth": "700"},
        # A LUT goes before a window.
        {"VOILUTSequence": lut(400, curve, 16), "WindowCenter": "900", "WindowWidth": "700"},
    ):
        path = write(tmp_path / "x.dcm", stored, syntax, bits_stored=12, photometric=photometric, extra=extra)
        np.testing.assert_array_equal(read_xray(path), recipe(path))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(
    ("entries", "bits", "kind"),
    [
        (np.arange(65536)[::-1], 16, "u2"),  # the descriptor holds 0 for 65,536 entries
        (np.arange(4096)[::-1] // 16, 8, "u2"),
        (np.arange(256)[::-1], 8, "u2"),
    ],
    ids=["65536 entries", "4096 entries of 8 bits", "256 entries of 8 bits"],
)
def test_a_lut_of_any_length_and_byte_order_is_applied(tmp_path, syntax, entries, bits, kind):
    stored = RNG.integers(0, len(entries), (48, 40)).astype("u2")
    (item,) = lut(0, entries, bits)
    item.add_new("LUTData", "OW", entries.astype((">" if syntax == ExplicitVRBigEndian else "<") + kind).tobytes())
    xray = decode_xray(write(tmp_path / "x.dcm", stored, syntax, extra={"VOILUTSequence": [item]}))
    shown = entries[stored] - entries[stored].min()
    np.testing.assert_array_equal(xray.pixels, (shown / shown.max() * 255).astype(np.uint8))
    assert xray.warnings == ()


@pytest.mark.parametrize("length", [256, 255, 4096])
def test_a_lut_may_have_two_entries_of_8_bits_in_a_word(tmp_path, length):
    entries = np.arange(length)[::-1].astype(np.float64) * 255 // length
    stored = RNG.integers(0, length, (48, 40)).astype("u2")
    (item,) = lut(0, entries, 8)
    item.add_new("LUTData", "OW", entries.astype("u1").tobytes() + b"\0" * (length % 2))
    xray = decode_xray(write(tmp_path / "x.dcm", stored, extra={"VOILUTSequence": [item]}))
    shown = entries[stored] - entries[stored].min()
    np.testing.assert_array_equal(xray.pixels, (shown / shown.max() * 255).astype(np.uint8))
    assert xray.warnings == ()


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [("128", "1", None), ("128", "1", "linear"), ("127.5", "0.25", "LINEAR_exact"), ("127.5", "0.001", "Sigmoid")],
)
def test_the_narrowest_windows_split_the_values_in_two(tmp_path, center, width, function):
    """PS3.3 C.11.2.1.2: LINEAR has at least width 1, the other functions any width above 0; centre 128 splits at 127.5."""
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    xray = decode_xray(write(tmp_path / "x.dcm", ramp, window=(center, width), voi_function=function))
    np.testing.assert_array_equal(xray.pixels, np.where(ramp < 128, 0, 255))
    assert xray.warnings == ()


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"])
def test_half_of_a_transform_is_none(tmp_path, name):
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    xray = decode_xray(write(tmp_path / "x.dcm", ramp, extra={name: "-2"}))
    np.testing.assert_array_equal(xray.pixels, ramp)
    assert xray.warnings == ()


def test_closed_form_of_a_ramp(tmp_path):
    """A ramp 0..255 keeps its values; MONOCHROME1 inverts it once, whatever PresentationLUTShape says."""
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for photometric, shape, expected in (
        ("MONOCHROME2", None, ramp),
        ("MONOCHROME1", None, 255 - ramp),
        ("MONOCHROME1", "INVERSE", 255 - ramp),
        ("MONOCHROME2", "IDENTITY", ramp),
        ("MONOCHROME2", "INVERSE", ramp),
    ):
        path = write(tmp_path / "x.dcm", ramp, photometric=photometric, extra={"PresentationLUTShape": shape})
        np.testing.assert_array_equal(read_xray(path), expected, err_msg=f"{photometric} {shape}")


def test_first_of_several_windows(tmp_path):
    stored = image("u2", 12)
    several = {"WindowCenter": ["1000", "3000"], "WindowWidth": ["500", "100"]}
    first = read_xray(write(tmp_path / "a.dcm", stored, bits_stored=12, window=(1000, 500)))
    np.testing.assert_array_equal(read_xray(write(tmp_path / "b.dcm", stored, bits_stored=12, extra=several)), first)


def test_a_negative_slope_inverts_the_grey_once(tmp_path):
    """Stored 0..4095 with slope -1 are modality values 0..-4095, so the smallest stored value is the brightest grey."""
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for window in (None, (-2048, 4096)):
        slope = {"RescaleSlope": "-1", "RescaleIntercept": "0"}
        pixels = read_xray(write(tmp_path / "x.dcm", ramp, bits_stored=12, window=window, extra=slope))
        assert pixels[0, 0] == 255
        assert pixels[-1, -1] == 0


@pytest.mark.parametrize(
    ("extra", "warning"),
    [
        ({"WindowCenter": "2000", "WindowWidth": "0"}, "WindowWidth 0.0"),
        ({"WindowCenter": "2000", "WindowWidth": "-5"}, "WindowWidth -5.0"),
        ({"WindowCenter": "2000", "WindowWidth": "0.5"}, "WindowWidth 0.5"),  # below 1 under LINEAR
        ({"WindowCenter": "2000", "WindowWidth": "0", "VOILUTFunction": "SIGMOID"}, "SIGMOID"),
        ({"WindowCenter": "2000", "WindowWidth": "300", "VOILUTFunction": "CUBIC"}, "CUBIC"),
        ({"WindowCenter": "-90000", "WindowWidth": "3"}, "one grey"),
        ({"RescaleSlope": "0", "RescaleIntercept": "5"}, "RescaleSlope 0.0"),
        ({"VOILUTSequence": lut(0, np.arange(5), 33)}, "33 bits"),
        ({"VOILUTSequence": lut(0, np.full(4096, 7), 12)}, "one grey"),
        ({"VOILUTSequence": lut(None, np.arange(5), 12)}, "LUTDescriptor is missing"),
        ({"ModalityLUTSequence": lut(None, np.arange(5), 12)}, "LUTDescriptor is missing"),
        ({"ModalityLUTSequence": lut(0, np.full(4096, 7), 12)}, "one value"),
    ],
)
def test_invalid_elements_are_ignored_with_a_warning(tmp_path, extra, warning):
    stored = image("u2", 12)
    plain = read_xray(write(tmp_path / "plain.dcm", stored, bits_stored=12))
    xray = decode_xray(write(tmp_path / "invalid.dcm", stored, bits_stored=12, extra=extra))
    np.testing.assert_array_equal(xray.pixels, plain)
    assert len(xray.warnings) == 1
    assert warning in xray.warnings[0]


def test_only_read_xray_logs_warnings_once_per_file(tmp_path, caplog):
    invalid = {"WindowCenter": "2000", "WindowWidth": "0", "BitsStored": 20}
    path = write(tmp_path / "invalid.dcm", image("u2", 12), extra=invalid)
    warnings = decode_xray(path).warnings
    assert len(warnings) == 2 and not caplog.records
    read_xray(path)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert all(text in record.message for text in (str(path), *warnings))
    read_xray(write(tmp_path / "plain.dcm", image("u2", 12), bits_stored=12))
    assert len(caplog.records) == 1


def test_text_where_a_number_belongs(tmp_path):
    path = write(tmp_path / "x.dcm", image("u2", 12), bits_stored=12, window=(2000, 3000))
    plain = read_xray(write(tmp_path / "plain.dcm", image("u2", 12) * 0 + read_stored_values(path), bits_stored=12))
    path.write_bytes(path.read_bytes().replace(b"3000", b"wide"))
    xray = decode_xray(path)
    np.testing.assert_array_equal(xray.pixels, plain)
    assert "WindowWidth" in xray.warnings[0]


def test_a_short_lut_is_ignored(tmp_path):
    stored = image("u2", 12)
    broken = lut(0, np.arange(4096), 12)
    broken[0].LUTData = broken[0].LUTData[:100]
    xray = decode_xray(write(tmp_path / "x.dcm", stored, bits_stored=12, extra={"VOILUTSequence": broken}))
    np.testing.assert_array_equal(xray.pixels, read_xray(write(tmp_path / "p.dcm", stored, bits_stored=12)))
    assert "100 bytes are too few for 4096 entries" in xray.warnings[0]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_bits_above_bits_stored_do_not_count_in_signed_values_and_beside_overlays(tmp_path, syntax):
    # Overlays are in the groups 6000, 6002, ... 601E.
    for dtype, overlay in (("i2", None), ("u2", 0x60000102), ("u2", 0x601E0102)):
        clean = image(dtype, 12)
        dirty = ((clean.view("u2") & 0x0FFF) | (RNG.integers(0, 16, clean.shape) << 12).astype("u2")).view(clean.dtype)
        path = write(tmp_path / "x.dcm", dirty, syntax, bits_stored=12)
        if overlay:
            dataset = dcmread(path)
            dataset.add_new(overlay, "US", 12)
            dataset.save_as(path)
        np.testing.assert_array_equal(read_stored_values(path), clean)
        np.testing.assert_array_equal(read_xray(path), recipe(path))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_unsigned_values_above_bits_stored_count_with_a_warning(tmp_path, syntax):
    stored = image("u2", 14)
    xray = decode_xray(write(tmp_path / "x.dcm", stored, syntax, bits_stored=12))
    np.testing.assert_array_equal(xray.pixels, read_xray(write(tmp_path / "y.dcm", stored, syntax, bits_stored=14)))
    assert xray.warnings == (f"BitsStored is 12, but values reach {stored.max()}; all 16 bits are used",)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_constant_image_is_black(tmp_path, photometric):
    xray = decode_xray(write(tmp_path / "x.dcm", np.full((5, 7), 300, "u2"), photometric=photometric, window=(300, 100)))
    np.testing.assert_array_equal(xray.pixels, np.zeros((5, 7), np.uint8))
    assert xray.warnings == ("all pixels of the image have the same value",)


def test_missing_tags_and_missing_preamble(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    absent = dict.fromkeys(["BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "BitsAllocated"])
    for stored in (ramp, ramp.astype(np.uint16) * 257):  # 16 bits are recognised by the length, or by the frame's precision
        for syntax in (ExplicitVRLittleEndian, JPEGLosslessSV1):
            xray = decode_xray(write(tmp_path / "a.dcm", stored, syntax, extra=absent))
            np.testing.assert_array_equal(xray.pixels, ramp)
            assert xray.warnings == ()
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        path = write(tmp_path / "b.dcm", ramp, syntax)
        whole = path.read_bytes()
        path.write_bytes(whole[128 + 4 :])  # no preamble
        np.testing.assert_array_equal(read_xray(path), ramp)
        start = 128 + 4 + 12 + struct.unpack("<I", whole[128 + 4 + 8 : 128 + 4 + 12])[0]
        path.write_bytes(whole[start:])  # no meta information either
        np.testing.assert_array_equal(read_xray(path), ramp)


def test_bytes_after_the_pixels_are_ignored(tmp_path):
    """One SIIM file has 216,296 bytes after its pixels; more than a tenth shows that the header is wrong."""
    stored = RNG.integers(0, 4096, (1200, 1000), dtype="u2")
    plain = write(tmp_path / "plain.dcm", stored, bits_stored=12)
    for extra in (2, 216_296):
        pixels = {"PixelData": stored.tobytes() + b"\7" * extra}
        xray = decode_xray(write(tmp_path / "padded.dcm", stored, bits_stored=12, extra=pixels))
        np.testing.assert_array_equal(xray.pixels, read_xray(plain))
        assert xray.warnings == (f"the pixel data have {extra} bytes more than the header describes; they are ignored",)
    wrong = {"half": {"Rows": 600}, "fewer": {"Columns": 800}, "bits": {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}}
    for name, extra in wrong.items():
        path = write(tmp_path / f"{name}.dcm", stored, bits_stored=12, extra=extra)
        with pytest.raises(UnreadableXray, match=r"have 2400000 bytes, but the header describes \d+"):
            read_xray(path)


def test_odd_sized_8_bit_big_endian_words(tmp_path):
    """Explicit BE stores 8-bit pixels of VR OW as swapped words (PS3.5 annex A.3)."""
    stored = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    padded = np.append(stored.ravel(), np.uint8(0))
    path = write(tmp_path / "x.dcm", stored, ExplicitVRBigEndian)
    dataset = dcmread(path)
    dataset.add_new("PixelData", "OW", padded.view("u2").byteswap().tobytes())
    dataset.save_as(path)
    np.testing.assert_array_equal(read_stored_values(path), stored)
    assert decode_xray(path).warnings == ()  # the byte that makes their number even is no surplus


def test_colour_becomes_luma_and_frames_become_the_first(tmp_path):
    colour = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    luma = {"RGB": (colour @ [0.299, 0.587, 0.114]).round(), "YBR_FULL": colour[..., 0].astype(float)}
    by_plane = colour.transpose(2, 0, 1)
    for photometric, planar, syntax in product(luma, (0, 1), NATIVE):
        pixels = (by_plane if planar else colour).tobytes()
        extra = {"SamplesPerPixel": 3, "PlanarConfiguration": planar, "PixelData": pixels}
        path = write(tmp_path / "c.dcm", colour[..., 0], syntax, photometric=photometric, extra=extra)
        np.testing.assert_array_equal(read_stored_values(path), colour)
        expected = luma[photometric] - luma[photometric].min()
        assert np.abs(read_xray(path) - expected / expected.max() * 255).max() <= 2
    frames = RNG.integers(0, 256, (3, 4, 6), dtype=np.uint8)
    path = write(tmp_path / "f.dcm", frames[0], extra={"NumberOfFrames": "3", "PixelData": frames.tobytes()})
    np.testing.assert_array_equal(read_stored_values(path), frames[0])
    assert "3 frames" in decode_xray(path).warnings[0]


def test_header_of_siim_with_ids_that_are_not_uids(tmp_path):
    ids = {"patient_id": "0f6", "study_id": "00188a671292", "series_id": "0a", "image_id": "557a70442928"}
    header = read_header(write(tmp_path / "x.dcm", image("u2", 12), **ids))
    assert {name: getattr(header, name) for name in ids} == ids
    assert (header.rows, header.columns, header.view) == (61, 47, "PA")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_an_absurd_size_is_refused(tmp_path, syntax):
    path = write(tmp_path / "x.dcm", image("u2", 12), syntax, extra={"Rows": 65535, "Columns": 65535})
    with pytest.raises(UnreadableXray, match="more than") as caught:
        read_xray(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_a_frame_of_another_size_than_the_header_is_refused(tmp_path, syntax):
    """The check precedes the decoder's allocation: the header states 62 rows, the codestream 61."""
    path = write(tmp_path / "x.dcm", image("u1", 8), syntax, extra={"Rows": 62})
    with pytest.raises(UnreadableXray, match="61 x 47 x 1, but the header says 62 x 47 x 1"):
        read_xray(path)


def test_unreadable_things_name_file_and_reason(tmp_path):
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "text.dcm").write_text("not an image " * 100)
    write(tmp_path / "short.dcm", image("u2", 12), extra={"PixelData": b"\0" * 100})
    for name in ("empty.dcm", "text.dcm", "short.dcm", "absent.dcm", "."):
        with pytest.raises(UnreadableXray) as caught:
            read_xray(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.reason


def test_the_header_of_a_file_that_is_not_dicom_is_refused(tmp_path):
    whole = write(tmp_path / "whole.dcm", image("u2", 12)).read_bytes()
    for content in (b"", b"garbage", b"not an image " * 100, RNG.bytes(4096), bytes(4096), whole[:200]):
        path = tmp_path / "x.dcm"
        path.write_bytes(content)
        with pytest.raises(UnreadableXray) as caught:
            read_header(path)
        assert caught.value.path == str(path) and caught.value.reason
    # A file truncated within its pixels still has a complete header.
    path.write_bytes(whole[:-1000])
    assert read_header(path) == read_header(tmp_path / "whole.dcm")


def test_an_unsupported_transfer_syntax_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write transfer syntax '1\.2\.840\.10008\.1\.2\.4\.51'; valid: "):
        write_xray(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), transfer_syntax="1.2.840.10008.1.2.4.51")
    assert not list(tmp_path.iterdir())


def test_damaged_files_have_one_error_class(tmp_path):
    """Changed, zeroed or removed bytes give an image or UnreadableXray; a crash or a hang would end the whole run."""
    chance = random.Random(0)
    stored = image("u2", 12)
    wholes = [write(tmp_path / "x.dcm", stored, syntax, bits_stored=12).read_bytes() for syntax in LOSSLESS]
    wholes.append(write(tmp_path / "x.dcm", image("u1", 8), JPEGBaseline8Bit).read_bytes())
    outcomes = {"read": 0, "unreadable": 0}
    for _ in range(600):
        damaged = bytearray(chance.choice(wholes))
        pixels = max(400, damaged.find(b"\xe0\x7f\x10\x00"))
        ends = (len(damaged), pixels, pixels + 250)[chance.randrange(3)]
        for _ in range(chance.choice([1, 2, 5, 30])):
            damaged[chance.randrange(128, min(ends, len(damaged)))] = chance.choice([0, 255, chance.randrange(256)])
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        (tmp_path / "damaged.dcm").write_bytes(damaged)
        try:
            pixels = read_xray(tmp_path / "damaged.dcm")
            outcomes["read"] += 1
            assert pixels.ndim == 2
            assert pixels.dtype == np.uint8
        except UnreadableXray as error:
            outcomes["unreadable"] += 1
            assert error.__context__ is None  # a traceback would keep the pixels in memory
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.real_data
def test_every_real_file_has_the_pixels_of_its_index(real_data):
    """index.csv has minimum, maximum, mean and hash of each stored array, computed independently with pydicom 3."""
    with open(real_data / "dicom" / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 31
    for row in rows:
        path = real_data / row["file"]
        if row["decode_pydicom3"] != "ok":
            with pytest.raises(UnreadableXray):
                read_xray(path)
            continue
        stored = read_stored_values(path)
        digest = hashlib.sha256(np.ascontiguousarray(stored.astype("<i4")).tobytes()).hexdigest()[:16]
        assert digest == row["sha256_16_int32"], row["file"]
        assert (stored.min(), stored.max()) == (int(row["px_min"]), int(row["px_max"]))
        assert stored.mean() == pytest.approx(float(row["px_mean"]), abs=1e-3)
        assert "x".join(map(str, stored.shape)) == row["shape"]
        xray = decode_xray(path)
        modality = path.name[:2]
        assert xray.warnings == ((f"not a projection X-ray: Modality {modality}",) if modality in ("CT", "MR") else ())
        if row["ts_uid"] != JPEGBaseline8Bit:  # lossy: some pixels of pydicom's pylibjpeg differ by one
            np.testing.assert_array_equal(xray.pixels, recipe(path))
