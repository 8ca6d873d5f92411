"""Lists the image files to be predicted, from files, folders and tables, and groups the files by study."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import read_headers
from kitlib.datasets.data_folder import IMAGES, listed_id
from kitlib.datasets.faults import Faults
from kitlib.datasets.table_file import TABLES, WORKBOOKS, read_table_file
from kitlib.datasets.walk import walk
from kitlib.errors import DatasetError
from kitlib.tables import storable

logger = logging.getLogger(__name__)

DICOM_MARK, MARK_AT = b"DICM", 128  # byte offset
INDEX = "DICOMDIR"  # lists the files of a DICOM medium; it is a DICOM file without an image
MAX_ID = 150  # characters; ids are file names of decoded copies


def list_files(
    names: str | Path | Iterable[str | Path],
    file_column: str = "file",
    study_column: str = "study_id",
    progress: bool = False,
) -> pd.DataFrame:
    """Return a table with one row per image file, and the columns file, path, image_id, study_id and error.

    Each of `names` is an image file, a folder (all images below it are listed), or a table (CSV, TSV or Parquet) with image
    files in the column `file_column`, as paths relative to the table's folder.

    In the result, `file` names the file as the caller did: for an image file, the element of `names`; for a folder, the
    element followed by the path below the folder; for a table, the cell. `path` is the path to read. `image_id` is the file
    name without suffix; if names repeat, -2, -3 and so on are added to make ids unique. `study_id` is the first of these
    that exists: the value in the table's column `study_column`, the StudyInstanceUID in the DICOM header, the image_id. Rows
    of one study are next to each other. `error` says why the file cannot be used, or is "". Raises DatasetError if there is
    no image file, or if a table cannot be read.
    """
    given = [names] if isinstance(names, str | Path) else list(names)
    rows: dict[tuple[str, str], str] = {}  # (file, path) -> study_id from a table, or ""
    for name in given:
        path = Path(name)
        if path.is_dir():
            rows |= dict.fromkeys(((file, file) for file in _find_images(str(name))), "")
        elif path.suffix.lower() in (*TABLES, *WORKBOOKS):
            rows |= _read_files(path, file_column, study_column)
        else:
            rows.setdefault((str(name), str(name)), "")
    if not rows:
        raise DatasetError(
            f"there is no image file in: {', '.join(map(str, given)) or 'an empty list'}; give DICOM, PNG or JPEG files, or "
            "folders or tables of them"
        )
    table = pd.DataFrame(list(rows), columns=["file", "path"]).assign(table_study=list(rows.values()))
    table["error"] = ["" if os.path.isfile(path) else "there is no such file" for path in table["path"]]
    usable = table["error"] == ""
    headers = read_headers(table.loc[usable, "path"].tolist(), progress)
    stated = pd.Series([header.study_id for header in headers], table.index[usable], dtype=object)
    table["image_id"] = _free_ids(table["path"])
    table["study_id"] = [
        of_table or storable(stated.get(index, "")) or image_id
        for index, of_table, image_id in zip(table.index, table["table_study"], table["image_id"], strict=True)
    ]
    table["file"] = table["file"].map(storable)
    # Studies are sorted by the position of their first file.
    order = table["study_id"].map({study: place for place, study in enumerate(table["study_id"].unique())})
    return table.iloc[order.argsort(kind="stable")].reset_index(drop=True)[["file", "path", "image_id", "study_id", "error"]]


def _find_images(folder: str) -> list[str]:
    """Return the paths of the image files in and below a folder: DICOM files of any name, and files such as .png or .jpg."""
    found, others = [], 0
    for parent, names in walk(Path(folder), lambda left_out, reason: logger.warning("%s %s; left out", left_out, reason)):
        for name in names:
            file = os.path.join(folder, os.path.relpath(parent / name, folder))
            is_image = Path(name).suffix.lower() in IMAGES or (name != INDEX and _is_dicom(file))
            found += [file] if is_image else []
            others += not is_image
    if others:
        logger.info("%s: %d files are neither DICOM nor pictures and are left out", folder, others)
    return found


def _is_dicom(file: str) -> bool:
    try:
        if not os.path.isfile(file):  # opening a pipe would wait for ever
            return False
        with open(file, "rb") as opened:
            return opened.read(MARK_AT + len(DICOM_MARK))[MARK_AT:] == DICOM_MARK
    except OSError:
        return False


def _read_files(path: Path, file_column: str, study_column: str) -> dict[tuple[str, str], str]:
    """Read a table of files; return a dict that maps each pair (cell of `file_column`, path to read) to a study id.

    The study id is "" if the table has no column `study_column`. Raises DatasetError if it has no column `file_column`.
    """
    faults = Faults()
    table = read_table_file(path, (file_column, study_column), faults)
    for _, row, problem in faults.rows:
        logger.warning("%s %s: %s", path, row, problem)
    if file_column not in table:
        raise DatasetError(
            f"{path} has no column {file_column!r} of files; it has: {', '.join(table.columns)}. Give the name of the "
            "column of files as `file_column` (--file-column)"
        )
    studies: Sequence[str] = table[study_column].tolist() if study_column in table else [""] * len(table)
    files = table[file_column].tolist()
    if blank := [number for number, file in enumerate(files, start=2) if not file]:
        logger.warning("%s: %d rows without a file are left out, the first in line %d", path, len(blank), blank[0])
    return {(file, str(path.parent / file)): study for file, study in zip(files, studies, strict=True) if file}


def _free_ids(paths: Iterable[str]) -> list[str]:
    ids: dict[str, None] = {}
    numbers: dict[str, int] = {}  # name -> the last number that was tried for it
    for path in paths:
        name = Path(path).name
        # If the part after the last dot is a number, the name is a UID without a suffix.
        plain = storable(name if Path(name).suffix[1:].isdigit() else listed_id(name)).lstrip(".")[:MAX_ID] or "image"
        image_id = plain
        while image_id in ids:
            numbers[plain] = numbers.get(plain, 1) + 1
            image_id = f"{plain}-{numbers[plain]}"
        ids[image_id] = None
    return list(ids)
