"""Whether Kaggle would accept a submission.csv, and if not, every reason with its row."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitlib.errors import SubmissionError
from kitlib.scoring.submission_csv import HEADER, LABELS, ONE_PIXEL, parse_prediction, read_cells, read_ids, split_id

# What pandas, and so Kaggle's scorer, reads as "no value" in a cell of text.
READ_AS_NAN = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
        *("NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)


@dataclass(frozen=True)
class Fault:
    row: int | None  # line of the submission, the header being 1; None where there is no line
    id: str | None
    problem: str

    def __str__(self) -> str:
        place = "no row" if self.row is None else f"row {self.row}"
        return f"{place}, {self.id}: {self.problem}" if self.id else f"{place}: {self.problem}"


def validate(sample: str | Path, submission: str | Path) -> list[Fault]:
    """Every fault of `submission` beside the ids of `sample`, by row, absent ids last; empty if Kaggle would accept it.

    The order of rows and groups is free, and a class may be left out. Raises SubmissionError if the *sample* cannot be read.
    """
    wanted = read_ids(sample)
    try:
        cells = read_cells(submission)
    except SubmissionError as error:
        return [Fault(None, None, str(error))]
    if not cells:
        return [Fault(None, None, f"{submission} is empty")]
    first_row: dict[str, int] = {}
    faults, known = [], set(wanted)
    line, header = cells[0]
    if header != HEADER:
        faults.append(Fault(line, None, f"the header is {','.join(header)!r}, must be {','.join(HEADER)!r}"))
    for line, row in cells[1:]:
        name = row[0]
        if len(row) != 2:
            faults.append(Fault(line, name, f"{len(row)} cells, must be 2"))
        if name in first_row:
            faults.append(Fault(line, name, f"duplicate id, first in row {first_row[name]}"))
        first_row.setdefault(name, line)
        if name not in known:
            faults.append(Fault(line, name, "extra id: the sample submission does not ask for it"))
        elif len(row) >= 2:
            faults += [Fault(line, name, problem) for problem in prediction_faults(row[1], split_id(name)[1])]
    absent = (name for name in wanted if name not in first_row)
    return faults + [Fault(None, name, "missing id: the sample submission asks for it") for name in absent]


def prediction_faults(text: str, level: str) -> list[str]:
    """Every fault of one prediction string; `level` is `study` or `image`."""
    if text.strip() in READ_AS_NAN:
        return [f"empty prediction string ({text!r} is read as NaN)"]
    try:
        labels, numbers = parse_prediction(text)
    except ValueError:
        return _faults_by_group(text, level)
    # Almost every row is clean: one check of the whole row, and group by group only where it fails.
    confidence, xmin, ymin, xmax, ymax = numbers.T
    clean = set(labels) <= set(LABELS[level]) and np.isfinite(numbers).all()
    clean = clean and ((confidence >= 0) & (confidence <= 1) & (xmin < xmax) & (ymin < ymax)).all()
    one_pixel = np.array([label != "opacity" for label in labels])
    clean = clean and (numbers[one_pixel, 1:] == ONE_PIXEL).all()
    return [] if clean else _faults_by_group(text, level)


def _faults_by_group(text: str, level: str) -> list[str]:
    tokens = text.split()
    if len(tokens) % 6:
        return [f"{len(tokens)} words are not groups of six (label confidence xmin ymin xmax ymax)"]
    faults = []
    for start in range(0, len(tokens), 6):
        label, *words = tokens[start : start + 6]
        place = f"group {start // 6 + 1}"
        if label not in LABELS[level]:
            faults.append(f"{place}: label {label!r} is none of {', '.join(LABELS[level])}")
        try:
            # float() would read 1_0 as ten.
            confidence, *box = (float(word.replace("_", "?")) for word in words)
        except ValueError:
            faults.append(f"{place}: {' '.join(words)!r} is not five numbers")
            continue
        if not 0 <= confidence <= 1:
            faults.append(f"{place}: confidence {words[0]} is not in 0..1")
        if not all(map(math.isfinite, box)):
            faults.append(f"{place}: box {' '.join(words[1:])} is not finite")
        elif label != "opacity" and label in LABELS[level] and tuple(box) != ONE_PIXEL:
            faults.append(f"{place}: {label} counts only with the box 0 0 1 1, not {' '.join(words[1:])}")
        elif box[0] >= box[2] or box[1] >= box[3]:
            faults.append(f"{place}: box {' '.join(words[1:])} is inverted or has no area (xmin ymin xmax ymax)")
    return faults
