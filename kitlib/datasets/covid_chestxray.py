"""Reads ieee8023's covid-chestxray-dataset (Cohen et al. 2020): frontal X-rays of COVID-19 and other pneumonias."""

from pathlib import Path

import pandas as pd

from kitlib.classes import DIAGNOSES
from kitlib.datasets.base import Dataset, Faults, read_csv
from kitlib.datasets.diagnoses import ages, diagnosis_dataset, sexes
from kitlib.errors import DatasetError

METADATA = "metadata.csv"
# Every release has these; offset, sex, age, folder and license are read where they are.
COLUMNS = ("patientid", "finding", "view", "modality", "filename")
VIEWS = ("PA", "AP", "AP Supine", "APS")
UNKNOWN = ("", "todo", "unknown")
# The last part of a finding that tells more than the part of its path before it, and findings of releases without paths.
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
GOT = "`git clone https://github.com/ieee8023/covid-chestxray-dataset`, see inputs/README.md"


def read_covid_chestxray(folder: str | Path, progress: bool = True) -> Dataset:
    """The frontal X-rays that `metadata.csv` names, in the folder that each row says, or in images/.

    image_id is the file's name without suffix, or with it where two share it. A finding is a path such as
    `Pneumonia/Viral/COVID-19`, or one name, as older releases have it; several stand with a comma between. One is enough to
    know a germ: `COVID-19, ARDS` is COVID-19. `offset`, in days, is kept, NaN where unknown. A row without a patient counts
    as a patient of its own. Left out, with a fault: other modalities and views, counted; findings that are unknown, not
    named here, or several that exclude one another; rows that name a file again, and files that are missing or damaged.
    Raises DatasetError where the table is missing or has other columns, or no image is left.
    """
    folder, faults = Path(folder), Faults()
    # Their case and spaces changed over the releases.
    table = read_csv(folder / METADATA, (), GOT).rename(columns=lambda name: name.strip().lower())
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise DatasetError(f"{folder / METADATA} lacks the column(s) {missing}, it has {list(table.columns)}: {GOT}")
    table = table.apply(lambda column: column.str.strip())
    table = _frontal(table, faults)
    again = table.filename.duplicated()
    faults.count(METADATA, table.filename[again], "name a file that an earlier row names; the first row is used")
    table = table[~again].assign(diagnosis=lambda rows: _diagnoses(rows, faults))
    table = table[table.diagnosis != ""]
    inside = table["folder"].where(table["folder"] != "", "images") if "folder" in table else "images"
    table["path"] = [str(folder / place) for place in inside + "/" + table.filename]
    here = table.path.map(lambda path: Path(path).is_file()).astype(bool)
    faults.count(METADATA, table.filename[~here], "have no file; left out")
    table = table[here].reset_index(drop=True)
    if table.empty:
        raise DatasetError(f"{folder} holds no frontal X-ray that {METADATA} names, with a finding: {GOT}")
    stems = table.filename.map(lambda name: Path(name).stem)
    image_ids = stems.mask(stems.duplicated(keep=False), table.filename)
    faults.count(METADATA, image_ids[table.patientid == ""], "have no patient; each counts as one of its own")
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
            "sex": sexes(_column(table, "sex")),
            "age": ages(_column(table, "age"), image_ids, faults, METADATA),
            "offset": pd.to_numeric(_column(table, "offset"), errors="coerce").astype(float),
        }
    )
    return diagnosis_dataset(rows, folder, faults, DIAGNOSES, GOT, progress=progress)


def diagnosis_of(finding: str) -> str:
    """One of DIAGNOSES, or "" where `finding` is unknown. Raises ValueError where it is not among FINDINGS, or contradicts.

    Of a path the deepest part that is known counts: what stands below a germ's kind is a kind of it.
    """
    found = set()
    for path in finding.split(","):
        parts = [part.strip().lower() for part in path.split("/")]
        if path.strip().lower() in UNKNOWN:
            continue
        known = [BY_NAME[part] for part in parts if part in BY_NAME]
        if not known:
            raise ValueError(f"finding {path.strip()!r} is none that is known here")
        found.add(known[-1])
    # What else is found beside a pneumonia, and a pneumonia beside one of a known germ, take nothing back.
    for vague in ("other", "pneumonia"):
        if len(found - {"normal"}) > 1:
            found.discard(vague)
    if len(found) > 1:
        raise ValueError(f"findings {finding!r} exclude one another")
    return found.pop() if found else ""


def _frontal(table: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    xray = table.modality.str.lower() == "x-ray"
    faults.count(METADATA, table.filename[~xray], "are no X-rays; left out")
    table = table[xray]
    frontal = table["view"].str.lower().isin([view.lower() for view in VIEWS])
    for view, rows in table[~frontal].groupby("view"):
        faults.count(METADATA, rows.filename, f"have the view {view!r}, not one of {', '.join(VIEWS)}; left out")
    return table[frontal]


def _diagnoses(table: pd.DataFrame, faults: Faults) -> list[str]:
    """The diagnosis of each row, "" for those that are left out."""
    told, unknown = [], []
    for name, finding in zip(table.filename, table.finding, strict=True):
        try:
            told.append(diagnosis_of(finding))
            unknown += [] if told[-1] else [name]
        except ValueError as error:
            faults.add(METADATA, name, f"{error}; left out")
            told.append("")
    faults.count(METADATA, unknown, "have no finding yet; left out")
    return told


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series("", index=table.index, dtype=object)
