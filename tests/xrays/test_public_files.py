"""The DICOM files that pydicom ships, one row a kind: how many are read, refused for which reason, and warned about."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom.data
import pytest

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import decode_xray

FILES = Path(pydicom.data.__file__).parent / "test_files"
# Outcome -> the files of pydicom 3.0.2 that have it, as one pattern for the path below FILES. Files that match no pattern,
# as another version may ship, are ignored.
KINDS = {
    "read": r"SC_(rgb|ybr|jpeg).*|GDCMJ2K_TextGBR\.dcm|JPEGLSNearLossless_.*|image_dfl\.dcm|dicomdirtests/77654033/CR.*",
    "not a projection X-ray": (
        r"CT_small.*|MR_small.*|693_J2KI\.dcm|J2K_pixelrep.*|JPEG2000\.dcm|JPGExtended\.dcm|ExplVR_BigEnd\.dcm|"
        r"examples_(jpeg2k|overlay|rgb_color|ybr_color)\.dcm|rtdose.*|dicomdirtests/\d+/(CT|MR).*"
    ),
    "a palette of colours": r"examples_palette\.dcm",
    "BitsAllocated is 1": r"liver_.*",
    "no PixelData": (
        r"rt(plan|struct).*|ExplVR_.*NoMeta\.dcm|reportsi.*|test-SR\.dcm|waveform_ecg\.dcm|no_meta.*|priv_SQ\.dcm|"
        r"UN_sequence\.dcm|empty_charset_LEI\.dcm|dicomdirtests/DICOMDIR.*|dicomdirtests/TINY_ALPHA/(DICOMDIR|PT.*)"
    ),
    "invalid size": r"meta_missing_tsyntax\.dcm|nested_priv_SQ\.dcm",
    "pixel data end": r"MR_truncated\.dcm",
    "tiles": r"JPEG2000-embedded-sequence-delimiter\.dcm",
    "not a number": r"badVR\.dcm",
    "scan start must be zero": r"JPEG-lossy\.dcm",
}
# Numbers of files of pydicom 3.0.2.
COUNTS = {
    "read": 34,
    "not a projection X-ray": 52,
    "a palette of colours": 1,
    "BitsAllocated is 1": 2,
    "no PixelData": 74,
    "invalid size": 2,
    "pixel data end": 1,
    "tiles": 1,
    "not a number": 1,
    "scan start must be zero": 1,
}
# The first file is uncompressed or lossless; the others have the same image in other encodings, also lossy ones.
SAME = (
    r"SC_rgb_rle\.dcm|SC_rgb_(dcmtk|gdcm|jls|jpeg_dcmtk|jpeg_gdcm|jpeg_lossy|rle).*|SC_ybr_full_422_uncompressed\.dcm",
    r"SC_rgb_jpeg_dcmd\.dcm|SC_rgb_jpeg\.dcm|SC_jpeg_no_color_transform\.dcm",
    r"SC_rgb_jpeg_app14_dcmd\.dcm|SC_jpeg_no_color_transform_2\.dcm",
    r"SC_rgb_small_odd.*",
    r"MR_small.*",
    r"rtdose.*",
)
NAMES = sorted(path.relative_to(FILES).as_posix() for path in FILES.rglob("*") if path.is_file())


def outcome(name):
    """Return the key of KINDS that says what becomes of a file."""
    try:
        warnings = decode_xray(FILES / name).warnings
    except UnreadableXray as error:
        return next((kind for kind in KINDS if kind in error.reason), error.reason)
    return next((kind for kind in KINDS if any(kind in warning for warning in warnings)), "read")


@pytest.mark.filterwarnings("ignore")
def test_the_outcome_of_every_file_is_known():
    known = {name: kind for name in NAMES for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)}
    outcomes = {name: outcome(name) for name in known}
    assert outcomes == known
    counts = Counter(outcomes.values())
    assert counts == COUNTS if pydicom.__version__ == "3.0.2" else counts.total() > 0


def test_one_image_in_several_encodings_has_the_same_pixels():
    for pattern in SAME:
        names = [name for name in NAMES if re.fullmatch(pattern, name)]
        first = next(name for name in names if re.fullmatch(pattern.split("|")[0], name))
        pixels = decode_xray(FILES / first).pixels.astype(int)
        assert len(names) > 1 and pixels.min() == 0 and pixels.max() == 255
        for name in names:
            assert np.abs(decode_xray(FILES / name).pixels - pixels).max() <= 2, name
