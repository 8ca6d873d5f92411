"""Reads COVIDGR-1.0 (Tabik et al. 2020): PA X-rays from one hospital, half of them of patients with a positive PCR test."""

from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.errors import DatasetError

# Folder -> diagnosis. A negative test does not mean that the patient was healthy.
FOLDERS = {"P": "COVID-19", "N": "other"}
HOW_TO_GET = "https://github.com/ari-dasci/OD-covidgr, see inputs/README.md"
# Tabik et al. 2020, IEEE Journal of Biomedical and Health Informatics.
PUBLISHED = {"images": 852, "COVID-19": 426, "other": 426}


def read_covidgr(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images in the folders P (COVID-19) and N (other), anywhere below `folder`.

    image_id is `P-` or `N-` and the file name without suffix. The data set does not state patients, so each image is treated
    as a patient of its own; only near-duplicates are kept together in one fold. The severity levels are not read. Left out
    and recorded in `Dataset.faults`: repeated file names and unreadable files. Raises DatasetError if P or N is missing or
    empty.
    """
    source = DataFolder.of(folder)
    rows = []
    for name, diagnosis in FOLDERS.items():
        wanted = {path for path in source.paths if source.folders(path)[-1:] == (name.lower(),)}
        files = source.find_images(is_wanted=wanted.__contains__)
        if not files:
            raise DatasetError(
                f"none of the {len(source.paths)} files below {source.folder} is a PNG or JPEG image in a folder {name!r}; "
                f"give the folder that holds {' and '.join(FOLDERS)}: {HOW_TO_GET}"
            )
        rows += [(f"{name}-{stem}", f"covidgr-{name}-{stem}", str(path), diagnosis) for stem, path in files.items()]
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "path", "diagnosis"])
    table = table.assign(source="covidgr", view="PA")
    return diagnosis_dataset(table, source, ("COVID-19", "other"), HOW_TO_GET, PUBLISHED, progress=progress)
