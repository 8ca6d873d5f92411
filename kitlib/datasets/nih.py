"""Reads NIH ChestX-ray14 (Wang et al. 2017) into the kit's tables: 14 findings and No Finding, official lists, boxes."""

from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import NIH_FINDINGS
from kitlib.datasets.base import Dataset, Faults, boxes_of, cut_at_edges, files_below, read_csv, with_headers
from kitlib.errors import DatasetError
from kitlib.tables import BOX

ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the later one corrects ages and sexes
BOXES = "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
GOT = "`kaggle datasets download nih-chest-xrays/data`, see inputs/README.md"
# Wang et al. 2017 and the data's own FAQ: images and patients; rows a finding are of Data_Entry_2017.csv.
PUBLISHED = {
    "images": 112120,
    "patients": 30805,
    "boxes": 984,
    "Atelectasis": 11559,
    "Cardiomegaly": 2776,
    "Effusion": 13317,
    "Infiltration": 19894,
    "Mass": 5782,
    "Nodule": 6331,
    "Pneumonia": 1431,
    "Pneumothorax": 5302,
    "Consolidation": 4667,
    "Edema": 2303,
    "Emphysema": 2516,
    "Fibrosis": 1686,
    "Pleural_Thickening": 3385,
    "Hernia": 227,
    "No Finding": 60361,
}


def read_nih(folder: str | Path, progress: bool = True) -> Dataset:
    """The images below `folder` with their findings; they lie in `images_001/images` to `images_012/images`, or elsewhere.

    image_id and study_id are the file's name without suffix, patients are `nih-00000001`. Labels have the columns
    NIH_FINDINGS, 0 or 1. `boxes` has the column `finding`. `split` is train or test where the official lists are there.
    Left out, with a fault: rows without a file, files without a row, unreadable headers, unknown findings, bad boxes.
    Raises DatasetError where the table of entries is missing or has other columns, or no image is there.
    """
    folder, faults = Path(folder), Faults()
    name = next((each for each in ENTRIES if (folder / each).is_file()), ENTRIES[-1])
    table = read_csv(folder / name, ("Image Index", "Finding Labels", "Patient ID", "View Position"), GOT)
    for index in table["Image Index"][table["Image Index"].duplicated()]:
        faults.add(name, index, "the image occurs again; the first row is used")
    table = table.drop_duplicates("Image Index")
    files = files_below(folder, (".png", ".jpg", ".jpeg"), faults)
    if not files:
        raise DatasetError(f"{folder} holds no PNG or JPEG image: unpack images_001 to images_012 there, {GOT}")
    table["image_id"] = table["Image Index"].map(lambda index: Path(index).stem)
    table = _with_files(table, files, name, faults)
    labels = _labels(table, name, faults)
    table = table[table.image_id.isin(labels.id)]
    rows = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": "nih-" + table["Patient ID"].str.strip().str.zfill(8),
            "path": table.path,
            "source": "nih",
            "view": table["View Position"],
        }
    )
    images = with_headers(rows, folder, faults, progress)
    boxes = read_boxes(folder / BOXES, faults)
    images, boxes = cut_at_edges(images, boxes[boxes.image_id.isin(images.image_id)], faults, BOXES)
    images = _split(images, folder, faults)
    return Dataset.checked(folder, images, labels[labels.id.isin(images.image_id)], faults, PUBLISHED, boxes=boxes)


def _with_files(table: pd.DataFrame, files: dict[str, Path], name: str, faults: Faults) -> pd.DataFrame:
    table["path"] = table.image_id.map({image_id: str(path) for image_id, path in files.items()})
    # With a single archive unpacked a hundred thousand rows have no file.
    faults.count(name, table.image_id[table.path.isna()], "have no file; left out", "other rows")
    for image_id in sorted(set(files) - set(table.image_id)):
        faults.add(str(files[image_id].name), image_id, f"has no row in {name}; left out")
    return table[table.path.notna()].sort_values("image_id", ignore_index=True)


def _labels(table: pd.DataFrame, name: str, faults: Faults) -> pd.DataFrame:
    found = [set(cell.split("|")) for cell in table["Finding Labels"]]
    values = np.array([[finding in cell for finding in NIH_FINDINGS] for cell in found], dtype=float)
    labels = pd.DataFrame(values.reshape(-1, len(NIH_FINDINGS)), columns=list(NIH_FINDINGS))
    labels.insert(0, "id", table.image_id.to_numpy())
    # "No Finding" excludes the others, and an empty cell says nothing at all.
    bad = [not cell <= set(NIH_FINDINGS) or ("No Finding" in cell and len(cell) > 1) for cell in found]
    for image_id, cell in zip(table.image_id[bad], table["Finding Labels"][bad], strict=True):
        faults.add(name, image_id, f"findings {cell!r} are not among the 15; left out")
    return labels[~np.array(bad, dtype=bool)].reset_index(drop=True)


def read_boxes(path: Path, faults: Faults) -> pd.DataFrame:
    """The list's boxes with their finding; its columns are `Image Index`, `Finding Label`, then x, y, w, h by position."""
    columns = ["image_id", *BOX, "finding"]
    if not path.is_file():
        faults.add(path.name, "", "the file is missing; there are no boxes")
        return pd.DataFrame(columns=columns)
    table = read_csv(path, ("Image Index", "Finding Label"), GOT)
    if len(table.columns) < 6:
        raise DatasetError(f"{path} has the columns {list(table.columns)}: wanted x, y, w, h after image and finding, {GOT}")
    boxes, whole = boxes_of(table["Image Index"].map(lambda index: Path(index).stem), table.iloc[:, 2:6])
    for image_id in boxes.image_id[~whole]:
        faults.add(path.name, image_id, "a box without area or with a cell that is no number; the box is left out")
    # The list calls Infiltration "Infiltrate".
    finding = table["Finding Label"].replace("Infiltrate", "Infiltration")
    return boxes.assign(finding=finding)[whole][columns].reset_index(drop=True)


def _split(images: pd.DataFrame, folder: Path, faults: Faults) -> pd.DataFrame:
    listed: dict[str, str] = {}
    for split, name in LISTS.items():
        path = folder / name
        if not path.is_file():
            faults.add(name, "", "the official list is missing; all images may be trained on")
            return images
        listed |= {Path(line).stem: split for line in path.read_text(encoding="utf-8").split()}
    split = images.image_id.map(listed)
    for image_id in images.image_id[split.isna()]:
        faults.add(", ".join(LISTS.values()), image_id, "is in neither list; left out")
    return images.assign(split=split)[split.notna()].reset_index(drop=True)
