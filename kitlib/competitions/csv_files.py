"""Reads the CSV files of a competition: the ground truth, the sample submission, and a submission row by row."""

import filecmp
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import pandas as pd

from kitlib.datasets.test_images import read_test_images
from kitlib.errors import ScoringError, SubmissionError, TableError
from kitlib.scoring.validate import Fault, check_rows
from kitlib.tables import read_text_table

V = TypeVar("V")

SAMPLE = "sample_submission.csv"  # name of the sample submission in most competitions
MANY_FOLDERS = 100  # a folder with more subfolders holds studies or images, so its subfolders are not searched for a sample


@dataclass(frozen=True)
class Rows(Generic[V]):
    """Format of a submission's rows: the header, whose first column is the id, and a function that parses one row.

    `parse` gets the id and the other cells of a row; it returns the row's value and a list of faults, as texts. `sample` is
    the file name of the sample submission on Kaggle.
    """

    header: tuple[str, ...]
    parse: Callable[[str, list[str]], tuple[V, list[str]]]
    sample: str = SAMPLE

    def read_sample(self, path: Path) -> list[str]:
        """Return the ids in a sample submission, each once. Raises SubmissionError if it cannot be read or has no ids."""
        try:
            ids = read_text_table(path, self.header[:1])[self.header[0]]
        except TableError as error:
            raise SubmissionError(str(error)) from error
        if not len(ids) or (ids == "").any():
            raise SubmissionError(f"{path} needs at least one row, and an id in each row; copy the competition's file again")
        return list(dict.fromkeys(ids))

    def find_faults(self, ids: Sequence[str], path: Path, source: str) -> list[Fault]:
        """Return every fault of the submission file `path`, which must have exactly the ids `ids`.

        `source` is a text for messages that says where the ids are from.
        """
        return check_rows(path, self.header, ids, self.parse, source)[1]

    def read(self, path: Path, ids: Sequence[str]) -> dict[str, V]:
        """Read a submission file; return a dict that maps each id to the value that `parse` returns for the row.

        `ids` are the ground truth's ids. Raises SubmissionError if the file has a fault, such as a missing or unknown id.
        """
        values, faults = check_rows(path, self.header, ids, self.parse, "the ground truth")
        if faults:
            raise SubmissionError(
                f"{path} has {'1 fault' if len(faults) == 1 else f'{len(faults)} faults'}; the first: {faults[0]}. "
                "`python -m kitlib validate` lists every fault"
            )
        return values


@dataclass(frozen=True)
class TestSet:
    """Test images: an `images` table, a table of the faults found (see Dataset.faults), and the ids of a submission."""

    __test__ = False  # pytest would collect the class

    images: pd.DataFrame
    faults: pd.DataFrame
    submission_ids: tuple[str, ...]


def find_sample(folder: str | Path, name: str = SAMPLE) -> Path:
    """Return the path of the sample submission in a folder or its subfolders.

    This is the file called `name`; without one, a CSV file with `sample_submission` in its name, preferably one that also
    has `stage_2` in its name. Of several such files, the one nearest to `folder` is returned. Raises SubmissionError if
    there is no such file, or if several equally near files differ.
    """
    candidates: list[Path] = []
    for files in _levels(folder):
        if found := [path for path in files if path.name == name]:
            return _only(found)
        candidates += (path for path in files if "sample_submission" in path.name)
    if not candidates:
        raise SubmissionError(f"found no sample submission (the list of ids to predict) in {folder}; add the file {name}")
    candidates = [path for path in candidates if "stage_2" in path.name] or candidates
    highest = min(len(path.parts) for path in candidates)
    return _only([path for path in candidates if len(path.parts) == highest])


def _levels(folder: str | Path) -> Iterator[list[Path]]:
    """Yield one list of CSV files per level: the files in a folder, then the files in its subfolders, and so on.

    Links to folders are not followed. If a folder has more than MANY_FOLDERS subfolders, all of them are skipped.
    """
    folders = [str(folder)]
    while folders:
        files, below = [], []
        for place in folders:
            try:
                entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            except OSError:  # the reader of the images reports such a folder
                continue
            inside = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            below += inside if len(inside) <= MANY_FOLDERS else []
            files += [Path(entry.path) for entry in entries if entry.name.endswith(".csv") and entry.is_file()]
        yield files
        folders = below


def _only(samples: list[Path]) -> Path:
    """Return the first of several equal files. Raises SubmissionError, which lists the files, if they differ."""
    if not all(filecmp.cmp(samples[0], path, shallow=False) for path in samples[1:]):
        listing = "".join(f"\n  {path}" for path in samples)
        raise SubmissionError(f"{len(samples)} sample submissions differ; give the folder of one of them:{listing}")
    return samples[0]


def read_listed(rows: Rows[Any]) -> Callable[[Path], TestSet]:
    """Return a function that gets a folder and returns a TestSet: the images whose ids are in its sample submission.

    The returned function raises SubmissionError if the folder has no sample submission, several different ones, or no ids.
    """

    def read_test(folder: Path) -> TestSet:
        ids = rows.read_sample(find_sample(folder, rows.sample))
        images, faults = read_test_images(folder, ids)
        return TestSet(images, faults, tuple(ids))

    return read_test


def read_truth_table(path: Path, file_names: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Read a ground-truth CSV file as a table of strings; `attrs["path"]` of the table is the file's path.

    `path` is the file, or a folder with a file of one of `file_names` (if there are several, the first is read). Blanks
    around column names are removed. Raises ScoringError if the file is missing, cannot be read, has no rows, lacks one of
    `columns`, or has an empty cell in the first of `columns`.
    """
    if path.is_dir():
        available = [path / name for name in file_names if (path / name).is_file()]
        if not available:
            raise ScoringError(
                f"{path} has no {' or '.join(file_names)}; it has {sorted(file.name for file in path.iterdir())[:9]}"
            )
        path = available[0]
    try:
        table = read_text_table(path).rename(columns=str.strip)
    except TableError as error:
        raise ScoringError(str(error)) from error
    missing = [name for name in columns if name not in table.columns]
    if missing or table.empty:
        problem = f"lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}" if missing else "has no rows"
        raise ScoringError(f"{path} {problem}. Expected the competition's {' or '.join(file_names)}")
    table.attrs["path"] = str(path)
    empty = np.flatnonzero(table[columns[0]].str.strip() == "")
    if len(empty):
        refuse(table, int(empty[0]), f"{columns[0]} is empty")
    return table


def read_numbers(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Convert columns of a ground-truth table to numbers, float (n, columns); an empty cell becomes NaN.

    Raises ScoringError, with the number of the row, if another cell is not a finite number.
    """
    cells = table[list(columns)]
    numbers = cells.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    wrong = np.argwhere(~np.isfinite(numbers) & (cells.to_numpy() != ""))
    if len(wrong):
        row, column = map(int, wrong[0])
        refuse(table, row, f"{columns[column]} is {cells.iloc[row, column]!r}, but must be a number or empty")
    return numbers


def refuse(table: pd.DataFrame, row: int, problem: str) -> NoReturn:
    """Raise ScoringError about the row `row` (from 0) of a table that `read_truth_table` has returned."""
    raise ScoringError(f"{table.attrs['path']}, row {row + 2} ({table.iloc[row, 0]}): {problem}")


def refuse_rows(table: pd.DataFrame, is_wrong: np.ndarray, problem: str) -> None:
    """Raise ScoringError about the first row for which the bool array `is_wrong` (n,) is True, if there is one."""
    if is_wrong.any():
        refuse(table, int(np.flatnonzero(is_wrong)[0]), problem)


def join_rows(rows: dict[str, np.ndarray], columns: Sequence[str]) -> pd.DataFrame:
    """Return a table with image_id and `columns`. `rows` maps each image_id to its k rows, an array (k, len(columns))."""
    numbers = np.concatenate([np.empty((0, len(columns))), *rows.values()])
    table = pd.DataFrame(numbers, columns=list(columns))
    table.insert(0, "image_id", np.repeat(list(rows), [len(array) for array in rows.values()]))
    return table
