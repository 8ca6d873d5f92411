"""Reads MIDRC-RICORD-1C (Tsai et al. 2021) from The Cancer Imaging Archive: X-rays of patients with COVID-19."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, read_headers
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.errors import DatasetError

PATIENT = re.compile(r"MIDRC-RICORD-1C-([\w-]+)", re.IGNORECASE)
LATERAL = ("LL", "RL", "LLD", "RLD", "LAT", "LATERAL")
GOT = "NBIA Data Retriever with the collection's manifest, see inputs/README.md"
# The collection's page: 361 patients, all tested positive.
PUBLISHED = {"images": 998, "patients": 361}


def read_ricord(folder: str | Path, progress: bool = True) -> Dataset:
    """The DICOM files below `folder`, as the retriever lays them: MIDRC-RICORD-1C-PATIENT/STUDY/SERIES/FILE.dcm.

    Everybody has COVID-19, so that the set serves in a pool alone. image_id is the path from the patient's folder on, with
    "-" between, since files are often called 1-1.dcm. The readers' annotations (a JSON file) and the clinical table (a
    spreadsheet) are not read: sex and age are unknown. Left out, with a fault: files that lie in no patient's folder,
    lateral views, as the headers say, and unreadable files. Raises DatasetError where no DICOM file of a patient is there.
    """
    folder, faults = Path(folder), Faults()
    rows, strangers = [], []
    for path in sorted(folder.rglob("*.dcm")):
        parts = path.relative_to(folder).with_suffix("").parts
        matches = enumerate(map(PATIENT.fullmatch, parts[:-1]))
        place, match = next(((place, match) for place, match in matches if match), (0, None))
        if match is None:
            strangers.append("/".join(parts))
            continue
        patient = match[1].upper()
        rows.append(("-".join((patient, *parts[place + 1 :])), f"ricord-{patient}", str(path)))
    faults.count("the folder", strangers, "lie in no folder MIDRC-RICORD-1C-PATIENT; left out")
    if not rows:
        raise DatasetError(f"{folder} holds no folder MIDRC-RICORD-1C-PATIENT with DICOM files: fetch them with {GOT}")
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "path"])
    table["view"] = [header.view for header in read_headers(table.path.tolist(), progress=False)]
    lateral = table["view"].str.upper().isin(LATERAL)
    faults.count("the headers", table.image_id[lateral], "are lateral views; left out")
    table = table[~lateral].assign(source="ricord", diagnosis="COVID-19", licence="CC BY-NC 4.0")
    return diagnosis_dataset(table, folder, faults, ("COVID-19",), GOT, PUBLISHED, progress)
