"""Labels of a user's own images, from a column of class names or from one column of 0 and 1 per class."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from kitlib.datasets.base import first_faults, one_hot
from kitlib.datasets.data_folder import DataFolder
from kitlib.errors import DatasetError, SettingsError
from kitlib.tables import OPEN, SCHEMAS

# Names that a class must not have, because it would replace a column of the kit's tables.
RESERVED = {column for name in ("images", *OPEN) for column in SCHEMAS[name]} | {"split", "sex", "age", "diagnosis"}
RESERVED |= {"images", "studies", "patients", "boxes", "faults", "masks"}  # counts in a run's metrics.json
VALUES = {"true": "1", "false": "0"}


def rename_classes(rows: pd.DataFrame, class_names: Mapping[str, str]) -> pd.DataFrame:
    """Return `rows` with the classes in the column `label` renamed; `class_names` maps old to new names.

    Raises SettingsError if an old name does not occur in the column.
    """
    classes = sorted(set(rows.label) - {""})
    if unknown := sorted(set(class_names) - set(classes)):
        raise SettingsError(f"class_names renames {unknown[0]!r}, but the classes are {', '.join(map(repr, classes))}")
    return rows.assign(label=rows.label.replace(dict(class_names)))


def stated_classes(rows: pd.DataFrame, names: Sequence[str], file: str) -> set[str]:
    """Return the classes that occur in `rows`; `file` is the table's file, for messages.

    If `rows` has the column `label`, these are its values. Otherwise these are the classes of `names` whose label column
    (see `label_column`) has a 1. Raises DatasetError if a class has the name of a column in the kit's own tables.
    """
    if "label" in rows:
        classes = set(rows.label) - {""}
    else:
        classes = {name for name in names if (_parse(rows[label_column(name)]) > 0).any()}
    if reserved := sorted((classes | set(names)) & RESERVED):
        raise DatasetError(f"{file}: the class {reserved[0]!r} has the name of a column of the kit: rename the class")
    return classes


def leave_out_blank(rows: pd.DataFrame, source: DataFolder, file: str) -> pd.DataFrame:
    """Return the rows whose column `label` is not blank; one fault counts the other rows. `file` is the table's file."""
    is_blank = rows.label == ""
    source.faults.add_summary(file, rows.file[is_blank], "have no class; left out", "other images")
    return rows[~is_blank]


def parse_label_columns(rows: pd.DataFrame, names: Sequence[str], source: DataFolder, file: str) -> pd.DataFrame:
    """Return `rows` with the text in the label columns of the classes `names` converted to 1.0, 0.0 or NaN (unknown).

    1 and true become 1.0, 0 and false 0.0, blank cells NaN. Any other value becomes NaN too, and a fault counts the cells.
    Raises DatasetError if a column has neither a 0 nor a 1.
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
                f"{file}: the column {name!r} has neither 0 nor 1, but {values or 'only blank cells'}. If it contains class "
                "names, give it as `label` in the parameter `columns`; otherwise remove it from `labels`"
            )
        problem = f"have in {name} another value than 0, 1 and blank ({values}); their label is unknown"
        source.faults.add_summary(file, rows.file[other], problem, "other images")
        columns[label_column(name)] = numbers
    return rows.assign(**columns)


def label_column(name: str) -> str:
    """Return the name of the column for the class `name`, with a prefix that keeps it different from all other columns."""
    return f"label: {name}"


def class_labels(
    images: pd.DataFrame, classes: Collection[str], source: DataFolder, file: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `images` without the studies that have several classes, and the `labels` table of the remaining studies.

    The column `label` of `images` has the class of each image. In the `labels` table, a study has 1.0 for its class and 0.0
    for all other `classes`. Studies with several classes are recorded in the faults of `source`.
    """
    for study_id, several in images.groupby("study_id").label.unique().items():
        if len(several) > 1:
            problem = (
                f"the study's images have the classes {', '.join(sorted(several))}; all are left out. If each image has a "
                "class of its own, leave `study` out of columns"
            )
            source.faults.add(file, str(study_id), problem)
    images = images[images.groupby("study_id").label.transform("nunique") == 1]
    studies = images.drop_duplicates("study_id")
    return images, one_hot(studies.study_id, studies.label, sorted(classes))


def column_labels(images: pd.DataFrame, names: Sequence[str], source: DataFolder, file: str) -> pd.DataFrame:
    """Return a `labels` table with one row for each study of `images` and one column for each class in `names`.

    If the images of a study disagree on a class, the study's label is NaN (unknown), and a fault counts the study. Images
    whose label is unknown do not matter, unless the study has no other images. `names` may be empty.
    """
    by_study = images.groupby("study_id")[[label_column(name) for name in names]]
    least, most = by_study.min(), by_study.max()
    differs = (least != most) & least.notna()
    for name in names:
        problem = f"are studies whose images disagree on {name}; their label is unknown"
        source.faults.add_summary(file, least.index[differs[label_column(name)]], problem, "other rows")
    labels = least.where(~differs).set_axis(list(names), axis=1)
    return labels.assign(id=least.index)


def check_no_class_lost(labels: pd.DataFrame, listed: Collection[str], source: DataFolder) -> None:
    """Raise DatasetError if a class in `listed`, which occurs in the user's data, has no study left in `labels`.

    Adds a fault to `source` if there is only one class.
    """
    for name in sorted(listed):
        if not (labels[name] > 0).any():
            raise DatasetError(
                f"{source.folder}: there is the class {name!r}, but none of its images can be used; {first_faults(source)}"
            )
    classes = labels.columns.drop("id")
    if len(listed) == 1 and len(classes) == 1 and np.all(labels[classes] > 0):
        problem = "is the class of all images; to train a classifier, add images of others, such as with the parameter pool"
        source.faults.add("the folder", next(iter(listed)), problem)


def _parse(cells: pd.Series) -> pd.Series:
    """Return 1.0 for each cell that means true, 0.0 for each that means false, and NaN for any other text."""
    numbers = pd.to_numeric(cells.str.lower().replace(VALUES), errors="coerce").astype(float)
    return numbers.where(numbers.isin([0, 1]))
