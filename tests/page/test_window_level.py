"""Windows compared with pydicom, with closed forms, and with the decoded copy of files without a window."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1

from kitlib.errors import UnreadableXray
from kitlib.page.window_level import read_windowed
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.worker import decode_into
from kitlib.xrays.writing import write_xray


def write(path, stored, syntax=ExplicitVRLittleEndian, **told):
    write_xray(path, stored, transfer_syntax=syntax, **told)
    return path


RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


def test_closed_form_of_a_ramp(tmp_path):
    """LINEAR with centre 128 and width 129 is black up to 63.5, 127.5 at the centre, white from 191.5: 2 greys per step."""
    windowed = read_windowed(write(tmp_path / "x.dcm", RAMP), 32)
    assert (windowed.lowest, windowed.highest, windowed.file_window) == (0, 255, None)
    assert windowed.full_range == windowed.default == (128, 256)
    np.testing.assert_array_equal(windowed.render(128, 256), RAMP)
    shown = windowed.render(128, 129).ravel()
    assert shown.dtype == np.uint8
    assert (shown[:64] == 0).all() and (shown[192:] == 255).all()
    # ((64 - 127.5) / 128 + 0.5) * 255 = 0.996; of 65 2.988, of 127 126.504, of 128 128.496
    assert list(shown[[64, 65, 127, 128]]) == [1, 3, 127, 128]


def test_monochrome1_is_inverted_once(tmp_path):
    windowed = read_windowed(write(tmp_path / "x.dcm", RAMP, photometric="MONOCHROME1"), 32)
    assert windowed.inverted
    np.testing.assert_array_equal(windowed.render(128, 256), 255 - RAMP)
    assert (
        windowed.render(-500, 100).max() == 0
    )  # all values are above the window, which is black because low values are white


def test_width_one_is_a_threshold_and_less_is_refused(tmp_path):
    windowed = read_windowed(write(tmp_path / "x.dcm", RAMP), 32)
    np.testing.assert_array_equal(windowed.render(100, 1), np.where(RAMP > 99, 255, 0))  # x <= c - 0.5 is black
    for center, width in ((100, 0.5), (100, 0), (100, -3), (float("nan"), 10), (1, float("inf"))):
        with pytest.raises(ValueError, match="width must be 1 or more"):
            windowed.render(center, width)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([8, 12, 16]),
    signed=st.booleans(),
    rescale=st.none() | st.tuples(st.sampled_from(["1", "0.5", "2.25"]), st.sampled_from(["0", "-1024", "17.5"])),
    center=st.integers(-20, 120),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_files_window_equals_that_of_pydicom(tmp_path, bits, signed, rescale, center, width, seed):
    """pydicom maps to the range of the stored bits; mapped to 0..255, the grey levels differ by rounding."""
    lowest = -(2 ** (bits - 1)) if signed else 0
    dtype = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    stored = np.random.default_rng(seed).integers(lowest, lowest + 2**bits, (30, 20)).astype(dtype)
    slope, intercept = map(float, rescale or (1, 0))
    window = (lowest + center / 100 * 2**bits) * slope + intercept, 2 + width / 100 * 2**bits * slope
    extra = {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]} if rescale else {}
    rounded = tuple(round(value, 4) for value in window)
    path = write(tmp_path / "x.dcm", stored, bits_stored=bits, window=rounded, extra=extra)
    windowed = read_windowed(path, 30)
    assert windowed.file_window == windowed.default == rounded
    np.testing.assert_array_equal(windowed.values, stored * slope + intercept)
    theirs = apply_windowing(stored * slope + intercept, dcmread(path))
    ends = np.array([lowest, lowest + 2**bits - 1]) * slope + intercept
    np.testing.assert_allclose(windowed.render(*rounded), (theirs - ends[0]) / np.ptp(ends) * 255, atol=0.5001)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([8, 10, 15, 16]),
    signed=st.booleans(),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    rescale=st.none() | st.tuples(st.sampled_from(["1", "0.037", "-3"]), st.sampled_from(["0", "-1024", "17.3"])),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_whole_range_shows_what_a_file_without_a_window_shows(tmp_path, bits, signed, photometric, rescale, seed):
    random = np.random.default_rng(seed)
    lowest = -(2 ** (bits - 1)) if signed else 0
    ends = np.sort(random.choice(2**bits, 2, replace=False)) + lowest
    stored = random.integers(ends[0], ends[1] + 1, (12, 17)).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    stored[0, :2] = ends
    extra = {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1]} if rescale else {}
    path = write(tmp_path / "x.dcm", stored, bits_stored=bits, photometric=photometric, extra=extra)
    windowed = read_windowed(path, 17)
    apart = windowed.render(*windowed.full_range).astype(int) - decode_xray(path).pixels
    assert np.abs(apart).max() <= 1


@pytest.mark.parametrize(("function", "center", "width"), [("LINEAR_EXACT", 128, 64), ("SIGMOID", 128, 64)])
def test_other_functions_become_the_line_nearest_to_them(tmp_path, function, center, width):
    path = write(tmp_path / "x.dcm", RAMP, window=(center, width), voi_function=function)
    windowed = read_windowed(path, 32)
    assert windowed.file_window == (128.5, 65)
    shown = windowed.render(*windowed.file_window).astype(float)
    # LINEAR_EXACT is PS3.3 C.11.2.1.3.2; in its centre the sigmoid has the same slope, 1/width per step.
    exact = np.clip((RAMP.astype(float) - center) / width + 0.5, 0, 1) * 255
    np.testing.assert_allclose(shown, exact, atol=1)
    if function == "SIGMOID":
        middle = np.abs(RAMP.astype(float) - center) <= 8
        np.testing.assert_allclose(shown[middle], 255 / (1 + np.exp(-4 * (RAMP[middle] - 128.0) / 64)), atol=1.5)


def test_luts_of_both_kinds(tmp_path):
    """A modality LUT gives the values; a VOI LUT is reported but not used as a window."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [256, 0, 16])
    item.add_new("LUTData", "OW", (np.arange(256, dtype=np.uint16) ** 2 // 2).astype("<u2").tobytes())
    path = write(tmp_path / "x.dcm", RAMP, extra={"ModalityLUTSequence": [item]})
    windowed = read_windowed(path, 32)
    np.testing.assert_array_equal(windowed.values, apply_modality_lut(RAMP, dcmread(path)))
    assert (windowed.lowest, windowed.highest, windowed.has_curve) == (0, 32512, False)  # 255^2 // 2
    path = write(tmp_path / "y.dcm", RAMP, window=(100, 50), extra={"VOILUTSequence": [item]})
    windowed = read_windowed(path, 32)
    assert windowed.has_curve and windowed.file_window is None and windowed.default == (128, 256)


def test_values_are_shrunk_by_area_means_to_the_size_of_the_decoded_copy(tmp_path):
    """A 64 x 40 image becomes means of 4 x 4 blocks, and the range stays that of the whole image."""
    stored = np.random.default_rng(0).integers(0, 4096, (64, 40)).astype(np.uint16)
    stored[0, 0], stored[-1, -1] = 0, 4095
    path = write(
        tmp_path / "x.dcm", stored, JPEGLosslessSV1, bits_stored=12, extra={"RescaleSlope": "2", "RescaleIntercept": "5"}
    )
    windowed = read_windowed(path, 16)
    means = stored.reshape(16, 4, 10, 4).mean(axis=(1, 3)) * 2 + 5
    np.testing.assert_allclose(windowed.values, means, rtol=1e-6)
    assert windowed.values.dtype == np.float32
    assert (windowed.lowest, windowed.highest) == (5, 8195)
    cache = XrayCache(tmp_path, 16)
    cache.folder.mkdir()
    assert decode_into(cache.folder / "x.safetensors", "x", str(path), 16).status == "decoded"
    copy = cache.read("x").pixels.astype(int)
    assert np.abs(windowed.render(*windowed.full_range) - copy).max() <= 1


def test_colour_is_its_luma(tmp_path):
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    colour = np.repeat(grey[..., None], 3, axis=2)
    extra = {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "PixelData": colour.tobytes(),
    }
    windowed = read_windowed(write(tmp_path / "x.dcm", grey, window=(5, 5), extra=extra), 12)
    assert windowed.file_window is None and not windowed.inverted
    np.testing.assert_array_equal(windowed.render(*windowed.full_range), decode_xray(tmp_path / "x.dcm").pixels)


def test_palettes_and_float_values_are_their_greys(tmp_path):
    path = write(tmp_path / "x.dcm", RAMP, extra={"PhotometricInterpretation": "PALETTE COLOR"})
    dataset = dcmread(path)
    for part in ("Red", "Green", "Blue"):
        dataset.add_new(f"{part}PaletteColorLookupTableDescriptor", "US", [256, 0, 8])
        dataset.add_new(f"{part}PaletteColorLookupTableData", "OW", RAMP.ravel()[::-1].tobytes())
    dataset.save_as(path)
    np.testing.assert_array_equal(read_windowed(path, 32).values, 255 - RAMP)
    del dataset.PixelData
    dataset.PhotometricInterpretation, dataset.BitsAllocated = "MONOCHROME1", 32
    dataset.add_new("FloatPixelData", "OF", (RAMP / 1000).astype("<f4").tobytes())
    dataset.save_as(path)
    np.testing.assert_allclose(read_windowed(path, 32).values, 255 - RAMP, atol=1)


def test_unreadable_files_raise_unreadable_xray(tmp_path):
    (tmp_path / "text.dcm").write_text("no image")
    whole = write(tmp_path / "whole.dcm", RAMP).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-100])
    for name in ("text.dcm", "cut.dcm", "missing.dcm"):
        with pytest.raises(UnreadableXray, match=name):
            read_windowed(tmp_path / name, 64)


@pytest.mark.real_data
def test_real_files_look_like_their_decoded_copies(real_data):
    """RG1 has 15 bits and the LINEAR window 15000 / 30000; its decoded copy is that picture stretched to 0..255."""
    windowed = read_windowed(real_data / "dicom/derived/RG1half_ExplicitLE.dcm", 977)
    copy = decode_xray(real_data / "dicom/derived/RG1half_ExplicitLE.dcm").pixels
    assert windowed.file_window == (15000, 30000) and windowed.inverted and windowed.values.shape == copy.shape == (977, 920)
    assert (windowed.lowest, windowed.highest) == (959, 26441)  # from the data set's index
    shown = windowed.render(*windowed.file_window).astype(float)
    stretched = (shown - shown.min()) / np.ptp(shown) * 255
    assert np.abs(stretched - copy).max() <= 2
