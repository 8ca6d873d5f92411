"""Checks whether Kaggle would accept a submission file, and lists every fault with its row."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kitlib.datasets.sample_submission import HEADER, read_sample
from kitlib.errors import SubmissionError
from kitlib.scoring.submission_csv import LABELS, ONE_PIXEL, parse_prediction, read_cells, split_id

# Texts that pandas, and so Kaggle's scorer, reads as NaN.
READ_AS_NAN = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
        *("NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)


V = TypeVar("V")


@dataclass(frozen=True)
class Fault:
    """A reason why Kaggle would reject a submission."""

    row: int | None  # line number in the submission, 1 for the header; None if the fault is not in a line
    id: str | None
    problem: str

    def __str__(self) -> str:
        location = "no row" if self.row is None else f"row {self.row}"
        return f"{location}, {self.id}: {self.problem}" if self.id else f"{location}: {self.problem}"


def validate(sample: str | Path, submission: str | Path) -> list[Fault]:
    """Return all faults of SIIM-COVID's submission file `submission`, which must have the ids in the file `sample`.

    Raises SubmissionError if the sample cannot be read.
    """
    return validate_rows(read_sample(sample).ids, submission)


def validate_rows(ids: Sequence[str], submission: str | Path, source: str = "the sample submission") -> list[Fault]:
    """Return all faults of SIIM-COVID's submission file, ordered by row, then missing ids; [] if Kaggle accepts the file.

    `ids` are the ids that the file must have. `source` is a text for messages that says where these ids are from. Rows, and
    the groups in a prediction string, may have any order, and classes may be missing. An unreadable file has a single fault.
    """
    return check_rows(submission, HEADER, ids, _parse_siim_row, source)[1]


def check_rows(
    path: str | Path,
    header: Sequence[str],
    ids: Collection[str],
    parse: Callable[[str, list[str]], tuple[V, list[str]]],
    source: str = "the sample submission",
) -> tuple[dict[str, V], list[Fault]]:
    """Read a submission file of any competition; return a dict from id to the parsed row, and all faults.

    The file's header must be `header`, with the id first; the file's ids must be `ids`. `source` is a text for messages that
    says where these ids are from. `parse` gets a row's id and its other cells, and returns the parsed row and a description
    of each fault. Faults are ordered by row, then missing ids. Use the dict only if there are no faults; otherwise parsed
    rows may be missing or wrong.
    """
    try:
        cells = read_cells(path)
    except SubmissionError as error:
        return {}, [Fault(None, None, str(error))]
    if not cells:
        return {}, [Fault(None, None, f"{path} is empty")]
    values: dict[str, V] = {}
    first_row: dict[str, int] = {}
    faults, valid_ids = [], set(ids)
    line, names = cells[0]
    if names != list(header):
        faults.append(Fault(line, None, f"the header is {','.join(names)!r}, but must be {','.join(header)!r}"))
    for line, row in cells[1:]:
        name = row[0]
        problems = []
        if len(row) != len(header):
            problems.append(f"the row has {len(row)} cells, but must have {len(header)}")
        if name in first_row:
            problems.append(f"duplicate id: row {first_row[name]} has the same id")
        first_row.setdefault(name, line)
        if name not in valid_ids:
            problems.append(f"extra id: it is not in {source}")
        elif len(row) >= len(header):
            value, wrong = parse(name, row[1 : len(header)])
            problems += wrong
            values[name] = value
        faults += [Fault(line, name, problem) for problem in problems]
    missing = (name for name in ids if name not in first_row)
    return values, faults + [Fault(None, name, f"missing id: it is in {source}") for name in missing]


def _parse_siim_row(submission_id: str, cells: list[str]) -> tuple[None, list[str]]:
    return None, prediction_faults(cells[0], split_id(submission_id)[1])


def prediction_faults(text: str, level: str) -> list[str]:
    """Return descriptions of all faults in a prediction string for a study or an image (`level` "study" or "image")."""
    return check_groups(text, LABELS[level], [label for label in LABELS[level] if label != "opacity"])[2]


def check_groups(text: str, labels: Collection[str], boxless: Collection[str]) -> tuple[list[str], np.ndarray, list[str]]:
    """Parse and check a prediction string; return its labels, its numbers (n, 5), and all faults (see `parse_prediction`).

    A label must be one of `labels`, a confidence must be in 0..1, and a box must be finite and have an area. Labels in
    `boxless` must have the box 0 0 1 1. If there is a fault, no labels and no numbers are returned.
    """
    nothing: tuple[list[str], np.ndarray] = ([], np.empty((0, 5)))
    if text.strip() in READ_AS_NAN:
        return *nothing, [f"empty prediction string ({text!r} is read as NaN)"]
    try:
        found, numbers = parse_prediction(text)
    except ValueError:
        return *nothing, _faults_by_group(text, labels, boxless)
    # Almost all rows are valid, so the whole row is checked at once; its groups are checked only if that fails.
    confidence, xmin, ymin, xmax, ymax = numbers.T
    is_valid = set(found) <= set(labels) and np.isfinite(numbers).all()
    is_valid = is_valid and ((confidence >= 0) & (confidence <= 1) & (xmin < xmax) & (ymin < ymax)).all()
    has_one_pixel_box = np.array([label in boxless for label in found])
    is_valid = is_valid and (numbers[has_one_pixel_box, 1:] == ONE_PIXEL).all()
    return (found, numbers, []) if is_valid else (*nothing, _faults_by_group(text, labels, boxless))


def _faults_by_group(text: str, labels: Collection[str], boxless: Collection[str]) -> list[str]:
    tokens = text.split()
    if len(tokens) % 6:
        return [f"{len(tokens)} words are not groups of six (label confidence xmin ymin xmax ymax)"]
    faults = []
    for start in range(0, len(tokens), 6):
        label, *words = tokens[start : start + 6]
        group = f"group {start // 6 + 1}"
        if label not in labels:
            faults.append(f"{group}: label {label!r} is not one of {', '.join(labels)}")
        try:
            # float() would accept 1_0 as ten.
            confidence, *box = (float(word.replace("_", "?")) for word in words)
        except ValueError:
            faults.append(f"{group}: {' '.join(words)!r} is not five numbers")
            continue
        if not 0 <= confidence <= 1:
            faults.append(f"{group}: confidence {words[0]} is not in 0..1")
        if not all(map(math.isfinite, box)):
            faults.append(f"{group}: box {' '.join(words[1:])} is not finite")
        elif label in boxless and tuple(box) != ONE_PIXEL:
            faults.append(f"{group}: {label} must have the box 0 0 1 1, not {' '.join(words[1:])}")
        elif box[0] >= box[2] or box[1] >= box[3]:
            faults.append(f"{group}: box {' '.join(words[1:])} is inverted or has no area (xmin ymin xmax ymax)")
    return faults
