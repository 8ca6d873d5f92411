"""Reads the rows of a user's own table, matches each row with its image file, and joins repeated rows."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import first_faults
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.table_columns import BOX_KEYS, check_columns
from kitlib.datasets.table_file import read_table_file
from kitlib.datasets.table_images import ImageNames
from kitlib.datasets.table_labels import label_column
from kitlib.errors import DatasetError

TRIED = 50  # number of rows that are searched for a column of file names


def read_rows(path: Path, wanted: Mapping[str, str], source: DataFolder, names: ImageNames, file_key: str) -> pd.DataFrame:
    """Return the rows of the table in the file `path`, with the `wanted` columns as text and a column `path`.

    `wanted` maps fields of Columns to columns of the table; the result uses the names of the fields. `path` is the row's
    image file, which `names` finds. If no file or several files match, `path` is None and a fault is recorded. Messages use
    `file_key`, the field of Columns for the image files. Raises DatasetError if the table cannot be read or lacks a column,
    or if no row matches exactly one image file.
    """
    table = read_table_file(path, wanted.values(), source.faults)
    if "file" not in wanted:
        raise DatasetError(
            f"{path.name}: the parameter `columns` has no key `{file_key}`; {_suggest_file(table, path, names, file_key)}"
        )
    check_columns(table, path, [("labels" if key == label_column(name) else key, name) for key, name in wanted.items()])
    rows = pd.DataFrame({key: table[name] for key, name in wanted.items()})
    found = [names.find(cell, path.parent) for cell in rows.file]
    counts = pd.Series([len(paths) for paths in found], rows.index)
    is_blank = rows.file == ""
    lines = "row " + (rows.index[is_blank] + 1).astype(str)
    source.faults.add_summary(path.name, lines, f"have no file name in {wanted['file']}; left out", "other rows")
    source.faults.add_summary(path.name, rows.file[(counts == 0) & ~is_blank], "have no file; left out", "other rows")
    unclear = {cell: paths for cell, paths in zip(rows.file, found, strict=True) if len(paths) > 1}
    for cell, paths in sorted(unclear.items()):
        several = ", ".join(sorted(map(source.name, paths))[:3])
        problem = f"{len(paths)} files have this name, such as {several}; left out. Write the folder, too"
        source.faults.add(path.name, cell, problem)
    if not (counts == 1).any():
        example = f", such as {source.name(names.paths[0])!r}" if names.paths else ""
        raise DatasetError(
            f"{path.name}: no cell of the column {wanted['file']!r}, such as {rows.file.iloc[0]!r}, names exactly one of "
            f"the {len(names.paths)} image files in {source.folder}{example}; {first_faults(source)}. Set `competition` to "
            f"the folder of the images, or choose another column; {_suggest_file(table, path, names, file_key)}"
        )
    source.mark_read(path for paths in found for path in paths)
    return rows.assign(path=[paths[0] if len(paths) == 1 else None for paths in found])


def join_repeats(rows: pd.DataFrame, source: DataFolder, file: str) -> pd.DataFrame:
    """Return `rows` without repeated rows, and without any row of an image whose rows contradict each other.

    Both are recorded as faults. Rows of the same image may differ in the box columns, because there is one row per box.
    `file` is the table's name, for messages.
    """
    of_boxes = [key for key in (*BOX_KEYS, "finding") if key in rows]
    facts = rows.drop(columns=["file", "path", *of_boxes])
    counts = facts.groupby(rows.path).nunique()
    disagrees = rows.path.isin(counts.index[(counts > 1).any(axis=1)])
    for _, several in rows[disagrees].groupby("path"):
        column = next(name for name in counts if len(set(several[name])) > 1)
        values = ", ".join(map(repr, sorted(set(several[column]))[:5]))
        problem = f"the rows of this image differ in {column}: {values}; the image is left out"
        source.faults.add(file, several.file.iloc[0], problem)
    rows = rows[~disagrees]
    is_repeated = rows.duplicated([column for column in rows if column != "file"])
    source.faults.add_summary(file, rows.file[is_repeated], "repeat an earlier row; left out", "other rows")
    return rows[~is_repeated]


def _suggest_file(table: pd.DataFrame, path: Path, names: ImageNames, file_key: str) -> str:
    """Return a hint for a message: the column that contains most image file names or, if none does, all columns."""
    head = table.head(TRIED)
    hits = [sum(len(names.find(cell, path.parent)) == 1 for cell in head.iloc[:, index]) for index in range(head.shape[1])]
    if best := max(hits):
        column = table.columns[hits.index(best)]
        return f"the column {column!r} names {best} files in the first {len(head)} rows: columns: {{{file_key}: {column!r}}}"
    return f"the table's columns are {', '.join(map(repr, table.columns))}"
