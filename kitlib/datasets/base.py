"""What every reader of a data set returns, and what readers share: strict CSV files, faults, headers, labels and boxes."""

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kitlib.classes import MASK_CONVENTIONS
from kitlib.errors import DatasetError, UnreadableXray
from kitlib.tables import BOX, check_table, empty_table
from kitlib.xrays.dicom import read_header
from kitlib.xrays.image_file import image_format, image_size

HEADER_THREADS = 16  # the time goes into waiting for the disk


@dataclass(frozen=True)
class Dataset:
    """The tables of one data set as in kitlib.tables, what is broken in it, and the counts that its makers published.

    `images` may have `false_none` (SIIM: nobody looked at it), `split` ("train" or "test", where an official list says so)
    and `convention` (of MASK_CONVENTIONS). `masks`, of sets that have them, has the columns image_id, structure (a key of
    MASK_CODES) and path; several rows of one image and structure count together. `faults` has the columns file, row (an id
    as it stands in the file, or a path) and problem, which also says what was done about it. `published` is name -> count,
    of the whole set.
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
            raise ValueError(f"the convention of masks is one of {', '.join(MASK_CONVENTIONS)}, not {unknown}")

    @classmethod
    def checked(
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
        """The data set in `folder`, its images and labels checked; an empty table of boxes by default. Raises TableError."""
        images, labels = check_table(images, "images", str(folder)), check_table(labels, "labels", str(folder))
        boxes = empty_table("boxes") if boxes is None else boxes
        return cls(images, labels, boxes, faults.table(), dict(published or {}), masks)


class Faults:
    """Collects what is broken; nothing is dropped without a line here."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, file: str, row: str, problem: str) -> None:
        self.rows.append((file, row, problem))

    def count(self, file: str, rows: Iterable[str], problem: str, others: str = "others") -> None:
        """One line for all of `rows`, where there are any: there may be thousands."""
        if rows := sorted(rows):
            self.add(file, rows[0], f"and {len(rows) - 1} {others} {problem}")

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["file", "row", "problem"], dtype=object)


def read_csv(path: Path, columns: Sequence[str], got: str = "see inputs/README.md") -> pd.DataFrame:
    """All cells as text, empty ones as "". Raises DatasetError: no file (`got`: where to get it), no CSV, other columns."""
    if not path.is_file():
        raise DatasetError(f"{path} is missing: copy the data set's file there, {got}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no CSV file ({error}): fetch the data set's file again") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DatasetError(f"{path} lacks the column(s) {missing}, it has {list(table.columns)}: is it another file?")
    return table


def files_below(root: Path, suffixes: Sequence[str], faults: Faults) -> dict[str, Path]:
    """Image id (the name without suffix) -> path of each file below `root` with one of `suffixes`; the first counts."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in suffixes:
                continue
            if path.stem in found:
                faults.add(str(path.relative_to(root)), path.stem, f"has the name of {found[path.stem]}; left out")
            else:
                found[path.stem] = path
    return found


@dataclass(frozen=True)
class ImageHeader:
    """What a DICOM, PNG or JPEG file says of itself before its pixels; `problem` is why that is of no use, if so."""

    rows: int = 0
    columns: int = 0
    patient_id: str = ""  # of DICOM alone, as `view`
    view: str = ""
    problem: str = ""


def read_headers(paths: Sequence[str], progress: bool) -> list[ImageHeader]:
    """The headers of all files, in their order."""
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(tqdm(pool.map(_header, paths), total=len(paths), desc="headers", unit="file", disable=not progress))


def with_headers(rows: pd.DataFrame, folder: Path, faults: Faults, progress: bool) -> pd.DataFrame:
    """`rows` (image_id, patient_id, path, source and view) as a table images in which every image is a study.

    Sizes, and a view that is "", are what the headers say. An image whose header cannot be read is left out, with a fault.
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


def one_hot(ids: pd.Series, shown: pd.Series, classes: Iterable[str]) -> pd.DataFrame:
    """The table labels of exclusive classes, of which each of `ids` shows one."""
    return pd.DataFrame({"id": ids, **{name: (shown == name).astype(float) for name in classes}})


def boxes_of(image_ids: pd.Series, cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The table boxes of four columns x, y, width and height, as text, and which rows are whole: numbers with an area."""
    x, y, width, height = (pd.to_numeric(cells[name], errors="coerce") for name in cells)
    boxes = pd.DataFrame({"image_id": image_ids, "xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height})
    return boxes, np.isfinite(boxes[list(BOX)]).all(axis=1) & (width > 0) & (height > 0)


def cut_at_edges(
    images: pd.DataFrame, boxes: pd.DataFrame, faults: Faults, file: str, suffix: str = ""
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Boxes cut at zero and at the images' far edges where `images` has sizes; images that lose a box leave with it.

    `file` and `suffix` (of an image's id) are the faults' words for where a box comes from.
    """
    sizes = {"xmin": 0, "ymin": 0, "xmax": math.inf, "ymax": math.inf}
    boxes = check_table(boxes, "boxes", file)
    placed = boxes[["image_id"]].merge(images, on="image_id", how="left")
    if "columns" in images:
        sizes |= {"xmax": placed["columns"].to_numpy(), "ymax": placed["rows"].to_numpy()}
    cut = boxes.copy()
    for low, high in (("xmin", "xmax"), ("ymin", "ymax")):
        cut[low], cut[high] = boxes[low].clip(lower=sizes[low]), np.minimum(boxes[high], sizes[high])
    reach = (boxes[list(BOX)] - cut[list(BOX)]).abs().max(axis=1)
    nothing = (cut.xmax - cut.xmin < 1) | (cut.ymax - cut.ymin < 1)
    for index in np.flatnonzero((reach > 0) & ~nothing):
        name = f"{boxes.image_id[index]}{suffix}"
        faults.add(file, name, f"a box reaches {reach[index]:.1f} pixels beyond the image; cut at its edge")
    lost = set(boxes.image_id[nothing])
    for image_id in sorted(lost):
        faults.add(file, f"{image_id}{suffix}", "a box lies outside the image or is thinner than a pixel; left out")
    return images[~images.image_id.isin(lost)], cut[~cut.image_id.isin(lost)].reset_index(drop=True)


def _header(path: str) -> ImageHeader:
    try:
        if image_format(path):
            return ImageHeader(*image_size(path))
        header = read_header(path)
    except UnreadableXray as error:
        return ImageHeader(problem=error.reason)
    except OSError as error:
        return ImageHeader(problem=str(error))
    problem = "" if header.rows and header.columns else "it says no image size"
    return ImageHeader(header.rows, header.columns, header.patient_id, header.view, problem)
