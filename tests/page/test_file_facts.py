"""File formats and header facts, read from files written here with known content."""

import struct

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from kitlib.errors import UnreadableXray
from kitlib.page.file_facts import kind_by_signature, printable, read_facts, recognise_foreign
from kitlib.xrays.writing import write_xray

GREY = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)


def write(path, stored=GREY, syntax=ExplicitVRLittleEndian, **told):
    write_xray(path, stored, transfer_syntax=syntax, bits_stored=12 if stored.itemsize == 2 else 8, **told)
    return path


def coloured_dicom(path, colour, photometric="RGB"):
    told = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": np.ascontiguousarray(colour).tobytes()}
    return write(path, colour[..., 0], photometric=photometric, extra=told)


def test_a_dicom_file_says_what_was_written_and_nothing_of_the_patient(tmp_path):
    path = write(
        tmp_path / "x.dcm",
        syntax=JPEGLSLossless,
        photometric="MONOCHROME1",
        patient_id="Doe",
        study_id="1.2",
        image_id="1.2.3",
    )
    facts = read_facts(path)
    assert facts.shown == {
        "Format": "DICOM",
        "Modality": "DX",
        "View": "PA",
        "Body part": "CHEST",
        "Photometric interpretation": "MONOCHROME1",
        "Bits": "12",
        "Transfer syntax": "JPEG-LS Lossless Image Compression",  # PS3.6 table A-1
    }
    assert (facts.kind, facts.modality, facts.study_id, facts.patient_id, facts.coloured) == (
        "DICOM",
        "DX",
        "1.2",
        "Doe",
        False,
    )


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colour_is_a_pixel_whose_channels_differ_by_more_than_a_sixteenth(tmp_path, photometric):
    grey = np.repeat((GREY % 256).astype(np.uint8)[..., None], 3, axis=2)
    if photometric == "YBR_FULL":
        grey[..., 1:] = 128  # grey, PS3.3 C.7.6.3.1.2
    assert not read_facts(coloured_dicom(tmp_path / "grey.dcm", grey, photometric)).coloured
    for away, coloured in ((16, False), (17, True)):  # of 256 greys
        dot = grey.copy()
        dot[7, 9] = 128
        dot[7, 9, 2] += away
        assert read_facts(coloured_dicom(tmp_path / "dot.dcm", dot, photometric)).coloured == coloured


def test_pictures_are_grey_or_coloured_whatever_their_mode_says(tmp_path):
    grey = Image.fromarray((GREY % 256).astype(np.uint8))
    red = Image.new("RGB", (64, 48), (200, 20, 20))
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF")):
        for picture, coloured in ((grey, False), (grey.convert("RGB"), False), (red, True)):
            picture.save(tmp_path / f"x.{suffix}")
            facts = read_facts(tmp_path / f"x.{suffix}")
            assert (facts.kind, facts.shown, facts.coloured) == (kind, {"Format": kind}, coloured)
    Image.fromarray(GREY).save(tmp_path / "sixteen.png")
    assert not read_facts(tmp_path / "sixteen.png").coloured
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_facts(tmp_path / "cmyk.jpg").coloured


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04" + bytes(50), "ZIP"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        (b"name" + bytes(253) + b"ustar\x0000", "tar"),
        (b"%PDF-1.7\n", "PDF"),
        (b"II*\0" + bytes(50), "TIFF"),
        (b"BM" + struct.pack("<IHH", 100, 0, 0), "BMP"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypisom", "video"),
        (b"  <!DOCTYPE html><p>", "web page"),
        (b"BMI,age\n22,40\n", "text"),
        ("é".encode() * 600, "text"),
        (b"x" + "é".encode() * 600, "text"),  # the last of 1,024 bytes is half a character
        (b"x" + "😀".encode() * 300, "text"),  # the last three are most of one
    ],
)
def test_other_files_are_named_by_their_content(tmp_path, content, what):
    (tmp_path / "x.dcm").write_bytes(content)
    told, advice = recognise_foreign(tmp_path / "x.dcm")
    assert what in told and advice.endswith(".")
    assert kind_by_signature(tmp_path / "x.dcm") == ""


def test_files_that_may_be_images_are_not_foreign(tmp_path):
    whole = write(tmp_path / "x.dcm").read_bytes()
    # A preamble may be the header of another format (PS3.10 section 7.1), and a file may have no preamble.
    # Neither a zero byte nor 0xff is text in UTF-8.
    not_text = np.random.default_rng(0).bytes(500), b"text \0", b"x" * 1020 + b"\xff" + b"x" * 10
    for content in (whole, b"II*\0" + whole[4:], whole[132:], *not_text):
        (tmp_path / "x.dcm").write_bytes(content)
        assert recognise_foreign(tmp_path / "x.dcm") is None
    Image.fromarray(GREY).save(tmp_path / "x.png")
    assert recognise_foreign(tmp_path / "x.png") is None and kind_by_signature(tmp_path / "x.png") == "PNG"


def test_damaged_files_raise_unreadable_xray(tmp_path):
    whole = write(tmp_path / "x.dcm").read_bytes()
    for content in (b"", whole[:140], bytes(500), b"\x89PNG\r\n\x1a\n" + bytes(30)):
        (tmp_path / "x.dcm").write_bytes(content)
        with pytest.raises(UnreadableXray):
            read_facts(tmp_path / "x.dcm")
    with pytest.raises(FileNotFoundError):
        read_facts(tmp_path / "absent.dcm")


def test_a_damaged_length_shows_nothing_of_the_next_elements(tmp_path):
    path = write(tmp_path / "x.dcm", extra={"PatientName": "Doe^John", "Modality": "CR"})
    whole = path.read_bytes()
    modality, name = whole.index(b"CS\x02\0CR"), whole.index(b"Doe^John")
    path.write_bytes(whole[: modality + 2] + struct.pack("<H", name + 8 - modality - 4) + whole[modality + 4 :])
    facts = read_facts(path)
    assert facts.modality == "ILLEGIBLE" and "Doe" not in repr(facts)


def test_values_that_are_absent_are_not_shown_and_long_codes_are_illegible(tmp_path):
    facts = read_facts(write(tmp_path / "x.dcm", extra={"ViewPosition": "", "BodyPartExamined": "C" * 32}))
    assert "View" not in facts.shown and facts.body_part == "C" * 32
    # A longer value is not a code; DICOM's have at most 16 letters.
    assert read_facts(write(tmp_path / "y.dcm", extra={"BodyPartExamined": "C" * 33})).body_part == "ILLEGIBLE"


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_channels_of_a_coloured_picture_differ_by_more_than_a_sixteenth_too(tmp_path, suffix):
    for away, coloured in ((16, False), (17, True)):  # of 256 greys
        picture = np.full((48, 64, 3), 100, np.uint8)
        picture[7, 9, 2] += away
        Image.fromarray(picture).save(tmp_path / f"x.{suffix}")
        assert read_facts(tmp_path / f"x.{suffix}").coloured == coloured


def test_the_sixteenth_is_that_of_the_stored_bits(tmp_path):
    for away, coloured in ((256, False), (257, True)):  # of the 4,096 greys of 12 bits
        colour = np.full((48, 64, 3), 1000, np.uint16)
        colour[7, 9, 2] += away
        assert read_facts(coloured_dicom(tmp_path / "x.dcm", colour)).coloured == coloured


def test_raw_files_are_grey(tmp_path):
    with open(tmp_path / "x.img", "wb") as file:
        file.truncate(2048 * 2048 * 2)  # JSRT's size
    facts = read_facts(tmp_path / "x.img")
    assert (facts.kind, facts.coloured) == ("JSRT", False)


def test_printable_is_one_short_line_without_control_characters():
    assert printable("Röntgen <b>\n\t 肺", 60) == "Röntgen <b> 肺"
    assert printable("abc\u202egnp.exe\x00\udcff", 60) == "abc?gnp.exe??"
    assert printable("x" * 300, 60) == "x" * 59 + "…" and printable("x" * 60, 60) == "x" * 60
