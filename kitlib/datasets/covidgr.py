"""Reads COVIDGR-1.0 (Tabik et al. 2020): PA X-rays from one hospital, half of them of patients with a positive PCR test."""

from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, find_files
from kitlib.datasets.diagnoses import SUFFIXES, diagnosis_dataset
from kitlib.errors import DatasetError

# Folder -> diagnosis. A negative test does not mean that the patient was healthy.
FOLDERS = {"P": "COVID-19", "N": "other"}
HOW_TO_GET = "https://github.com/ari-dasci/OD-covidgr, see inputs/README.md"
# Tabik et al. 2020, IEEE Journal of Biomedical and Health Informatics.
PUBLISHED = {"images": 852, "COVID-19": 426, "other": 426}


def read_covidgr(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the images in the folders P (COVID-19) and N (other), which are in `folder` or in one folder below it.

    image_id is `P-` or `N-` and the file name without suffix. The data set does not state patients, so each image is treated
    as a patient of its own; only near-duplicates are kept together in one fold. The severity levels are not read. Left out,
    with a fault: repeated file names and unreadable files. Raises DatasetError if P or N is missing or empty, or if there
    are several pairs.
    """
    folder, faults = Path(folder), Faults()
    roots = [path.parent for path in sorted(folder.rglob("P")) if path.is_dir() and (path.parent / "N").is_dir()]
    if len(roots) != 1:
        raise DatasetError(
            f"{folder} has {len(roots)} folders that contain P and N, expected one: unpack the data set there, {HOW_TO_GET}"
        )
    rows = []
    for name, diagnosis in FOLDERS.items():
        files = find_files(roots[0] / name, SUFFIXES, faults)
        if not files:
            raise DatasetError(f"{roots[0] / name} contains no PNG or JPEG image: unpack the data set again, {HOW_TO_GET}")
        rows += [(f"{name}-{stem}", f"covidgr-{name}-{stem}", str(path), diagnosis) for stem, path in files.items()]
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "path", "diagnosis"])
    table = table.assign(source="covidgr", view="PA")
    return diagnosis_dataset(table, folder, faults, ("COVID-19", "other"), HOW_TO_GET, PUBLISHED, progress)
