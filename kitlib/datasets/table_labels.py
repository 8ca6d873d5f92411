"""Labels of own images: one class name per image, or a column of 0 and 1 per class; what a study's images agree on."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from kitlib.datasets.base import first_faults, one_hot
from kitlib.datasets.data_folder import DataFolder
from kitlib.errors import DatasetError, SettingsError
from kitlib.tables import OPEN, SCHEMAS

# A class of this name would replace a column of the kit's tables.
RESERVED = {column for name in ("images", *OPEN) for column in SCHEMAS[name]} | {"split", "sex", "age", "diagnosis"}
RESERVED |= {"images", "studies", "patients", "boxes", "faults", "masks"}  # counts in a run's metrics.json
VALUES = {"true": "1", "false": "0"}


def rename_classes(rows: pd.DataFrame, class_names: Mapping[str, str]) -> pd.DataFrame:
    """Return `rows` with the classes in `label` renamed. Raises SettingsError if `class_names` names no class."""
    there = sorted(set(rows.label) - {""})
    if unknown := sorted(set(class_names) - set(there)):
        raise SettingsError(f"class_names renames {unknown[0]!r}, but the classes are {', '.join(map(repr, there))}")
    return rows.assign(label=rows.label.replace(dict(class_names)))


def stated_classes(rows: pd.DataFrame, names: Sequence[str], file: str) -> set[str]:
    """Return the classes that rows have: those in `label`, or those of the columns `names` with a 1.

    Raises DatasetError if a class has the name of a column of the kit.
    """
    if "label" in rows:
        classes = set(rows.label) - {""}
    else:
        classes = {name for name in names if (_parse(rows[label_column(name)]) > 0).any()}
    if reserved := sorted((classes | set(names)) & RESERVED):
        raise DatasetError(f"{file}: the class {reserved[0]!r} has the name of a column of the kit: rename it")
    return classes


def leave_out_blank(rows: pd.DataFrame, source: DataFolder, file: str) -> pd.DataFrame:
    """Return the `rows` that have a class in `label`; the others are counted in a fault."""
    is_blank = rows.label == ""
    source.faults.add_summary(file, rows.file[is_blank], "have no class; left out", "other images")
    return rows[~is_blank].reset_index(drop=True)


def parse_label_columns(rows: pd.DataFrame, names: Sequence[str], source: DataFolder, file: str) -> pd.DataFrame:
    """Return `rows` with a column of 1.0, 0.0 and NaN (unknown) for each of `names`, in place of text.

    Other values than 0, 1, true, false and blank are unknown, with a fault that counts them. Raises DatasetError if a column
    has no 0 and no 1.
    """
    columns = {}
    for name in names:
        cells = rows[label_column(name)]
        numbers = _parse(cells)
        is_known = numbers.notna()
        other = ~is_known & (cells != "")
        values = ", ".join(map(repr, sorted(set(cells[other]))[:5]))
        if not is_known.any():
            raise DatasetError(
                f"{file}: the column {name!r} has neither 0 nor 1, but {values or 'blank cells alone'}: take it out of the "
                "list labels in columns, or if it holds names of classes, give it as `label`"
            )
        problem = f"have in {name} another value than 0, 1 and blank ({values}); their label is unknown"
        source.faults.add_summary(file, rows.file[other], problem, "other images")
        columns[label_column(name)] = numbers
    return rows.assign(**columns)


def label_column(name: str) -> str:
    """Return what the column of the class `name` is called beside other columns, which may have the same name."""
    return f"label: {name}"


def class_labels(
    images: pd.DataFrame, classes: Collection[str], source: DataFolder, file: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `images` and their table of labels: 1.0 for the class in `label`, 0.0 for the others of `classes`.

    The images of a study that have several classes are left out, with a fault.
    """
    for study_id, several in images.groupby("study_id").label.unique().items():
        if len(several) > 1:
            problem = (
                f"the study's images have the classes {', '.join(sorted(several))}; all are left out. If each image has a "
                "class of its own, leave `study` out of columns"
            )
            source.faults.add(file, str(study_id), problem)
    images = images[images.groupby("study_id").label.transform("nunique") == 1].reset_index(drop=True)
    studies = images.drop_duplicates("study_id", ignore_index=True)
    return images, one_hot(studies.study_id, studies.label, sorted(classes))


def column_labels(images: pd.DataFrame, names: Sequence[str], source: DataFolder, file: str) -> pd.DataFrame:
    """Return the table of labels of `images`, one column for each of `names`; without names, it has no class.

    A label that images of a study state differently is unknown, with a fault; one that only some state is the study's.
    """
    by_study = images.groupby("study_id", sort=False)[[label_column(name) for name in names]]
    least, most = by_study.min(), by_study.max()
    differs = (least != most) & least.notna()
    for name in names:
        problem = f"are studies whose images disagree on {name}; their label is unknown"
        source.faults.add_summary(file, least.index[differs[label_column(name)]], problem, "other rows")
    labels = least.where(~differs).set_axis(list(names), axis=1)
    labels.insert(0, "id", least.index)
    return labels.reset_index(drop=True)


def check_no_class_lost(labels: pd.DataFrame, listed: Collection[str], source: DataFolder) -> None:
    """Raise DatasetError if one of the classes `listed` in the table has no image left; a single class is a fault."""
    for name in sorted(listed):
        if not (labels[name] > 0).any():
            raise DatasetError(
                f"{source.folder}: no image of the class {name!r} can be used, although some are listed; "
                f"{first_faults(source)}"
            )
    classes = labels.columns.drop("id")
    if len(listed) == 1 and len(classes) == 1 and np.all(labels[classes] > 0):
        problem = "is the class of all images; to train a classifier, add images of others, such as by the parameter pool"
        source.faults.add("the folder", next(iter(listed)), problem)


def _parse(cells: pd.Series) -> pd.Series:
    """Return 1.0 or 0.0 for each cell, and NaN for other values."""
    numbers = pd.to_numeric(cells.str.lower().replace(VALUES), errors="coerce").astype(float)
    return numbers.where(numbers.isin([0, 1]))
