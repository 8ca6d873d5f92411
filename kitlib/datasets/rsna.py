"""Reads the training set (stage 2) of the RSNA Pneumonia Detection Challenge: X-rays, classes, and boxes of opacities."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import RSNA_CLASSES
from kitlib.datasets.base import Dataset, cut_at_edges, make_boxes, one_hot, scale_boxes
from kitlib.datasets.data_folder import DataFolder, listed_id, or_renamed, read_csv
from kitlib.datasets.train_images import read_train_images
from kitlib.errors import DatasetError

# The second file name in each line is used by copies on Kaggle. stage2_train_metadata.csv has both labels and classes.
LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
LABEL_TABLES, CLASS_TABLES = (
    (*or_renamed(LABELS), "stage2_train_metadata*.csv"),
    (*or_renamed(CLASSES), "stage2_train_metadata*.csv"),
)
IMAGES = "stage_2_train_images"  # folder in the challenge's files; copies use other names
SIDE = 1024  # pixels a side of every published image; boxes are in these pixels, even in resized copies
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


def read_rsna(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the training images below `folder` (DICOM, PNG or JPEG files), with their classes and opacity boxes.

    The images may be in any folder that has no "test" in its name. Boxes of resized images are scaled. Labels have the
    columns RSNA_CLASSES. If there is a table of classes, exactly one class of each image is 1. Otherwise, for images without
    an opacity, the classes "Normal" and "No Lung Opacity / Not Normal" are unknown (NaN).

    `image_id` and `study_id` are RSNA's patientId. RSNA has one image per patientId, but the images come from NIH, where a
    patient has several. If RSNA's list of NIH images (MAPPING) is below `folder`, `patient_id` is NIH's patient, so that no
    patient is in two folds; otherwise, `patient_id` is the patientId, and a fault is recorded. Left out and recorded in
    `Dataset.faults`: rows without a file, files without a row, and images with an unreadable header, an invalid box, or a
    class that contradicts the boxes. Raises DatasetError if the table of boxes is missing or
    lists none of the files.
    """
    source = DataFolder.of(folder)
    labels, boxes = read_label_tables(source)
    patients = read_nih_patients(source)
    images = read_train_images(
        source, labels["id"], LABELS, name="rsna", how_to_get=HOW_TO_GET, patients=patients, progress=progress
    )
    boxes = boxes[boxes.image_id.isin(images.image_id)]
    originals = images[["image_id"]].assign(rows=SIDE, columns=SIDE)
    images, boxes = cut_at_edges(images, scale_boxes(boxes, images, originals, source, LABELS), source, LABELS)
    return Dataset.from_tables(source, images, labels[labels.id.isin(images.image_id)], PUBLISHED, boxes=boxes)


def read_label_tables(folder: str | Path | DataFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the label tables below `folder`; return a `labels` table (id is the patientId) and a `boxes` table of opacities.

    Boxes are in pixels of the published images. An image with an invalid or contradictory row is left out of both tables. If
    there is no table of classes, the classes "Normal" and "No Lung Opacity / Not Normal" of images without a box are NaN.
    Left-out images and a missing table are faults. Raises DatasetError without a table of boxes, or if a column is missing.
    """
    source = DataFolder.of(folder)
    faults = source.faults
    path = source.need_table(*LABEL_TABLES, how_to_get=HOW_TO_GET)
    rows = read_csv(path, ("patientId", "x", "y", "width", "height", "Target"))
    boxes, is_valid = make_boxes(rows.patientId, rows[["x", "y", "width", "height"]])
    has_both = rows.groupby("patientId").Target.transform("nunique") > 1
    excluded = set(rows.patientId[~rows.Target.isin(["0", "1"]) | (is_valid != (rows.Target == "1")) | has_both])
    for patient in sorted(excluded):
        faults.add(
            LABELS, patient, "Target must be 1 with a valid box in every row, or 0 without a box; the image is left out"
        )
    boxed = set(boxes.image_id[is_valid])
    class_path = source.find_table(*CLASS_TABLES)
    if class_path is None:
        faults.add(CLASSES, "", "the file is missing; whether an image without an opacity is normal is unknown")
        patients = sorted(set(rows.patientId) - excluded)
        classes = pd.Series(["Lung Opacity" if patient in boxed else "" for patient in patients])
        labels = one_hot(pd.Series(patients), classes, RSNA_CLASSES)
        labels.loc[(classes == "").to_numpy(), [name for name in RSNA_CLASSES if name != "Lung Opacity"]] = np.nan
        return labels, boxes[is_valid & ~boxes.image_id.isin(excluded)]
    detailed = read_csv(class_path, ("patientId", "class"))[["patientId", "class"]].drop_duplicates()
    for patient in sorted(set(detailed.patientId[detailed.patientId.duplicated(keep=False)])):
        faults.add(CLASSES, patient, "has two different classes; the image is left out")
        excluded.add(patient)
    class_of = detailed.drop_duplicates("patientId").set_index("patientId")["class"]
    for patient in sorted(set(rows.patientId) - excluded):
        name = class_of.get(patient, "")
        if name not in RSNA_CLASSES or (name == "Lung Opacity") != (patient in boxed):
            faults.add(CLASSES, patient, f"the class {name!r} is invalid or contradicts the boxes; the image is left out")
            excluded.add(patient)
    patients = sorted(set(rows.patientId) - excluded)
    labels = one_hot(pd.Series(patients), class_of.reindex(patients).reset_index(drop=True), RSNA_CLASSES)
    return labels, boxes[is_valid & ~boxes.image_id.isin(excluded)]


def read_nih_patients(source: DataFolder) -> dict[str, str]:
    """Return a dict from RSNA's patientId to NIH's patient id (such as `nih-00000001`), from RSNA's list of NIH images.

    If the list (the file MAPPING) is missing, the dict is empty, and a fault is recorded. Raises DatasetError if the list
    cannot be parsed.
    """
    path = source.find_table(MAPPING)
    if path is None:
        source.faults.add(MAPPING, "", "the file is missing; images of one NIH patient may fall into several folds")
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
            f"{path} must list objects with 'subset_img_id' and 'img_id' ({error!r}): fetch this file again, or remove it"
        ) from error
