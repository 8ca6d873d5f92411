"""Reads the DICOM header of a PNG from the JSON file beside it, as in BIMCV's sets (DICOM JSON model, PS3.18 annex F)."""

import json
from io import BytesIO
from pathlib import Path

from pydicom import Dataset
from pydicom.tag import Tag

from kitlib.xrays.header import KEYWORDS, PIXELS, Elements, parse

MAX_JSON_BYTES = 2**22  # a header with a lookup table of 65,536 entries as numbers has half a million
TAGS = frozenset(f"{Tag(keyword):08X}" for keyword in KEYWORDS if keyword not in PIXELS)


def json_header_path(path: str | Path) -> Path | None:
    """Return `path` with the suffix .json; None if `path` is not a PNG file, or if there is no such JSON file."""
    header = Path(path).with_suffix(".json")
    return header if Path(path).suffix.lower() == ".png" and header.is_file() else None


def read_json_header(path: Path) -> Elements:
    """Return the DICOM elements that displaying an X-ray requires, from a JSON file that contains a DICOM header.

    Raises ValueError if the file cannot be read, is too large, is not in the DICOM JSON model or has none of these elements.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"the file has more than {MAX_JSON_BYTES} bytes")
        wanted = {tag: element for tag, element in json.loads(path.read_bytes()).items() if tag.upper() in TAGS}
        if not wanted:
            raise ValueError("the file has none of an X-ray's DICOM elements")
        # Written and read again, because Elements has an element's value as bytes.
        file = BytesIO()
        Dataset.from_json(wanted).save_as(file, implicit_vr=False, little_endian=True)
        return parse(BytesIO(file.getvalue()), file.getvalue())[0]
    except Exception as error:  # of any class, from pydicom's conversions of values
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(" ".join(reason.split())[:200]) from None
