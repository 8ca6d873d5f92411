"""The Dataset that a reader returns, and what readers share: CSV files, faults, image headers, and making of tables."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from kitlib.classes import MASK_CONVENTIONS
from kitlib.errors import DatasetError, TableError, UnreadableXray
from kitlib.tables import BOX, check_table, cut_boxes, empty_table, listed_name, read_text, read_text_table, storable

HEADER_THREADS = 16  # more than there are cores, because the threads mostly wait for the disk


@dataclass(frozen=True)
class Dataset:
    """The tables of one data set (see kitlib.tables), its faults, and the counts of its content that its authors published.

    `images` may have the columns `false_none` (SIIM: no annotator looked at the image), `split` ("train" or "test", from an
    official list) and `convention` (of MASK_CONVENTIONS). `masks` is None for data sets without masks, otherwise it has the
    columns image_id, structure (a key of MASK_CODES) and path; several files for the same image and structure are combined.
    `faults` has the columns file, row (an id as written in the file, or a path) and problem, which also says how the fault
    was handled. `published` maps the name of a count to its value for the whole data set. Raises ValueError if a convention
    is unknown.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    faults: pd.DataFrame
    published: dict[str, int] = field(default_factory=dict)
    masks: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        conventions = set(self.images["convention"]) if "convention" in self.images else set()
        if unknown := sorted(conventions - set(MASK_CONVENTIONS)):
            raise ValueError(f"unknown mask conventions {unknown}; valid: {', '.join(MASK_CONVENTIONS)}")

    @classmethod
    def from_tables(
        cls,
        folder: Path,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        faults: "Faults",
        published: dict[str, int] | None = None,
        *,
        boxes: pd.DataFrame | None = None,
        masks: pd.DataFrame | None = None,
    ) -> "Dataset":
        """Return a Dataset of these tables, after checking `images` and `labels`; `boxes` defaults to an empty table.

        A study whose images have different patient ids is added to `faults`. Raises DatasetError, which quotes the first
        faults, if there is no image; TableError, which names `folder`, if `images` or `labels` is not valid (see
        kitlib.tables).
        """
        if images.empty:
            problems = pd.Series([f"{problem} ({file} {row})" for file, row, problem in faults.rows], dtype=object)
            raise DatasetError(
                f"{folder}: no image can be used; there are {len(problems)} faults, "
                f"the first: {'; '.join(problems.head(3)) or 'none, so the tables are empty'}"
            )
        images, labels = check_table(images, "images", str(folder)), check_table(labels, "labels", str(folder))
        boxes = empty_table("boxes") if boxes is None else boxes
        counts = images.groupby("study_id")["patient_id"].nunique()
        mixed = images[images["study_id"].isin(counts.index[counts > 1])]
        for study_id, several in mixed.groupby("study_id")["patient_id"].unique().items():
            problem = f"the study's images have the patient ids {', '.join(sorted(several))}; these patients share a fold"
            faults.add(folder.name, str(study_id), problem)
        return cls(images, labels, boxes, faults.table(), dict(published or {}), masks)


class Faults:
    """Collects the faults of a data set: a row for everything that a reader leaves out or changes."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, file: str, row: str, problem: str) -> None:
        """Add one fault: its file, its row (an id or a path), and the problem, with how it was handled."""
        self.rows.append((storable(file), storable(row), storable(problem)))

    def add_summary(self, file: str, rows: Iterable[str], problem: str, others: str = "others") -> None:
        """Add one fault for all `rows` together, which names the first and counts the others; no fault if there are none."""
        if rows := sorted(rows):
            self.add(file, rows[0], f"and {len(rows) - 1} {others} {problem}")

    def table(self) -> pd.DataFrame:
        """Return the faults as a table with the columns file, row and problem."""
        return pd.DataFrame(self.rows, columns=["file", "row", "problem"], dtype=object)


def read_csv(
    path: Path, columns: Sequence[str], how_to_get: str = "see inputs/README.md", separator: str = ","
) -> pd.DataFrame:
    """Return the table in a CSV file; all cells are text, and empty cells are "" (see kitlib.tables.read_text_table).

    Raises DatasetError if the file is missing (the message ends with `how_to_get`), is not a CSV file, or lacks one of
    `columns`.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing: copy the data set's file there, {how_to_get}")
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


def find_listed(files: dict[str, Path], cell: str) -> Path | None:
    """Return the one of `files` (see `index_files`) that a table's cell names, with or without folders; None if none is."""
    path = unicodedata.normalize("NFC", cell.strip().replace("\\", "/"))
    return files.get(path) or files.get(listed_name(cell))


def index_files(root: Path) -> dict[str, Path]:
    """Return the files below `root`, keyed by their path relative to `root` with slashes, in Unicode's composed form."""
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return {unicodedata.normalize("NFC", path.relative_to(root).as_posix()): path for path in paths}


def find_files(root: Path, suffixes: Sequence[str], faults: Faults) -> dict[str, Path]:
    """Return image id -> path for the files below `root` that have one of `suffixes`.

    The id is the file name without suffix (see `listed_id`). If several files have the same id, the first one is used and
    each of the others becomes a fault. Hidden files are ignored.
    """
    paths: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in suffixes:
                continue
            image_id = listed_id(name)
            if image_id in paths:
                faults.add(str(path.relative_to(root)), image_id, f"has the same name as {paths[image_id]}; left out")
            else:
                paths[image_id] = path
    return paths


def listed_id(name: str) -> str:
    """Return the image id of a file: its name, as written in a table or on the disk, without folders and suffix."""
    return Path(listed_name(name)).stem


@dataclass(frozen=True)
class ImageHeader:
    """The image size, patient and view that the header of an image file states."""

    rows: int = 0
    columns: int = 0
    patient_id: str = ""  # DICOM only
    view: str = ""  # DICOM only
    problem: str = ""  # why the header cannot be used, "" if it can
    study_id: str = ""  # DICOM only


def read_headers(paths: Sequence[str], progress: bool) -> list[ImageHeader]:
    """Return one ImageHeader per file, in the order of `paths`; that of an unreadable file has a `problem`."""
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(tqdm(pool.map(_read_header, paths), total=len(paths), desc="headers", unit="file", disable=not progress))


def add_headers(rows: pd.DataFrame, folder: Path, faults: Faults, progress: bool) -> pd.DataFrame:
    """Return an `images` table: `rows`, with the sizes from the files' headers; every image is a study of its own.

    `rows` has the columns image_id, patient_id, path, source and view; an empty view is filled in from the header. An image
    whose header cannot be read is left out, with a fault that names the file relative to `folder`.
    """
    headers = read_headers(rows.path.tolist(), progress)
    for path, image_id, header in zip(rows.path, rows.image_id, headers, strict=True):
        if header.problem:
            faults.add(str(Path(path).relative_to(folder)), image_id, f"{header.problem}; left out")
    images = rows.assign(
        study_id=rows.image_id,
        rows=[header.rows for header in headers],
        columns=[header.columns for header in headers],
        view=[view or header.view for view, header in zip(rows["view"], headers, strict=True)],
    )
    return images[[not header.problem for header in headers]].reset_index(drop=True)


def one_hot(ids: pd.Series, image_classes: pd.Series, classes: Iterable[str]) -> pd.DataFrame:
    """Return a `labels` table with one row per id: 1.0 in the column of its class, 0.0 in those of the other `classes`.

    `image_classes` has the class of each id, with the same index as `ids`.
    """
    return pd.DataFrame({"id": ids, **{name: (image_classes == name).astype(float) for name in classes}})


def make_boxes(image_ids: pd.Series, cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return a `boxes` table made from `cells`, and a boolean Series that is True for its valid rows.

    `cells` has one row per box and four columns of text: x, y, width and height, in this order, whatever their names. A row
    is valid if all four are finite numbers and the box has an area.
    """
    x, y, width, height = (pd.to_numeric(cells[name], errors="coerce") for name in cells)
    boxes = pd.DataFrame({"image_id": image_ids, "xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height})
    return boxes, np.isfinite(boxes[list(BOX)]).all(axis=1) & (width > 0) & (height > 0)


def cut_at_edges(
    images: pd.DataFrame, boxes: pd.DataFrame, faults: Faults, file: str, suffix: str = ""
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut boxes to their images (see kitlib.tables.cut_boxes); returns the `images` and `boxes` tables.

    An image with a box that cannot be used is removed with all of its boxes. Each cut and each removed image is a fault,
    with the `file` that the boxes come from, and with the image id followed by `suffix`.
    """
    boxes = check_table(boxes, "boxes", file)
    cut, overhang, problems = cut_boxes(boxes, images)
    for index in np.flatnonzero((overhang > 0) & (problems == "")):
        name = f"{boxes.image_id[index]}{suffix}"
        faults.add(file, name, f"a box reaches {overhang[index]:.1f} pixels beyond the image; cut at its edge")
    unusable = problems[problems != ""].groupby(boxes.image_id).first()
    for image_id, problem in unusable.items():
        faults.add(file, f"{image_id}{suffix}", f"{problem}; the image is left out")
    kept = cut[~cut.image_id.isin(unusable.index)].reset_index(drop=True)
    return images[~images.image_id.isin(unusable.index)], kept


def _read_header(path: str) -> ImageHeader:
    # Imported here because pydicom takes a second, and a submission lists its files without reading their headers.
    from kitlib.xrays.dicom import read_header
    from kitlib.xrays.image_file import image_format, image_size

    try:
        if image_format(path):
            return ImageHeader(*image_size(path))
        header = read_header(path)
    except UnreadableXray as error:
        return ImageHeader(problem=error.reason)
    except OSError as error:
        return ImageHeader(problem=str(error))
    problem = "" if header.rows and header.columns else "the header states no image size"
    return ImageHeader(header.rows, header.columns, header.patient_id, header.view, problem, header.study_id)
