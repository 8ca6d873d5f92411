"""Reads NIH ChestX-ray14 (Wang et al. 2017): images, labels (14 findings, or No Finding), boxes, official lists."""

from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import NIH_FINDINGS
from kitlib.datasets.base import Dataset, add_headers, cut_at_edges, make_boxes, scale_boxes
from kitlib.datasets.data_folder import DataFolder, listed_id, or_renamed, read_csv, read_lines
from kitlib.datasets.diagnoses import parse_ages, parse_sexes
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError
from kitlib.tables import BOX

# The first name is the organisers', and the later of their tables corrects ages and sexes. Copies on Kaggle rename the
# files, for example to train_val_list_NIH.txt; nih-chest-xrays/sample has sample_labels.csv.
ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
BOXES = "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
SIDE = 1024  # pixels a side of every published image; boxes are in these pixels, even in resized copies
HOW_TO_GET = "`kaggle datasets download nih-chest-xrays/data`, see inputs/README.md"
# Images and patients are from Wang et al. 2017 and the data set's FAQ; rows per finding are counted in Data_Entry_2017.csv.
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


def read_nih(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images anywhere below `folder`, with labels and boxes. Resized images and renamed tables are read too.

    image_id and study_id are the file name without suffix; patient ids have the form `nih-00000001`. Labels have the columns
    NIH_FINDINGS, 0 or 1. `images` has sex and age, as far as the table states them (`058Y` or 58; above 130 is unknown).
    `boxes` has an additional column `finding`; boxes of resized images are scaled. If the official lists of training and
    test images are present, `split` is "train" or "test". Left out and recorded in `Dataset.faults`: rows without a file,
    files without a row, invalid boxes, images with an unreadable header or an unknown finding, images in neither official
    list. Raises DatasetError if the table of entries is missing or lacks a column, if one official list is present without
    the other, or if no file is an image that the table lists.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    path = source.need_table(*chain(*map(or_renamed, ENTRIES)), how_to_get=HOW_TO_GET)
    name = path.name
    table = read_csv(path, ("Image Index", "Finding Labels", "Patient ID", "View Position"))
    table["image_id"] = table["Image Index"].map(listed_id)
    for image_id in table.image_id[table.image_id.duplicated()]:
        faults.add(name, image_id, "the image occurs again; the first row is used")
    table = table.drop_duplicates("image_id")
    files = source.find_images()
    if not files:
        raise DatasetError(f"{folder} contains no PNG or JPEG image. Unpack images_001 to images_012 there: {HOW_TO_GET}")
    if not table.image_id.isin(list(files)).any():
        raise DatasetError(
            f"{name} lists {len(table)} images, such as {table['Image Index'].iloc[0] if len(table) else 'none'}, but "
            f"none of the {len(files)} images in {folder}, such as {next(iter(files.values()))}. To get them: {HOW_TO_GET}"
        )
    table = _match_files(table, files, name, faults)
    labels = _read_labels(table, name, faults)
    table = table[table.image_id.isin(labels.id)]
    rows = pd.DataFrame(
        {
            "image_id": table.image_id,
            "patient_id": "nih-" + table["Patient ID"].str.strip().str.zfill(8),
            "path": table.path,
            "source": "nih",
            "view": table["View Position"],
            "sex": parse_sexes(table.get("Patient Gender", pd.Series("", index=table.index))),
            "age": parse_ages(_ages(table), table.image_id, faults, name),
        }
    )
    images = add_headers(rows, source, progress)
    boxes = read_boxes(source.find_table(*or_renamed(BOXES)), faults)
    boxes = boxes[boxes.image_id.isin(images.image_id)]
    originals = images[["image_id"]].assign(rows=SIDE, columns=SIDE)
    boxes = scale_boxes(boxes, images, originals, source, BOXES)
    images, boxes = cut_at_edges(images, boxes, source, BOXES)
    images = _add_split(images, source)
    labels, boxes = labels[labels.id.isin(images.image_id)], boxes[boxes.image_id.isin(images.image_id)]
    return Dataset.from_tables(source, images, labels, PUBLISHED, boxes=boxes.reset_index(drop=True))


def _ages(table: pd.DataFrame) -> pd.Series:
    """Return the ages in years as text; ages in months or days (units M and D of the first release) become "0"."""
    cells = table.get("Patient Age", pd.Series("", index=table.index)).str.strip()
    return cells.mask(cells.str.match(r"\d+[MD]$"), "0").str.removesuffix("Y")


def _match_files(table: pd.DataFrame, files: dict[str, Path], name: str, faults: Faults) -> pd.DataFrame:
    table["path"] = table.image_id.map({image_id: str(path) for image_id, path in files.items()})
    # A single fault, because a hundred thousand rows have no file if only one archive is unpacked.
    faults.add_summary(name, table.image_id[table.path.isna()], "have no file; left out", "other rows")
    faults.add_summary("the folder", set(files) - set(table.image_id), f"have no row in {name}; left out", "other files")
    return table[table.path.notna()].sort_values("image_id")


def _read_labels(table: pd.DataFrame, name: str, faults: Faults) -> pd.DataFrame:
    findings = [set(cell.split("|")) for cell in table["Finding Labels"]]
    labels = pd.DataFrame({name: [float(name in cell) for cell in findings] for name in NIH_FINDINGS})
    labels["id"] = table.image_id.to_numpy()
    # "No Finding" excludes all other findings. An empty cell is invalid because "" is not a finding.
    is_invalid = [not cell <= set(NIH_FINDINGS) or ("No Finding" in cell and len(cell) > 1) for cell in findings]
    for image_id, cell in zip(table.image_id[is_invalid], table["Finding Labels"][is_invalid], strict=True):
        faults.add(name, image_id, f"the findings {cell!r} are not valid (one or more of 14, or No Finding alone); left out")
    return labels[~np.array(is_invalid)]


def read_boxes(path: Path | None, faults: Faults) -> pd.DataFrame:
    """Return the boxes in the file `path`, as a table with the columns image_id, xmin, ymin, xmax, ymax and finding.

    The file's first six columns are `Image Index`, `Finding Label`, x, y, width and height; the last four may have any
    names. Invalid boxes are left out and recorded in `faults`. If `path` is None, `faults` records the missing file, and the
    table is empty. Raises DatasetError if the file lacks columns.
    """
    columns = ["image_id", *BOX, "finding"]
    if path is None:
        faults.add(BOXES, "", "the file is missing; there are no boxes")
        return pd.DataFrame(columns=columns)
    table = read_csv(path, ("Image Index", "Finding Label"))
    if len(table.columns) < 6:
        raise DatasetError(
            f"{path} has the columns {list(table.columns)}; x, y, width or height is missing. To get the file: {HOW_TO_GET}"
        )
    boxes, is_valid = make_boxes(table["Image Index"].map(listed_id), table.iloc[:, 2:6])
    for image_id in boxes.image_id[~is_valid]:
        faults.add(path.name, image_id, "the box has no area, or one of its cells is not a number; the box is left out")
    # The list calls Infiltration "Infiltrate".
    finding = table["Finding Label"].replace("Infiltrate", "Infiltration")
    return boxes.assign(finding=finding)[is_valid][columns]


def _add_split(images: pd.DataFrame, source: DataFolder) -> pd.DataFrame:
    paths = {split: source.find_table(*or_renamed(name)) for split, name in LISTS.items()}
    missing = [LISTS[split] for split, path in paths.items() if path is None]
    if len(missing) == 1:
        raise DatasetError(
            f"{source.folder} has only one of the two official lists: {missing[0]} is missing, so the test images are "
            f"unknown. Give an input that contains {missing[0]} in the parameter `beside`, or use neither list"
        )
    if missing:
        source.faults.add(", ".join(missing), "", "the official lists are missing; all images may be used for training")
        return images
    split_of = {listed_id(line): split for split, path in paths.items() if path for line in read_lines(path)}
    split = images.image_id.map(split_of)
    problem = "are in neither of the official lists; left out"
    source.faults.add_summary(", ".join(LISTS.values()), images.image_id[split.isna()], problem, "other images")
    return images.assign(split=split)[split.notna()]
