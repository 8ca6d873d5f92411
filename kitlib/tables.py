"""The tables that notebooks exchange: columns, types, validation, reading and writing; also reads other programs' CSV files.

Identifiers are bare (`5776db0cec75`, not `5776db0cec75_study`); only the submission file adds suffixes. Boxes are `xmin,
ymin, xmax, ymax` in pixels of the original DICOM image, x along columns. Additional columns are allowed and kept.
"""

import codecs
import io
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.atomic import replacing
from kitlib.classes import ONE_FINDING, STUDY_CLASSES
from kitlib.errors import TableError

BOX = ("xmin", "ymin", "xmax", "ymax")
# As a share of the image's side; a box that reaches further beyond its image must belong to an image of another size. In
# the tables of SIIM, RSNA and NIH only one of 18,392 boxes reaches beyond its image, by 0.0008.
MOST_OVERHANG = 0.1
LEAST_SIDE = 1.0  # pixels of a box after the cut; a thinner one shows nothing

# Column -> kind. "probability" is a float in 0..1, NaN if unknown; "pixel" is a finite float; "finding" is the class of a
# box, which is ONE_FINDING in tables without this column; "bytes" are the bytes of a file.
SCHEMAS: dict[str, dict[str, str]] = {
    # One row per image. `path` is the image file; rows and columns are its original size, 0 if not known yet.
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
    # One row per study; every further column is a class of the data set: 0, 1, or NaN if unknown. Unlabelled images have
    # no class.
    "labels": {"id": "id"},
    "boxes": {"image_id": "id", "finding": "finding", **dict.fromkeys(BOX, "pixel")},
    # One row per image (id is an image_id).
    "folds": {"id": "id", "fold": "count"},
    "study_scores": {"study_id": "id", "model": "text", "fold": "integer", **dict.fromkeys(STUDY_CLASSES, "probability")},
    # Predictions of an image classifier; every further column is one of its classes.
    "class_scores": {"image_id": "id", "model": "text", "fold": "integer"},
    # Predictions of a classifier trained without the folds `outer` (-1: no outer fold) and `fold`, on which its epoch was
    # chosen. For images of fold `outer` these are test predictions, for images of `fold` out-of-fold predictions.
    "nested_scores": {"image_id": "id", "model": "text", "outer": "integer", "fold": "integer"},
    "image_scores": {"image_id": "id", "model": "text", "fold": "integer", "none": "probability"},
    "detections": {
        "image_id": "id",
        "model": "text",
        "fold": "integer",
        "finding": "finding",
        "score": "probability",
        **dict.fromkeys(BOX, "pixel"),
    },
    # One row per image that was searched for lungs: "found" or the reason why not, the lungs' share of the canvas, and their
    # bounding box, which is the whole image if they were not found.
    "lungs": {"image_id": "id", "verdict": "text", "area": "probability", **dict.fromkeys(BOX, "pixel")},
    # Agreement of a predicted structure (a key of MASK_CODES) with the ground truth, in pixels of the decoded copy.
    "mask_scores": {
        **{"image_id": "id", "model": "text", "fold": "integer", "structure": "text"},
        **{"dice": "probability", "jaccard": "probability"},
    },
    # A segmenter's probabilities of a structure that most images do not have, for one image: an 8-bit grey PNG, in which 255
    # is a probability of 1, of any size; it shows the whole image and nothing else.
    "mask_maps": {"image_id": "id", "model": "text", "fold": "integer", "finding": "id", "map": "bytes"},
    # One row per image that a detector has predicted, even if it predicted no box. A column `findings` may have the classes
    # of the detector, joined by FINDINGS_SEPARATOR.
    "coverage": {"image_id": "id", "model": "text", "fold": "integer"},
}

FINDINGS_SEPARATOR = "; "

# Tables whose further columns are all classes (probabilities); at least one is required, except in `labels`.
OPEN = ("labels", "class_scores", "nested_scores")

# Columns that identify a row of a table.
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
    "mask_maps": ("image_id", "model", "fold", "finding"),
    "lungs": ("image_id",),
}


def check_table(table: pd.DataFrame, name: str, where: str = "") -> pd.DataFrame:
    """Check `table` against the schema `name`; return it with the schema's columns first, converted to their dtypes.

    Raises TableError for missing columns, wrong types, values out of range, repeated keys, and boxes without area. `where`
    says where the table is from, such as a file, and is added to the message.
    """
    if name not in SCHEMAS:
        raise TableError(f"unknown table {name!r}; available: {', '.join(SCHEMAS)}")
    schema = SCHEMAS[name]
    place = f"table {name}" + (f" from {where}" if where else "")
    if schema.get("finding") == "finding" and "finding" not in table.columns:
        table = table.assign(finding=ONE_FINDING)
    missing = [column for column in schema if column not in table.columns]
    if missing:
        raise TableError(f"{place}: missing column(s) {', '.join(missing)}; has: {', '.join(map(str, table.columns))}")
    table = table[[*schema, *(column for column in table.columns if column not in schema)]].copy()
    for column, kind in schema.items():
        table[column] = _typed(table[column], kind, f"{place}, column {column}")
    if name in OPEN:
        classes = class_columns(table, name)
        if len(table) and not classes and name != "labels":
            raise TableError(f"{place}: no class column, only {', '.join(schema)}")
        for column in classes:
            table[column] = _typed(table[column], "probability", f"{place}, column {column}")
    if name in KEYS:
        key = list(KEYS[name])
        repeated = table.duplicated(key, keep=False)
        if repeated.any():
            first = _first(table, repeated, key)
            columns = ", ".join(f"`{column}`" for column in key)
            raise TableError(f"{place}: {int(repeated.sum())} rows are duplicates in {columns}; the first is {first}")
    if "xmin" in schema:
        empty = ~((table.xmin < table.xmax) & (table.ymin < table.ymax))
        if empty.any():
            first = _first(table, empty, ["image_id", *BOX])
            raise TableError(f"{place}: {int(empty.sum())} boxes have no area; the first is {first}")
    return table.reset_index(drop=True)


def class_columns(table: pd.DataFrame, name: str) -> list[str]:
    """Return a table's class columns, in order: the names that are not in the schema `name`, for example "labels"."""
    return [column for column in table.columns if column not in SCHEMAS[name]]


def cut_boxes(boxes: pd.DataFrame, images: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Cut boxes at the edges of their images; return the cut boxes and, for each box, its overhang and why it is unusable.

    All three results have the index of `boxes`. The overhang is the number of pixels by which a box reached beyond its
    image, 0 for boxes inside. The reason why a box is unusable is a text, "" for usable boxes. A box is unusable if it lies
    outside the image, reaches beyond it by more than 0.1 of the image's width or height (MOST_OVERHANG), or is thinner than
    1 pixel after the cut (LEAST_SIDE). `images` has the images' sizes; raises TableError if it lacks the size of an image
    with a box. All boxes from annotation files, whatever their source, are cut by this function.
    """
    sizes = images.set_index("image_id")[["columns", "rows"]].reindex(boxes["image_id"]).to_numpy(float)
    if np.isnan(sizes).any():
        unknown = boxes["image_id"].to_numpy()[np.isnan(sizes).any(axis=1)][0]
        raise TableError(f"the image {unknown!r} has a box, but no size in the `images` table")
    low, high = boxes[["xmin", "ymin"]].to_numpy(float), boxes[["xmax", "ymax"]].to_numpy(float)
    cut = boxes.copy()
    cut[list(BOX)] = np.hstack([low.clip(min=0), np.minimum(high, sizes)])
    beyond = np.maximum(-low, high - sizes).clip(min=0)
    problems = pd.Series("", index=boxes.index, dtype=object)
    thickness = np.minimum(high, sizes) - low.clip(min=0)
    for is_wrong, problem in (
        (thickness < LEAST_SIDE, f"a box is thinner than {LEAST_SIDE:g} pixel within the image"),
        (beyond > MOST_OVERHANG * sizes, f"a box reaches beyond the image by more than {MOST_OVERHANG:g} of its side"),
        ((high <= 0) | (low >= sizes), "a box lies outside the image"),
    ):
        problems[is_wrong.any(axis=1)] = problem
    return cut, pd.Series(beyond.max(axis=1, initial=0), index=boxes.index), problems


def read_text(path: str | Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark; a byte order mark is removed.

    Raises TableError, with file and line, if the file has another encoding; OSError if the file cannot be read.
    """
    content = Path(path).read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TableError(
            f"{path}, line {line}: the byte {content[error.start : error.start + 1]!r} is not UTF-8; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise TableError(f"{path}: the text has a NUL character; save the file as UTF-8")
    return text


def read_text_table(path: str | Path, columns: Sequence[str] = (), separator: str = ",") -> pd.DataFrame:
    """Return the table in a CSV file that another program wrote; all cells are text, and empty cells are "".

    For a TSV file, pass a tab as `separator`. Raises TableError, with the path of the file, if the file cannot be read, if a
    line has more cells than the first line, or if one of `columns` is missing.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    table = parse_text_table(text, str(path), separator)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise TableError(f"{path} lacks the columns {missing}; it has {list(table.columns)}")
    return table


def parse_text_table(text: str, where: str, separator: str = ",") -> pd.DataFrame:
    """Return the table in the CSV text `text`; all cells are text, and empty cells are "".

    Raises TableError if the text is not CSV, or if a line has more cells than the first line; the message begins with
    `where`.
    """
    try:
        with warnings.catch_warnings():
            # pandas drops additional cells with a warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise TableError(f"{where} is not a CSV file ({error})") from error
    except pd.errors.ParserWarning as error:
        raise TableError(f"{where}: a line has more cells than the first line; correct or replace the file") from error


def storable(text: str) -> str:
    """Return `text` as valid Unicode: bytes that are not UTF-8, as in some file names, become text such as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed_name(cell: str) -> str:
    """Return the file name at the end of `cell`, which is a table's cell with a file name or a path.

    Folders may be written as on Windows (`C:\\xrays\\a.png`). The result is in Unicode's composed form, because macOS writes
    file names in the decomposed form, in which the same letters are other characters.
    """
    return unicodedata.normalize("NFC", cell.strip().replace("\\", "/").rpartition("/")[2])


def findings_of(*tables: pd.DataFrame | None) -> tuple[str, ...]:
    """Return the different findings (classes of boxes) in `boxes` and `detections` tables, in alphabetical order.

    If a table lacks the column `finding`, all its boxes have ONE_FINDING, "opacity". A table that is None has no boxes.
    """
    named = [table["finding"] if "finding" in table else [ONE_FINDING] * len(table) for table in tables if table is not None]
    return tuple(sorted({str(name) for names in named for name in pd.unique(pd.Series(names, dtype=object))}))


def study_labels(labels: pd.DataFrame, where: str = "") -> pd.DataFrame:
    """Return a `labels` table with only the id and SIIM's four study classes. Raises TableError if a class is missing."""
    labels = check_table(labels, "labels", where)
    missing = [name for name in STUDY_CLASSES if name not in labels.columns]
    if missing:
        raise TableError(
            f"the table of labels{' from ' + where if where else ''} lacks the study class(es) {', '.join(missing)}; it has "
            f"{', '.join(class_columns(labels, 'labels')) or 'no class'}. If the labels belong to another data set, train a "
            "classifier with notebook 25, which allows any classes"
        )
    return labels[["id", *STUDY_CLASSES]]


def empty_table(name: str) -> pd.DataFrame:
    """Return the table `name` without rows, with the right columns and dtypes."""
    return check_table(pd.DataFrame({column: [] for column in SCHEMAS[name]}), name)


def write_table(table: pd.DataFrame, name: str, path: str | Path) -> None:
    """Check a table against the schema `name`, then write it as Parquet, atomically."""
    checked = check_table(table, name, str(path))
    with replacing(path) as temporary_path:
        checked.to_parquet(temporary_path, index=False)


def read_table(name: str, path: str | Path) -> pd.DataFrame:
    """Return the table in a Parquet file, checked against the schema `name`.

    Raises TableError, with the path of the file, if the file is missing, damaged or invalid.
    """
    path = Path(path)
    if not path.is_file():
        available = (
            sorted(file.name for file in path.parent.glob("*")) if path.parent.is_dir() else "nothing (no such folder)"
        )
        raise TableError(f"{path} is missing (table {name}); {path.parent} contains: {available}")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise TableError(f"{path} cannot be read as Parquet: {error}") from error
    return check_table(table, name, str(path))


def concatenate(tables: Iterable[pd.DataFrame], name: str) -> pd.DataFrame:
    """Return the rows of all `tables`, which have the schema `name`, as one checked table with a new index."""
    nonempty = [table for table in tables if len(table)]
    return check_table(pd.concat(nonempty, ignore_index=True), name) if nonempty else empty_table(name)


def _typed(column: pd.Series, kind: str, place: str) -> pd.Series:
    if kind in ("id", "text", "finding"):
        text = column.astype(object).where(column.notna(), "").astype(str)
        if kind != "text" and (text == "").any():
            raise TableError(f"{place}: the cell in row {int(np.flatnonzero(text == '')[0])} is empty")
        return text.astype(object)
    if kind == "bytes":
        if wrong := [row for row, value in enumerate(column) if not isinstance(value, bytes) or not value]:
            raise TableError(f"{place}: {len(wrong)} cell(s) are empty or not of type bytes; the first is in row {wrong[0]}")
        return column.astype(object)
    try:
        number = pd.to_numeric(column).astype("float64")
    except (TypeError, ValueError) as error:
        raise TableError(f"{place} is not numeric ({error})") from error
    if kind in ("count", "integer"):
        bad = ~np.isfinite(number) | (number != number.round()) | ((number < 0) if kind == "count" else False)
        expected = "whole numbers" + (" of at least 0" if kind == "count" else "")
    elif kind == "probability":
        bad = (number < 0) | (number > 1)
        expected = "in 0..1 or NaN"
    else:
        bad = ~np.isfinite(number)
        expected = "finite pixels"
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TableError(
            f"{place}: {int(bad.sum())} value(s) are not {expected}; the first is {number.iloc[row]} in row {row}"
        )
    return number.astype("int64") if kind in ("count", "integer") else number


def _first(table: pd.DataFrame, rows: pd.Series, columns: list[str]) -> dict[str, object]:
    return table.loc[rows, columns].iloc[0].to_dict()
