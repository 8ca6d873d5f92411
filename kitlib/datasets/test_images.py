"""Lists the images of a competition's test set."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from kitlib.datasets.data_folder import IMAGES, DataFolder


def read_test_images(folder: str | Path, ids: Collection[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return an `images` table of the image files below `folder` whose names without suffix are in `ids`; and faults.

    Headers are not read: rows and columns are 0, and each image is its own study and patient. Files in folders with "test"
    in their name are preferred to others. An id without a file is a fault; for the columns of the second table see
    kitlib.datasets.base.Dataset.
    """
    source = DataFolder(folder)
    files = source.find_images(IMAGES, lambda path: any("test" in name for name in source.folders(path)))
    missing = [name for name in ids if name not in files]
    if missing:
        files |= {name: path for name, path in source.find_images(IMAGES).items() if name not in files}
        missing = [name for name in missing if name not in files]
    source.faults.add_summary("sample submission", missing, "have no image file", "other ids")
    listed = [name for name in ids if name in files]
    images = pd.DataFrame({"image_id": listed, "study_id": listed, "patient_id": listed})
    images = images.assign(path=[str(files[name]) for name in listed], rows=0, columns=0, source="test", view="")
    return images, source.faults.table()
