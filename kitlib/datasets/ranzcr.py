"""Reads the training set of RANZCR CLiP, Catheter and Line Position Challenge: X-rays with eleven labels each."""

from pathlib import Path

import pandas as pd

from kitlib.classes import RANZCR_LABELS
from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder, read_csv
from kitlib.datasets.train_images import read_train_images

LABELS, ANNOTATIONS = "train.csv", "train_annotations.csv"
ID = "StudyInstanceUID"  # of an image, in spite of its name
HOW_TO_GET = "`kaggle competitions download -c ranzcr-clip-catheter-line-classification`, see inputs/README.md"
# Counted in train.csv.
PUBLISHED = {
    "images": 30083,
    "patients": 3255,
    **dict(zip(RANZCR_LABELS, (79, 1138, 7240, 279, 529, 2748, 4797, 3195, 8460, 21324, 830), strict=True)),
}


def read_ranzcr(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the training images below `folder`, JPEG files or copies as PNG or DICOM, with their labels and patients.

    The images may be in any folder that has no "test" in its name. image_id and study_id both come from the column
    StudyInstanceUID, which identifies one image. `train_annotations.csv`, the courses of catheters and lines, is not used; a
    fault counts its rows. Left out and recorded in `Dataset.faults`: rows without a file, files without a row, images with
    an unreadable header, and images with an invalid row or several rows. Raises DatasetError if the table is missing or
    lacks a column, or if the table lists none of the image files.
    """
    source = DataFolder.of(folder)
    path = source.need_table(LABELS, how_to_get=HOW_TO_GET)
    table = read_csv(path, (ID, *RANZCR_LABELS, "PatientID")).drop_duplicates()
    labels = table[list(RANZCR_LABELS)].apply(pd.to_numeric, errors="coerce")
    is_wrong = ~labels.isin([0, 1]).all(axis=1) | table[ID].duplicated(keep=False)
    is_wrong |= (table[[ID, "PatientID"]] == "").any(axis=1)
    problem = "have a label that is neither 0 nor 1, no patient, or several rows; left out"
    source.faults.add_summary(LABELS, set(table[ID][is_wrong]), problem, "other images")
    if annotations := source.find_table(ANNOTATIONS):
        rows = len(read_csv(annotations, (ID,)))
        source.faults.add(ANNOTATIONS, "", f"the courses of {rows} lines are not used")
    labels["id"] = table[ID]
    labels, table = labels[~is_wrong], table[~is_wrong]
    patients = dict(zip(table[ID], table["PatientID"], strict=True))
    images = read_train_images(
        source, patients, LABELS, name="ranzcr", how_to_get=HOW_TO_GET, patients=patients, progress=progress
    )
    labels = labels[labels["id"].isin(images["image_id"])].sort_values("id")
    return Dataset.from_tables(source, images, labels, PUBLISHED)
