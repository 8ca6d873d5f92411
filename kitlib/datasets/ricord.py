"""Reads MIDRC-RICORD-1C (Tsai et al. 2021) from The Cancer Imaging Archive: X-rays of patients with COVID-19."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, read_headers
from kitlib.datasets.data_folder import DICOM, PICTURES, DataFolder
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.errors import DatasetError

# Matches a patient's folder or, in copies, the beginning of a JPEG or PNG file's name, but not the collection's own
# folders.
PATIENT = re.compile(r"MIDRC[-_]RICORD[-_]1C[-_](\d{6}[-_]\d{6}|SITE\d+[-_]\d+|\d+)(?=[-_.]|$)", re.IGNORECASE)
LATERAL = ("LL", "RL", "LLD", "RLD", "LAT", "LATERAL")
HOW_TO_GET = "NBIA Data Retriever with the collection's manifest, see inputs/README.md"
# From the collection's page; all 361 patients tested positive.
PUBLISHED = {"images": 998, "patients": 361}


def read_ricord(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the DICOM files below `folder`, in the retriever's layout MIDRC-RICORD-1C-PATIENT/STUDY/SERIES/FILE.dcm.

    PATIENT has the form 419639-000082 or SITE2-000105. PNG and JPEG files named MIDRC-RICORD-1C-PATIENT-... are read as
    well. All patients have COVID-19, so the data set is useful only together with others. `image_id` is the patient, the
    folders and the file name, joined by "-", because many files are named 1-1.dcm. Sex and age are unknown: neither the
    radiologists' annotations (a JSON file) nor the clinical table (a spreadsheet) are read. Left out and recorded in
    `Dataset.faults`: files whose path has no PATIENT, further files with the same image_id, lateral views (according to
    DICOM headers) and unreadable files. Raises DatasetError if no path has a PATIENT.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    rows: dict[str, tuple[str, str]] = {}
    outside: list[str] = []
    copies: list[str] = []
    for path in source.find((*DICOM, *PICTURES)):
        parts = Path(source.name(path)).with_suffix("").parts
        # The deepest match is used, because the folder above the patients may have a similar name.
        matches = [(index, match) for index, match in enumerate(map(PATIENT.match, parts)) if match]
        if not matches:
            outside.append(source.name(path))
            continue
        index, match = matches[-1]
        patient = match[1].upper().replace("_", "-")
        rest = (parts[index][match.end() :].strip("-_"), *parts[index + 1 :])
        image_id = "-".join((patient, *filter(None, rest)))
        if image_id in rows:
            copies.append(source.name(path))
        rows.setdefault(image_id, (f"ricord-{patient}", str(path)))
    faults.add_summary("the folder", copies, "have the patient, folders and name of another file; left out", "other files")
    faults.add_summary("the folder", outside, "are not in a folder MIDRC-RICORD-1C-PATIENT, nor named so; left out")
    if not rows:
        raise DatasetError(
            f"none of the {len(source.paths)} files in {folder} is a DICOM file in a folder MIDRC-RICORD-1C-PATIENT: "
            f"fetch the DICOM files with {HOW_TO_GET}"
        )
    table = pd.DataFrame([(image_id, *row) for image_id, row in rows.items()], columns=["image_id", "patient_id", "path"])
    table["view"] = [header.view for header in read_headers(table.path.tolist(), progress=False)]
    is_lateral = table["view"].str.upper().isin(LATERAL)
    faults.add_summary("the headers", table.image_id[is_lateral], "are lateral views; left out")
    table = table[~is_lateral].assign(source="ricord", diagnosis="COVID-19", licence="CC BY-NC 4.0")
    return diagnosis_dataset(table, source, ("COVID-19",), HOW_TO_GET, PUBLISHED, progress=progress)
