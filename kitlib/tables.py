"""The tables that every stage reads and writes: their columns, the check at the door, Parquet in and out.

Identifiers are bare (`5776db0cec75`, not `5776db0cec75_study`): the suffixes belong to the submission file alone. Boxes are
`xmin, ymin, xmax, ymax` in pixels of the original DICOM image, x along columns. Columns beyond a table's own are allowed
and kept.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.atomic import replacing
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import TableError

BOX = ("xmin", "ymin", "xmax", "ymax")

# Column -> kind. "probability" is a float in 0..1, NaN where unknown; "pixel" a finite float.
SCHEMAS: dict[str, dict[str, str]] = {
    # One row an image. `path` points to the DICOM file; rows and columns are the original size, 0 where it is not known yet.
    "images": {
        "image_id": "id",
        "study_id": "id",
        "patient_id": "id",
        "path": "text",
        "rows": "count",
        "columns": "count",
        "source": "text",
        "view": "text",
    },
    # One row a study; every further column is a class of the data set, NaN where unknown.
    "labels": {"id": "id"},
    "boxes": {"image_id": "id", **dict.fromkeys(BOX, "pixel")},
    # One row an image (id is an image_id).
    "folds": {"id": "id", "fold": "count"},
    "study_scores": {"study_id": "id", "model": "text", "fold": "integer", **dict.fromkeys(STUDY_CLASSES, "probability")},
    # Of a classifier of images; every further column is one of its classes.
    "class_scores": {"image_id": "id", "model": "text", "fold": "integer"},
    # Of a classifier that saw neither the fold `outer` (-1: there is none) nor `fold`, on which its epoch was chosen. With f
    # the image's own fold: a test prediction where outer == f, out of fold where fold == f, of a training image elsewhere.
    "nested_scores": {"image_id": "id", "model": "text", "outer": "integer", "fold": "integer"},
    "image_scores": {"image_id": "id", "model": "text", "fold": "integer", "none": "probability"},
    "detections": {
        "image_id": "id",
        "model": "text",
        "fold": "integer",
        "score": "probability",
        **dict.fromkeys(BOX, "pixel"),
    },
    # One row an image whose lungs were looked for: "found" or why not, their share of the canvas, and their frame, which is
    # the whole image where they were not found.
    "lungs": {"image_id": "id", "verdict": "text", "area": "probability", **dict.fromkeys(BOX, "pixel")},
    # How well a found structure (of MASK_CODES) agrees with the drawn one, on the decoded copy's pixels.
    "mask_scores": {
        **{"image_id": "id", "model": "text", "fold": "integer", "structure": "text"},
        **{"dice": "probability", "jaccard": "probability"},
    },
    # One row an image that a detector looked at, also where it found no box.
    "coverage": {"image_id": "id", "model": "text", "fold": "integer"},
}

# Tables whose further columns are all classes: probabilities, at least one.
OPEN = ("labels", "class_scores", "nested_scores")

# Tables in which these columns name a row.
KEYS: dict[str, tuple[str, ...]] = {
    "images": ("image_id",),
    "labels": ("id",),
    "folds": ("id",),
    "study_scores": ("study_id", "model", "fold"),
    "image_scores": ("image_id", "model", "fold"),
    "class_scores": ("image_id", "model", "fold"),
    "nested_scores": ("image_id", "model", "outer", "fold"),
    "coverage": ("image_id", "model", "fold"),
    "mask_scores": ("image_id", "model", "fold", "structure"),
    "lungs": ("image_id",),
}


def check_table(table: pd.DataFrame, name: str, where: str = "") -> pd.DataFrame:
    """Return `table` with the contract's columns first and its dtypes; raise TableError where it breaks the contract.

    `where` (a file, a stage) is put into the message.
    """
    if name not in SCHEMAS:
        raise TableError(f"no table is called {name!r}; there are: {', '.join(SCHEMAS)}")
    schema = SCHEMAS[name]
    place = f"table {name}" + (f" from {where}" if where else "")
    missing = [column for column in schema if column not in table.columns]
    if missing:
        raise TableError(f"{place}: missing column(s) {', '.join(missing)}; has: {', '.join(map(str, table.columns))}")
    table = table[[*schema, *(column for column in table.columns if column not in schema)]].copy()
    for column, kind in schema.items():
        table[column] = _typed(table[column], kind, f"{place}, column {column}")
    if name in OPEN:
        classes = class_columns(table, name)
        if len(table) and not classes:
            raise TableError(f"{place}: no class, only {', '.join(schema)}")
        for column in classes:
            table[column] = _typed(table[column], "probability", f"{place}, column {column}")
    if name in KEYS:
        key = list(KEYS[name])
        twice = table.duplicated(key, keep=False)
        if twice.any():
            first = _first(table, twice, key)
            raise TableError(f"{place}: {int(twice.sum())} rows share their {', '.join(key)}, first {first}")
    if "xmin" in schema:
        bad = ~((table.xmin < table.xmax) & (table.ymin < table.ymax))
        if bad.any():
            first = _first(table, bad, ["image_id", *BOX])
            raise TableError(f"{place}: {int(bad.sum())} boxes without area, first {first}")
    return table.reset_index(drop=True)


def class_columns(table: pd.DataFrame, name: str) -> list[str]:
    """The classes of a table of OPEN, in its order."""
    return [column for column in table.columns if column not in SCHEMAS[name]]


def study_labels(labels: pd.DataFrame, where: str = "") -> pd.DataFrame:
    """The table labels of a data set with SIIM's study classes, these first; TableError for another data set's."""
    labels = check_table(labels, "labels", where)
    missing = [name for name in STUDY_CLASSES if name not in labels.columns]
    if missing:
        raise TableError(
            f"labels{' from ' + where if where else ''} lack the study class(es) {', '.join(missing)}; they have: "
            f"{', '.join(class_columns(labels, 'labels')) or 'no class'}. Is it another data set's run?"
        )
    return labels[["id", *STUDY_CLASSES]]


def empty_table(name: str) -> pd.DataFrame:
    """The table `name` without rows, in its own dtypes."""
    return check_table(pd.DataFrame({column: [] for column in SCHEMAS[name]}), name)


def write_table(table: pd.DataFrame, name: str, path: str | Path) -> None:
    """Check, then write as Parquet beside and rename."""
    checked = check_table(table, name, str(path))
    with replacing(path) as beside:
        checked.to_parquet(beside, index=False)


def read_table(name: str, path: str | Path) -> pd.DataFrame:
    """Read one Parquet table and check it; a missing or damaged file is a TableError that names it."""
    path = Path(path)
    if not path.is_file():
        there = sorted(entry.name for entry in path.parent.glob("*")) if path.parent.is_dir() else "no such folder"
        raise TableError(f"{path} is missing (table {name}); in {path.parent}: {there}")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise TableError(f"{path} cannot be read as Parquet: {error}") from error
    return check_table(table, name, str(path))


def concatenate(tables: Iterable[pd.DataFrame], name: str) -> pd.DataFrame:
    """All rows under one index, checked; without rows, the empty table."""
    filled = [table for table in tables if len(table)]
    return check_table(pd.concat(filled, ignore_index=True), name) if filled else empty_table(name)


def _typed(column: pd.Series, kind: str, place: str) -> pd.Series:
    if kind in ("id", "text"):
        text = column.astype(object).where(column.notna(), "").astype(str)
        if kind == "id" and (text == "").any():
            raise TableError(f"{place}: empty in row {int(np.flatnonzero(text == '')[0])}")
        return text.astype(object)
    try:
        number = pd.to_numeric(column).astype("float64")
    except (TypeError, ValueError) as error:
        raise TableError(f"{place}: not numeric: {error}") from error
    if kind in ("count", "integer"):
        bad = ~np.isfinite(number) | (number != number.round()) | ((number < 0) if kind == "count" else False)
        wanted = "whole numbers" + (" from 0" if kind == "count" else "")
    elif kind == "probability":
        bad = (number < 0) | (number > 1)
        wanted = "0..1 or NaN"
    else:
        bad = ~np.isfinite(number)
        wanted = "finite pixels"
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TableError(f"{place}: {int(bad.sum())} value(s) are not {wanted}, first {number.iloc[row]} in row {row}")
    return number.astype("int64") if kind in ("count", "integer") else number


def _first(table: pd.DataFrame, rows: pd.Series, columns: list[str]) -> dict[str, object]:
    return table.loc[rows, columns].iloc[0].to_dict()
