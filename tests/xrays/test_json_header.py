"""16-bit PNGs beside a JSON file of their DICOM header: shown as it says, whatever it says; and what is no header."""

import base64
import json
import random

import cv2
import numpy as np
import pytest

from kitlib.xrays.image_file import decode_image
from kitlib.xrays.json_header import MAX_JSON_BYTES, json_header_path, read_json_header

HEADER = {
    "00080060": {"vr": "CS", "Value": ["CR"]},
    "00280004": {"vr": "CS", "Value": ["MONOCHROME1"]},
    "00280101": {"vr": "US", "Value": [12]},
    "00281050": {"vr": "DS", "Value": [1800]},
    "00281051": {"vr": "DS", "Value": ["2500"]},
}
CURVE = (np.linspace(0, 1, 4096) ** 0.5 * 65535).astype(np.uint16)
LUT = {
    "00283002": {"vr": "US", "Value": [4096, 0, 16]},
    "00283006": {"vr": "OW", "InlineBinary": base64.b64encode(CURVE.tobytes()).decode()},
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("lut", [None, LUT, LUT | {"00283006": {"vr": "US", "Value": CURVE.tolist()}}])
def test_a_16_bit_png_is_shown_as_its_json_header_says(tmp_path, photometric, lut):
    stored = np.random.default_rng(5).integers(0, 4096, (40, 30)).astype(np.uint16)
    header = HEADER | {"00280004": {"vr": "CS", "Value": [photometric]}}
    header |= {"00283010": {"vr": "SQ", "Value": [lut]}} if lut else {}
    cv2.imwrite(str(tmp_path / "x.png"), stored)
    (tmp_path / "x.json").write_text(json.dumps(header))
    # PS3.3 C.11.2.1.2.1 for centre 1800 and width 2500; a LUT goes before a window.
    shown = CURVE[stored].astype(float) if lut else ((stored - 1799.5) / 2499 + 0.5).clip(0, 1) * 4095
    shown = shown.max() - shown if photometric == "MONOCHROME1" else shown
    expected = (shown - shown.min()) / (shown.max() - shown.min()) * 255
    xray = decode_image(tmp_path / "x.png")
    assert np.abs(xray.pixels - (expected - 0.5)).max() <= 0.6 and xray.warnings == ()
    # An 8-bit PNG has been converted for display, and is shown as it is.
    eight = (stored >> 4).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), eight)
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").pixels, eight)


def test_bits_range_and_modality_of_a_json_header(tmp_path):
    stored = np.random.default_rng(6).integers(100, 2**14, (40, 30)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), stored)
    header = HEADER | {"00281051": {"vr": "DS"}, "00080060": {"vr": "CS", "Value": ["CT"]}}  # no width, so no window
    (tmp_path / "x.json").write_text(json.dumps(header))
    xray = decode_image(tmp_path / "x.png")
    span = stored.max() - stored.min()
    np.testing.assert_array_equal(xray.pixels, ((stored.max() - stored) / span * 255).astype(np.uint8))
    assert xray.warnings == (
        "not a projection X-ray: Modality CT",
        f"BitsStored is 12, but values reach {stored.max()}; all 16 bits are used",
    )


def test_damaged_json_headers_cost_no_image(tmp_path):
    """Whatever a damaged header states, the image is decoded, as it says or without it."""
    chance = random.Random(0)
    stored = np.random.default_rng(8).integers(0, 4096, (12, 10)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), stored)
    values = [0, 20000, 40000, 65535]  # of the stored values 2046 to 2049, so that half of the image is black
    lut = {"00283002": {"vr": "US", "Value": [4, 2046, 16]}, "00283006": {"vr": "US", "Value": values}}
    whole = json.dumps(HEADER | {"00283010": {"vr": "SQ", "Value": [lut]}, "00280120": {"vr": "US", "Value": [0]}}).encode()
    ignored = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 4])):
            damaged[chance.randrange(len(damaged))] = chance.choice(b'0123456789"[]{}:,xUSQ-e.\xff')
        (tmp_path / "x.json").write_bytes(damaged)
        xray = decode_image(tmp_path / "x.png")
        ignored += any("header in the JSON file is ignored" in warning for warning in xray.warnings)
        assert xray.pixels.shape == (12, 10) and xray.pixels.max() > 200
    assert 50 < ignored < 290


def test_signed_values_of_a_json_header(tmp_path):
    signed = np.random.default_rng(9).integers(-2048, 2048, (40, 30))
    # Two's complement in 12 bits; the other four are not part of the value.
    cv2.imwrite(str(tmp_path / "x.png"), (signed & 0xFFF).astype(np.uint16))
    header = {"00280101": {"vr": "US", "Value": [12]}, "00280103": {"vr": "US", "Value": [1]}}
    (tmp_path / "x.json").write_text(json.dumps(header | {"00280004": {"vr": "CS", "Value": ["MONOCHROME2"]}}))
    span = signed.max() - signed.min()
    xray = decode_image(tmp_path / "x.png")
    np.testing.assert_array_equal(xray.pixels, ((signed - signed.min()) / span * 255).astype(np.uint8))
    assert xray.warnings == ()


@pytest.mark.parametrize("order", [1, -1])
def test_tags_count_in_either_case_and_in_any_order(tmp_path, order):
    header = HEADER | {"0020000d": {"vr": "UI", "Value": ["1.2.3"]}, "0020000E": {"vr": "UI", "Value": ["1.2.4"]}}
    (tmp_path / "x.json").write_text(json.dumps(dict(list(header.items())[::order])))
    elements = read_json_header(tmp_path / "x.json")
    assert (elements.text("StudyInstanceUID"), elements.text("SeriesInstanceUID")) == ("1.2.3", "1.2.4")
    assert elements.numbers("WindowWidth") == [2500] and elements.whole("BitsStored", 0) == 12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError: "),
        ("[]", "AttributeError: "),
        ('{"00280101": {"Value": [12]}}', "KeyError: "),
        ("{}", "the file has none of an X-ray's DICOM elements"),
        # The pixels are in the PNG, and a file of anything else is no header of an X-ray.
        ('{"7FE00010": {"vr": "OW", "InlineBinary": "AAAA"}}', "the file has none of an X-ray's DICOM elements"),
        ('{"00100010": {"vr": "PN"}}', "the file has none of an X-ray's DICOM elements"),
    ],
)
def test_what_is_no_header_is_an_error_of_one_class_that_names_the_reason(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="^" + reason) as caught:
        read_json_header(tmp_path / "x.json")
    assert type(caught.value) is ValueError


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    whole = json.dumps(HEADER)
    (tmp_path / "x.json").write_text(whole.ljust(MAX_JSON_BYTES))
    assert read_json_header(tmp_path / "x.json").whole("BitsStored", 0) == 12
    (tmp_path / "x.json").write_text(whole.ljust(MAX_JSON_BYTES + 1))
    with pytest.raises(ValueError, match=f"more than {MAX_JSON_BYTES} bytes"):
        read_json_header(tmp_path / "x.json")


def test_only_a_file_beside_a_png_is_its_header(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(HEADER))
    (tmp_path / "c.json").mkdir()
    assert json_header_path(tmp_path / "a.png") == tmp_path / "a.json"
    assert json_header_path(str(tmp_path / "b.PNG")) == tmp_path / "b.json"
    for name in ("a.jpg", "a.dcm", "a", "c.png", "d.png"):
        assert json_header_path(tmp_path / name) is None
