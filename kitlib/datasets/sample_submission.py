"""Reads sample_submission.csv, which has the ids of a submission's rows, and tells what was repaired in the file."""

import codecs
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kitlib.errors import SubmissionError

logger = logging.getLogger(__name__)

HEADER = ["id", "PredictionString"]
SUBMISSION_ID = re.compile(r".+_(?:study|image)")


@dataclass(frozen=True)
class Sample:
    """The ids in a sample submission, each once, in the file's order, and how the file differs from the usual format.

    Each of `repairs` is a pair of texts: the id that has a problem ("" for the whole file), and the problem, which also says
    how it was handled.
    """

    ids: tuple[str, ...]
    repairs: tuple[tuple[str, str], ...]


def read_sample(path: str | Path) -> Sample:
    """Return the ids in a sample submission and the repairs that were needed; log a warning for each repair.

    The ids are read from the column with the largest number of cells ending in _study or _image. Columns may have any names
    and any order, and the header may be missing. Blanks around ids are removed. Cells may be separated by commas, semicolons
    or tabs. The file may be UTF-8, Latin-1, or UTF-16 with a byte order mark. Raises SubmissionError if the file cannot be
    opened or has no id.
    """
    try:
        text, encoding = _decode(Path(path).read_bytes())
    except OSError as error:
        raise SubmissionError(f"{path} cannot be read: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    separator = max(",;\t", key=lines[0].count) if lines else ","
    # Not read by the csv module, which takes everything after a stray quote for one cell and so would lose ids. No id and no
    # prediction contains a separator or a quote.
    rows = [[cell.strip('"') for cell in line.split(separator)] for line in lines]
    columns = [[row[index] if index < len(row) else "" for row in rows] for index in range(max(map(len, rows), default=0))]
    cells = max(columns, key=lambda column: sum(map(_is_id, column)), default=[])
    ids = Counter(cell.strip() for cell in cells if _is_id(cell))
    if not ids:
        raise SubmissionError(
            f"{path} has no id that ends in _study or _image; it must have the header {','.join(HEADER)} and one row per "
            "study and image. Copy the competition's file again"
        )
    repairs = []
    if encoding != "UTF-8":
        repairs.append(("", f"the file is not in UTF-8; read as {encoding}"))
    if separator != ",":
        repairs.append(("", f"cells are separated by {separator!r} instead of ','"))
    if _is_id(cells[0]):
        repairs.append(("", "the header is missing; the first line is read as a row"))
    else:
        if rows[0] != HEADER:
            repairs.append(("", f"the header is {','.join(rows[0])!r} instead of {','.join(HEADER)!r}"))
        cells = cells[1:]
    for names, problem in (
        ([cell for cell in cells if cell != cell.strip()], "the id has blanks around it; they are removed"),
        ([name for name, count in ids.items() if count > 1], "the id occurs again; it gets one row"),
        ([cell for cell in cells if not _is_id(cell)], "the id ends neither in _study nor in _image; left out"),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            repairs.append((names[0], problem + others))
    for name, problem in repairs:
        logger.warning("%s: %s%s", path, f"{name!r}: " if name else "", problem)
    return Sample(tuple(ids), tuple(repairs))


def _decode(content: bytes) -> tuple[str, str]:
    """Return the text in a file's content, and the name of its encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace"), "UTF-16"
    try:
        return content.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "Latin-1"


def _is_id(cell: str) -> bool:
    return SUBMISSION_ID.fullmatch(cell.strip()) is not None
