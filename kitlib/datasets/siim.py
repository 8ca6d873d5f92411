"""Reads the training and test sets of the SIIM-FISABIO-RSNA COVID-19 competition, and lists their faults.

Nothing is left out silently: each table of faults has the columns `file`, `row` (an id as written in the file, or a path)
and `problem`, which also says how the fault was handled.
"""

import ast
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.classes import STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.datasets.base import Dataset, Faults, cut_at_edges, read_csv, read_headers
from kitlib.datasets.sample_submission import read_sample
from kitlib.errors import DatasetError, SubmissionError
from kitlib.tables import BOX, check_table

STUDY_TABLE, IMAGE_TABLE, SAMPLE = "train_study_level.csv", "train_image_level.csv", "sample_submission.csv"
# For the training set; counted in the competition's tables and DICOM headers.
PUBLISHED = {"images": 6334, "studies": 6054, "patients": 3261, "boxes": 7853, "false_none": 217}
# Suffixes of files that hold no image, although they may be named like one, such as the JSON header beside a PNG.
NOT_IMAGES = (".json", ".csv", ".txt", ".xml", ".md", ".html", ".pdf", ".yaml")
# Of several files with one name, the first of these suffixes is used, then any other.
PREFERRED = (".dcm", ".png", ".jpg", ".jpeg")
MAX_DEPTH = 4  # folders below `train` or `test` in which files are searched; the competition's files are below two


@dataclass(frozen=True)
class SiimTest:
    """The test set: its images, its faults, and the ids of studies and images that need a row in a submission."""

    images: pd.DataFrame  # an `images` table, one row per file; rows and columns are 0 if the header cannot be read
    faults: pd.DataFrame  # see Dataset.faults
    study_ids: tuple[str, ...]  # studies that need a row: those of the sample in its order, then others that have files
    image_ids: tuple[str, ...]  # images that need a row: those of the sample in its order, then others that have files
    sample_ids: tuple[str, ...]  # the sample submission's ids (..._study, ..._image), each once; empty if it has none

    @property
    def submission_ids(self) -> tuple[str, ...]:
        """Ids of a submission's rows: exactly the sample's, as Kaggle requires, or those of the files below test."""
        return self.sample_ids or (
            *(f"{name}_study" for name in self.study_ids),
            *(f"{name}_image" for name in self.image_ids),
        )


def read_train(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the competition's training images, study labels and boxes (in original pixels, cut at the image's edges).

    `false_none` is True if an image has no box but another image of its study has one: annotators looked at one image per
    study, so the missing box means nothing. Such images are in the tables, but in no fold.

    Left out, with a fault: rows without a file, files without a row, images without a study label, images with an unreadable
    header (because their patient is unknown) or an invalid box (because the image would be taken for healthy). Raises
    DatasetError if the train folder, a CSV file or a column is missing, or if no file below train is an image of the table.
    """
    folder, faults = Path(folder), Faults()
    labels, boxes, rows = read_label_tables(folder, faults)
    train = folder / "train"
    if not train.is_dir():
        raise DatasetError(f"{train} is missing: unpack the competition's training files there, see inputs/README.md")
    files, _ = _find_dicom_files(train, faults)
    if not rows.image_id.isin(files.image_id).any():
        found = [path for path in sorted(train.rglob("*")) if path.is_file()]
        first = f", the first is {_relative_path(found[0], folder)}" if found else ""
        wanted = f", such as train/{rows.study_id[0]}/<series>/{rows.image_id[0]}.dcm" if len(rows) else ""
        raise DatasetError(
            f"{train} holds {len(found)} files{first}; none of them is a <study>/<series>/<image>.dcm of the "
            f"{len(rows)} images in {IMAGE_TABLE}{wanted}: unpack the competition's training files there"
        )
    for image_id in sorted(set(rows.image_id) - set(files.image_id)):
        faults.add(IMAGE_TABLE, f"{image_id}_image", "has no file below train; left out")
    for file in files[~files.image_id.isin(rows.image_id)].itertuples():
        faults.add(_relative_path(file.path, folder), file.image_id, f"has no usable row in {IMAGE_TABLE}; left out")
    images = rows.merge(files, on="image_id", suffixes=("", "_of_file"))
    for row in images[images.study_id != images.study_id_of_file].itertuples():
        faults.add(
            IMAGE_TABLE,
            f"{row.image_id}_image",
            f"the file is below the study {row.study_id_of_file}; the table's study is used",
        )
    images = _with_headers(images, folder, faults, "left out", progress)
    images = images[images.readable].drop(columns=["readable", "study_id_of_file"])
    images, boxes = cut_at_edges(images, boxes[boxes.image_id.isin(images.image_id)], faults, IMAGE_TABLE, "_image")
    for study_id in sorted(set(labels.id) - set(images.study_id)):
        faults.add(STUDY_TABLE, f"{study_id}_study", "has no usable image")
    return Dataset.from_tables(folder, images, labels, faults, PUBLISHED, boxes=boxes)


def read_test(folder: str | Path, progress: bool = True, headers: bool = True) -> SiimTest:
    """Read the test images below `folder`/test, and the ids, from files and sample submission, that need a submission row.

    The files are <study>/<series>/<image>.dcm, or in other places and with other suffixes if the sample has their image;
    such a file belongs to the study of the sample that is in its path, otherwise to the one in its header. With
    `headers=False` no file is opened, which is fast: each study is then treated as a patient, sizes are 0, and an image
    whose path has no study has its own id as study_id, see `studies_from_headers`. The files and the sample submission need
    not agree (the public and the hidden test set differ, and either may have no study or no image): an id that is in only
    one of them is a fault, but still part of the result. An image with an unreadable header gets a row; its study is that in
    its path, which is also used as its patient. Raises DatasetError if the folder test is missing and no sample submission
    can be read.
    """
    folder = Path(folder)
    test, faults = folder / "test", Faults()
    sample_ids = _read_sample_ids(folder / SAMPLE, faults)
    if not sample_ids and not test.is_dir():
        problems = "".join(f"; {file}: {problem}" for file, _, problem in faults.rows)
        raise DatasetError(
            f"{folder} has neither {SAMPLE} with ids nor a folder test; see inputs/README.md for its layout{problems}"
        )
    listed: dict[str, list[str]] = {"study": [], "image": []}
    for name in sample_ids:
        bare, _, kind = name.rpartition("_")
        listed[kind].append(bare)
    if not test.is_dir():
        faults.add("test", "", "the folder is missing; only the sample submission's ids are used")
    files, studies = _find_dicom_files(test, faults, set(listed["study"]), set(listed["image"]))
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
        images = _with_headers(images, folder, faults, "included, with the study from its path", progress)
        images = images.drop(columns="readable")
    else:
        images = files.assign(patient_id=files.study_id, rows=0, columns=0, view="", source="siim")
    images = check_table(images, "images", str(folder))
    return SiimTest(images, faults.table(), ids["study"], ids["image"], sample_ids)


def studies_from_headers(images: pd.DataFrame, study_ids: Collection[str]) -> pd.DataFrame:
    """Return `images` with the study that the DICOM header states for each image that has its own id as study_id.

    Only studies in `study_ids` are used; other images, and files that cannot be read, keep their own id as study_id.
    """
    unknown = [row for row in images.itertuples() if row.study_id == row.image_id and os.path.isfile(row.path)]
    headers, known = read_headers([row.path for row in unknown], progress=False), set(study_ids)
    studies = {row.Index: header.study_id for row, header in zip(unknown, headers, strict=True) if header.study_id in known}
    return images.assign(study_id=[studies.get(index, study) for index, study in images.study_id.items()])


def read_label_tables(folder: Path, faults: Faults) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read the two CSV files of labels; returns a `labels` table (id is the study_id), a `boxes` table, a table of images.

    Boxes are in original pixels and may reach beyond their images, whose sizes are in the DICOM files. The table of images
    has the columns image_id, study_id and false_none. Invalid rows are left out, with a fault. Raises DatasetError if a file
    or a column is missing.
    """
    labels = _read_study_labels(folder / STUDY_TABLE, faults)
    table = read_csv(folder / IMAGE_TABLE, ("id", "boxes", "label", "StudyInstanceUID"))
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
                raise ValueError(f"boxes and label disagree: {row.label[:60]!r}")
        except ValueError as error:
            faults.add(IMAGE_TABLE, row.id, f"{error}; left out")
            continue
        rows.append((row.image_id, row.StudyInstanceUID, not image_boxes))
        boxes += [(row.image_id, *box) for box in image_boxes]
    images = pd.DataFrame(rows, columns=["image_id", "study_id", "false_none"], dtype=object)
    images["false_none"] = images.false_none.astype(bool) & images.study_id.isin(studies_with_boxes)
    table = check_table(pd.DataFrame(boxes, columns=["image_id", *BOX]), "boxes", IMAGE_TABLE)
    return labels, table, images.sort_values("image_id", ignore_index=True)


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
    """Return each id without `suffix`; "", with a fault, for an id that lacks the suffix or repeats an earlier one."""
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
        raise ValueError(f"the boxes are not a Python literal: {cell[:60]!r}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"the boxes are not a list of boxes: {cell[:60]!r}")
    return [_box_corners(entry) for entry in entries]


def _box_corners(entry: Any) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(entry[key]) for key in ("x", "y", "width", "height"))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"a box needs numbers for x, y, width, height, got {str(entry)[:60]!r}") from error
    corners = (x, y, x + width, y + height)
    if not all(map(math.isfinite, corners)) or corners[2] <= x or corners[3] <= y:
        raise ValueError(f"a box has no area: {str(entry)[:90]!r}")
    return corners


def _read_sample_ids(path: Path, faults: Faults) -> tuple[str, ...]:
    """Return the ids in the sample submission `path`, () if it cannot be read; every repair is a fault."""
    try:
        sample = read_sample(path)
    except SubmissionError as error:
        faults.add(SAMPLE, "", f"{error}; ids are taken from the files below test")
        return ()
    for name, problem in sample.repairs:
        faults.add(SAMPLE, name, problem)
    return sample.ids


def _find_dicom_files(
    root: Path, faults: Faults, study_ids: Collection[str] = (), image_ids: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Return a table of the files <study>/<series>/<image>.dcm below `root`, sorted by image_id, and all folders in `root`.

    The columns are image_id, study_id and path. Files of `image_ids` may also lie elsewhere and have another suffix or none;
    one without a study in its path has its image_id as study_id. If several files have the same image_id, the best placed is
    used: below a study of `study_ids`, in the usual form, first in the order of paths. Other files are faults.
    """
    candidates, studies = [], []
    for parts, names in _walk(root, faults):
        if len(parts) == 1 and _can_be_id(parts[0]):
            studies.append(parts[0])
        for name in names:
            if name.startswith("."):
                continue  # hidden files, created by desktops and interrupted downloads
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
    for (_, is_unusual, _), candidate, image_id, study in sorted(candidates):
        if image_id in files:
            problem = f"has the same name as {files[image_id][2]}; left out"
            faults.add(_relative_path(candidate, root.parent), image_id, problem)
            continue
        files[image_id] = (image_id, study, candidate)
        if is_unusual:
            problem = f"is not in the form <study>/<series>/<image>.dcm; used, because {SAMPLE} has its image"
            faults.add(_relative_path(candidate, root.parent), image_id, problem)
    columns = ["image_id", "study_id", "path"]
    return pd.DataFrame([files[name] for name in sorted(files)], columns=columns, dtype=object), sorted(studies)


def _walk(root: Path, faults: Faults) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the path below `root`, as its parts, and the names of the files of each folder, at most MAX_DEPTH deep.

    Links to folders are followed after all other folders, unless they lead to a folder that contains `root`. Every folder is
    read once, so links cannot lead in a circle.
    """
    starts, read = [str(root)] if root.is_dir() else [], set()

    def cannot_be_read(error: OSError) -> None:
        faults.add(
            _relative_path(error.filename, root.parent), "", f"the folder cannot be read ({error.strerror}); left out"
        )

    for start in starts:  # grows in the loop
        for folder, folders, names in os.walk(start, onerror=cannot_be_read):
            status, parts = os.stat(folder), Path(folder).relative_to(root).parts
            place = (status.st_dev, status.st_ino)
            if place in read or len(parts) > MAX_DEPTH:
                reason = (
                    "is a link to a folder that is read already" if place in read else f"is over {MAX_DEPTH} folders deep"
                )
                faults.add(_relative_path(folder, root.parent), "", f"{reason}; left out")
                folders.clear()
                continue
            read.add(place)
            folders.sort()
            links = [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            # A link to a folder above would add all other data sets.
            starts += [link for link in links if not root.resolve().is_relative_to(os.path.realpath(link))]
            yield parts, sorted(names)


def _can_be_id(name: str) -> bool:
    """Return whether an id can be written to a CSV file as it is."""
    return name.isprintable() and not set(name) & {",", '"'}


def _with_headers(images: pd.DataFrame, folder: Path, faults: Faults, outcome: str, progress: bool) -> pd.DataFrame:
    """Return `images` with additional columns from the DICOM headers: patient_id, rows, columns, view, source and readable.

    `readable` says whether the header could be read. If not, this is a fault, whose text ends with `outcome`, which says how
    the image is handled.
    """
    records = []
    for row, header in zip(images.itertuples(), read_headers(images.path, progress), strict=True):
        if header.problem:
            faults.add(
                _relative_path(row.path, folder), row.image_id, f"the header cannot be read ({header.problem}); {outcome}"
            )
        patient = header.patient_id or row.study_id
        records.append((patient, header.rows, header.columns, header.view, not header.problem))
    columns = pd.DataFrame(records, columns=["patient_id", "rows", "columns", "view", "readable"], index=images.index)
    return images.join(columns).assign(source="siim")


def _relative_path(path: str | Path, folder: Path) -> str:
    return str(Path(path).relative_to(folder))
