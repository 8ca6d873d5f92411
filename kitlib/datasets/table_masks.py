"""Finds the files of lung masks in a user's own data set, and matches each mask with its image."""

import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

from kitlib.datasets.data_folder import PICTURES, DataFolder, folded, without_suffix
from kitlib.errors import DatasetError

MaskFiles = dict[Path, tuple[tuple[str, ...], tuple[str, ...]]]  # path -> folders above and below the mask folder
MASK_SUFFIXES = (*PICTURES, ".gif")
# What a mask's file name has in addition to the name of its image: x_mask, x-mask, mask_x, x_lung_mask.
AFFIX = re.compile(r"(?:[ _-]?lungs?)?[ _-]?(?:mask|seg|segmentation|label)s?$|^(?:mask|seg)s?[ _-]", re.IGNORECASE)


def find_mask_files(source: DataFolder, mask_folder: str) -> MaskFiles:
    """Return a dict from each mask file's path to two tuples: names of the folders above, and of those below, `mask_folder`.

    `mask_folder` is the name of a folder, or a path such as `annotations/masks`; case is ignored. Several folders may have
    this name, as in CLASS/masks, also within one another. The data set's additional folders are searched, too. Raises
    DatasetError if no folder of this name contains PNG, JPEG or GIF files.
    """
    wanted = tuple(folded(mask_folder).strip("/").split("/"))
    found = {}
    for path in source.paths:
        beside = [root.name for root in source.beside if root in path.parents and source.folder not in path.parents]
        folders = tuple(folded(name) for name in (*beside[:1], *source.name(path).split("/")[:-1]))
        starts = [start for start in range(len(folders)) if folders[start : start + len(wanted)] == wanted]
        if starts and path.suffix.lower() in MASK_SUFFIXES:
            found[path] = (folders[: starts[0]], folders[starts[-1] + len(wanted) :])
    if not found:
        available = sorted(
            {source.name(path).rpartition("/")[0] for path in source.paths if path.suffix.lower() in MASK_SUFFIXES}
        )
        raise DatasetError(
            f"{source.folder} has no folder {mask_folder!r} with files of the types {', '.join(MASK_SUFFIXES)}; set "
            f"mask_folder to the folder of the masks. Folders with such files: {', '.join(available[:10]) or 'none'}"
        )
    return found


def match_masks(source: DataFolder, images: pd.DataFrame, files: MaskFiles) -> pd.DataFrame:
    """Return a table of lung masks, with the columns of Dataset.masks; `files` is the result of `find_mask_files`.

    A mask file has the name of its image, optionally with "mask" before or after it (see AFFIX). If several images have this
    name, the image's folders must also match: its first folders must be those above the mask folder, or its last folders
    those below the mask folder. A mask that matches no image or several images is not used. The numbers of such masks and of
    images without a mask are recorded in `source.faults`. Raises DatasetError if no mask matches an image.
    """
    images_of: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)  # name and folders -> image ids
    for image_id, path in zip(images.image_id, images.path, strict=True):
        *folders, name = folded(source.name(path)).split("/")
        name = without_suffix(name)
        images_of[name,].append(image_id)
        for number in range(1, len(folders) + 1):
            images_of[name, "above", *folders[:number]].append(image_id)
            images_of[name, "below", *folders[-number:]].append(image_id)
    rows: list[tuple[str, str, str]] = []
    orphans: list[str] = []
    unclear: list[str] = []
    for path, (above, below) in files.items():
        name = without_suffix(folded(path.name))
        name = name if (name,) in images_of else AFFIX.sub("", name)
        named = images_of.get((name,), [])
        above_it, below_it = images_of.get((name, "above", *above), []), images_of.get((name, "below", *below), [])
        named = above_it if len(above_it) == 1 else below_it if len(below_it) == 1 else named
        if len(named) == 1:
            rows.append((named[0], "lungs", str(path)))
        else:
            (unclear if named else orphans).append(source.name(path))
    source.mark_read(files)
    masks = pd.DataFrame(rows, columns=["image_id", "structure", "path"])
    source.faults.add_summary("the folder", orphans, "are masks without an image of their name; left out", "other files")
    source.faults.add_summary("the folder", unclear, "are masks whose name several images have; left out", "other files")
    source.faults.add_summary("the folder", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    if masks.empty:
        raise DatasetError(
            f"{source.folder}: no mask has the name of an image; rename the masks, or leave mask_folder empty. One of the "
            f"{len(files)} masks is {source.name(next(iter(files)))!r}, one of the {len(images)} images is "
            f"{source.name(images.path.iloc[0])!r}"
        )
    return masks.sort_values(["image_id", "path"])
