"""Finds the training images that a competition's table lists, in any folders, and reads their headers."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import add_headers
from kitlib.datasets.data_folder import DICOM, PICTURES, DataFolder, listed_id
from kitlib.errors import DatasetError

OF_TEST = re.compile(r"(^|[ _-])test\d*([ _-]|$)")  # a folder of test images


def read_train_images(
    source: DataFolder,
    ids: Collection[str],
    table: str,
    *,
    name: str,
    how_to_get: str,
    patients: Mapping[str, str] | None = None,
    in_test_folders: bool = False,
    progress: bool,
) -> pd.DataFrame:
    """Return an `images` table of the image files that are named after `ids`; each image is its own study.

    The files are DICOM, PNG or JPEG. `table` is the file that lists the ids, for messages; `name` becomes the images'
    `source`. `patients` maps an image_id to its patient; an image without a patient is its own patient. Files in folders of
    test images are used only if `in_test_folders` is True; files in folders of masks are never used. Added to the faults of
    `source`: ids without a file, files without an id, and images with an unreadable header. Raises DatasetError, whose
    message ends with `how_to_get`, if no file is named after one of `ids`.
    """

    def is_test(path: Path) -> bool:
        return not in_test_folders and any(map(OF_TEST.search, source.folders(path)))

    def is_mask(path: Path) -> bool:
        return any("mask" in name for name in source.folders(path)[-1:])

    listed, faults, suffixes = set(ids), source.faults, (*DICOM, *PICTURES)
    test_files = source.find(suffixes, is_test)
    source.set_aside(test_files)
    of_test = {listed_id(path.name) for path in test_files} & listed
    faults.add_summary("the folder", of_test, "lie in a folder of test images; left out", "other listed images")
    files = source.find_images(suffixes, lambda path: not is_test(path) and not is_mask(path))
    if listed.isdisjoint(files):
        first, wanted = next(iter(files.values()), "none"), next(iter(ids), "none")
        places = "" if in_test_folders else ", outside folders with 'test' in their names"
        raise DatasetError(
            f"{table} lists {len(listed)} images (the first is {wanted}), but none of them is among the {len(files)} images "
            f"(the first is {first}) in {source.folder}{places}: {how_to_get}"
        )
    faults.add_summary(table, listed - set(files), "have no file; left out", "other images")
    problem = f"have no usable row in {table}; left out"
    faults.add_summary("the folder", set(files) - listed, problem, "other files")
    image_ids = sorted(listed & set(files))
    rows = pd.DataFrame(
        {
            "image_id": image_ids,
            "patient_id": [(patients or {}).get(image_id, image_id) for image_id in image_ids],
            "path": [str(files[image_id]) for image_id in image_ids],
            "source": name,
            "view": "",
        }
    )
    return add_headers(rows, source, progress)
