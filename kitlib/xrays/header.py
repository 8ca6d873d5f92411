"""Reads those elements of a DICOM file that an X-ray needs, without pydicom's conversions and their warnings."""

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

# PageError before memory is allocated. The largest X-rays, digitised mammograms, are near 40 million pixels and 80 MB.
MAX_FILE_BYTES = 2**29
MAX_SAMPLES = 2**26
DEFER_BYTES = 2**18  # longer than any LUT

IDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID")
TEXTS = ("Modality", "BodyPartExamined", "ViewPosition", "PhotometricInterpretation", "VOILUTFunction")
NUMBERS = (
    *("SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope"),
)
LUTS = ("ModalityLUTSequence", "VOILUTSequence")
KEYWORDS = (*IDS, *TEXTS, *NUMBERS, *LUTS, "PixelData", "FloatPixelData", "DoubleFloatPixelData")

BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8"}


class InvalidElement(ValueError):
    """An element whose value cannot be what it says; the image may still be shown without it."""


@dataclass(frozen=True)
class XrayHeader:
    """What a DICOM file says about its image; text is empty and numbers are 0 where the file says nothing."""

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
    """The elements of one dataset by keyword, converted one at a time."""

    def __init__(self, dataset: Dataset, source: bytes = b""):
        """`source` is the file that the offsets of deferred elements point into."""
        self.dataset, self.source = dataset, memoryview(source)
        self._elements = dict(dataset.items())

    def __contains__(self, keyword: str) -> bool:
        return Tag(keyword) in self._elements

    def raw(self, keyword: str) -> bytes | memoryview:
        """The value's bytes, empty where the element is absent; of a deferred element a view of the file."""
        element = self._elements.get(Tag(keyword))
        if isinstance(element, RawDataElement) and element.value is None and element.length:
            length = len(self.source) if self.is_encapsulated(keyword) else element.length
            return self.source[element.value_tell : element.value_tell + length]
        return element.value if element is not None and isinstance(element.value, bytes) else b""

    def text(self, keyword: str) -> str:
        """The first value, stripped; UTF-8, or Latin-1 where it is not (which keeps different ids different)."""
        value = bytes(self.raw(keyword))
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        return text.split("\\")[0].strip(" \0")

    def numbers(self, keyword: str) -> list[float]:
        """All values; empty where the element is absent or has none. Raises InvalidElement where one is no number."""
        value = bytes(self.raw(keyword))
        if not value:
            return []
        vr = self.vr(keyword)
        # Implicit files do not say the VR, and a damaged one may say nonsense.
        vr = vr if vr in BINARY or vr in ("DS", "IS") else dictionary_VR(keyword)
        if vr in BINARY:
            kind = np.dtype(BINARY[vr]).newbyteorder("<" if self.is_little_endian(keyword) else ">")
            return np.frombuffer(value[: len(value) // kind.itemsize * kind.itemsize], dtype=kind).tolist()
        texts = [text.strip() for text in value.decode("latin-1").strip(" \0").split("\\")]
        try:
            return [float(text) for text in texts] if any(texts) else []
        except ValueError as error:
            raise InvalidElement(f"{keyword} is {value[:40]!r}, no number") from error

    def number(self, keyword: str) -> float | None:
        """The first value, None where there is none."""
        values = self.numbers(keyword)
        return values[0] if values else None

    def whole(self, keyword: str, default: int) -> int:
        """The first value as a whole number. Raises InvalidElement."""
        value = self.number(keyword)
        if value is None:
            return default
        if not np.isfinite(value) or value != int(value):
            raise InvalidElement(f"{keyword} is {value}, no whole number")
        return int(value)

    def items(self, keyword: str) -> list["Elements"]:
        """The items of a sequence, none where it is absent."""
        return [Elements(item) for item in (self.dataset[keyword].value or [])] if keyword in self else []

    def vr(self, keyword: str) -> str:
        return self._elements[Tag(keyword)].VR or ""

    def is_little_endian(self, keyword: str) -> bool:
        return getattr(self._elements[Tag(keyword)], "is_little_endian", True)

    def is_encapsulated(self, keyword: str) -> bool:
        element = self._elements[Tag(keyword)]
        return bool(getattr(element, "is_undefined_length", False)) or getattr(element, "length", 0) == 0xFFFFFFFF


def read_elements(path: str | Path, with_pixels: bool = True) -> tuple[Elements, str]:
    """The elements of `path` and its transfer syntax; a file without one is uncompressed, as its first element shows.

    Raises ValueError, or whatever pydicom makes of a damaged file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size} bytes, more than the {MAX_FILE_BYTES} that an X-ray may have")
    if not with_pixels:
        with open(path, "rb") as file:
            if DeflatedExplicitVRLittleEndian.encode() not in file.read(2048):
                file.seek(0)
                return _parsed(file)
    # From memory, a length that lies reads what is there; from a file, Python first allocates what the length promises.
    return _parsed(BytesIO(source := _inflated(Path(path).read_bytes())), source)


def header_of(elements: Elements, transfer_syntax: str) -> XrayHeader:
    """Raises ValueError where there is none of an X-ray's elements: any bytes pass for an empty dataset."""
    if not any(keyword in elements for keyword in KEYWORDS):
        raise ValueError("none of an X-ray's DICOM elements: empty, cut short or of another kind")
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


def _parsed(file: BinaryIO, source: bytes = b"") -> tuple[Elements, str]:
    """With the `source` that the file holds come the pixels, as a view of it and not a copy."""
    dataset = dcmread(
        file,
        force=True,
        specific_tags=list(KEYWORDS),
        stop_before_pixels=not source,
        defer_size=DEFER_BYTES if source else None,
    )
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return Elements(dataset, source), syntax


def _inflated(raw: bytes) -> bytes:
    """`raw`, or the dataset of a deflated file without its meta group: Explicit VR Little Endian by the standard.

    pydicom would inflate without a bound: a thousandfold of the file's size.
    """
    if DeflatedExplicitVRLittleEndian.encode() not in raw[:2048]:
        return raw
    file = BytesIO(raw)
    read_preamble(file, force=True)
    start = file.tell()
    # (0002,0000) UL: bytes of the meta group after this element, which is 12 bytes long.
    if raw[start : start + 8] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError("deflated, and its meta information does not say its length")
    start += 12 + int.from_bytes(raw[start + 8 : start + 12], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(raw[start:], MAX_FILE_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"inflates to more than the {MAX_FILE_BYTES} bytes that an X-ray may have")
    return plain
