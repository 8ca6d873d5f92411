"""Reads the training and test sets of the SIIM-FISABIO-RSNA COVID-19 competition, and lists their faults.

Nothing is left out silently: each table of faults has the columns `file`, `row` (an id as written in the file, or a path)
and `problem`, which also says how the fault was handled.
"""

import ast
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.classes import STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.datasets.base import Dataset, cut_at_edges, original_sizes, read_headers, scale_boxes
from kitlib.datasets.data_folder import PICTURES, DataFolder, read_csv
from kitlib.datasets.faults import Faults
from kitlib.datasets.sample_submission import read_sample
from kitlib.datasets.walk import walk
from kitlib.errors import DatasetError, SubmissionError
from kitlib.tables import BOX, check_table

SIZES = "meta.csv"  # of resized copies, see `original_sizes`
STUDY_TABLE, IMAGE_TABLE, SAMPLE = "train_study_level.csv", "train_image_level.csv", "sample_submission.csv"
# For the training set; counted in the competition's tables and DICOM headers.
PUBLISHED = {"images": 6334, "studies": 6054, "patients": 3261, "boxes": 7853, "false_none": 217}
# Suffixes of files that are not images but may have an image's name, such as the JSON header next to a PNG.
NOT_IMAGES = (".json", ".csv", ".txt", ".xml", ".md", ".html", ".pdf", ".yaml")
# Of several files with one name, the first of these suffixes is used, then any other.
PREFERRED = (".dcm", ".png", ".jpg", ".jpeg")
MAX_DEPTH = 4  # folders below `train` or `test` in which files are searched; the competition's files are below two


@dataclass(frozen=True)
class SiimTest:
    """The test set: its images, its faults, and the ids of its studies, of its images and of a submission's rows."""

    images: pd.DataFrame  # an `images` table, one row per file; rows and columns are 0 if the header cannot be read
    faults: pd.DataFrame  # see Dataset.faults
    study_ids: tuple[str, ...]  # the studies in the sample submission, in its order; then other studies that have files
    image_ids: tuple[str, ...]  # the images in the sample submission, in its order; then other images that have files
    sample_ids: tuple[str, ...]  # the sample submission's ids (..._study, ..._image), each once; empty if it has none

    @property
    def submission_ids(self) -> tuple[str, ...]:
        """Ids of a submission's rows: the ids in the sample submission or, if it has none, ids made from the test files."""
        return self.sample_ids or (
            *(f"{name}_study" for name in self.study_ids),
            *(f"{name}_image" for name in self.image_ids),
        )


def read_train(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the competition's training images, study labels and boxes (in the files' pixels, cut at the image's edges).

    The images are the DICOM files train/<study>/<series>/<image>.dcm, or PNG or JPEG files below the folder `train` that are
    named after the image ids. PNG and JPEG files may be resized, so the table `meta.csv` must state the original sizes; they
    have no DICOM headers, so each study counts as a patient. The label tables may be in an additional folder (see
    DataFolder).

    `false_none` is True if an image has no box but another image of its study has one: annotators looked at one image per
    study, so the missing box means nothing. Such images are in the tables, but in no fold.

    Left out and recorded in `Dataset.faults`: rows without a file, files without a row, images without a study label, images
    with an unreadable header (because their patient is unknown) or an invalid box (because the image would be taken for
    healthy). Raises DatasetError if the folder `train`, a CSV file or a column is missing, or if the table lists none of the
    files below `train`.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    labels, boxes, rows = read_label_tables(source)
    files = _find_train_files(source, rows)
    faults.add_summary(IMAGE_TABLE, set(rows.image_id) - set(files.image_id), "have no file below train; left out")
    unlisted = files.path[~files.image_id.isin(rows.image_id)].map(source.name)
    faults.add_summary("train", unlisted, f"have no usable row in {IMAGE_TABLE}; left out", "other files")
    images = rows.merge(files, on="image_id", suffixes=("", "_of_file"))
    is_elsewhere = (images.study_id != images.study_id_of_file) & (images.study_id_of_file != images.image_id)
    for row in images[is_elsewhere].itertuples():
        problem = f"the file is below the study {row.study_id_of_file}; the table's study is used"
        faults.add(IMAGE_TABLE, f"{row.image_id}_image", problem)
    # The faults above count the training files that are not used.
    source.mark_read(path for path in source.paths if {"train", "test"} & set(source.folders(path)))
    images = _with_headers(images, source.name, faults, "left out", progress)
    images = images[images.readable].drop(columns=["readable", "study_id_of_file"])
    boxes = boxes[boxes.image_id.isin(images.image_id)]
    is_copy = images.path.str.lower().str.endswith(PICTURES)
    problem = "are copies without a header; their study is used as their patient"
    faults.add_summary("train", images.image_id[is_copy], problem, "other images")
    originals = original_sizes(images, source, SIZES)
    images = images[images.image_id.isin(originals.image_id)]
    boxes = scale_boxes(boxes[boxes.image_id.isin(images.image_id)], images, originals, source, IMAGE_TABLE)
    images, boxes = cut_at_edges(images, boxes, source, IMAGE_TABLE, "_image")
    unused = set(labels.id) - set(images.study_id)
    faults.add_summary(STUDY_TABLE, {f"{study_id}_study" for study_id in unused}, "have no usable image", "other studies")
    return Dataset.from_tables(source, images, labels, PUBLISHED, boxes=boxes)


def _find_train_files(source: DataFolder, rows: pd.DataFrame) -> pd.DataFrame:
    """Return a table of the training files with the columns image_id, path and study_id (as in `_find_files`).

    Raises DatasetError if there is no folder `train`, or if `rows` lists none of the files below this folder.
    """
    trains = dict.fromkeys(
        path.parents[len(names) - 1 - names.index("train")]
        for path, names in ((path, source.folders(path)) for path in source.paths)
        if "train" in names
    )
    # Images in additional folders are used only if the main folder has none, as when it contains only the tables.
    own = [train for train in trains if train.is_relative_to(source.folder)]
    tables = [_find_files(train, source.faults, image_ids=set(rows.image_id))[0] for train in own or trains]
    files = pd.concat([pd.DataFrame(columns=["image_id", "study_id", "path"]), *tables])
    # If there are several folders called train, they are copies, as in an archive that contains everything twice.
    copies = files.path[files.image_id.duplicated()].map(source.name)
    source.faults.add_summary("train", copies, "have the name of a file in another folder train; left out", "other files")
    files = files.drop_duplicates("image_id")
    if not files.image_id.isin(rows.image_id).any():
        found = [path for path in source.paths if "train" in source.folders(path)]
        first = f", the first is {source.name(found[0])}" if found else ""
        wanted = f", such as train/{rows.study_id.iloc[0]}/<series>/{rows.image_id.iloc[0]}.dcm" if len(rows) else ""
        raise DatasetError(
            f"{source.folder / 'train'} holds {len(found)} files{first}; none of them is a <study>/<series>/<image>.dcm of "
            f"the {len(rows)} images in {IMAGE_TABLE}{wanted}, or a PNG or JPEG copy. Unpack the competition's training "
            "files in this folder, see inputs/README.md"
        )
    return files


def read_test(folder: str | Path, progress: bool = True, headers: bool = True) -> SiimTest:
    """Return the SIIM test set: the images below `folder`/test, and the ids that need a row in a submission.

    Test files have paths <study>/<series>/<image>.dcm. Files with other paths or suffixes are read too if the sample
    submission has their image id. If the path of such a file contains a study in the sample submission, this is the file's
    study; otherwise, the study in the header is. If `headers` is False, no file is opened, which is fast: each study counts
    as a patient, sizes are 0, and an image without a study in its path has its own id as study_id (see
    `studies_from_headers`). If an image's header cannot be read, its study counts as its patient.

    The public and the hidden test set differ, so files and sample submission need not have the same ids. Ids without a file
    and files' ids that the sample submission lacks are faults. The sample submission's ids need a row or, if it
    has none, the files' ids. Raises DatasetError if there are neither ids in the sample submission nor usable test files.
    """
    folder = Path(folder)
    test, faults = folder / "test", Faults()
    sample_ids = _read_sample_ids(folder / SAMPLE, faults)
    if not sample_ids and not test.is_dir():
        problems = "".join(f"; {file}: {problem}" for file, _, problem in faults.rows)
        raise DatasetError(
            f"{folder} has neither ids in {SAMPLE} nor a folder 'test'; inputs/README.md shows the layout{problems}"
        )
    listed: dict[str, list[str]] = {"study": [], "image": []}
    for name in sample_ids:
        bare, _, kind = name.rpartition("_")
        listed[kind].append(bare)
    if not test.is_dir():
        faults.add("test", "", "the folder is missing; only the sample submission's ids are used")
    files, studies = _find_files(test, faults, set(listed["study"]), set(listed["image"]))
    if not sample_ids and files.empty:
        problems = "; ".join(f"{file} {row}: {problem}" for file, row, problem in faults.rows[:3])
        raise DatasetError(
            f"a submission would have no rows: {test} has no file of the form <study>/<series>/<image>.dcm, and {SAMPLE} "
            f"has no ids. The first of {len(faults.rows)} faults: {problems or 'none, because the folder is empty'}"
        )
    ids: dict[str, tuple[str, ...]] = {}
    for kind, names in (("study", studies), ("image", files.image_id.tolist())):
        sample_names, file_names = set(listed[kind]), set(names)
        for name in listed[kind]:
            if name not in file_names:
                faults.add(SAMPLE, f"{name}_{kind}", "has no file below test; it still gets a row")
        additional = [name for name in names if name not in sample_names]
        if sample_ids:
            for name in additional:
                faults.add("test", name, f"the {kind} is not in {SAMPLE}")
        ids[kind] = (*listed[kind], *additional)
    if headers:
        images = studies_from_headers(files, ids["study"])
        name_file = partial(_relative_path, folder=folder)
        images = _with_headers(images, name_file, faults, "included, with the study from its path", progress)
        images = images.drop(columns="readable")
    else:
        images = files.assign(patient_id=files.study_id, rows=0, columns=0, view="", source="siim")
    images = check_table(images, "images", str(folder))
    return SiimTest(images, faults.table(), ids["study"], ids["image"], sample_ids)


def studies_from_headers(images: pd.DataFrame, study_ids: Collection[str]) -> pd.DataFrame:
    """Return `images` with the study id from the DICOM header for each image whose study was unknown.

    The study of an image is unknown if its study_id is its image_id. It stays unknown if the file cannot be read, or if the
    study in the header is not in `study_ids`.
    """
    unknown = [row for row in images.itertuples() if row.study_id == row.image_id]
    headers, known = read_headers([row.path for row in unknown], progress=False), set(study_ids)
    studies = {row.Index: header.study_id for row, header in zip(unknown, headers, strict=True) if header.study_id in known}
    return images.assign(study_id=[studies.get(index, study) for index, study in images.study_id.items()])


def read_label_tables(folder: str | Path | DataFolder) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read the two CSV files of labels; return a `labels` table (id is the study_id), a `boxes` table and a table of images.

    The files may be anywhere below `folder`, or in additional folders if `folder` is a DataFolder.

    Boxes are in original pixels. They may reach beyond the edges of the images, because the CSV files have no image sizes.
    The table of images has the columns image_id, study_id and false_none. Invalid rows are left out and recorded as faults.
    Raises DatasetError if a file or a column is missing.
    """
    source = DataFolder.of(folder)
    faults, how_to_get = source.faults, "copy the competition's file there, see inputs/README.md"
    labels = _read_study_labels(source.need_table(STUDY_TABLE, how_to_get=how_to_get), faults)
    path = source.need_table(IMAGE_TABLE, how_to_get=how_to_get)
    table = read_csv(path, ("id", "boxes", "label", "StudyInstanceUID"))
    table["image_id"] = _bare_ids(table.id, "_image", IMAGE_TABLE, faults)
    labelled = set(labels.id)
    rows, boxes, studies_with_boxes = [], [], set()
    for row in table[table.image_id != ""].itertuples():
        if row.boxes.strip():
            studies_with_boxes.add(row.StudyInstanceUID)
        if row.StudyInstanceUID not in labelled:
            faults.add(IMAGE_TABLE, row.id, f"study {row.StudyInstanceUID!r} has no usable row in {STUDY_TABLE}; left out")
            continue
        try:
            image_boxes = _parse_boxes(row.boxes)
            if bool(image_boxes) != row.label.startswith("opacity"):
                raise ValueError(f"{row.label[:60]!r} in the column 'label' contradicts the column 'boxes'")
        except ValueError as error:
            faults.add(IMAGE_TABLE, row.id, f"{error}; left out")
            continue
        rows.append((row.image_id, row.StudyInstanceUID, not image_boxes))
        boxes += [(row.image_id, *box) for box in image_boxes]
    images = pd.DataFrame(rows, columns=["image_id", "study_id", "false_none"])
    images["false_none"] = images.false_none.astype(bool) & images.study_id.isin(studies_with_boxes)
    table = check_table(pd.DataFrame(boxes, columns=["image_id", *BOX]), "boxes", IMAGE_TABLE)
    return labels, table, images.sort_values("image_id")


def _read_study_labels(path: Path, faults: Faults) -> pd.DataFrame:
    table = read_csv(path, ("id", *STUDY_LABEL_COLUMNS))
    labels = pd.DataFrame({"id": _bare_ids(table.id, "_study", STUDY_TABLE, faults)})
    for column, name in STUDY_LABEL_COLUMNS.items():
        labels[name] = pd.to_numeric(table[column], errors="coerce")
    values = labels[list(STUDY_CLASSES)]
    is_one_hot = values.isin([0, 1]).all(axis=1) & (values.sum(axis=1) == 1)
    for name in table.id[~is_one_hot & (labels.id != "")]:
        faults.add(STUDY_TABLE, name, "the row does not have a 1 for exactly one class and 0 for the others; left out")
    return check_table(labels[is_one_hot & (labels.id != "")], "labels", str(path))


def _bare_ids(ids: pd.Series, suffix: str, file: str, faults: Faults) -> pd.Series:
    """Return the ids without `suffix`, but "" for an id that lacks the suffix or repeats; each "" is a fault of `file`."""
    bare = ids.str.removesuffix(suffix)
    is_wrong = ~ids.str.endswith(suffix) | (bare == "")
    is_repeated = ~is_wrong & ids.duplicated()
    for name in ids[is_wrong]:
        faults.add(file, name, f"the id does not end in {suffix}; left out")
    for name in ids[is_repeated]:
        faults.add(file, name, "the id occurs again; the first row is used")
    return bare.where(~is_wrong & ~is_repeated, "")


def _parse_boxes(cell: str) -> list[tuple[float, float, float, float]]:
    """Return the boxes (xmin, ymin, xmax, ymax) in a table's cell, such as [{'x': 1, 'y': 2, 'width': 3, 'height': 4}].

    An empty cell has no boxes. Raises ValueError if the cell is not a Python literal in this form.
    """
    if not cell.strip():
        return []
    try:
        entries = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"the cell in the column 'boxes' is not a Python literal: {cell[:60]!r}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"the cell in the column 'boxes' is not a list of boxes: {cell[:60]!r}")
    return [_box_corners(entry) for entry in entries]


def _box_corners(entry: Any) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(entry[key]) for key in ("x", "y", "width", "height"))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"a box needs numbers for x, y, width and height, got {str(entry)[:60]!r}") from error
    corners = (x, y, x + width, y + height)
    if not all(map(math.isfinite, corners)) or corners[2] <= x or corners[3] <= y:
        raise ValueError(f"a box has no area: {str(entry)[:90]!r}")
    return corners


def _read_sample_ids(path: Path, faults: Faults) -> tuple[str, ...]:
    """Return the ids in the sample submission `path`, or () if the file cannot be read; invalid ids are faults."""
    try:
        sample = read_sample(path)
    except SubmissionError as error:
        faults.add(SAMPLE, "", f"{error}; ids are taken from the files below test")
        return ()
    for name, problem in sample.repairs:
        faults.add(SAMPLE, name, problem)
    return sample.ids


def _find_files(
    root: Path, faults: Faults, study_ids: Collection[str] = (), image_ids: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Return a table of the image files <study>/<series>/<image>.dcm below `root`, and a list of the studies in `root`.

    The table is sorted by image_id and has the columns image_id, study_id and path. The studies are the names of the folders
    directly in `root`. A file named after one of `image_ids` may have any other path, and another suffix or none; without
    one of `study_ids` in its path, its study_id is its image_id. If several files have the same image_id, files below one of
    `study_ids` are preferred, then files at the path above, then suffixes as in PREFERRED, then the first path in
    alphabetical order. Files that are not used are faults.
    """
    candidates, studies = [], []

    def leave_out(folder: str, reason: str) -> None:
        faults.add(_relative_path(folder, root.parent), "", f"{reason}; left out")

    for folder, names in walk(root, leave_out, MAX_DEPTH):
        parts = folder.relative_to(root).parts
        if len(parts) == 1 and _can_be_id(parts[0]):
            studies.append(parts[0])
        for name in names:
            path = root.joinpath(*parts, name)
            suffix = path.suffix.lower()
            has_suffix = suffix == ".dcm"
            image_id = name if name in image_ids and not has_suffix else path.stem
            is_usual, is_named = has_suffix and len(parts) == 2, image_id in image_ids and suffix not in NOT_IMAGES
            study = next((part for part in parts if part in study_ids), parts[0] if is_usual else "")
            if not all(map(_can_be_id, (study, image_id))):
                problem = "has characters in its path that an id in a CSV file cannot have; left out"
                faults.add(_relative_path(path, root.parent), path.stem, problem)
            elif not is_usual and not is_named:
                problem = "is not in the form <study>/<series>/<image>.dcm; left out"
                faults.add(_relative_path(path, root.parent), path.stem, problem)
            else:
                rank = (study not in study_ids, not is_usual, [*PREFERRED, suffix].index(suffix))
                candidates.append((rank, str(path), image_id, study or image_id))
    files: dict[str, tuple[str, str, str]] = {}
    unusual = []
    for (_, is_unusual, _), candidate, image_id, study in sorted(candidates):
        if image_id in files:
            problem = f"has the same name as {files[image_id][2]}; left out"
            faults.add(_relative_path(candidate, root.parent), image_id, problem)
            continue
        files[image_id] = (image_id, study, candidate)
        if is_unusual:
            unusual.append(_relative_path(candidate, root.parent))
    problem = "are not in the form <study>/<series>/<image>.dcm; used, because a table lists their images"
    faults.add_summary(root.name, unusual, problem, "other files")
    columns = ["image_id", "study_id", "path"]
    return pd.DataFrame([files[name] for name in sorted(files)], columns=columns), sorted(studies)


def _can_be_id(name: str) -> bool:
    """Return whether `name` can be written as an id to a CSV file without quoting: no comma, quote or control character."""
    return name.isprintable() and not set(name) & {",", '"'}


def _with_headers(
    images: pd.DataFrame, name: Callable[[str], str], faults: Faults, outcome: str, progress: bool
) -> pd.DataFrame:
    """Return `images` with additional columns from the DICOM headers: patient_id, rows, columns, view, source and readable.

    `readable` says whether the header could be read. If not, a fault is added; its text ends with `outcome`, which says how
    the image is handled. `name` is a function from a path to the file name that the fault states.
    """
    records = []
    for row, header in zip(images.itertuples(), read_headers(images.path, progress), strict=True):
        if header.problem:
            faults.add(name(row.path), row.image_id, f"the header cannot be read ({header.problem}); {outcome}")
        patient = header.patient_id or row.study_id
        records.append((patient, header.rows, header.columns, header.view, not header.problem))
    columns = pd.DataFrame(records, columns=["patient_id", "rows", "columns", "view", "readable"])
    return images.join(columns).assign(source="siim")


def _relative_path(path: str | Path, folder: Path) -> str:
    return str(Path(path).relative_to(folder))
