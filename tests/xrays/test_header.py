"""Header elements: numbers in the file's own value representation and byte order, and texts in any encoding."""

import struct

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from kitlib.xrays.dicom import read_header
from kitlib.xrays.header import read_elements

SIGNED, UNSIGNED = -2000, 63536  # the same two bytes, F830 in hexadecimal


def read(path, syntax, **elements):
    """Write a file without a transfer syntax that has these elements (VR, value), and read them."""
    dataset = Dataset()
    for keyword, (vr, value) in elements.items():
        dataset.add_new(keyword, vr, value)
    dataset.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian)
    return read_elements(path, with_pixels=False)


@pytest.mark.parametrize(
    ("syntax", "vr", "expected"),
    [
        # The dictionary says "US or SS" for this element; only an explicit file says which.
        (ExplicitVRLittleEndian, "SS", SIGNED),
        (ExplicitVRBigEndian, "SS", SIGNED),
        (ExplicitVRLittleEndian, "US", UNSIGNED),
        (ExplicitVRBigEndian, "US", UNSIGNED),
        # An implicit file does not say; unsigned is assumed.
        (ImplicitVRLittleEndian, "SS", UNSIGNED),
        (ImplicitVRLittleEndian, "US", UNSIGNED),
    ],
)
def test_an_element_of_two_representations_is_read_as_the_file_states(tmp_path, syntax, vr, expected):
    value = SIGNED if vr == "SS" else UNSIGNED
    elements, found = read(tmp_path / "x.dcm", syntax, PixelPaddingValue=(vr, value), Rows=("US", 258))
    assert elements.number("PixelPaddingValue") == expected and elements.whole("Rows", 0) == 258 and found == syntax


@pytest.mark.parametrize(
    ("vr", "value", "expected"),
    [("DS", "40.5\\-600 ", [40.5, -600]), ("FD", [40.5, -600.0], [40.5, -600]), ("SL", 70000, [70000]), ("IS", "7", [7])],
)
def test_a_representation_that_the_dictionary_does_not_expect_is_used(tmp_path, vr, value, expected):
    elements, _ = read(tmp_path / "x.dcm", ExplicitVRLittleEndian, WindowCenter=(vr, value))
    assert elements.numbers("WindowCenter") == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"M\xc3\xbcller", "Müller"),
        (b"M\xfcller", "Müller"),
        (b"M\xf6ller", "Möller"),  # must not become the same patient as Müller
        (b"M\xe9ller\\other", "Méller"),
        (b" a 1 \0", "a 1"),
    ],
)
def test_ids_in_utf_8_and_latin_1_are_read_and_stay_different(tmp_path, written, expected):
    written += b" " * (len(written) % 2)
    # PatientID (0010,0020), explicit VR, little-endian, without a character set.
    (tmp_path / "x.dcm").write_bytes(b"\x10\0\x20\0LO" + struct.pack("<H", len(written)) + written)
    assert read_header(tmp_path / "x.dcm").patient_id == expected
