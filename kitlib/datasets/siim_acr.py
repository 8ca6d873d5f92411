"""Reads the training set of SIIM-ACR Pneumothorax Segmentation: X-rays, and the masks of their pneumothoraces."""

from pathlib import Path

import pandas as pd

from kitlib.classes import PNEUMOTHORAX
from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder, listed_id, read_csv
from kitlib.datasets.train_images import read_train_images
from kitlib.errors import DatasetError
from kitlib.xrays.run_lengths import EMPTY, parse_runs

# The tables of stage 2 and of stage 1; in stage 1, column names and values have blanks around them.
LABEL_TABLES = ("stage_2_train.csv", "train-rle.csv")
# The NIH images that the images come from; published by a participant, with the columns Kaggle_ID and NIH_ID.
MAPPINGS = ("siimacr_to_nih.csv", "nih_id.csv")
HOW_TO_GET = "`kaggle competitions download -c siim-acr-pneumothorax-segmentation`, see inputs/README.md"
# Counted in stage_2_train.csv.
PUBLISHED = {"images": 12047, "patients": 6171, "masks": 12047, PNEUMOTHORAX: 2669}


def read_siim_acr(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the training images below `folder` (DICOM, or copies in PNG or JPEG) and their masks, as run lengths.

    The images may be in any folder, even in one for test images: stage 2 uses the test images of stage 1 for training. Both
    `image_id` and `study_id` are the column ImageId. Every image has a mask of the structure "pneumothorax". Each row of
    `masks` is one lesion, or an empty mask if the image's label is 0. If the folder has a list of the images' NIH names (one
    of MAPPINGS), `patient_id` is NIH's patient, written as in kitlib.datasets.nih. Without a list, every image counts as
    a patient of its own, and a fault is recorded. Not read, but recorded in `Dataset.faults`, are rows without a
    file, files without a row, and images whose header is unreadable or whose run lengths are not a mask of 1,024 x 1,024
    pixels. Raises DatasetError if the table is missing, lacks a column, or lists none of the image files.
    """
    source = DataFolder.of(folder)
    path = source.need_table(*LABEL_TABLES, how_to_get=HOW_TO_GET)
    table = read_csv(path, ("ImageId",)).rename(columns=str.strip)
    if "EncodedPixels" not in table:
        raise DatasetError(f"{path} has no column 'EncodedPixels', only {', '.join(map(repr, table))}: {HOW_TO_GET}")
    masks = pd.DataFrame({"image_id": table["ImageId"].str.strip(), "structure": PNEUMOTHORAX.lower(), "path": str(path)})
    masks["runs"] = table["EncodedPixels"].str.strip()
    is_wrong = (masks["image_id"] == "") | masks["runs"].map(lambda text: bool(parse_runs(text)[1]))
    excluded = set(masks["image_id"][is_wrong])
    problem = "have run lengths that are not a mask of 1,024 x 1,024 pixels; left out"
    source.faults.add_summary(path.name, excluded, problem, "other images")
    masks = masks[~masks["image_id"].isin(excluded)]
    ids = sorted(set(masks["image_id"]))
    images = read_train_images(
        source,
        ids,
        path.name,
        name="siim_acr",
        how_to_get=HOW_TO_GET,
        patients=_read_patients(source, ids),
        in_test_folders=True,
        progress=progress,
    )
    masks = masks[masks["image_id"].isin(images["image_id"])].sort_values("image_id", kind="stable")
    positive = set(masks["image_id"][masks["runs"] != EMPTY])
    labels = pd.DataFrame({"id": images["image_id"], PNEUMOTHORAX: images["image_id"].isin(positive).astype(float)})
    return Dataset.from_tables(source, images, labels, PUBLISHED, masks=masks)


def _read_patients(source: DataFolder, ids: list[str]) -> dict[str, str]:
    """Return a dict from image_id to NIH's patient id, read from a list of NIH images (one of MAPPINGS).

    If there is no list, the dict is empty and a fault is recorded. If images in `ids` are not listed, a fault counts them.
    """
    path = source.find_table(*MAPPINGS)
    if path is None:
        source.faults.add(MAPPINGS[0], "", "the file is missing; images of one NIH patient may fall into several folds")
        return {}
    table = read_csv(path, ("Kaggle_ID", "NIH_ID"))
    nih_patients = "nih-" + table["NIH_ID"].map(listed_id).str.partition("_")[0]
    patients = dict(zip(table["Kaggle_ID"], nih_patients, strict=True))
    problem = "have no row; their patients may be in several folds"
    source.faults.add_summary(path.name, set(ids) - set(patients), problem, "other images")
    return patients
