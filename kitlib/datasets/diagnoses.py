"""Makes a Dataset from images that have one diagnosis each; used for several data sets."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kitlib.classes import DIAGNOSES
from kitlib.datasets.base import Dataset, add_headers, one_hot
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError


def diagnosis_dataset(
    rows: pd.DataFrame,
    source: DataFolder,
    diagnoses: Sequence[str],
    how_to_get: str,
    published: dict[str, int] | None = None,
    *,
    progress: bool,
) -> Dataset:
    """Return a Dataset of the images in `rows` (columns image_id, patient_id, path, source, view and diagnosis).

    Every image is a study of its own. Further columns of `rows` are kept. The columns `sex` ("M", "F" or ""), `age` (years,
    NaN if unknown) and `licence` are added if missing. An empty `view` is filled in from a DICOM header. `diagnoses` lists
    the data set's diagnoses, a subset of DIAGNOSES; the labels have a column for each, with 1 for images that have the
    diagnosis and 0 for others. An image whose header cannot be read is left out and recorded in `Dataset.faults`. Raises
    DatasetError, which ends with `how_to_get`, if no image remains; ValueError if a diagnosis is not in `diagnoses`.
    """
    invalid = sorted(set(rows.diagnosis) - set(diagnoses) | set(diagnoses) - set(DIAGNOSES))
    if invalid:
        raise ValueError(f"unknown diagnoses {invalid}; valid: {', '.join(diagnoses)}")
    rows = rows.sort_values("image_id")
    defaults = {"sex": "", "licence": "", "age": np.nan}
    rows = rows.assign(**{name: value for name, value in defaults.items() if name not in rows})
    images = add_headers(rows, source, progress)
    if images.empty:
        raise DatasetError(f"{source.folder} contains no X-ray that can be read: {how_to_get}")
    return Dataset.from_tables(source, images, one_hot(images.image_id, images.diagnosis, diagnoses), published)


def parse_sexes(cells: pd.Series) -> list[str]:
    """Return "M" or "F" for each cell that starts with this letter, in either case, and "" for any other cell."""
    letters = cells.str.strip().str[:1].str.upper()
    return letters.where(letters.isin(["M", "F"]), "").tolist()


def parse_ages(cells: pd.Series, ids: pd.Series, faults: Faults, file: str) -> pd.Series:
    """Return the age in each cell, in years. A cell that is empty or is not a number from 0 to 130 becomes NaN.

    One fault counts the cells that become NaN although they are not empty. The fault states `file`, which contains the
    cells, and the first image id of these cells in alphabetical order. `ids` has the image id of each cell.
    """
    years = pd.to_numeric(cells.str.strip(), errors="coerce").astype(float)
    years = years.where(years.between(0, 130))
    faults.add_summary(
        file, ids[years.isna() & (cells.str.strip() != "")], "have an age that is not a number of years; the age is unknown"
    )
    return years
