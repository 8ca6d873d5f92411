"""Reads the JSRT database of lung nodules with the SCR masks of lungs and heart."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, add_headers, one_hot
from kitlib.datasets.data_folder import PICTURES, DataFolder
from kitlib.errors import DatasetError
from kitlib.xrays.image_file import JSRT_BYTES

NAME = re.compile(r"JPC(LN|NN)\d{3}")
LABELS = {"LN": "nodule", "NN": "no nodule"}
# Folder in SCR or a copy -> structure; left and right are the patient's. SCR's clavicles are not read.
STRUCTURES = {"heart": "heart", "left lung": "left_lung", "right lung": "right_lung", "mask": "lungs", "lung": "lungs"}
MASK_SUFFIXES = (".gif", ".png")
HOW_TO_GET_IMAGES = "from db.jsrt.or.jp, see inputs/README.md"
HOW_TO_GET_MASKS = "from www.isi.uu.nl/Research/Databases/SCR, see inputs/README.md"
# Shiraishi et al. 2000 (AJR) for the images; van Ginneken et al. 2006 (Medical Image Analysis) for the masks of all of them.
PUBLISHED = {"images": 247, "nodule": 154, "no nodule": 93, "masks": 247}


def read_jsrt(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images below `folder` (raw `.IMG` files as in JSRT's `All247images`, or PNG or JPEG) and their masks.

    A mask is a file in a folder named "heart", "left lung" or "right lung", as in SCR's folder `scratch`, or "mask" or
    "lung" (both lungs). Folder names may have `_` or `-` for a space, and a plural s. The `image_id` and `study_id` are the
    file name without suffix. The name also identifies the patient and states the label (nodule or no nodule). Files with
    other names, and raw files of another size, are left out and recorded in `Dataset.faults`. Images without masks are
    included. If an image lacks the mask of a structure that other images have, its other masks are left out. If no image has
    masks, `Dataset.masks` is None. Both are recorded as faults. Raises DatasetError if there is no image, or no lung mask
    among the masks.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    candidates = source.find_images((".img",)) or source.find_images(PICTURES, lambda path: not _structure(path))
    files, misnamed = {}, []
    for name, path in candidates.items():
        size = path.stat().st_size
        if not NAME.fullmatch(name.upper()):
            misnamed.append(path.name)
        elif path.suffix.lower() == ".img" and size != JSRT_BYTES:
            faults.add(path.name, name, f"has {size} bytes instead of {JSRT_BYTES}; left out. Fetch the file again")
        else:
            files[name.upper()] = path
    faults.add_summary("the folder", misnamed, "have no name such as JPCLN001; left out", "other files")
    if not files:
        raise DatasetError(
            f"{folder} has {len(source.paths)} files, but no image of JSRT, such as JPCLN001.IMG; unpack 'All247images' "
            f"into this folder, {HOW_TO_GET_IMAGES}"
        )
    rows = pd.DataFrame(
        {
            "image_id": list(files),
            "patient_id": [f"jsrt-{name}" for name in files],
            "path": [str(path) for path in files.values()],
            "source": "jsrt",
            "view": "PA",
            "convention": "lung_fields",
        }
    )
    images = add_headers(rows, source, progress)
    labels = one_hot(images.image_id, images.image_id.str.slice(3, 5).map(LABELS), LABELS.values())
    masks = _find_masks(source, images)
    return Dataset.from_tables(source, images, labels, PUBLISHED, masks=masks)


def _structure(path: Path) -> str:
    """Return the structure that the mask file `path` shows, according to its folder; "" if it is not in a mask folder."""
    return STRUCTURES.get(re.sub("[ _-]+", " ", path.parent.name.lower()).removesuffix("s"), "")


def _find_masks(source: DataFolder, images: pd.DataFrame) -> pd.DataFrame | None:
    """Return the mask files as a table like `Dataset.masks`; if there are none, record a fault and return None.

    If an image lacks the mask of a structure that occurs in the data set, the image's other masks are left out and a fault
    is recorded. Raises DatasetError if no mask shows a lung.
    """
    faults = source.faults
    source.find(MASK_SUFFIXES, lambda path: "clavicle" in path.parent.name.lower())  # known, but not used
    # SCR has two folds, each with a folder per structure.
    found = source.find(MASK_SUFFIXES, lambda path: bool(_structure(path)) and NAME.fullmatch(path.stem.upper()) is not None)
    rows = [(path.stem.upper(), _structure(path), str(path)) for path in found]
    if not rows:
        faults.add("the folder", "", f"there are no masks; unpack SCR's folder scratch there, {HOW_TO_GET_MASKS}")
        return None
    masks = pd.DataFrame(rows, columns=["image_id", "structure", "path"])
    is_repeated = masks.duplicated(["image_id", "structure"])
    for structure, repeated in masks[is_repeated].groupby("structure").image_id:
        problem = f"have a second mask of the {structure.replace('_', ' ')}; left out"
        faults.add_summary("scratch", repeated, problem, "other images")
    masks = masks[~is_repeated]
    faults.add_summary("scratch", set(masks.image_id) - set(images.image_id), "have masks but no image; left out")
    masks = masks[masks.image_id.isin(images.image_id)]
    structures = set(masks.structure)
    if structures <= {"heart"}:
        raise DatasetError(
            f"{source.folder} has masks of the heart, but none in folders named 'left lung' or 'right lung'; unpack SCR's "
            f"folder 'scratch' into this folder, {HOW_TO_GET_MASKS}"
        )
    missing = {image_id: structures - set(part) for image_id, part in masks.groupby("image_id").structure}
    missing = {image_id: names for image_id, names in missing.items() if names}
    for image_id, names in missing.items():
        words = ", ".join(sorted(name.replace("_", " ") for name in names))
        faults.add("scratch", image_id, f"has no mask of the {words}; its other masks are left out")
    faults.add_summary("scratch", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    return masks[~masks.image_id.isin(list(missing))].sort_values(["image_id", "structure"])
