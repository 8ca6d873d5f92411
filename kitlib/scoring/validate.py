"""Checks whether Kaggle would accept a submission.csv and lists every fault with its row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Fault:
    """A reason why Kaggle would reject a submission."""

    row: int | None  # line number in the submission, 1 for the header; None if no line is concerned
    id: str | None
    problem: str

    def __str__(self) -> str:
        location = "no row" if self.row is None else f"row {self.row}"
        return f"{location}, {self.id}: {self.problem}" if self.id else f"{location}: {self.problem}"


def validate(sample: str | Path, submission: str | Path) -> list[Fault]:
    """Return all faults of a submission file, see `validate_rows`; `sample` is the path of sample_submission.csv.

    Raises SubmissionError if the sample cannot be read.
    """
    return validate_rows(read_sample(sample).ids, submission)


def validate_rows(ids: Sequence[str], submission: str | Path) -> list[Fault]:
    """Return all faults of a submission file, ordered by row, missing ids last; [] if Kaggle would accept the file.

    `ids` are the ids that the file must have, those of the sample submission. Rows, and the groups in a prediction string,
    may have any order, and classes may be missing. A submission that cannot be read is a fault.
    """
    try:
        cells = read_cells(submission)
    except SubmissionError as error:
        return [Fault(None, None, str(error))]
    if not cells:
        return [Fault(None, None, f"{submission} is empty")]
    first_row: dict[str, int] = {}
    faults, valid_ids = [], set(ids)
    line, header = cells[0]
    if header != HEADER:
        faults.append(Fault(line, None, f"the header is {','.join(header)!r}, but must be {','.join(HEADER)!r}"))
    for line, row in cells[1:]:
        name = row[0]
        if len(row) != 2:
            faults.append(Fault(line, name, f"the row has {len(row)} cells, but must have 2"))
        if name in first_row:
            faults.append(Fault(line, name, f"duplicate id: row {first_row[name]} has the same id"))
        first_row.setdefault(name, line)
        if name not in valid_ids:
            faults.append(Fault(line, name, "extra id: it is not in the sample submission"))
        elif len(row) >= 2:
            faults += [Fault(line, name, problem) for problem in prediction_faults(row[1], split_id(name)[1])]
    missing = (name for name in ids if name not in first_row)
    return faults + [Fault(None, name, "missing id: it is in the sample submission") for name in missing]


def prediction_faults(text: str, level: str) -> list[str]:
    """Return a description of each fault of a prediction string; `level`, "study" or "image", is the kind of its row."""
    if text.strip() in READ_AS_NAN:
        return [f"empty prediction string ({text!r} is read as NaN)"]
    try:
        labels, numbers = parse_prediction(text)
    except ValueError:
        return _faults_by_group(text, level)
    # Almost all rows are valid, so the whole row is checked at once; its groups are checked only if that fails.
    confidence, xmin, ymin, xmax, ymax = numbers.T
    is_valid = set(labels) <= set(LABELS[level]) and np.isfinite(numbers).all()
    is_valid = is_valid and ((confidence >= 0) & (confidence <= 1) & (xmin < xmax) & (ymin < ymax)).all()
    has_one_pixel_box = np.array([label != "opacity" for label in labels])
    is_valid = is_valid and (numbers[has_one_pixel_box, 1:] == ONE_PIXEL).all()
    return [] if is_valid else _faults_by_group(text, level)


def _faults_by_group(text: str, level: str) -> list[str]:
    tokens = text.split()
    if len(tokens) % 6:
        return [f"{len(tokens)} words are not groups of six (label confidence xmin ymin xmax ymax)"]
    faults = []
    for start in range(0, len(tokens), 6):
        label, *words = tokens[start : start + 6]
        group = f"group {start // 6 + 1}"
        if label not in LABELS[level]:
            faults.append(f"{group}: label {label!r} is not one of {', '.join(LABELS[level])}")
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
        elif label != "opacity" and label in LABELS[level] and tuple(box) != ONE_PIXEL:
            faults.append(f"{group}: {label} must have the box 0 0 1 1, not {' '.join(words[1:])}")
        elif box[0] >= box[2] or box[1] >= box[3]:
            faults.append(f"{group}: box {' '.join(words[1:])} is inverted or has no area (xmin ymin xmax ymax)")
    return faults
