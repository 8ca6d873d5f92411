"""Reads the format and header facts of an uploaded file, in a decoding process where a malicious file can do no harm."""

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pydicom.uid import UID

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import read_stored_values
from kitlib.xrays.header import header_of, read_elements
from kitlib.xrays.image_file import image_format, open_image

# In a grey image, lossy compression makes colour channels differ by less than this; coloured arrows or paper by more.
COLOURED_SHARE = 1 / 16  # of the range of grey levels
ILLEGIBLE = "ILLEGIBLE"
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")  # modes of Pillow

UNPACK = "Unpack it and choose the images in it."
CONVERT = "Save the image as PNG or JPEG, or choose the DICOM file it was made from."
CHOOSE_IMAGE = "Choose a DICOM, PNG or JPEG file of a chest X-ray."
FOREIGN_FORMATS = {  # start of the file (a regular expression) -> what the file is, and what to do
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": ("a ZIP archive", UNPACK),
    rb"\x1f\x8b": ("a gzip archive", UNPACK),
    rb"BZh[1-9]|\xfd7zXZ\0|\x28\xb5\x2f\xfd": ("a compressed archive", UNPACK),
    rb"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", UNPACK),
    rb"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    rb".{257}ustar": ("a tar archive", UNPACK),
    rb"%PDF-": ("a PDF document", "Export the image in it as DICOM, PNG or JPEG."),
    rb"II\*\0|MM\0\*": ("a TIFF image", CONVERT),
    rb"BM.{4}\0{4}": ("a BMP image", CONVERT),
    rb"RIFF.{4}WEBP": ("a WebP image", CONVERT),
    rb".{4}ftyp(heic|heix|mif1|avif)": ("a HEIC or AVIF image", CONVERT),
    rb"\0{3}\x0cjP  |\xff\x4f\xff\x51": ("a JPEG 2000 image without a DICOM header", CONVERT),
    rb".{4}ftyp|RIFF.{4}AVI |\x1aE\xdf\xa3": ("a video", CHOOSE_IMAGE),
    rb".{344}(n\+1|ni1)\0": ("a NIfTI volume", CONVERT),
    rb"MZ|\x7fELF": ("a program", CHOOSE_IMAGE),
    rb"(?i)\s*(<!doctype html|<html)": ("a web page", CHOOSE_IMAGE),
}


@dataclass(frozen=True)
class FileFacts:
    """The format of an image file, and facts about the image. A text is "" if the file's header does not state the fact.

    `study_id` and `patient_id` only serve to tell studies and patients apart. They must not be shown.
    """

    kind: str  # "DICOM", "PNG", "JPEG", "GIF" or "JSRT"
    shown: dict[str, str]  # name -> fact to display; nothing about the patient
    modality: str = ""
    body_part: str = ""
    view: str = ""
    study_id: str = ""
    patient_id: str = ""
    coloured: bool = False  # whether the colour channels differ


def recognise_foreign(path: str | Path) -> tuple[str, str] | None:
    """Return None if the file may be an X-ray, otherwise two texts: what the file is, and what the visitor should do.

    Raises OSError if the file cannot be opened.
    """
    if kind_by_signature(path):  # a DICOM file's first 128 bytes may be another format's header
        return None
    with open(path, "rb") as file:
        start = file.read(1024)
    match = next(
        (description for beginning, description in FOREIGN_FORMATS.items() if re.match(beginning, start, re.DOTALL)), None
    )
    return match or (("a text file", CHOOSE_IMAGE) if _is_text(start) else None)


def kind_by_signature(path: str | Path) -> str:
    """Return the format that the first bytes of the file show, such as "DICOM" or "PNG", or "" if it is unknown.

    Raises OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        return image_format(path) or ("DICOM" if file.read(132)[128:] == b"DICM" else "")


def read_facts(path: str | Path) -> FileFacts:
    """Return the format and header facts of an image file.

    Raises UnreadableXray if the file is damaged, and OSError if it cannot be opened.
    """
    kind = image_format(path)
    if kind:
        return FileFacts(kind, {"Format": kind}, coloured=kind != "JSRT" and _picture_is_coloured(path))
    try:
        # This reads the pixels too, because an element with an invalid length can then request no more bytes than exist.
        elements, syntax = read_elements(path)
        header, samples = header_of(elements, syntax), elements.whole("SamplesPerPixel", 1)
    except OSError:
        raise
    except Exception as error:  # pydicom raises many kinds of errors for damaged files
        prefix = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UnreadableXray(path, prefix + " ".join(str(error).split())) from None
    modality, body_part, view, photometric = map(
        _clean_code, (header.modality, header.body_part, header.view, header.photometric)
    )
    facts = {
        "Format": "DICOM",
        "Modality": modality,
        "View": view,
        "Body part": body_part,
        "Photometric interpretation": photometric,
        "Bits": str(header.bits_stored or ""),
        "Transfer syntax": UID(header.transfer_syntax).name,
    }
    return FileFacts(
        "DICOM",
        {name: text for name, value in facts.items() if (text := printable(value, 80))},
        modality=modality.upper(),
        body_part=body_part.upper(),
        view=view.upper(),
        study_id=header.study_id,
        patient_id=header.patient_id,
        coloured=samples == 3 and _dicom_is_coloured(path, header.photometric, header.bits_stored),
    )


def printable(text: str, longest: int) -> str:
    """Return the text as one line of at most `longest` characters.

    Control characters, surrogates and characters that change the writing direction are replaced with `?`.
    """
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _clean_code(text: str) -> str:
    """Return `text` if it has the form of a code in a DICOM header, otherwise ILLEGIBLE.

    If the length of a header element is damaged, its value contains the next elements, possibly the patient's name.
    """
    return text if len(text) <= 32 and re.fullmatch(r"[\w ,./()+-]*", text) else ILLEGIBLE


def _is_text(start: bytes) -> bool:
    if b"\0" in start:
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3  # the last character may be incomplete
    return True


def _picture_is_coloured(path: str | Path) -> bool:
    with open_image(path) as image:
        if image.mode in GREY_MODES:
            return False
        try:
            if image.format == "GIF":
                return _channels_differ(np.array(image.convert("RGB")), 8)
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError) as error:
            raise UnreadableXray(path, f"damaged image: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise UnreadableXray(path, "damaged image: nothing could be decoded")
    return _channels_differ(pixels, 8)


def _dicom_is_coloured(path: str | Path, photometric: str, bits_stored: int) -> bool:
    values = read_stored_values(path)
    all_bits = 8 * values.itemsize
    bits = bits_stored if 1 <= bits_stored <= all_bits else all_bits
    if photometric.upper().startswith("YBR"):  # luma and two colour differences, unless the decoder converted them to RGB
        distance = np.abs(values[..., 1:].astype(np.int32) - 2 ** (bits - 1)).max()
        return bool(distance > COLOURED_SHARE * 2**bits) and _channels_differ(values, bits)
    return _channels_differ(values, bits)


def _channels_differ(channels: np.ndarray, bits: int) -> bool:
    """Return True if the 3 values of any pixel in `channels` (rows, columns, 3) differ by more than compression causes."""
    first, second, third = cv2.split(np.ascontiguousarray(channels))
    pairs = ((first, second), (second, third), (third, first))
    return max(cv2.norm(channel, other, cv2.NORM_INF) for channel, other in pairs) > COLOURED_SHARE * 2**bits
