"""Lists the files of a data set, which may be in several folders, and finds images and tables among them."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from pathlib import Path

import pandas as pd

from kitlib.datasets.faults import Faults
from kitlib.datasets.walk import walk
from kitlib.errors import DatasetError, TableError
from kitlib.tables import listed_name, read_text, read_text_table

PICTURES = (".png", ".jpg", ".jpeg")
DICOM = (".dcm", ".dicom")
IMAGES = (*PICTURES, *DICOM, ".img", ".gif", ".bmp", ".tif", ".tiff")


class DataFolder:
    """All files of a data set, in its main folder and in additional folders, and the faults found while reading the files.

    `folder` is the main folder. `beside` has the additional folders: on Kaggle, masks or tables are often in a dataset of
    their own, and attached datasets are read-only. `paths` lists all files, those in `folder` first; within a folder, the
    least deeply nested files come first, then the order is alphabetical. Each folder is listed once (see
    kitlib.datasets.walk). Files that are used must be marked as read; `count_unread` adds a fault for the image files that
    were not. Raises DatasetError if one of the folders does not exist.
    """

    def __init__(self, folder: str | Path, beside: Sequence[str | Path] = ()) -> None:
        self.folder, self.beside, self.faults = Path(folder), tuple(map(Path, beside)), Faults()
        self._roots: dict[Path, Path] = {}
        for root in (self.folder, *self.beside):
            if not root.is_dir():
                raise DatasetError(f"{root} is not a folder; give the folder that holds the data set, see inputs/README.md")
            found = [Path(folder, name) for folder, names in walk(root, self._leave_out) for name in names]
            broken = [path.relative_to(root).as_posix() for path in found if not path.exists()]
            self.faults.add_summary("the folder", broken, "are links to files that do not exist; left out", "others")
            found = [path for path in found if path.exists()] if broken else found
            for path in sorted(found, key=lambda path: (len(path.parts), path)):
                self._roots.setdefault(path, root)
        self.paths = list(self._roots)
        self._read: set[Path] = set()
        self._set_aside: set[Path] = set()

    @classmethod
    def of(cls, folder: "str | Path | DataFolder") -> "DataFolder":
        """Return `folder` unchanged if it is a DataFolder; otherwise return a new DataFolder for this path."""
        return folder if isinstance(folder, DataFolder) else cls(folder)

    def name(self, path: str | Path) -> str:
        """Return the path of a file, with forward slashes, relative to the main or additional folder that contains it."""
        return Path(path).relative_to(self._roots.get(Path(path), self.folder)).as_posix()

    def folders(self, path: Path) -> tuple[str, ...]:
        """Return the names, in lower case, of the subfolders on the way from the data set's folder to the file `path`."""
        return tuple(part.lower() for part in path.relative_to(self._roots[path]).parts[:-1])

    def find(self, suffixes: Collection[str], is_wanted: Callable[[Path], bool] = lambda path: True) -> list[Path]:
        """Return the files with one of the lower-case `suffixes` for which `is_wanted` returns True; mark them as read."""
        found = [path for path in self.paths if path.suffix.lower() in suffixes and is_wanted(path)]
        self._read.update(found)
        return found

    def find_images(
        self, suffixes: Collection[str] = PICTURES, is_wanted: Callable[[Path], bool] = lambda path: True
    ) -> dict[str, Path]:
        """Return a dict that maps image ids to paths, sorted by id, for the files that `find` returns.

        The image id is the file name without suffix. If several files have the same id, the first file is used. Later files
        with the suffix and size in bytes of the first file are taken for copies of it. One fault counts the copies, another
        fault counts the later files that differ.
        """
        paths: dict[str, Path] = {}
        copies: list[str] = []
        others: list[str] = []
        for path in self.find(suffixes, is_wanted):
            first = paths.setdefault(listed_id(path.name), path)
            if first is not path:
                is_copy = first.suffix == path.suffix and first.stat().st_size == path.stat().st_size
                (copies if is_copy else others).append(self.name(path))
        self.faults.add_summary("the folder", copies, "are copies of files with the same name; left out", "others")
        self.faults.add_summary("the folder", others, "have the name of another file, but differ; left out", "others")
        return dict(sorted(paths.items()))

    def find_table(self, *patterns: str) -> Path | None:
        """Return the path of the table whose file name matches one of `patterns`, or None if no file matches.

        The patterns, such as `train_val_list*.txt`, are in order of preference; case is ignored. A file directly in the data
        set's folder is preferred to files in subfolders, and these to files in the additional folders. Files with identical
        content count as one. Raises DatasetError, which lists the files, if several different files match equally well.
        """
        for pattern in patterns:
            for root in (self.folder, *self.beside):
                if found := [path for path in self._matching(pattern) if self._roots[path] == root]:
                    top = [path for path in found if path.parent == root]
                    return self._the_only(pattern, top or found)
        return None

    def need_table(self, *patterns: str, how_to_get: str) -> Path:
        """Return the path of the table that `find_table` finds; raise DatasetError if no file matches.

        The message ends with `how_to_get`, which says how to get the file.
        """
        if path := self.find_table(*patterns):
            return path
        tables = [self.name(path) for path in self.paths if path.suffix.lower() in (".csv", ".txt", ".tsv", ".json")]
        available = f"the tables {', '.join(tables[:5])}" if tables else f"{len(self.paths)} files, but no table"
        raise DatasetError(
            f"{self.folder / patterns[0]} is missing, also in subfolders and additional folders; the data set has "
            f"{available}. To get the file: {how_to_get}"
        )

    def find_listed(self, cell: str, base: Path, below: str = "", exactly: bool = False) -> Path | None:
        """Return the path of the image file that a table's `cell` names, or None if no file matches; mark the file as read.

        `cell` is a file name or path. The file is searched in the folder `base`/`below`, then in the subfolder `below` of
        the main folder, because the table may be in an additional folder. Case is ignored, and so are leading folders in
        `cell` that do not exist. A file with the suffix in `cell` is preferred. Unless `exactly` is True, a file with
        another suffix also matches, because images are often converted.
        """
        parts = folded(f"{cell.strip()}".replace("\\", "/")).strip("/").split("/")
        starts = [folded(f"{folder.as_posix()}/{below}").rstrip("/") for folder in dict.fromkeys((base, self.folder))]
        for start, number in product(starts, range(len(parts))):
            name = f"{start}/{'/'.join(parts[number:])}"
            path = self._by_name.get(name)
            if path is None and not exactly:
                path = self._by_stem.get(name) or self._by_stem.get(without_suffix(name))
            if path:
                self._read.add(path)
                return path
        return None

    def find_all_listed(self, cells: Sequence[str], bases: Sequence[Path]) -> list[Path | None]:
        """Return one path per cell, as `find_listed` does, or None for a cell without a matching file.

        `bases` has the argument `base` of `find_listed` for each cell. First, each cell is matched with a file that has the
        suffix in the cell. Each remaining cell may then match a file with another suffix that no other cell has matched: a
        row whose file is missing must not get the file of another row.
        """
        exact = [self.find_listed(cell, base, exactly=True) for cell, base in zip(cells, bases, strict=True)]
        taken = set(exact)
        found = []
        for path, cell, base in zip(exact, cells, bases, strict=True):
            other = None if path else self.find_listed(cell, base)
            found.append(path or (other if other not in taken else None))
            taken.add(found[-1])
        return found

    def mark_read(self, paths: Iterable[str | Path]) -> None:
        """Mark files as read, so that `count_unread` does not count them."""
        self._read.update(map(Path, paths))

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Exclude the images `paths`, such as a test set without labels, from the number that `count_images` returns."""
        self._set_aside.update(paths)

    def count_images(self) -> int:
        """Return the number of image files in the main folder.

        Images in folders of masks and images passed to `set_aside` do not count.
        """
        return sum(
            path.suffix.lower() in IMAGES and self._is_own(path) and not any("mask" in name for name in self.folders(path))
            for path in self.paths
            if path not in self._set_aside
        )

    def count_unread(self) -> None:
        """Add one fault that counts, for each folder, the image files of the data set's main folder that were not read."""
        unread = [
            path for path in self.paths if path.suffix.lower() in IMAGES and path not in self._read and self._is_own(path)
        ]
        if unread:
            counts = Counter(path.parent.relative_to(self.folder).as_posix() for path in unread).most_common()
            listing = ", ".join(f"{folder} {count}" for folder, count in counts[:5])
            more = f" and {len(counts) - 5} more folders" if len(counts) > 5 else ""
            self.faults.add_summary(
                "the folder",
                [self.name(path) for path in unread],
                f"are not read, because no table lists them or the layout has no such folder; by folder: {listing}{more}",
                "other image files",
            )

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        return {folded(path.as_posix()): path for path in reversed(self.paths) if path.suffix.lower() in IMAGES}

    @cached_property
    def _by_stem(self) -> dict[str, Path]:
        return {without_suffix(name): path for name, path in self._by_name.items()}

    def _is_own(self, path: Path) -> bool:
        return self._roots[path] == self.folder

    def _matching(self, pattern: str) -> list[Path]:
        return [path for path in self.paths if fnmatchcase(path.name.lower(), pattern.lower())]

    def _the_only(self, pattern: str, found: list[Path]) -> Path:
        contents = {path.read_bytes(): path for path in reversed(found)} if len(found) > 1 else {b"": found[0]}
        if len(contents) > 1:
            paths = sorted(contents.values())
            folders = dict.fromkeys(path.parent for path in paths)
            advice = (
                f"give the folder of one of them, such as {next(iter(folders))}" if len(folders) > 1 else "keep one of them"
            )
            listing = ", ".join(map(self.name, paths))
            raise DatasetError(f"{self.folder} has several files {pattern} that differ: {listing}; {advice}")
        return next(iter(contents.values()))

    def _leave_out(self, folder: str, reason: str) -> None:
        self.faults.add("the folder", folder, f"{reason}; left out")


def read_csv(path: Path, columns: Sequence[str], separator: str = ",") -> pd.DataFrame:
    """Return the table in a CSV file; all cells are text, and empty cells are "" (see kitlib.tables.read_text_table).

    Raises DatasetError if the file cannot be read, is not a CSV file, or lacks one of `columns`.
    """
    try:
        return read_text_table(path, columns, separator)
    except TableError as error:
        raise DatasetError(f"{error}: check that it is the right file, or fetch it again") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file (see kitlib.tables.read_text). Raises DatasetError if its encoding is unknown."""
    try:
        return read_text(path).splitlines()
    except TableError as error:
        raise DatasetError(str(error)) from error


def or_renamed(name: str) -> tuple[str, str]:
    """Return two patterns for `find_table`: the file name itself, and one that also matches renamed copies of the file.

    For train_val_list.txt, the second pattern is train_val_list*.txt, which matches train_val_list_NIH.txt.
    """
    path = Path(name)
    return name, f"{path.stem}*{path.suffix}"


def listed_id(name: str) -> str:
    """Return the image id of an image file, whose name or path is `name`: the file name without suffix."""
    return Path(listed_name(name)).stem


def folded(name: str) -> str:
    """Return `name` in the form used to compare names: case-folded, and in Unicode's composed form."""
    return unicodedata.normalize("NFC", name).casefold()


def without_suffix(name: str) -> str:
    """Return `name` without the suffix of an image; other dots are part of the name, as in the UIDs of DICOM."""
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGES else name
