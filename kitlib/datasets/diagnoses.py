"""What the readers of sets with one diagnosis an image share: from rows of files and diagnoses to the kit's tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import DIAGNOSES
from kitlib.datasets.base import Dataset, Faults, one_hot, with_headers
from kitlib.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg")


def diagnosis_dataset(
    rows: pd.DataFrame,
    folder: Path,
    faults: Faults,
    known: Sequence[str],
    got: str,
    published: dict[str, int] | None = None,
    progress: bool = True,
) -> Dataset:
    """The data set whose images are `rows`, with the columns image_id, patient_id, path, source, view and diagnosis.

    Every image is a study of its own. Further columns stay; sex ("M", "F" or ""), age (years, NaN unknown) and licence are
    put in where they lack. An empty `view` is filled in from a DICOM header. Labels are one-hot over `known`, the diagnoses
    of DIAGNOSES that the set can tell apart. An image whose header cannot be read is left out, with a fault. Raises
    DatasetError, which says what was `got`, where no image is left, ValueError for a diagnosis that is not in `known`.
    """
    strangers = sorted(set(rows.diagnosis) - set(known) | set(known) - set(DIAGNOSES))
    if strangers:
        raise ValueError(f"the diagnoses {strangers} are not among {', '.join(known)}")
    rows = rows.sort_values("image_id", ignore_index=True)
    untold = {"sex": "", "licence": "", "age": np.nan}
    rows = rows.assign(**{name: value for name, value in untold.items() if name not in rows})
    images = with_headers(rows, folder, faults, progress)
    if images.empty:
        raise DatasetError(f"{folder} holds no X-ray that can be read: {got}")
    return Dataset.checked(folder, images, one_hot(images.image_id, images.diagnosis, known), faults, published)


def sexes(cells: pd.Series) -> list[str]:
    """ "M" or "F" by a cell's first letter, whatever its case; "" for anything else."""
    letters = cells.str.strip().str[:1].str.upper()
    return letters.where(letters.isin(["M", "F"]), "").tolist()


def ages(cells: pd.Series, ids: pd.Series, faults: Faults, file: str) -> pd.Series:
    """Years as a number, NaN where a cell is empty, or holds no age; those are counted in a fault."""
    years = pd.to_numeric(cells.str.strip(), errors="coerce").astype(float)
    years = years.where(years.between(0, 130))
    faults.count(file, ids[years.isna() & (cells.str.strip() != "")], "have an age that is no number of years")
    return years
