"""Finds the test images of a competition by the ids of its sample submission, in any folders, without opening a file."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from kitlib.datasets.data_folder import DICOM, IMAGES, without_suffix
from kitlib.datasets.faults import Faults
from kitlib.datasets.train_images import OF_TEST
from kitlib.datasets.walk import walk
from kitlib.errors import DatasetError
from kitlib.tables import check_table


def read_test_images(folder: str | Path, ids: Collection[str], name: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return an `images` table of the image files in `folder` that are named after `ids`, and a table of faults.

    File names and ids are compared without the suffixes of images. If several files have the same name, a file in a folder
    with "test" in its name is preferred, then a DICOM file, then the first path in alphabetical order. No file is opened:
    sizes are 0, and each image is its own study and patient. `name` becomes the images' `source`. Faults (see Dataset) are
    ids without a file, files that are not used because another file has the same name, and files in folders of test images
    that are not named after an id. Ids without a file still need a row in the submission. Raises DatasetError if `folder`
    does not exist.
    """
    folder, wanted, faults = Path(folder), {without_suffix(name): name for name in ids}, Faults()
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is not a folder; give the folder that holds the competition's files, see inputs/README.md"
        )
    candidates: list[tuple[bool, bool, str, str]] = []
    unlisted: list[str] = []
    for place, names in walk(folder, lambda path, reason: faults.add("the folder", path, f"{reason}; left out")):
        is_test = any(map(OF_TEST.search, place.relative_to(folder).as_posix().lower().split("/")))
        for file in names:
            image_id, suffix = wanted.get(without_suffix(file)), Path(file).suffix.lower()
            if image_id is not None:
                candidates.append((not is_test, suffix not in DICOM, str(place / file), image_id))
            elif is_test and suffix in IMAGES:
                unlisted.append((place / file).relative_to(folder).as_posix())
    paths: dict[str, str] = {}
    for _, _, path, image_id in sorted(candidates):
        paths.setdefault(image_id, path)
    others = [Path(path).relative_to(folder).as_posix() for *_, path, image_id in candidates if paths[image_id] != path]
    faults.add_summary("the folder", others, "have the name of another file; left out", "other files")
    faults.add_summary("the folder", unlisted, "are test images that the sample submission does not list", "other files")
    faults.add_summary("the sample submission", set(ids) - set(paths), "have no file, but still get a row", "other images")
    image_ids = [image_id for image_id in ids if image_id in paths]
    images = pd.DataFrame({"image_id": image_ids, "study_id": image_ids, "patient_id": image_ids})
    images = images.assign(path=[paths[image_id] for image_id in image_ids], rows=0, columns=0, source=name, view="")
    return check_table(images, "images", str(folder)), faults.table()
