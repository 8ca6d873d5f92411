"""Reads Kermany's X-rays of children (Cell 2018), from Kaggle or Mendeley: bacterial or viral pneumonia, or normal."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import PICTURES, DataFolder
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.errors import DatasetError

PARTS = ("train", "test", "val")
KINDS = {"normal": True, "pneumonia": False, "opacity": False}  # folder -> whether its images are normal
# Folders of retina images, which Mendeley's archive also contains, in the same layout and with another folder NORMAL.
RETINAS = ("cnv", "dme", "drusen")
KNOWN_DIAGNOSES = ("viral", "bacterial", "normal")
GERMS = {"bacteria": "bacterial", "virus": "viral", "normal": "normal"}
# File names in Kaggle's version and in Mendeley's third version. A third number counts further images of the same series.
PERSON = re.compile(r"(person\d+)_(bacteria|virus)_\d+(?:_\d+)?", re.IGNORECASE)
SERIES = re.compile(r"(?:NORMAL2-)?(IM-\d+)-\d+(?:-\d+)?", re.IGNORECASE)
MENDELEY = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+", re.IGNORECASE)
HOW_TO_GET = "`kaggle datasets download paultimothymooney/chest-xray-pneumonia`, see inputs/README.md"
# Kermany et al. 2018, Cell: 5,232 training images, 3,883 of them with pneumonia, and 624 test images.
PUBLISHED = {"images": 5856, "bacterial": 2780, "viral": 1493, "normal": 1583}


def read_kermany(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images in the folders train, test and val, which may be anywhere below `folder`.

    Each of these folders has the subfolders NORMAL and PNEUMONIA (in some copies OPACITY) or, as in coronahack, contains the
    images directly. The column `part` is train, test or val. image_id is the file name without suffix; if a file name occurs
    in two parts, it is prefixed with the part, as in `test-NAME`.

    The file name states the diagnosis and the patient. It is not documented whether `person1` in the test folder is
    `person1` in the training folder. A patient number is taken for the same patient in all parts and for both germs: joining
    two patients is harmless, but separating one leaks. There is no column `split`, because the official test folder shares
    patient numbers with the other folders. All patients are 1 to 5 years old: `age_group` is "child", `age` is unknown.

    Left out and recorded in `Dataset.faults`: unreadable files, files with the name of another file of their part,
    and files whose name states no diagnosis or another one than their folder. Raises DatasetError if there is no image.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    files: dict[tuple[str, str], _NamedFile] = {}
    unnamed, misplaced, copies = [], [], []
    for path, part, kind in _find_files(source):
        file = _parse_name(path)
        if file is None:
            unnamed.append(source.name(path))
        elif kind in KINDS and (file.diagnosis == "normal") != KINDS[kind]:
            misplaced.append(source.name(path))
        elif (part, path.stem) in files:
            copies.append(source.name(path))
        else:
            files[part, path.stem] = file
    faults.add_summary("the folder", unnamed, "have a name that states no diagnosis; left out", "other files")
    faults.add_summary("the folder", misplaced, "have a name that contradicts their folder; left out", "other files")
    faults.add_summary("the folder", copies, "have the name of another file of their part; left out", "other files")
    if not files:
        raise DatasetError(
            f"none of the {len(source.paths)} files in {folder} is an image such as 'train/PNEUMONIA/person1_virus_6.jpeg' "
            f"or 'test/NORMAL/IM-0115-0001.jpeg'; unpack the data set in this folder: {HOW_TO_GET}"
        )
    stems = pd.Series([stem for _, stem in files])
    shared = set(stems[stems.duplicated()])
    rows = pd.DataFrame(
        {
            "image_id": [f"{part}-{stem}" if stem in shared else stem for part, stem in files],
            "patient_id": [f"kermany-{named.patient}" for named in files.values()],
            "path": [str(named.path) for named in files.values()],
            "source": "kermany",
            "view": "AP",
            "diagnosis": [named.diagnosis for named in files.values()],
            "part": [part for part, _ in files],
            "age_group": "child",
            "licence": "CC BY 4.0",
        }
    )
    return diagnosis_dataset(rows, source, KNOWN_DIAGNOSES, HOW_TO_GET, PUBLISHED, progress=progress)


@dataclass(frozen=True)
class _NamedFile:
    path: Path
    diagnosis: str
    patient: str


def _find_files(source: DataFolder) -> list[tuple[Path, str, str]]:
    """Return (path, part, kind) for each image file in a folder PART/KIND or PART; part and kind are in lower case.

    The part is train, test or val. The kind is normal, pneumonia or opacity, or "" for files directly in a folder PART.
    Folders PART/KIND are left out if PART also has a folder of retina images (RETINAS).
    """
    retinas = {path.parent.parent for path in source.paths if path.parent.name.lower() in RETINAS}
    places = {}
    for path in source.paths:
        part, kind = ("", "", *source.folders(path))[-2:]
        if kind in PARTS:
            places[path] = (path, kind, "")
        elif part in PARTS and kind in KINDS and path.parent.parent not in retinas:
            places[path] = (path, part, kind)
    return [places[path] for path in source.find(PICTURES, places.__contains__)]


def _parse_name(path: Path) -> _NamedFile | None:
    if match := PERSON.fullmatch(path.stem):
        return _NamedFile(path, GERMS[match[2].lower()], match[1].lower())
    if match := MENDELEY.fullmatch(path.stem):
        return _NamedFile(path, GERMS[match[1].lower()], match[2])
    if match := SERIES.fullmatch(path.stem):
        return _NamedFile(path, "normal", match[1].upper())
    return None
