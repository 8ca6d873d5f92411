"""Puts compressed frames of any kind into DICOM files, also frames that kitlib.xrays.writing does not write."""

from pathlib import Path

from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import UID


def replace_pixels(path: Path, frame: bytes, syntax: str) -> Path:
    """Replace the pixel data of the DICOM file `path` by one compressed frame in the transfer syntax; return `path`."""
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    return path
