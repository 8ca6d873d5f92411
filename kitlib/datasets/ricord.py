"""Reads MIDRC-RICORD-1C (Tsai et al. 2021) from The Cancer Imaging Archive: X-rays of patients with COVID-19."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, read_headers
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.errors import DatasetError

PATIENT = re.compile(r"MIDRC-RICORD-1C-([\w-]+)", re.IGNORECASE)
LATERAL = ("LL", "RL", "LLD", "RLD", "LAT", "LATERAL")
HOW_TO_GET = "NBIA Data Retriever with the collection's manifest, see inputs/README.md"
# From the collection's page; all 361 patients tested positive.
PUBLISHED = {"images": 998, "patients": 361}


def read_ricord(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the DICOM files below `folder`, in the retriever's layout MIDRC-RICORD-1C-PATIENT/STUDY/SERIES/FILE.dcm.

    All patients have COVID-19, so the data set is useful only in a pool. image_id is the patient, the folders and the file
    name, joined by "-", because many files are named 1-1.dcm. Sex and age are unknown: neither the radiologists' annotations
    (a JSON file) nor the clinical table (a spreadsheet) are read. Left out, with a fault: files that are not in a patient's
    folder, lateral views (according to their headers) and unreadable files. Raises DatasetError if no patient has a DICOM
    file.
    """
    folder, faults = Path(folder), Faults()
    rows, outside = [], []
    for path in sorted(folder.rglob("*.dcm")):
        parts = path.relative_to(folder).with_suffix("").parts
        matches = enumerate(map(PATIENT.fullmatch, parts[:-1]))
        index, match = next(((number, match) for number, match in matches if match), (0, None))
        if match is None:
            outside.append("/".join(parts))
            continue
        patient = match[1].upper()
        rows.append(("-".join((patient, *parts[index + 1 :])), f"ricord-{patient}", str(path)))
    faults.add_summary("the folder", outside, "are not in a folder MIDRC-RICORD-1C-PATIENT; left out")
    if not rows:
        raise DatasetError(
            f"{folder} contains no folder MIDRC-RICORD-1C-PATIENT with DICOM files: fetch them with {HOW_TO_GET}"
        )
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "path"])
    table["view"] = [header.view for header in read_headers(table.path.tolist(), progress=False)]
    is_lateral = table["view"].str.upper().isin(LATERAL)
    faults.add_summary("the headers", table.image_id[is_lateral], "are lateral views; left out")
    table = table[~is_lateral].assign(source="ricord", diagnosis="COVID-19", licence="CC BY-NC 4.0")
    return diagnosis_dataset(table, folder, faults, ("COVID-19",), HOW_TO_GET, PUBLISHED, progress)
