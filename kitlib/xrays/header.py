"""Reads the DICOM elements that an X-ray needs, without pydicom's value conversions and their warnings."""

import os
import stat
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_preamble
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from kitlib.xrays.encapsulation import DELIMITER, is_unterminated

# Larger files and images are refused before memory is allocated. The largest X-rays, digitised mammograms, have about 40
# million pixels and 80 MB.
MAX_FILE_BYTES = 2**29
MAX_SAMPLES = 2**26
DEFER_BYTES = 2**18  # elements that are longer are read as views of the file; no LUT is that long

IDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID")
TEXTS = ("Modality", "SOPClassUID", "BodyPartExamined", "ViewPosition", "PhotometricInterpretation", "VOILUTFunction")
NUMBERS = (
    *("SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *(f"{kind}PixelPadding{name}" for kind in ("Float", "DoubleFloat") for name in ("Value", "RangeLimit")),
    *("WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope"),
)
LUTS = ("ModalityLUTSequence", "VOILUTSequence")
PALETTES = tuple(
    f"{part}PaletteColorLookupTable{name}"
    for part in ("Red", "Green", "Blue", "SegmentedRed", "SegmentedGreen", "SegmentedBlue")
    for name in (("Data",) if part.startswith("Segmented") else ("Descriptor", "Data"))
)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
KEYWORDS = (*IDS, *TEXTS, *NUMBERS, *LUTS, *PALETTES, *PIXELS)
# Overlay Bit Position of the 16 overlay groups: bits of the pixel data that contain drawings.
OVERLAYS = tuple(0x60000102 + (group << 17) for group in range(16))

BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8"}


class InvalidElement(ValueError):
    """Raised when a header element has a value that cannot be right; the image may still be shown without the element."""


@dataclass(frozen=True)
class XrayHeader:
    """Header fields of an X-ray's DICOM file; absent texts are "", absent numbers are 0."""

    image_id: str  # SOPInstanceUID
    study_id: str
    series_id: str
    patient_id: str
    rows: int
    columns: int
    view: str  # ViewPosition: PA, AP, LL, ...
    modality: str
    body_part: str
    photometric: str
    transfer_syntax: str
    bits_stored: int


class Elements:
    """The elements of one pydicom dataset, by keyword; a value is converted only when one of the methods reads it."""

    def __init__(self, dataset: Dataset, source: bytes = b""):
        """Wrap `dataset`; `source` is the content of its file, from which values are read that pydicom has not loaded."""
        self.dataset, self.source = dataset, memoryview(source)
        self.unterminated = False  # whether the pixel data lacked their end
        self._elements = dict(dataset.items())

    def __contains__(self, keyword: str | int) -> bool:
        return Tag(keyword) in self._elements

    def raw(self, keyword: str) -> bytes | memoryview:
        """Return the bytes of an element's value, b"" if the element is absent.

        If pydicom has not loaded the value, the result is a view of the file's content.
        """
        element = self._elements.get(Tag(keyword))
        if isinstance(element, RawDataElement) and element.value is None and element.length:
            length = len(self.source) if self.is_encapsulated(keyword) else element.length
            return self.source[element.value_tell : element.value_tell + length]
        return element.value if element is not None and isinstance(element.value, bytes) else b""

    def text(self, keyword: str) -> str:
        """Return an element's first value as text without surrounding spaces, "" if the element is absent.

        Decodes UTF-8, or Latin-1 if the bytes are not valid UTF-8, so that different ids stay different.
        """
        value = bytes(self.raw(keyword))
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        return text.split("\\")[0].strip(" \0")

    def numbers(self, keyword: str) -> list[float]:
        """Return all values of an element as numbers, [] if it is absent or empty.

        Raises InvalidElement if a value is not a number.
        """
        value = bytes(self.raw(keyword))
        if not value:
            return []
        vr = self.vr(keyword)
        # Files with implicit VR do not contain the VR, and damaged files may contain an invalid VR.
        vr = vr if vr in BINARY or vr in ("DS", "IS") else dictionary_VR(keyword)
        vr = "US" if vr == "US or SS" else vr
        if vr in BINARY:
            kind = np.dtype(BINARY[vr]).newbyteorder("<" if self.is_little_endian(keyword) else ">")
            return np.frombuffer(value[: len(value) // kind.itemsize * kind.itemsize], dtype=kind).tolist()
        texts = [text.strip() for text in value.decode("latin-1").strip(" \0").split("\\")]
        try:
            return [float(text) for text in texts] if any(texts) else []
        except ValueError as error:
            raise InvalidElement(f"{keyword} is {value[:40]!r}, not a number") from error

    def number(self, keyword: str) -> float | None:
        """Return an element's first value as a number, None if the element is absent or empty.

        Raises InvalidElement if a value is not a number.
        """
        values = self.numbers(keyword)
        return values[0] if values else None

    def whole(self, keyword: str, default: int) -> int:
        """Return an element's first value as an integer, `default` if the element is absent or empty.

        Raises InvalidElement if the value is not a whole number.
        """
        value = self.number(keyword)
        if value is None:
            return default
        if not np.isfinite(value) or value != int(value):
            raise InvalidElement(f"{keyword} is {value}, not a whole number")
        return int(value)

    def items(self, keyword: str) -> list["Elements"]:
        """Return the items of a sequence element, each as Elements; [] if the sequence is absent."""
        return [Elements(item) for item in (self.dataset[keyword].value or [])] if keyword in self else []

    def vr(self, keyword: str) -> str:
        """Return the element's value representation, such as "US", or "" if the file does not state it."""
        return self._elements[Tag(keyword)].VR or ""

    def is_little_endian(self, keyword: str) -> bool:
        """Return whether the element's bytes are little-endian."""
        return getattr(self._elements[Tag(keyword)], "is_little_endian", True)

    def is_encapsulated(self, keyword: str) -> bool:
        """Return whether the element has an undefined length, as compressed pixel data do."""
        element = self._elements[Tag(keyword)]
        return bool(getattr(element, "is_undefined_length", False)) or getattr(element, "length", 0) == 0xFFFFFFFF


def read_elements(path: str | Path, with_pixels: bool = True) -> tuple[Elements, str]:
    """Read a DICOM file; return its elements and its transfer syntax.

    A file without a transfer syntax is read as uncompressed, with VR and byte order derived from its first element. Pixel
    data are read only if `with_pixels`. Raises ValueError if the file is not regular or too large, OSError if it cannot be
    opened, or any exception of pydicom if it is damaged.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"the file has {status.st_size} bytes, more than the limit of {MAX_FILE_BYTES} for an X-ray")
    if not with_pixels:
        with open(path, "rb") as file:
            if DeflatedExplicitVRLittleEndian.encode() not in file.read(2048):
                file.seek(0)
                return parse(file)
    # A damaged element may state a huge length. Reading from memory stops at the end of the data, but reading from a file
    # first allocates the stated length.
    source = _inflate(Path(path).read_bytes())
    if unterminated := is_unterminated(source):
        source += DELIMITER  # without it, pydicom reads no pixel data at all
    elements, syntax = parse(BytesIO(source), source)
    elements.unterminated = unterminated
    return elements, syntax


def header_of(elements: Elements, transfer_syntax: str) -> XrayHeader:
    """Return the XrayHeader of a file from its elements. Raises ValueError if the file has no element of an X-ray.

    The check is needed because pydicom reads arbitrary bytes as an empty dataset.
    """
    if not any(keyword in elements for keyword in KEYWORDS):
        raise ValueError("the file has none of an X-ray's DICOM elements; it is empty, truncated or not DICOM")
    image_id, study_id, series_id, patient_id = map(elements.text, IDS)
    return XrayHeader(
        image_id=image_id,
        study_id=study_id,
        series_id=series_id,
        patient_id=patient_id,
        rows=elements.whole("Rows", 0),
        columns=elements.whole("Columns", 0),
        view=elements.text("ViewPosition"),
        modality=elements.text("Modality"),
        body_part=elements.text("BodyPartExamined"),
        photometric=elements.text("PhotometricInterpretation"),
        transfer_syntax=transfer_syntax,
        bits_stored=elements.whole("BitsStored", 0),
    )


def parse(file: BinaryIO, source: bytes = b"") -> tuple[Elements, str]:
    """Parse an open DICOM file; return its elements and its transfer syntax.

    The pixel data are included only if `source`, the file's content, is passed; large elements are then views of `source`.
    """
    dataset = dcmread(
        file,
        force=True,
        specific_tags=[*map(Tag, KEYWORDS), *map(Tag, OVERLAYS)],
        stop_before_pixels=not source,
        defer_size=DEFER_BYTES if source else None,
    )
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return Elements(dataset, source), syntax


def _inflate(raw: bytes) -> bytes:
    """Return `raw`, the content of a DICOM file, inflated if the file is deflated, otherwise unchanged.

    The inflated content is the dataset without the meta group, in Explicit VR Little Endian, as the standard requires.
    pydicom would inflate without a limit, to up to a thousand times the file's size. Raises ValueError if the result exceeds
    MAX_FILE_BYTES or the meta group has no length.
    """
    if DeflatedExplicitVRLittleEndian.encode() not in raw[:2048]:
        return raw
    file = BytesIO(raw)
    read_preamble(file, force=True)
    start = file.tell()
    # (0002,0000) UL: bytes of the meta group after this element, which is 12 bytes long.
    if raw[start : start + 8] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError("the file is deflated, but its meta information has no group length")
    start += 12 + int.from_bytes(raw[start + 8 : start + 12], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(raw[start:], MAX_FILE_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"the file inflates to more than {MAX_FILE_BYTES} bytes, the limit for an X-ray")
    return plain
