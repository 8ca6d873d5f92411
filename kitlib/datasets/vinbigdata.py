"""Reads the training set of VinBigData Chest X-ray Abnormalities Detection: X-rays, and each radiologist's boxes."""

from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import NO_FINDING, VINBIGDATA_FINDINGS
from kitlib.datasets.base import Dataset, cut_at_edges, original_sizes, scale_boxes
from kitlib.datasets.data_folder import DataFolder, read_csv
from kitlib.datasets.train_images import read_train_images
from kitlib.tables import BOX

LABELS = "train.csv"
CORNERS = ("x_min", "y_min", "x_max", "y_max")
SIZES = ("train_meta.csv", "meta.csv")  # of resized copies, see `original_sizes`
SINGLE = ("Aortic enlargement", "Cardiomegaly")  # findings that an image can have only once
HOW_TO_GET = "`kaggle competitions download -c vinbigdata-chest-xray-abnormalities-detection`, see inputs/README.md"
# Counted in train.csv; the count of a finding is the number of images in which at least one reader drew a box around it.
PUBLISHED = {
    "images": 15000,
    "boxes": 36096,
    **dict(
        zip(
            VINBIGDATA_FINDINGS,
            (3067, 186, 452, 2300, 353, 386, 613, 1322, 826, 1134, 1032, 1981, 96, 1617),
            strict=True,
        )
    ),
    NO_FINDING: 10606,
}


def read_vinbigdata(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the training images below `folder`, with the boxes of 14 findings.

    The images are DICOM or, in resized copies, PNG or JPEG. They may be in any folder that has no "test" in its name. Three
    radiologists (readers) saw each image, and usually each of them drew a box around a finding. The additional column
    `reader` of `boxes` has the radiologist's id. An image has a finding if any reader drew a box around it. Boxes of resized
    images are scaled to their pixels. There are no patient ids: each image is its own patient, and a fault says so. Left out
    and recorded in `Dataset.faults`: rows without a file, files without a row, and images with an unreadable header, an
    invalid row, an invalid box or no original size. Raises DatasetError if a table is missing or lists no image file.
    """
    source = DataFolder.of(folder)
    labels, boxes = read_label_table(source)
    images = read_train_images(source, labels["id"], LABELS, name="vinbigdata", how_to_get=HOW_TO_GET, progress=progress)
    problem = "there are no patient ids; each image is its own patient, so a patient may be in several folds"
    source.faults.add(LABELS, "", problem)
    originals = original_sizes(images, source, *SIZES)
    images = images[images["image_id"].isin(originals["image_id"])]
    boxes = boxes[boxes["image_id"].isin(images["image_id"])]
    images, boxes = cut_at_edges(images, scale_boxes(boxes, images, originals, source, LABELS), source, LABELS)
    return Dataset.from_tables(source, images, labels[labels["id"].isin(images["image_id"])], PUBLISHED, boxes=boxes)


def read_label_table(folder: str | Path | DataFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read `train.csv`; return a `labels` table (id is the image_id) and a `boxes` table.

    `boxes` has the additional columns `finding` and `reader` (the radiologist who drew the box). Boxes are in pixels of the
    original images. An image with an invalid row is left out of both tables, and a fault counts it. If one reader has drawn
    two boxes around a finding that an image can have only once (SINGLE), both are kept, but a fault counts the image. Raises
    DatasetError if the table is missing or lacks a column.
    """
    source = DataFolder.of(folder)
    path = source.need_table(LABELS, how_to_get=HOW_TO_GET)
    table = read_csv(path, ("image_id", "class_id", "rad_id", *CORNERS))
    code = pd.to_numeric(table["class_id"], errors="coerce")
    corners = table[list(CORNERS)].apply(pd.to_numeric, errors="coerce").set_axis(list(BOX), axis=1)
    is_box = code.isin(range(len(VINBIGDATA_FINDINGS)))
    has_area = np.isfinite(corners).all(axis=1) & (corners.xmin < corners.xmax) & (corners.ymin < corners.ymax)
    is_wrong = (is_box & ~has_area) | ~(is_box | (code == len(VINBIGDATA_FINDINGS))) | (table["image_id"] == "")
    excluded = set(table["image_id"][is_wrong])
    problem = "have a row whose class_id is not 0 to 14, or a finding without a box; left out"
    source.faults.add_summary(LABELS, excluded, problem, "other images")
    is_kept = ~table["image_id"].isin(excluded)
    finding = code[is_box].astype(int).map(dict(enumerate(VINBIGDATA_FINDINGS)))
    boxes = pd.concat([table["image_id"], finding.rename("finding"), corners, table["rad_id"].rename("reader")], axis=1)
    boxes = boxes[is_box & is_kept]
    again = boxes["finding"].isin(SINGLE) & boxes.duplicated(["image_id", "finding", "reader"])
    problem = f"have a second {' or '.join(SINGLE)} by one reader, although there can be only one; kept"
    source.faults.add_summary(LABELS, set(boxes["image_id"][again]), problem, "other images")
    disputed = set(table["image_id"][~is_box & is_kept]) & set(boxes["image_id"])
    problem = "have no finding for one reader and boxes of another; the boxes count"
    source.faults.add_summary(LABELS, disputed, problem, "other images")
    ids = pd.Index(sorted(set(table["image_id"][is_kept])))
    labels = pd.crosstab(boxes["image_id"], boxes["finding"]).reindex(ids, columns=VINBIGDATA_FINDINGS) > 0
    labels[NO_FINDING] = ~labels.any(axis=1)
    return labels.astype(float).rename_axis(index="id", columns=None).reset_index(), boxes
