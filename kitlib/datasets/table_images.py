"""Finds the image files that a user's own table lists, makes their image ids, and takes classes from folder names."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pandas as pd

from kitlib.datasets.data_folder import DICOM, IMAGES, PICTURES, DataFolder, folded, without_suffix
from kitlib.errors import DatasetError
from kitlib.tables import storable

# The name of a folder of masks, such as masks, leftMask and lung_masks, but not masked.
OF_MASKS = re.compile(r"(^|[ _-])masks?([ _-]|$)|masks?$", re.IGNORECASE)


LONGEST_ID = 150  # characters; ids are used as file names in the cache, which allows 200


class ImageNames:
    """Finds the image files of a data set from the file names or paths in a table's cells.

    Three kinds of files are never found: the mask files in `masks`, files in folders of masks (see OF_MASKS), and files
    whose name is not UTF-8. The last two kinds are recorded in `source.faults`.

    A cell matches a file if the file names and the folders are equal. Folders are compared from the last one backwards,
    until the shorter path ends. So the cell may have fewer folders than the file's path, or more, such as those of another
    computer. Case, Unicode form and suffix may differ, but a file with the same suffix is preferred. DICOM files may have no
    suffix.
    """

    def __init__(self, source: DataFolder, masks: Collection[Path] = ()) -> None:
        self.source = source
        self._named: defaultdict[str, list[Path]] = defaultdict(list)
        self._nearest: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
        self._folders: dict[Path, list[str]] = {}
        self._by_path: dict[str, Path] = {}
        paths = [path for path in source.paths if path not in masks and (path.suffix.lower() in IMAGES or _is_bare(path))]
        unused = {path for path in paths if any(map(OF_MASKS.search, source.name(path).split("/")[:-1]))}
        unnamed = {path for path in paths if storable(str(path)) != str(path)}
        source.mark_read(unused | unnamed)
        problem = "have a name that is not UTF-8, which no table can store; left out: rename the files"
        source.faults.add_summary("the folder", map(source.name, unnamed), problem, "other image files")
        problem = "lie in a folder of masks; left out. To use them, set the parameter mask_folder"
        source.faults.add_summary("the folder", map(source.name, unused), problem, "other image files")
        self.paths = [path for path in paths if path not in unused and path not in unnamed]
        for path in self.paths:
            *folders, name = folded(source.name(path)).split("/")
            # In some data sets many files have the same name (1-1.dcm), so files are also indexed by their nearest folder.
            for key in {name, without_suffix(name)}:
                self._named[key].append(path)
                self._nearest[key, folders[-1] if folders else ""].append(path)
            self._folders[path] = folders
            for full_name in (folded(path.as_posix()), without_suffix(folded(path.as_posix()))):
                self._by_path.setdefault(full_name, path)

    def find(self, cell: str, folder: Path) -> list[Path]:
        """Return the files that match a table's `cell`, a file name or path.

        If several files match, and one of them has the path `cell` relative to `folder`, or else to the data set's folder,
        only this file is returned.
        """
        parts = [part for part in folded(cell.replace("\\", "/")).split("/") if part not in ("", ".", "..")]
        if not parts:
            return []
        *folders, name = parts
        name = name if name in self._named else without_suffix(name)
        if folders:
            near = [*self._nearest.get((name, folders[-1]), ()), *self._nearest.get((name, ""), ())]
            agreeing = [path for path in near if _agree(folders, self._folders[path])]
        else:
            agreeing = self._named.get(name, [])
        if len(agreeing) > 1:
            for start in (folder, self.source.folder):
                if path := self._by_path.get("/".join([folded(start.as_posix()), *folders, name])):
                    return [path]
        return agreeing

    def all_images(self) -> list[Path]:
        """Return the PNG, JPEG and DICOM files in the data set's main folder; DICOM files may have no suffix."""
        own = [path for path in self.paths if self.source.folder in path.parents]
        return [path for path in own if path.suffix.lower() in (*PICTURES, *DICOM) or (_is_bare(path) and _is_dicom(path))]


def make_image_ids(names: pd.Series) -> pd.Series:
    """Return a unique image id for each path in `names`. The paths differ, and have slashes between folders.

    The id is the file name without suffix. Files that would share an id get their path without suffix as id, with "-" in
    place of slashes. Files that still share an id get their path with suffix, and finally an added number. An id longer than
    LONGEST_ID is replaced by its end and a hash of the path.
    """
    ids = names.map(lambda name: without_suffix(name.rpartition("/")[2]))
    wider: Sequence[Callable[[str], str]] = (
        lambda name: without_suffix(name).replace("/", "-"),
        lambda name: name.replace("/", "-"),
    )
    for make_id in wider:
        ids = ids.mask(ids.duplicated(keep=False), names.map(make_id))
    too_long = ids.str.len() > LONGEST_ID
    ids = ids.mask(too_long, ids.str[-LONGEST_ID + 17 :] + "-" + names.map(_digest))
    while ids.duplicated().any():
        ids = ids.mask(ids.duplicated(), ids + "-" + ids.groupby(ids).cumcount().astype(str))
    return ids


def find_class_folders(rows: pd.DataFrame, source: DataFolder) -> list[str]:
    """Return the class of each row: the name of a folder in the row's `path`, or "" if the path is not that deep.

    Going up from the files, the classes are the first folders whose names differ between rows: if all files are in folders
    such as `CLASS/images`, the class is CLASS. Raises DatasetError if all rows have the same folders, or if the folders have
    too many different names to be classes.
    """
    folders = [source.name(path).split("/")[-2::-1] if path else [] for path in rows.path]  # the nearest first
    for level in range(max(map(len, folders))):
        classes = [parts[level] if level < len(parts) else "" for parts in folders]
        names = sorted(set(classes) - {""})
        if len(names) > max(2, len(rows) // 2):
            raise DatasetError(
                f"`class_folders` finds {len(names)} folders for {len(rows)} images; {', '.join(map(repr, names[:3]))} seem "
                "to be patients or studies, not classes. Give a table with a column of classes"
            )
        if len(names) > 1:
            return classes
    shared = sorted({"/".join(parts[::-1]) for parts in folders})
    raise DatasetError(
        f"class_folders is set, but all {len(rows)} images lie in the folder {shared[0] or '.'!r}: put each class into a "
        "folder of its own, or give a table with a column of classes"
    )


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _agree(folders: Sequence[str], others: Sequence[str]) -> bool:
    common = min(len(folders), len(others))
    return list(folders[len(folders) - common :]) == list(others[len(others) - common :])


def _is_bare(path: Path) -> bool:
    """Return whether a file has no suffix. Digits after the last dot, as in a UID, do not count as a suffix."""
    return not path.suffix or path.suffix[1:].isdigit()


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
