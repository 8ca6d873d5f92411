"""Reads JSRT's database of nodules with the SCR masks of lungs and heart into the kit's tables."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, files_below, one_hot
from kitlib.errors import DatasetError
from kitlib.xrays.image_file import JSRT_BYTES, JSRT_SIDE

NAME = re.compile(r"JPC(LN|NN)\d{3}")
LABELS = {"LN": "nodule", "NN": "no nodule"}
# Folder of SCR -> structure. It has the clavicles, too, which are not read. Its sides are the patient's.
STRUCTURES = {"heart": "heart", "left lung": "left_lung", "right lung": "right_lung"}
MASK_SUFFIXES = (".gif", ".png")
IMAGES_GOT = "from db.jsrt.or.jp, see inputs/README.md"
MASKS_GOT = "from www.isi.uu.nl/Research/Databases/SCR, see inputs/README.md"
# Shiraishi et al. 2000 (AJR) for the images; van Ginneken et al. 2006 (Medical Image Analysis) for the masks, of each.
PUBLISHED = {"images": 247, "nodule": 154, "no nodule": 93, "masks": 247}


def read_jsrt(folder: str | Path, progress: bool = True) -> Dataset:
    """The raw `.IMG` files below `folder`, as JSRT's `All247images` has them, and the masks of SCR's `scratch`.

    image_id, study_id and patient are the file's name, labels the columns nodule and no nodule, by that name. Left out, with
    a fault: files of another name or size. Images without a mask stay; so do those that lack some of the structures that
    other images have, but without their masks. Raises DatasetError where no image or no mask is there.
    """
    folder, faults = Path(folder), Faults()
    found = files_below(folder, (".img",), faults)
    files = {}
    for name, path in sorted(found.items()):
        size = path.stat().st_size
        if not NAME.fullmatch(name.upper()):
            faults.add(path.name, name, "is none of JSRT's names, JPCLN001 and so on; left out")
        elif size != JSRT_BYTES:
            faults.add(path.name, name, f"has {size} bytes, and JSRT's files have {JSRT_BYTES}; left out, fetch it again")
        else:
            files[name.upper()] = path
    if not files:
        raise DatasetError(f"{folder} holds no .IMG file of JSRT: unpack All247images there, {IMAGES_GOT}")
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
    masks = _masks(folder, images, faults)
    return Dataset.checked(folder, images, labels, faults, PUBLISHED, masks=masks)


def _masks(folder: Path, images: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    """Of images that have every structure that any has."""
    rows = []
    # SCR has two folds, and each has a folder of every structure.
    for found in sorted(path for path in folder.rglob("*") if path.name.lower() in STRUCTURES and path.is_dir()):
        structure = STRUCTURES[found.name.lower()]
        for name, path in files_below(found, MASK_SUFFIXES, faults).items():
            rows.append((name.upper(), structure, str(path)))
    masks = pd.DataFrame(rows, columns=["image_id", "structure", "path"], dtype=object)
    if masks.empty:
        raise DatasetError(f"{folder} holds no mask: unpack SCR's folder scratch there, {MASKS_GOT}")
    twice = masks.duplicated(["image_id", "structure"])
    for row in masks[twice].itertuples():
        faults.add(row.path, row.image_id, f"is a second mask of its {row.structure.replace('_', ' ')}; left out")
    masks = masks[~twice]
    faults.count("scratch", set(masks.image_id) - set(images.image_id), "have masks and no image; left out")
    masks = masks[masks.image_id.isin(images.image_id)]
    structures = set(masks.structure)
    lacking = {image_id: structures - set(part) for image_id, part in masks.groupby("image_id").structure}
    lacking = {image_id: names for image_id, names in lacking.items() if names}
    for image_id, names in lacking.items():
        words = ", ".join(sorted(name.replace("_", " ") for name in names))
        faults.add("scratch", image_id, f"has no mask of the {words}; its other masks are left out")
    faults.count("scratch", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    return masks[~masks.image_id.isin(list(lacking))].sort_values(["image_id", "structure"], ignore_index=True)
