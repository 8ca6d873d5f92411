"""Reads a user's own images: a folder of DICOM, PNG or JPEG files, with or without a table that lists them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.classes import DIAGNOSES, MASK_CONVENTIONS
from kitlib.datasets.base import Dataset, add_headers
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.diagnoses import parse_ages, parse_sexes
from kitlib.datasets.table_boxes import add_boxes
from kitlib.datasets.table_columns import BOX_KEYS, Columns
from kitlib.datasets.table_file import TABLES, WORKBOOKS, find_table_file
from kitlib.datasets.table_images import ImageNames, find_class_folders, make_image_ids
from kitlib.datasets.table_labels import (
    check_no_class_lost,
    class_labels,
    column_labels,
    label_column,
    leave_out_blank,
    parse_label_columns,
    rename_classes,
    stated_classes,
)
from kitlib.datasets.table_masks import find_mask_files, match_masks
from kitlib.datasets.table_rows import join_repeats, read_rows
from kitlib.errors import DatasetError, SettingsError
from kitlib.settings import from_dict

# Values that a table's split column may have. Validation images count as "train", because the kit validates on folds.
SPLITS = {
    **dict.fromkeys(("train", "training", "val", "valid", "validation", "dev"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def read_own(
    folder: str | Path | DataFolder,
    progress: bool = True,
    *,
    table: str = "",
    columns: Mapping[str, Any] | None = None,
    boxes_table: str = "",
    class_folders: bool = False,
    class_names: Mapping[str, str] | None = None,
    mask_folder: str = "",
    mask_convention: str = "",
) -> Dataset:
    """Return a Dataset of a user's own images in `folder`; the other arguments are parameters of notebook 10.

    `table` is a CSV, TSV or Parquet file that lists the images (see `read_table_file`), and `columns` gives the names of its
    columns (see Columns); without a table, every image file is read. Boxes are in the table, one row per box, or in the file
    `boxes_table`. If `class_folders`, the class of an image is the name of a folder (see `find_class_folders`).
    `class_names` maps old names of classes to new ones; several classes can get the same new name. `mask_folder` is the
    folder of the lung masks (see `find_mask_files`), and `mask_convention` is one of MASK_CONVENTIONS. If neither the table
    nor the folders state classes, the `labels` table has no class column.

    image_id is the file name without suffix, or the path if file names repeat. The folder's name is the source of images
    whose source is not stated, and the prefix of all patient ids, so that they differ from those of other data sets. If the
    table gives no patient, the patient in the DICOM header is used; if there is none, each study is a patient of its own. If
    the table gives no study, each image is a study of its own. If all classes are in DIAGNOSES, the `images` table has the
    column `diagnosis`, so that the data set can be pooled with others.

    Left out and recorded in `Dataset.faults`: rows without a file or a class, or with an unknown split; images with
    contradicting rows, an unreadable header or an unusable box. Raises SettingsError if the parameters contradict each
    other; DatasetError if a file or column is missing, if no image remains, or if all images of a class are left out.
    """
    source, spec = DataFolder.of(folder), from_dict(Columns, dict(columns or {}))
    _check_parameters(spec, table, boxes_table, class_folders, class_names or {}, mask_folder, mask_convention)
    masks = find_mask_files(source, mask_folder) if mask_folder else {}
    names = ImageNames(source, masks)
    if table:
        rows, file = _read_listed(source, spec, table, names, with_boxes=not boxes_table)
    else:
        rows, file = _read_found(source, names), "the folder"
    if class_folders:
        rows["label"] = find_class_folders(rows, source)
    has_classes = "label" in rows
    rows = rename_classes(rows, class_names or {}) if has_classes else rows
    classes = stated_classes(rows, spec.labels, file)  # includes classes of rows that are left out below
    rows = join_repeats(rows[rows.path.notna()], source, file)
    paths = rows.path.drop_duplicates()
    rows["image_id"] = rows.path.map(dict(zip(paths, make_image_ids(paths.map(source.name)), strict=True)))

    listed = _select_split(rows.drop_duplicates("path"), source, file)
    if has_classes:
        listed = leave_out_blank(listed, source, file)
    listed = parse_label_columns(listed, spec.labels, source, file)
    images = _make_images(listed, source, file, progress)
    boxes = None
    if spec.box:
        box_rows, box_file = _read_boxes(source, spec, boxes_table, names) if boxes_table else (rows, file)
        images, boxes = add_boxes(box_rows, images, source, box_file, is_own_file=bool(boxes_table))
    if has_classes:
        images, labels = class_labels(images, classes, source, file)
        images = (
            images.rename(columns={"label": "diagnosis"}) if classes.issubset(DIAGNOSES) else images.drop(columns="label")
        )
    else:
        labels = column_labels(images, spec.labels, source, file)
        images = images.drop(columns=list(map(label_column, spec.labels)))
    if len(images):  # otherwise from_tables raises an error that says why there is none
        check_no_class_lost(labels, classes, source)
    found_masks = match_masks(source, images, masks) if masks and len(images) else None
    images = images.assign(convention=mask_convention) if masks else images
    return Dataset.from_tables(source, images, labels, boxes=boxes, masks=found_masks)


def _check_parameters(
    spec: Columns,
    table: str,
    boxes_table: str,
    class_folders: bool,
    class_names: Mapping[str, str],
    mask_folder: str,
    mask_convention: str,
) -> None:
    """Raise SettingsError if parameters of `read_own` contradict each other; the message says which one to change."""
    of_boxes = ("file", "finding", *BOX_KEYS) if boxes_table else ()
    if not table and (unused := [key for key in (*spec.single(), *(["labels"] * bool(spec.labels))) if key not in of_boxes]):
        raise SettingsError(
            f"the parameter `columns` has the keys {unused}, but `table` is not set; set it to the file with these columns"
        )
    if boxes_table and not spec.box:
        raise SettingsError(
            "`boxes_table` is set, but `columns` lacks the boxes: add xmin, ymin, xmax, ymax or xmin, ymin, width, height"
        )
    if spec.box_file and not boxes_table:
        raise SettingsError(
            "`columns` has the key `box_file`, but `boxes_table` is not set. Set `boxes_table`; or, if the boxes are in "
            "`table`, remove `box_file`: each box then belongs to the image in its row"
        )
    if class_folders and (spec.label or spec.labels):
        raise SettingsError("class_folders is set, and `columns` has label or labels: use only one of them")
    if class_names and not (class_folders or spec.label):
        raise SettingsError(
            "`class_names` is set, but there are no classes to rename: remove it, set `class_folders`, or add `label` to "
            "`columns`"
        )
    if bad := [name for name in class_names.values() if not (isinstance(name, str) and name.strip())]:
        raise SettingsError(f"`class_names` renames a class to {bad[0]!r}; the new name must be text and not blank")
    if bool(mask_folder) != bool(mask_convention) or (mask_folder and mask_convention not in MASK_CONVENTIONS):
        raise SettingsError(
            f"`mask_folder` is {mask_folder!r}, `mask_convention` is {mask_convention!r}. Set neither, or a folder and "
            f"one of {', '.join(MASK_CONVENTIONS)} (with_heart: the lung masks include the part behind the heart)"
        )


def _read_listed(
    source: DataFolder, spec: Columns, table: str, names: ImageNames, with_boxes: bool
) -> tuple[pd.DataFrame, str]:
    """Return the rows of the user's table, and the table's name.

    The column `path` has the image file of each row, None if the file is missing or several files match.
    """
    path = find_table_file(source, table, "table")
    left_to_boxes = () if with_boxes else (*BOX_KEYS, "finding")
    wanted = {key: name for key, name in spec.single().items() if key not in left_to_boxes}
    wanted |= {label_column(name): name for name in spec.labels}
    return read_rows(path, wanted, source, names, "file"), path.name


def _read_boxes(source: DataFolder, spec: Columns, boxes_table: str, names: ImageNames) -> tuple[pd.DataFrame, str]:
    """Return the rows of the file `boxes_table`, and the file's name.

    The column `path` has the image file of each row.
    """
    path = find_table_file(source, boxes_table, "boxes_table")
    wanted = {key: name for key, name in spec.single().items() if key in (*BOX_KEYS, "finding")}
    file = spec.box_file or spec.file
    rows = read_rows(path, ({"file": file} if file else {}) | wanted, source, names, "box_file")
    return join_repeats(rows[rows.path.notna()], source, path.name), path.name


def _read_found(source: DataFolder, names: ImageNames) -> pd.DataFrame:
    """Return one row per image file, for a data set whose labels are not in a table.

    If the folder has table files, a fault of `source` says that they are not read. Raises DatasetError if there is no image.
    """
    tables = [source.name(path) for path in source.paths if path.suffix.lower() in (*TABLES, *WORKBOOKS)]
    source.faults.add_summary("the folder", tables, "are not read, because the parameter table is empty", "other files")
    paths = names.all_images()
    if not paths:
        raise DatasetError(f"{source.folder} has no PNG, JPEG or DICOM file among its {len(source.paths)} files")
    return pd.DataFrame({"file": [source.name(path) for path in paths], "path": paths})


def _select_split(rows: pd.DataFrame, source: DataFolder, file: str) -> pd.DataFrame:
    """Return `rows` with the values of the column `split`, if there is one, replaced by "train" or "test".

    Rows with an unknown value are left out and recorded in the faults of `source`. Raises DatasetError if no row is "train".
    """
    if "split" not in rows:
        return rows
    cells = rows["split"].str.lower()
    is_blank, is_unknown = cells == "", ~cells.isin(["", *SPLITS])
    source.faults.add_summary(file, rows.file[is_blank], "have no split; used for training", "other images")
    for value, part in rows[is_unknown].groupby("split"):
        problem = f"have the split {value!r}, which is none of {', '.join(SPLITS)}; left out"
        source.faults.add_summary(file, part.file, problem, "other images")
    validation = rows.file[cells.map(SPLITS).eq("train") & ~cells.str.startswith("train")]
    source.faults.add_summary(
        file, validation, "are a validation set; used for training, because folds are used for validation", "other images"
    )
    rows = rows.assign(split=cells.map(SPLITS).fillna("train"))[~is_unknown]
    if (rows["split"] == "test").all():
        raise DatasetError(f"{file}: the split column assigns no image to training; leave `split` out of `columns`")
    return rows


def _make_images(rows: pd.DataFrame, source: DataFolder, file: str, progress: bool) -> pd.DataFrame:
    """Return the `images` table for `rows`, with additional columns for labels; faults count unknown ages and the like."""
    name = source.folder.resolve().name
    text = {key: rows.get(key, pd.Series("", rows.index)) for key in ("patient", "study", "source", "view")}
    images = rows.drop(columns=["patient", "study", "file", *BOX_KEYS, "finding"], errors="ignore").assign(
        path=rows.path.map(str),
        patient_id=text["patient"],
        stated_study=text["study"],
        source=text["source"].mask(text["source"] == "", name),
        view=text["view"],
    )
    if "sex" in rows:
        images["sex"] = parse_sexes(rows.sex)
        unknown = rows.image_id[(images.sex == "") & (rows.sex != "")]
        source.faults.add_summary(file, unknown, "have a sex that begins neither with M nor with F; the sex is unknown")
    if "age" in rows:
        images["age"] = parse_ages(rows.age, rows.image_id, source.faults, file)
    images = add_headers(images, source, progress)
    alone = images.patient_id == ""
    problem = (
        "have no patient, neither in the table's column for patient nor in a DICOM header; each study is a patient of its "
        "own, so folds leak if several studies show one patient"
    )
    source.faults.add_summary(file, images.image_id[alone], problem, "other images")
    source.faults.add_summary(
        file,
        images.image_id[("study" in rows) & (images.stated_study == "")],
        "have no study; each is a study of its own",
        "other images",
    )
    studies = images.stated_study.mask(images.stated_study == "", images.image_id)
    patients = name + "-" + images.patient_id.mask(alone, studies)
    return images.assign(patient_id=patients, study_id=studies).drop(columns="stated_study")
