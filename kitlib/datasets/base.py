"""Defines Dataset, the result of reading any data set, and functions that are used for several data sets."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tqdm import tqdm

from kitlib.classes import MASK_CONVENTIONS
from kitlib.datasets.data_folder import PICTURES, DataFolder, read_csv
from kitlib.errors import DatasetError, UnreadableXray
from kitlib.tables import BOX, check_table, cut_boxes, empty_table

HEADER_THREADS = 16  # more than there are cores, because the threads mostly wait for the disk
# If a random part of the data set should contain this many images of a class but has none, the layout was misread.
LEAST_EXPECTED = 20
MOST_LOST = 0.1  # share of the image files that may be unused
# Share of the images with boxes that may have unusable boxes; if more do, the boxes are for another image size.
MOST_UNUSABLE = 0.1


@dataclass(frozen=True)
class Dataset:
    """The tables of one data set (see kitlib.tables), the faults found while reading it, and its published counts.

    `images` may have these further columns: `false_none` (SIIM: no annotator looked at the image), `split` ("train" or
    "test", from an official list) and `convention` (how the masks define lungs: one of MASK_CONVENTIONS; in a pool of data
    sets, images from a data set without masks have "").

    `masks` is None if the data set has no masks. Otherwise it has one row per mask, with the columns `image_id`, `structure`
    (a key of MASK_CODES) and `path` (the mask file). Run lengths (see kitlib.xrays.run_lengths) are in a column `runs`; then
    `path` is the table that they come from. Several masks of the same image and structure are combined.

    `faults` has the columns `file`, `row` (an id as written in the file, or a path) and `problem`, which also says how the
    problem was handled. `published` maps names of counts, such as "patients", to the values that the data set's authors
    published for the whole data set. Raises ValueError if a convention is unknown.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    faults: pd.DataFrame
    published: dict[str, int] = field(default_factory=dict)
    masks: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        conventions = set(self.images["convention"]) if "convention" in self.images else set()
        if unknown := sorted(conventions - {"", *MASK_CONVENTIONS}):
            raise ValueError(f"unknown mask conventions {unknown}; valid: {', '.join(MASK_CONVENTIONS)}")

    @classmethod
    def from_tables(
        cls,
        source: DataFolder,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        published: Mapping[str, int] | None = None,
        *,
        boxes: pd.DataFrame | None = None,
        masks: pd.DataFrame | None = None,
    ) -> "Dataset":
        """Return a Dataset with the given tables and the faults of `source`; `boxes` defaults to an empty table.

        Checks `images` and `labels`, and compares them with the `published` counts. Adds a fault with the number of image
        files that no table lists (see DataFolder.count_unread), and a fault for each study whose images have different
        patient ids. Raises DatasetError if there is no image, or if the comparison shows that the folder has another layout
        than expected; TableError if a table is invalid (see kitlib.tables).
        """
        faults = source.faults
        source.mark_read(images.path)
        source.mark_read(() if masks is None else masks.path)
        source.count_unread()
        if images.empty:
            raise DatasetError(f"{source.folder}: no image can be used; {first_faults(source)}")
        images, labels = check_table(images, "images", str(source.folder)), check_table(labels, "labels", str(source.folder))
        boxes = empty_table("boxes") if boxes is None else boxes
        counts = images.groupby("study_id")["patient_id"].nunique()
        mixed = images[images["study_id"].isin(counts.index[counts > 1])]
        for study_id, several in mixed.groupby("study_id")["patient_id"].unique().items():
            problem = f"the study's images have the patient ids {', '.join(sorted(several))}; these patients share a fold"
            faults.add(source.folder.name, str(study_id), problem)
        _compare_with_published(source, images, labels, published or {})
        return cls(images, labels, boxes, faults.table(), dict(published or {}), masks)


def first_faults(source: DataFolder) -> str:
    """Return text for an error message: the number of faults of `source`, and the first three faults."""
    problems = [f"{problem} ({file} {row})" for file, row, problem in source.faults.rows]
    return f"there are {len(problems)} faults, the first: {'; '.join(problems[:3]) or 'none, so the tables are empty'}"


def _compare_with_published(
    source: DataFolder, images: pd.DataFrame, labels: pd.DataFrame, published: Mapping[str, int]
) -> None:
    """Raise DatasetError if the `published` counts show that the folder has another layout than expected.

    There are two such cases. All images have the same patient id, although at least LEAST_EXPECTED patients were expected.
    Or a class has no image, although at least LEAST_EXPECTED were expected, and more than the share MOST_LOST of the image
    files is unused. If fewer files are unused, the missing class is recorded as a fault, and no error is raised.
    """
    share = len(images) / published["images"] if "images" in published else 0.0
    unused = 1 - len(images) / max(len(images), source.count_images())
    for name in labels.columns.intersection(list(published)):
        if published[name] * share < LEAST_EXPECTED or (labels[name] > 0).any():
            continue
        expected = f"{published[name]} of {published['images']} published images"
        problem = f"none of the {len(images)} images has this class, which {expected} have"
        if unused > MOST_LOST:
            raise DatasetError(
                f"{source.folder} has another layout than expected, see inputs/README.md. Class {name!r}: {problem}, and "
                f"{unused:.0%} of the image files are not used; {first_faults(source)}"
            )
        source.faults.add(source.folder.name, name, problem)
    if published.get("patients", 0) * share >= LEAST_EXPECTED and len(set(images.patient_id)) == 1:
        raise DatasetError(
            f"{source.folder} has another layout than expected, see inputs/README.md. All {len(images)} images have the "
            f"patient id {images.patient_id.iloc[0]!r}, but {published['patients']} patients are published"
        )


@dataclass(frozen=True)
class ImageHeader:
    """The image size, and for DICOM files also the patient, study and view, as stated in an image file's header."""

    rows: int = 0
    columns: int = 0
    patient_id: str = ""  # DICOM only
    view: str = ""  # DICOM only
    problem: str = ""  # why the header cannot be used, "" if it can
    study_id: str = ""  # DICOM only


def read_headers(paths: Sequence[str], progress: bool) -> list[ImageHeader]:
    """Return one ImageHeader per file, in the order of `paths`; if a file is unreadable, the field `problem` says why."""
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(tqdm(pool.map(_read_header, paths), total=len(paths), desc="headers", unit="file", disable=not progress))


def add_headers(rows: pd.DataFrame, source: DataFolder, progress: bool) -> pd.DataFrame:
    """Return an `images` table made from `rows`, with image sizes from the files' headers; each image is its own study.

    `rows` has the columns image_id, patient_id, path, source and view. An empty patient_id or view is replaced by the value
    in the header, if there is one. An image with an unreadable header is left out, and a fault is added to `source`. Raises
    DatasetError if there are no rows.
    """
    if rows.empty:
        raise DatasetError(f"{source.folder}: no image can be used; {first_faults(source)}")
    source.mark_read(rows.path)
    headers = read_headers(rows.path.tolist(), progress)
    for path, image_id, header in zip(rows.path, rows.image_id, headers, strict=True):
        if header.problem:
            source.faults.add(source.name(path), image_id, f"{header.problem}; left out")
    images = rows.assign(
        study_id=rows.image_id,
        rows=np.array([header.rows for header in headers], dtype=int),
        columns=np.array([header.columns for header in headers], dtype=int),
        patient_id=[patient or header.patient_id for patient, header in zip(rows.patient_id, headers, strict=True)],
        view=[view or header.view for view, header in zip(rows["view"], headers, strict=True)],
    )
    return images[[not header.problem for header in headers]].reset_index(drop=True)


def one_hot(ids: pd.Series, image_classes: pd.Series, classes: Iterable[str]) -> pd.DataFrame:
    """Return a `labels` table with one row per id: 1.0 in the column of the id's class, 0.0 in the other class columns.

    `image_classes` has the class of each id; its index equals that of `ids`. `classes` are the names of the class columns.
    """
    return pd.DataFrame({"id": ids, **{name: (image_classes == name).astype(float) for name in classes}})


def make_boxes(image_ids: pd.Series, cells: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return a `boxes` table made from `cells`, and a boolean Series that says which rows are valid boxes.

    `cells` has one row per box and four columns of text: x, y, width and height, in this order; the names of the columns do
    not matter. `image_ids` has the image of each row. A row is valid if all four cells are finite numbers and the width and
    height are above 0.
    """
    x, y, width, height = (pd.to_numeric(cells[name], errors="coerce") for name in cells)
    boxes = pd.DataFrame({"image_id": image_ids, "xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height})
    return boxes, np.isfinite(boxes[list(BOX)]).all(axis=1) & (width > 0) & (height > 0)


def original_sizes(images: pd.DataFrame, source: DataFolder, *tables: str) -> pd.DataFrame:
    """Return a table with the original size of each image, which boxes refer to: image_id, rows and columns.

    A DICOM file has the original size. PNG and JPEG files may be resized; their original sizes are in a table of the data
    set, which has one of the file names `tables` and the columns image_id, dim0 (rows) and dim1 (columns). PNG and JPEG
    images without a valid row in that table are left out of the result and recorded as a fault. Raises DatasetError if
    there are PNG or JPEG files but no such table.
    """
    is_copy = images["path"].str.lower().str.endswith(PICTURES)
    originals = images.loc[~is_copy, ["image_id", "rows", "columns"]]
    if not is_copy.any():
        return originals
    how_to_get = (
        "attach a copy that has this table (columns image_id, dim0 and dim1: the original sizes, which are needed to scale "
        "the boxes of resized images), or name an input with it in the parameter `beside`"
    )
    path = source.need_table(*tables, how_to_get=how_to_get)
    table = read_csv(path, ("image_id", "dim0", "dim1"), how_to_get)
    sizes = table[["dim0", "dim1"]].apply(pd.to_numeric, errors="coerce")
    sizes = pd.DataFrame({"image_id": table["image_id"].str.strip(), "rows": sizes["dim0"], "columns": sizes["dim1"]})
    sizes = sizes[(sizes[["rows", "columns"]] >= 1).all(axis=1)].drop_duplicates("image_id")
    without = set(images["image_id"][is_copy]) - set(sizes["image_id"])
    source.faults.add_summary(path.name, without, "have no valid size; left out", "other images")
    return pd.concat([originals, sizes[sizes["image_id"].isin(images["image_id"][is_copy])]])


def scale_boxes(
    boxes: pd.DataFrame, images: pd.DataFrame, originals: pd.DataFrame, source: DataFolder, file: str
) -> pd.DataFrame:
    """Return `boxes` converted from pixels of the original images to pixels of the image files, which may be resized.

    `originals` has the columns image_id, rows and columns: the original size of each image with a box. `images` has the
    sizes of the image files. If images with boxes are resized, one fault of `file`, the file of the boxes, counts them.
    """
    sizes = images.merge(originals, on="image_id", suffixes=("", "_original")).set_index("image_id")
    scale = pd.DataFrame(
        {"x": sizes["columns"] / sizes["columns_original"], "y": sizes["rows"] / sizes["rows_original"]}
    ).reindex(boxes.image_id)
    resized = sizes[(sizes["columns"] != sizes["columns_original"]) | (sizes["rows"] != sizes["rows_original"])]
    resized = resized[resized.index.isin(boxes.image_id)]
    if len(resized):
        row = resized.iloc[0]
        example = f"{row.columns_original} x {row.rows_original} to {row['columns']} x {row['rows']} pixels"
        problem = f"with boxes are resized, such as the first from {example}; the boxes are scaled"
        source.faults.add_summary(file, resized.index, problem, "other images")
    factors = scale[["x", "y", "x", "y"]].to_numpy()
    return boxes.assign(**dict(zip(BOX, (boxes[list(BOX)].to_numpy() * factors).T, strict=True)))


def cut_at_edges(
    images: pd.DataFrame, boxes: pd.DataFrame, source: DataFolder, file: str, suffix: str = ""
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `images` and `boxes`, with the boxes cut at the edges of their images (see kitlib.tables.cut_boxes).

    An image with an unusable box is removed together with all of its boxes. Each cut box and each removed image is recorded
    as a fault of `file`, from which the boxes were read; the fault's row is the image id followed by `suffix`. Raises
    DatasetError if at least LEAST_EXPECTED images, and at least the share MOST_UNUSABLE of the images with boxes, would be
    removed: the boxes were then drawn on images of another size.
    """
    boxes = check_table(boxes, "boxes", file)
    cut, overhang, problems = cut_boxes(boxes, images)
    unusable = problems[problems != ""].groupby(boxes.image_id).first()
    if len(unusable) >= max(LEAST_EXPECTED, MOST_UNUSABLE * boxes.image_id.nunique()):
        raise DatasetError(
            f"{source.folder}: {len(unusable)} of {boxes.image_id.nunique()} images have an unusable box in {file}, such as "
            f"{unusable.index[0]!r} ({unusable.iloc[0]}). The boxes were drawn on images of a different size than the files"
        )
    for index in np.flatnonzero((overhang > 0) & (problems == "")):
        name = f"{boxes.image_id[index]}{suffix}"
        source.faults.add(file, name, f"a box reaches {overhang[index]:.1f} pixels beyond the image; cut at its edge")
    for image_id, problem in unusable.items():
        source.faults.add(file, f"{image_id}{suffix}", f"{problem}; the image is left out")
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
