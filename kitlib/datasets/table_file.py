"""Reads a user's own table: a CSV file as written by Excel and other programs, a TSV file or a Parquet file."""

import csv
import glob
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError, TableError
from kitlib.paths import project_root
from kitlib.tables import parse_text_table, read_text

TABLES = (".csv", ".tsv", ".txt", ".parquet")
WORKBOOKS = (".xlsx", ".xls", ".ods", ".numbers")
SEPARATORS = (",", ";", "\t")


def find_table_file(source: DataFolder, name: str, parameter: str) -> Path:
    """Return the path of the table file that the user calls `name`.

    `name` is a path relative to one of the data set's folders or to the project's root, an absolute path, or the name of a
    file anywhere in the data set's folders. `parameter` is the notebook parameter that `name` comes from, for messages.
    Raises DatasetError, which lists the available tables, if the file does not exist.
    """
    for root in (source.folder, *source.beside, project_root()):  # an absolute path stays unchanged
        if (root / name).is_file():
            return root / name
    if path := source.find_table(glob.escape(Path(name).name)):
        return path
    available = [source.name(path) for path in source.paths if path.suffix.lower() in (*TABLES, *WORKBOOKS)]
    listing = ", ".join(available[:10]) or "no table"
    raise DatasetError(f"{source.folder} has no file {name!r} (parameter `{parameter}`); available tables: {listing}")


def read_table_file(path: Path, wanted: Iterable[str], faults: Faults) -> pd.DataFrame:
    """Return the table in a CSV, TSV or Parquet file; all cells are text without surrounding spaces, "" if missing.

    A CSV file may be UTF-8 (with or without byte order mark) or UTF-16 (with the mark). Windows-1252 and Latin-1, which
    older versions of Excel write, are read too and recorded in `faults`. A first line such as `sep=;` states the separator.
    Without such a line, the comma, semicolon and tab are tried on the first line: the separator with the most `wanted`
    column names is used; among equals, the one with the most columns. Whole numbers in a Parquet file are returned without
    ".0". Raises DatasetError, with the path of the file, if the file cannot be read or has no rows.
    """
    suffix = path.suffix.lower()
    if suffix in WORKBOOKS:
        raise DatasetError(f"{path} is a workbook: in Excel, save its sheet as `CSV UTF-8`, and give that file's name")
    table = _read_parquet(path) if suffix == ".parquet" else _read_csv(path, set(wanted), faults)
    if table.empty:
        raise DatasetError(f"{path} has no row below its first line; its columns are {', '.join(table.columns)}")
    # The composed form, because macOS writes accents in the decomposed form.
    names = [unicodedata.normalize("NFC", name).strip() for name in table.columns]
    return table.apply(lambda column: column.str.strip()).set_axis(names, axis=1)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
        if not isinstance(table.index, pd.RangeIndex):  # such as file names
            table = table.reset_index()
    # pyarrow's errors are subclasses of these; OverflowError is raised for dates that pandas cannot represent.
    except (OSError, ValueError, KeyError, NotImplementedError, OverflowError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}): write it again, or give a CSV file") from error
    return table.astype(object).map(_as_text).rename(columns=str)


def _as_text(cell: object) -> str:
    if pd.api.types.is_scalar(cell) and pd.isna(cell):
        return ""
    # A column of whole numbers in which a value is missing is stored as floats.
    return str(int(cell)) if isinstance(cell, float | np.floating) and cell.is_integer() else str(cell)


def _read_csv(path: Path, wanted: set[str], faults: Faults) -> pd.DataFrame:
    try:
        text = read_text(path)
    except TableError:
        text = _read_single_bytes(path, faults)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    head, _, rest = text.partition("\n")
    if stated := re.fullmatch(r"\"?sep=([,;|\t])\"?", head.strip(" ")):
        separator, text = stated[1], rest
    else:
        columns = {separator: _split_line(head, separator) for separator in SEPARATORS}
        separator = max(SEPARATORS, key=lambda separator: (len(wanted & set(columns[separator])), len(columns[separator])))
    try:
        table = parse_text_table(text, str(path), separator)
    except TableError as error:
        raise DatasetError(f"{error}; the file was read with the separator {separator!r}") from error
    # pandas adds numbers to repeated column names, which would hide the repetition.
    names = _split_line(text.partition("\n")[0], separator)
    return table.set_axis(names, axis=1) if len(names) == len(table.columns) else table


def _read_single_bytes(path: Path, faults: Faults) -> str:
    """Return the text of a file that is not UTF-8, read as Windows-1252 or Latin-1, and record this in `faults`.

    Raises DatasetError if the file is not text.
    """
    content = path.read_bytes()
    if b"\0" in content:
        raise DatasetError(f"{path} is not a text file: save the table as `CSV UTF-8` or Parquet")
    lines = content.splitlines()
    others = [number for number, line in enumerate(lines, start=1) if not _is_utf8(line)]
    problem = f"and {len(others) - 1} other lines are not UTF-8; the file is read as Windows-1252: check names with accents"
    faults.add(path.name, f"line {others[0]}", problem)
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # never fails, because Latin-1 has a character for every byte


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split_line(line: str, separator: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:  # raised for a cell of more than 128 KB
        return [line]
