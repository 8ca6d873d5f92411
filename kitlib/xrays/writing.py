"""Writes DICOM X-rays in the transfer syntaxes that hospitals use, for phantoms, benchmarks and tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import DataElement, Dataset, FileMetaDataset
from pydicom import config as pydicom_config
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from kitlib.atomic import replacing
from kitlib.xrays.stored_values import NATIVE

DIGITAL_X_RAY = UID("1.2.840.10008.5.1.4.1.1.1.1")

# Encoders take the samples and the number of bits per sample. For signed images, JPEG Lossless gets the two's complement cut
# to `bits` and JPEG-LS the full two's complement (imagecodecs writes the dtype's precision); JPEG 2000 encodes the sign.
ENCODERS: dict[str, Callable[[np.ndarray, int], bytes | bytearray]] = {
    JPEGBaseline8Bit: lambda samples, bits: imagecodecs.jpeg8_encode(samples, level=95),
    JPEGLossless: lambda samples, bits: imagecodecs.jpeg8_encode(samples, lossless=True, predictor=4, bitspersample=bits),
    JPEGLosslessSV1: lambda samples, bits: imagecodecs.jpeg8_encode(samples, lossless=True, predictor=1, bitspersample=bits),
    JPEGLSLossless: lambda samples, bits: imagecodecs.jpegls_encode(samples),
    JPEG2000Lossless: lambda samples, bits: imagecodecs.jpeg2k_encode(
        samples, codecformat="j2k", reversible=True, bitspersample=bits
    ),
    JPEG2000: lambda samples, bits: imagecodecs.jpeg2k_encode(
        samples, level=50, codecformat="j2k", reversible=False, bitspersample=bits
    ),
}
WRITABLE = (*NATIVE, RLELossless, *ENCODERS)


def write_xray(
    path: str | Path,
    stored: np.ndarray,
    *,
    transfer_syntax: str,
    photometric: str = "MONOCHROME2",
    bits_stored: int | None = None,
    window: tuple[float, float] | None = None,
    voi_function: str | None = None,
    patient_id: str = "",
    study_id: str = "1",
    series_id: str = "1.1",
    image_id: str = "1.1.1",
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a DICOM X-ray file with the pixel values `stored`, atomically.

    `stored` has the shape (rows, columns) and the dtype uint8, int8, uint16 or int16. `transfer_syntax` is one of WRITABLE;
    baseline JPEG supports only uint8 and, like JPEG 2000 (.91), is lossy. `bits_stored` defaults to all bits of the dtype.
    `window` is (centre, width) after the modality LUT; `voi_function` is LINEAR, LINEAR_EXACT or SIGMOID. The ids are
    written unchanged to StudyInstanceUID, SeriesInstanceUID and SOPInstanceUID, because SIIM's ids are short hex strings and
    not UIDs. `extra` maps DICOM keywords to values, which replace those of the other arguments; the value None omits an
    element. Raises ValueError for an unsupported transfer syntax, shape or dtype.
    """
    if transfer_syntax not in WRITABLE:
        raise ValueError(f"cannot write transfer syntax {transfer_syntax!r}; valid: {', '.join(WRITABLE)}")
    if stored.ndim != 2 or stored.dtype.kind not in "ui" or stored.itemsize > 2:
        raise ValueError(f"expected 8- or 16-bit integers (rows, columns), got {stored.dtype} {stored.shape}")
    bits = bits_stored or stored.itemsize * 8
    if transfer_syntax == JPEGBaseline8Bit and stored.dtype != np.uint8:
        raise ValueError(f"{path}: baseline JPEG requires uint8, got {stored.dtype}")

    dataset = Dataset()
    with pydicom_config.disable_value_validation():
        for keyword, value in {
            "SOPClassUID": DIGITAL_X_RAY,
            "SOPInstanceUID": image_id,
            "Modality": "DX",
            "PatientName": "",
            "PatientID": patient_id,
            "BodyPartExamined": "CHEST",
            "ViewPosition": "PA",
            "StudyInstanceUID": study_id,
            "SeriesInstanceUID": series_id,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": photometric,
            "Rows": stored.shape[0],
            "Columns": stored.shape[1],
            "BitsAllocated": stored.itemsize * 8,
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": int(stored.dtype.kind == "i"),
        }.items():
            setattr(dataset, keyword, value)
        if window is not None:
            dataset.WindowCenter, dataset.WindowWidth = map(str, window)
        if voi_function is not None:
            dataset.VOILUTFunction = voi_function
        dataset["PixelData"] = _pixel_data(stored, transfer_syntax, bits)
        for keyword, value in (extra or {}).items():
            if value is None:
                dataset.pop(keyword, None)
            else:
                setattr(dataset, keyword, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(transfer_syntax)
        dataset.file_meta.MediaStorageSOPClassUID = DIGITAL_X_RAY
        dataset.file_meta.MediaStorageSOPInstanceUID = UID(image_id)
        with replacing(path) as temporary_path:
            dataset.save_as(temporary_path, enforce_file_format=True)


def _pixel_data(stored: np.ndarray, transfer_syntax: str, bits: int) -> DataElement:
    if transfer_syntax in NATIVE:
        dtype = stored.dtype.newbyteorder(">" if transfer_syntax == ExplicitVRBigEndian else "<")
        raw = stored.astype(dtype).tobytes()
        return DataElement("PixelData", "OW" if stored.itemsize == 2 else "OB", raw + b"\0" * (len(raw) % 2))
    if transfer_syntax == RLELossless:
        frame = next(_rle_frames(stored))
    else:
        samples = np.ascontiguousarray(stored)
        if transfer_syntax not in (JPEG2000Lossless, JPEG2000):
            samples = samples.view(f"u{stored.itemsize}")
        if transfer_syntax in (JPEGLossless, JPEGLosslessSV1):
            samples = samples & np.array((1 << bits) - 1, dtype=samples.dtype)
        frame = ENCODERS[transfer_syntax](samples, bits)
    element = DataElement("PixelData", "OB", encapsulate([bytes(frame)]))
    element.is_undefined_length = True
    return element


def _rle_frames(stored: np.ndarray) -> Iterator[bytes | bytearray]:
    return get_encoder(RLELossless).iter_encode(
        np.ascontiguousarray(stored),
        rows=stored.shape[0],
        columns=stored.shape[1],
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=stored.itemsize * 8,
        bits_stored=stored.itemsize * 8,
        pixel_representation=int(stored.dtype.kind == "i"),
        photometric_interpretation="MONOCHROME2",
    )
