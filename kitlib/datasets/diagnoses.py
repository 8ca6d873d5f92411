"""What the readers of sets with one diagnosis an image share: from rows of files and diagnoses to the kit's tables."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import DIAGNOSES
from kitlib.datasets.base import Dataset, Faults, LayoutError, read_headers
from kitlib.tables import check_table, empty_table

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
    LayoutError, which says what was `got`, where no image is left, ValueError for a diagnosis that is not in `known`.
    """
    strangers = sorted(set(rows.diagnosis) - set(known) | set(known) - set(DIAGNOSES))
    if strangers:
        raise ValueError(f"the diagnoses {strangers} are not among {', '.join(known)}")
    rows = rows.sort_values("image_id", ignore_index=True)
    headers = read_headers(rows.path.tolist(), progress)
    for row, header in zip(rows.itertuples(), headers, strict=True):
        if header.problem:
            faults.add(str(Path(row.path).relative_to(folder)), row.image_id, f"{header.problem}; left out")
    images = rows.assign(
        study_id=rows.image_id,
        rows=[header.rows for header in headers],
        columns=[header.columns for header in headers],
        view=[row.view or header.view for row, header in zip(rows.itertuples(), headers, strict=True)],
        **{name: "" for name in ("sex", "licence") if name not in rows},
    )
    if "age" not in rows:
        images["age"] = np.nan
    images = images[[not header.problem for header in headers]].reset_index(drop=True)
    if images.empty:
        raise LayoutError(f"{folder} holds no X-ray that can be read: {got}")
    labels = pd.DataFrame({"id": images.image_id, **{name: (images.diagnosis == name).astype(float) for name in known}})
    return Dataset(
        check_table(images, "images", str(folder)),
        check_table(labels, "labels", str(folder)),
        empty_table("boxes"),
        faults.table(),
        dict(published or {}),
    )


def count_fault(faults: Faults, file: str, ids: Iterable[str], problem: str) -> None:
    """One line for all of `ids`, where there are any."""
    ids = sorted(ids)
    if ids:
        faults.add(file, ids[0], f"and {len(ids) - 1} others {problem}")


def sexes(cells: pd.Series) -> list[str]:
    """ "M" or "F" by a cell's first letter, whatever its case; "" for anything else."""
    letters = cells.str.strip().str[:1].str.upper()
    return letters.where(letters.isin(["M", "F"]), "").tolist()


def ages(cells: pd.Series, ids: pd.Series, faults: Faults, file: str) -> pd.Series:
    """Years as a number, NaN where a cell is empty, or holds no age; those are counted in a fault."""
    years = pd.to_numeric(cells.str.strip(), errors="coerce").astype(float)
    years = years.where(years.between(0, 130))
    count_fault(faults, file, ids[years.isna() & (cells.str.strip() != "")], "have an age that is no number of years")
    return years
