"""Reads ieee8023's covid-chestxray-dataset (Cohen et al. 2020): frontal X-rays of COVID-19 and other pneumonias."""

import re
from pathlib import Path

import pandas as pd

from kitlib.classes import DIAGNOSES
from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder, listed_id, read_csv
from kitlib.datasets.diagnoses import diagnosis_dataset, parse_ages, parse_sexes
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError

METADATA = "metadata.csv"
# Columns that every release has; offset, sex, age, folder and license are read if present.
COLUMNS = ("patientid", "finding", "view", "modality", "filename")
RENAMED = {"imagename": "filename"}  # columns of copies -> the columns above
FRONTAL = re.compile(r"(PA|AP|APS)\b", re.IGNORECASE)  # also "AP Supine" and "AP erect"
UNKNOWN = ("", "todo", "unknown")
# Part of a finding's path, or a finding in releases without paths -> diagnosis. If several parts are listed, the last one
# decides.
FINDINGS = {
    "COVID-19": "COVID-19",
    **dict.fromkeys(("Viral", "SARS", "MERS", "MERS-CoV", "Influenza", "H1N1", "Varicella", "Herpes"), "viral"),
    **dict.fromkeys(("Bacterial", "Streptococcus", "Klebsiella", "Chlamydophila", "Legionella", "E.Coli"), "bacterial"),
    **dict.fromkeys(("Mycoplasma", "Mycoplasma Bacterial Pneumonia", "Nocardia", "Staphylococcus", "MRSA"), "bacterial"),
    **dict.fromkeys(("Pneumonia", "Fungal", "Pneumocystis", "Aspergillosis", "Aspiration", "Lipoid"), "pneumonia"),
    "No Finding": "normal",
    **dict.fromkeys(("Tuberculosis", "ARDS"), "other"),
}
BY_NAME = {name.lower(): diagnosis for name, diagnosis in FINDINGS.items()}
HOW_TO_GET = "`git clone https://github.com/ieee8023/covid-chestxray-dataset`, see inputs/README.md"


def read_covid_chestxray(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the frontal X-rays listed in `metadata.csv`, whose column `folder` states the subfolders (default: images/).

    `image_id` is the file name without suffix, or with the suffix if two file names differ only in the suffix. A finding is
    a path such as `Pneumonia/Viral/COVID-19`, or a single name in older releases. Several findings are separated by commas,
    and the most specific one decides: `COVID-19, ARDS` is COVID-19. The column `offset` is copied to `images`; it is in
    days, NaN if unknown. A row without a patient id counts as a patient of its own. Left out and recorded in
    `Dataset.faults`: rows whose modality is not X-ray or whose view is not frontal; rows whose finding is not stated or not
    in FINDINGS; rows whose findings exclude one another; repeated rows for one file; missing and damaged files. Raises
    DatasetError if `metadata.csv` is missing or lacks a column, or if no image remains.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    path = source.need_table(METADATA, how_to_get=HOW_TO_GET)
    # The case and the spaces of the column names differ between releases.
    table = read_csv(path, ()).rename(columns=lambda name: name.strip().lower())
    if "filename" not in table:
        table = table.rename(columns=RENAMED)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise DatasetError(f"{path} lacks the columns {missing}; its columns are {list(table.columns)}: {HOW_TO_GET}")
    table = table.apply(lambda column: column.str.strip())
    subfolders = table["folder"].where(table["folder"] != "", "images") if "folder" in table else "images"
    cells = (subfolders + "/" + table.filename).tolist()
    table["path"] = source.find_all_listed(cells, [path.parent] * len(cells))
    table = _select_frontal(table, faults)
    is_repeated = table.filename.duplicated() | (table.path.notna() & table.path.duplicated())
    faults.add_summary(METADATA, table.filename[is_repeated], "repeat the file of an earlier row; the first row is used")
    table = table[~is_repeated].assign(diagnosis=lambda rows: _find_diagnoses(rows, faults))
    table = table[table.diagnosis != ""]
    has_file = table.path.notna()
    faults.add_summary(METADATA, table.filename[~has_file], "have no file; left out")
    if table.empty:
        raise DatasetError(f"{folder} has no frontal X-ray with a finding in {METADATA}: {HOW_TO_GET}")
    if not has_file.any():
        raise DatasetError(
            f"{folder} holds {len(source.paths)} files, but none of the {len(table)} frontal X-rays listed in {METADATA}; "
            f"the first listed is {table.filename.iloc[0]!r}. To get the X-rays: {HOW_TO_GET}"
        )
    table = table[has_file].assign(path=table.path[has_file].map(str))
    stems = table.filename.map(listed_id)
    image_ids = stems.mask(stems.duplicated(keep=False), table.filename)
    faults.add_summary(
        METADATA, image_ids[table.patientid == ""], "have no patient id; each is treated as a patient of its own"
    )
    rows = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": "ieee-" + table.patientid.mask(table.patientid == "", "unknown-" + image_ids),
            "path": table.path,
            "source": "ieee8023",
            "view": table["view"],
            "diagnosis": table.diagnosis,
            "finding": table.finding,
            "licence": _column(table, "license"),
            "sex": parse_sexes(_column(table, "sex")),
            "age": parse_ages(_column(table, "age"), image_ids, faults, METADATA),
            "offset": pd.to_numeric(_column(table, "offset"), errors="coerce").astype(float),
        }
    )
    return diagnosis_dataset(rows, source, DIAGNOSES, HOW_TO_GET, progress=progress)


def diagnosis_of(finding: str) -> str:
    """Return the diagnosis (of DIAGNOSES) that a finding implies, or "" if it states none (blank, "todo" or "unknown").

    A finding is a path such as Pneumonia/Viral, or several paths separated by commas. In a path, the last part that is in
    FINDINGS decides, because it is the most specific. Raises ValueError if no part of a path is in FINDINGS, or if several
    findings exclude one another.
    """
    diagnoses = set()
    for path in finding.split(","):
        parts = [part.strip().lower() for part in path.split("/")]
        if path.strip().lower() in UNKNOWN:
            continue
        matches = [BY_NAME[part] for part in parts if part in BY_NAME]
        if not matches:
            raise ValueError(f"the kit does not know the finding {path.strip()!r}")
        diagnoses.add(matches[-1])
    # "other" does not contradict a pneumonia, and "pneumonia" does not contradict a pneumonia with a known germ.
    for vague in ("other", "pneumonia"):
        if len(diagnoses - {"normal"}) > 1:
            diagnoses.discard(vague)
    if len(diagnoses) > 1:
        raise ValueError(f"the findings {finding!r} exclude one another")
    return diagnoses.pop() if diagnoses else ""


def _select_frontal(table: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    is_xray = table.modality.str.lower() == "x-ray"
    faults.add_summary(METADATA, table.filename[~is_xray], "are not X-rays; left out")
    table = table[is_xray]
    is_frontal = table["view"].str.match(FRONTAL)
    for view, rows in table[~is_frontal].groupby("view"):
        faults.add_summary(METADATA, rows.filename, f"have the view {view!r}, which is neither PA nor AP; left out")
    return table[is_frontal]


def _find_diagnoses(table: pd.DataFrame, faults: Faults) -> list[str]:
    """Return the diagnosis of each row of `table`; a row to be left out has the diagnosis "" and is added to `faults`."""
    diagnoses, undiagnosed = [], []
    for name, finding in zip(table.filename, table.finding, strict=True):
        try:
            diagnoses.append(diagnosis_of(finding))
            undiagnosed += [] if diagnoses[-1] else [name]
        except ValueError as error:
            faults.add(METADATA, name, f"{error}; left out")
            diagnoses.append("")
    faults.add_summary(METADATA, undiagnosed, "have no finding yet; left out")
    return diagnoses


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series("", index=table.index)
