"""Reads the JSRT database of lung nodules with the SCR masks of lungs and heart."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, find_files, one_hot
from kitlib.errors import DatasetError
from kitlib.xrays.image_file import JSRT_BYTES, JSRT_SIDE

NAME = re.compile(r"JPC(LN|NN)\d{3}")
LABELS = {"LN": "nodule", "NN": "no nodule"}
# Folder in SCR -> structure; left and right are the patient's. SCR's clavicles are not read.
STRUCTURES = {"heart": "heart", "left lung": "left_lung", "right lung": "right_lung"}
MASK_SUFFIXES = (".gif", ".png")
HOW_TO_GET_IMAGES = "from db.jsrt.or.jp, see inputs/README.md"
HOW_TO_GET_MASKS = "from www.isi.uu.nl/Research/Databases/SCR, see inputs/README.md"
# Shiraishi et al. 2000 (AJR) for the images; van Ginneken et al. 2006 (Medical Image Analysis) for the masks of all of them.
PUBLISHED = {"images": 247, "nodule": 154, "no nodule": 93, "masks": 247}


def read_jsrt(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the raw `.IMG` files below `folder`, as in JSRT's `All247images`, and the masks in SCR's folder `scratch`.

    image_id and study_id are the file name without suffix, which also identifies the patient and states the label (nodule or
    no nodule). Left out, with a fault: files with another name or size. Images without masks are included. An image that
    lacks some of the structures that other images have is included without any mask. Raises DatasetError if there is no
    image or no mask.
    """
    folder, faults = Path(folder), Faults()
    candidates = find_files(folder, (".img",), faults)
    files = {}
    for name, path in sorted(candidates.items()):
        size = path.stat().st_size
        if not NAME.fullmatch(name.upper()):
            faults.add(path.name, name, "has no name such as JPCLN001; left out")
        elif size != JSRT_BYTES:
            faults.add(path.name, name, f"has {size} bytes instead of {JSRT_BYTES}; left out. Fetch the file again")
        else:
            files[name.upper()] = path
    if not files:
        raise DatasetError(f"{folder} contains no .IMG file of JSRT: unpack All247images there, {HOW_TO_GET_IMAGES}")
    images = pd.DataFrame(
        {
            "image_id": list(files),
            "study_id": list(files),
            "patient_id": [f"jsrt-{name}" for name in files],
            "path": [str(path) for path in files.values()],
            "rows": JSRT_SIDE,
            "columns": JSRT_SIDE,
            "source": "jsrt",
            "view": "PA",
            "convention": "lung_fields",
        }
    )
    labels = one_hot(images.image_id, images.image_id.str.slice(3, 5).map(LABELS), LABELS.values())
    masks = _find_masks(folder, images, faults)
    return Dataset.from_tables(folder, images, labels, faults, PUBLISHED, masks=masks)


def _find_masks(folder: Path, images: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    """Return the mask files below `folder`, as a table like Dataset.masks.

    An image gets masks only if it has one of every structure that occurs; others are faults. Raises DatasetError if there is
    no mask.
    """
    rows = []
    # SCR has two folds, each with a folder per structure.
    for mask_folder in sorted(path for path in folder.rglob("*") if path.name.lower() in STRUCTURES and path.is_dir()):
        structure = STRUCTURES[mask_folder.name.lower()]
        for name, path in find_files(mask_folder, MASK_SUFFIXES, faults).items():
            rows.append((name.upper(), structure, str(path)))
    masks = pd.DataFrame(rows, columns=["image_id", "structure", "path"], dtype=object)
    if masks.empty:
        raise DatasetError(f"{folder} contains no mask: unpack SCR's folder scratch there, {HOW_TO_GET_MASKS}")
    is_repeated = masks.duplicated(["image_id", "structure"])
    for row in masks[is_repeated].itertuples():
        faults.add(row.path, row.image_id, f"is a second mask of the {row.structure.replace('_', ' ')}; left out")
    masks = masks[~is_repeated]
    faults.add_summary("scratch", set(masks.image_id) - set(images.image_id), "have masks but no image; left out")
    masks = masks[masks.image_id.isin(images.image_id)]
    structures = set(masks.structure)
    missing = {image_id: structures - set(part) for image_id, part in masks.groupby("image_id").structure}
    missing = {image_id: names for image_id, names in missing.items() if names}
    for image_id, names in missing.items():
        words = ", ".join(sorted(name.replace("_", " ") for name in names))
        faults.add("scratch", image_id, f"has no mask of the {words}; its other masks are left out")
    faults.add_summary("scratch", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    return masks[~masks.image_id.isin(list(missing))].sort_values(["image_id", "structure"], ignore_index=True)
