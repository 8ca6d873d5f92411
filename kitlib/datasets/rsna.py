"""Reads the training set (stage 2) of the RSNA Pneumonia Detection Challenge: X-rays, classes, and boxes of opacities."""

import json
from pathlib import Path

import pandas as pd

from kitlib.classes import RSNA_CLASSES
from kitlib.datasets.base import (
    Dataset,
    Faults,
    add_headers,
    cut_at_edges,
    find_files,
    listed_id,
    make_boxes,
    one_hot,
    read_csv,
)
from kitlib.errors import DatasetError

LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images"
# RSNA's list of its images and the NIH images that they come from; published separately from the challenge's files.
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
HOW_TO_GET = "`kaggle competitions download -c rsna-pneumonia-detection-challenge`, see inputs/README.md"
# Shih et al. 2019 (Radiology: AI), for the stage 2 training set; rows and boxes are counted in its CSV file.
PUBLISHED = {
    "images": 26684,
    "label_rows": 30227,
    "boxes": 9555,
    "Normal": 8851,
    "No Lung Opacity / Not Normal": 11821,
    "Lung Opacity": 6012,
}


def read_rsna(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the training images below `folder` (DICOM, or PNG or JPEG if re-packed), with their classes and opacity boxes.

    image_id and study_id are RSNA's patientId. RSNA has one image per patientId, but the images come from NIH, where a
    patient has several. If MAPPING is in the folder, `patient_id` is NIH's patient, so that folds do not leak; otherwise it
    is the patientId, with a fault. Labels have the columns RSNA_CLASSES, exactly one of which is 1. Left out, with a fault:
    rows without a file, files without a row, and images with an unreadable header, an invalid box, or a class that
    contradicts their boxes. Raises DatasetError if a table or the image folder is missing, or if no file is an image of the
    tables.
    """
    folder, faults = Path(folder), Faults()
    labels, boxes = read_label_tables(folder, faults)
    if not (folder / IMAGES).is_dir():
        raise DatasetError(f"{folder / IMAGES} is missing: unpack the challenge's training images there, {HOW_TO_GET}")
    files = find_files(folder / IMAGES, (".dcm", ".png", ".jpg", ".jpeg"), faults)
    if not labels.id.isin(list(files)).any():
        first, wanted = next(iter(files.values()), "none"), next(iter(labels.id), "none")
        raise DatasetError(
            f"{folder / IMAGES} holds {len(files)} images, the first is {first}; none of them is one of the {len(labels)} "
            f"images in {LABELS}, such as {wanted}: {HOW_TO_GET}"
        )
    faults.add_summary(LABELS, set(labels.id) - set(files), "have no file; left out", "other images")
    for image_id in sorted(set(files) - set(labels.id)):
        faults.add(files[image_id].name, image_id, f"has no usable row in {LABELS}; left out")
    image_ids = sorted(set(files) & set(labels.id))
    patients = read_nih_patients(folder / MAPPING, faults)
    rows = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": [patients.get(image_id, image_id) for image_id in image_ids],
            "path": [str(files[image_id]) for image_id in image_ids],
            "source": "rsna",
            "view": "",
        }
    )
    images = add_headers(rows, folder, faults, progress)
    images, boxes = cut_at_edges(images, boxes[boxes.image_id.isin(images.image_id)], faults, LABELS)
    return Dataset.from_tables(folder, images, labels[labels.id.isin(images.image_id)], faults, PUBLISHED, boxes=boxes)


def read_label_tables(folder: str | Path, faults: Faults) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the two CSV files in `folder`; returns a `labels` table (id is the patientId) and a `boxes` table of opacities.

    An image with an invalid or contradictory row is left out of both, with a fault. Raises DatasetError if a file is missing
    or lacks a column.
    """
    rows = read_csv(Path(folder) / LABELS, ("patientId", "x", "y", "width", "height", "Target"), HOW_TO_GET)
    detailed = read_csv(Path(folder) / CLASSES, ("patientId", "class"), HOW_TO_GET).drop_duplicates()
    boxes, is_valid = make_boxes(rows.patientId, rows[["x", "y", "width", "height"]])
    has_both = rows.groupby("patientId").Target.transform("nunique") > 1
    excluded = set(rows.patientId[~rows.Target.isin(["0", "1"]) | (is_valid != (rows.Target == "1")) | has_both])
    for patient in sorted(excluded):
        faults.add(
            LABELS, patient, "Target is not always 1 with a valid box, or always 0 without one; the image is left out"
        )
    for patient in sorted(set(detailed.patientId[detailed.patientId.duplicated(keep=False)])):
        faults.add(CLASSES, patient, "has two different classes; the image is left out")
        excluded.add(patient)
    class_of = detailed.drop_duplicates("patientId").set_index("patientId")["class"]
    boxed = set(boxes.image_id[is_valid])
    for patient in sorted(set(rows.patientId) - excluded):
        name = class_of.get(patient, "")
        if name not in RSNA_CLASSES or (name == "Lung Opacity") != (patient in boxed):
            faults.add(CLASSES, patient, f"the class {name!r} is invalid or contradicts the boxes; the image is left out")
            excluded.add(patient)
    patients = sorted(set(rows.patientId) - excluded)
    labels = one_hot(pd.Series(patients, dtype=object), class_of.reindex(patients).reset_index(drop=True), RSNA_CLASSES)
    return labels, boxes[is_valid & ~boxes.image_id.isin(excluded)].reset_index(drop=True)


def read_nih_patients(path: Path, faults: Faults) -> dict[str, str]:
    """Read RSNA's mapping file `path`; returns RSNA's patientId -> NIH's patient id, written as in kitlib.datasets.nih.

    If the file is missing, this is a fault and the mapping is empty. Raises DatasetError if the file has another format.
    """
    if not path.is_file():
        faults.add(path.name, "", "the file is missing; images of one NIH patient may fall into several folds")
        return {}
    try:
        entries = json.loads(path.read_bytes())
        return {
            entry["subset_img_id"]: f"nih-{listed_id(entry['img_id']).partition('_')[0]}"
            for entry in entries
            if entry["subset_img_id"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is not a list of objects with subset_img_id and img_id ({error!r}): fetch it again, or remove it"
        ) from error
