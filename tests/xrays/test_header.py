"""Header elements: numbers in the file's own value representation and byte order, and texts in any encoding."""

import os
import struct

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

import kitlib.xrays.header
from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import read_header, read_stored_values
from kitlib.xrays.header import MAX_FILE_BYTES, read_elements
from kitlib.xrays.writing import write_xray

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


@pytest.mark.parametrize(("value", "expected"), [(b"", []), (b"\2", []), (b"\2\1", [258]), (b"\2\1\3", [258])])
def test_an_incomplete_number_does_not_count(tmp_path, value, expected):
    # Rows (0028,0010), explicit VR, little-endian.
    (tmp_path / "x.dcm").write_bytes(b"\x28\0\x10\0US" + struct.pack("<H", len(value)) + value)
    elements, _ = read_elements(tmp_path / "x.dcm")
    assert elements.numbers("Rows") == expected and elements.whole("Rows", 7) == (expected or [7])[0]


STORED = np.arange(3000, dtype=np.uint16).reshape(60, 50)
SYNTAX = DeflatedExplicitVRLittleEndian.encode()


def test_a_deflated_file_has_the_header_of_a_plain_one(tmp_path):
    for name, syntax in (("plain", ExplicitVRLittleEndian), ("deflated", DeflatedExplicitVRLittleEndian)):
        write_xray(tmp_path / name, STORED, transfer_syntax=syntax, patient_id="p")
    expected = vars(read_header(tmp_path / "plain")) | {"transfer_syntax": DeflatedExplicitVRLittleEndian}
    assert vars(read_header(tmp_path / "deflated")) == expected and expected["patient_id"] == "p"


def test_a_file_is_not_deflated_because_its_pixels_contain_the_name_of_that_syntax(tmp_path):
    stored = STORED.copy()
    assert len(SYNTAX) == 22
    stored[30, :11] = np.frombuffer(SYNTAX, "<u2")
    write_xray(tmp_path / "x.dcm", stored, transfer_syntax=ExplicitVRLittleEndian)
    np.testing.assert_array_equal(read_stored_values(tmp_path / "x.dcm"), stored)
    assert read_header(tmp_path / "x.dcm").rows == 60


@pytest.mark.parametrize("read_file", [read_header, read_stored_values])
def test_a_deflated_file_beyond_the_limit_or_without_the_length_of_its_meta_group_is_refused(
    tmp_path, monkeypatch, read_file
):
    path = tmp_path / "x.dcm"
    write_xray(path, STORED * 0, transfer_syntax=DeflatedExplicitVRLittleEndian)
    whole = path.read_bytes()
    assert len(whole) < 2000 < STORED.nbytes
    read_file(path)
    path.write_bytes(whole[:132] + whole[144:])  # the element takes 12 bytes after the preamble of 132
    with pytest.raises(UnreadableXray, match="its meta information has no group length"):
        read_file(path)
    path.write_bytes(whole)
    monkeypatch.setattr(kitlib.xrays.header, "MAX_FILE_BYTES", 2000)
    with pytest.raises(UnreadableXray, match="inflates to more than 2000 bytes"):
        read_file(path)


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.dcm"
    write_xray(path, STORED, transfer_syntax=ExplicitVRLittleEndian)
    os.truncate(path, MAX_FILE_BYTES)  # with a hole, which takes no space on the disk
    assert read_header(path).rows == 60
    os.truncate(path, MAX_FILE_BYTES + 1)
    for read_file in (read_header, read_stored_values):
        with pytest.raises(UnreadableXray, match=f"has {MAX_FILE_BYTES + 1} bytes, more than the limit"):
            read_file(path)
