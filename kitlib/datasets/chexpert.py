"""Reads CheXpert (Irvin et al. 2019): frontal X-rays with 14 observations, each positive, negative, uncertain or blank."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import CHEXPERT_OBSERVATIONS
from kitlib.datasets.base import Dataset, add_headers
from kitlib.datasets.data_folder import DataFolder, read_csv
from kitlib.datasets.diagnoses import parse_ages, parse_sexes
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError

TABLES = ("train.csv", "valid.csv")
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_OBSERVATIONS)
PLACE = re.compile(r"(patient\d+)/(study\d+)/([^/]+)\.\w+$")
# A blank cell is an observation that the report does not mention. It counts as negative, as in most work on CheXpert;
# an uncertain one (-1) is unknown, which is the paper's policy U-Ignore.
VALUES = {"1": 1.0, "0": 0.0, "": 0.0, "-1": np.nan}
HOW_TO_GET = "CheXpert-v1.0-small or CheXpert-v1.0, see inputs/README.md"
# The abstract of Irvin et al. 2019; its other counts include lateral images.
PUBLISHED = {"patients": 65240}


def read_chexpert(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the frontal X-rays listed in `train.csv` and `valid.csv`. The tables may be in subfolders; one may be missing.

    The column Path (`CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg`) gives patient, study and image:
    `patient00001-study1-view1_frontal` is both image_id and study_id. The labels are CHEXPERT_OBSERVATIONS: 1 positive; 0
    negative or not mentioned; NaN uncertain. `diagnosis` is "normal" if No Finding is 1 and Support Devices is 0 (the UNet +
    HRNet paper, too, excludes support devices); else "pneumonia" if Pneumonia is 1; else "other". An age of 0 means unknown.
    Left out and recorded in `Dataset.faults`: lateral images; rows with an invalid path, projection or observation; repeated
    rows; rows without a file; images with an unreadable header. Raises DatasetError if both tables are missing, a table
    lacks a column, or no image remains.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    tables = [path for path in map(source.find_table, TABLES) if path]
    if not tables:
        raise DatasetError(f"{folder} contains neither {' nor '.join(TABLES)}: {HOW_TO_GET}")
    names = ", ".join(map(source.name, tables))
    table = pd.concat(
        [read_csv(path, COLUMNS)[list(COLUMNS)].assign(table=source.name(path), base=path.parent) for path in tables],
        ignore_index=True,
    )
    table = table.assign(**{name: table[name].str.strip() for name in COLUMNS})
    table["Path"] = table["Path"].str.replace("\\", "/")  # as saved on Windows
    table["path"] = [str(path or "") for path in source.find_all_listed(table["Path"].tolist(), table["base"].tolist())]
    for name, rows in table.groupby("table"):
        table = table.drop(index=_unusable(rows, str(name), faults))
    if table.empty:
        raise DatasetError(f"{folder}: no row of {names} is a valid frontal X-ray with a file: {HOW_TO_GET}")
    image_ids = table["Path"].map(_image_id)
    observations = table[list(CHEXPERT_OBSERVATIONS)].apply(lambda column: column.map(_value).map(VALUES).astype(float))
    ages = parse_ages(table["Age"], image_ids, faults, names)
    rows = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": "chexpert-" + table["Path"].str.extract(PLACE)[0],
            "path": table["path"],
            "source": "chexpert",
            "view": table["AP/PA"],
            "diagnosis": _diagnoses(observations),
            "sex": parse_sexes(table["Sex"]),
            "age": ages.where(ages > 0),
        }
    )
    labels = observations.assign(id=image_ids)[["id", *CHEXPERT_OBSERVATIONS]]
    images = add_headers(rows, source, progress).sort_values("image_id")
    labels = labels.set_index("id").reindex(images.image_id).rename_axis("id").reset_index()
    return Dataset.from_tables(source, images, labels, PUBLISHED)


def _unusable(rows: pd.DataFrame, name: str, faults: Faults) -> pd.Index:
    """Return the index of the rows that cannot be used; `name` is the file name of the rows' table.

    For each kind of problem, the number of rows is added to `faults`. A row is counted only for its first problem.
    """
    cells, is_left = rows["Path"], pd.Series(True, index=rows.index)
    values = rows[list(CHEXPERT_OBSERVATIONS)].apply(lambda column: column.map(_value).isin(list(VALUES)))
    for is_faulty, problem in (
        (cells.map(PLACE.search).isna(), "do not have a path with patient, study and file; left out"),
        (rows["Frontal/Lateral"] == "Lateral", "are lateral; left out"),
        (rows["Frontal/Lateral"] != "Frontal", "are neither Frontal nor Lateral; left out"),
        (~values.all(axis=1), "have an observation that is not 1, 0, -1 or blank; left out"),
        (cells.map(_image_id).duplicated(), "repeat an earlier row; the first row is used"),
        (rows["path"] == "", "have no file; left out"),
    ):
        faults.add_summary(name, cells[is_faulty & is_left], problem)
        is_left &= ~is_faulty
    return rows.index[~is_left]


def _image_id(cell: str) -> str:
    match = PLACE.search(cell)
    return "-".join(match.groups()) if match else cell


def _value(cell: str) -> str:
    """Return the text of a cell without a final ".0", so that 1.0 becomes "1", a key of VALUES."""
    return cell[:-2] if cell.endswith(".0") else cell


def _diagnoses(observations: pd.DataFrame) -> np.ndarray:
    is_normal = (observations["No Finding"] == 1) & (observations["Support Devices"] == 0)
    return np.select([is_normal, observations["Pneumonia"] == 1], ["normal", "pneumonia"], "other")
