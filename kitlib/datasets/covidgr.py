"""Reads COVIDGR-1.0 (Tabik et al. 2020): PA X-rays of one hospital, half of them of patients with a positive PCR test."""

from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, files_below
from kitlib.datasets.diagnoses import SUFFIXES, diagnosis_dataset
from kitlib.errors import DatasetError

# Folder -> diagnosis. Nobody says that who tested negative was healthy.
FOLDERS = {"P": "COVID-19", "N": "other"}
GOT = "https://github.com/ari-dasci/OD-covidgr, see inputs/README.md"
# Tabik et al. 2020, IEEE Journal of Biomedical and Health Informatics.
PUBLISHED = {"images": 852, "COVID-19": 426, "other": 426}


def read_covidgr(folder: str | Path, progress: bool = True) -> Dataset:
    """The images below P/ and N/ of `folder`, or of the one folder in it that has both.

    image_id is `P-` or `N-` and the file's name without suffix. The set says nothing of patients: each image counts as one
    of its own, and only near-duplicates hold images together. Severities are not read. Left out, with a fault: names that
    occur twice, and unreadable files. Raises DatasetError where P or N is missing or empty.
    """
    folder, faults = Path(folder), Faults()
    inner = [place.parent for place in sorted(folder.rglob("P")) if place.is_dir() and (place.parent / "N").is_dir()]
    if len(inner) != 1:
        raise DatasetError(f"{folder} has {len(inner)} places with the folders P and N, wanted one: unpack it there, {GOT}")
    rows = []
    for name, diagnosis in FOLDERS.items():
        files = files_below(inner[0] / name, SUFFIXES, faults)
        if not files:
            raise DatasetError(f"{inner[0] / name} holds no PNG or JPEG image: unpack the set again, {GOT}")
        rows += [(f"{name}-{stem}", f"covidgr-{name}-{stem}", str(path), diagnosis) for stem, path in files.items()]
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "path", "diagnosis"])
    table = table.assign(source="covidgr", view="PA")
    return diagnosis_dataset(table, folder, faults, ("COVID-19", "other"), GOT, PUBLISHED, progress)
