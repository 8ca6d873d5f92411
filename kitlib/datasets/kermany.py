"""Reads Kermany's X-rays of children (Cell 2018), from Kaggle or Mendeley: bacterial or viral pneumonia, or normal."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults
from kitlib.datasets.diagnoses import SUFFIXES, diagnosis_dataset
from kitlib.errors import DatasetError

PARTS = ("train", "test", "val")
KINDS = ("NORMAL", "PNEUMONIA")
KNOWN_DIAGNOSES = ("viral", "bacterial", "normal")
GERMS = {"bacteria": "bacterial", "virus": "viral", "normal": "normal"}
# File names in Kaggle's version and in Mendeley's third version. A third number counts further images of the same series.
PERSON = re.compile(r"(person\d+)_(bacteria|virus)_\d+(?:_\d+)?", re.IGNORECASE)
SERIES = re.compile(r"(?:NORMAL2-)?(IM-\d+)-\d+(?:-\d+)?", re.IGNORECASE)
MENDELEY = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+", re.IGNORECASE)
HOW_TO_GET = "`kaggle datasets download paultimothymooney/chest-xray-pneumonia`, see inputs/README.md"
# Kermany et al. 2018, Cell: 5,232 training images, 3,883 of them with pneumonia, and 624 test images.
PUBLISHED = {"images": 5856, "bacterial": 2780, "viral": 1493, "normal": 1583}


def read_kermany(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the images in train, test and val, each with the folders NORMAL and PNEUMONIA, anywhere below `folder`.

    image_id is the file name without suffix, prefixed with `PART-` if two parts share the name. The file name states the
    diagnosis and the patient. The same number is treated as the same patient in all parts and for both germs, because it is
    not documented whether `person1` in the test folder is `person1` in the training folder; joining two patients is
    harmless, while separating one leaks. Because the official test folder shares numbers with the others, there is no
    `split`; the column `part` is train, test or val. All patients are children of one to five years: `age_group` is "child",
    `age` unknown. Left out, with a fault: further copies of a part, names that state no diagnosis, or not that of their
    folder, and unreadable files. Raises DatasetError if there is no such folder or no image.
    """
    folder, faults = Path(folder), Faults()
    files: dict[tuple[str, str], _NamedFile] = {}
    for path, part, kind in _find_files(folder):
        file, name = _parse_name(path), str(path.relative_to(folder))
        if file is None:
            faults.add(name, path.stem, "the name states no diagnosis; left out")
        elif (file.diagnosis == "normal") != (kind == "NORMAL"):
            faults.add(name, path.stem, f"has a name that states {file.diagnosis}, but is in the folder {kind}; left out")
        elif (part, path.stem) in files:
            faults.add(name, path.stem, f"has the same name as {files[part, path.stem].path}; left out")
        else:
            files[part, path.stem] = file
    if not files:
        raise DatasetError(
            f"{folder} contains no image in the folders {' and '.join(KINDS)} of train, test or val; unpack the data set in "
            f"{folder}: {HOW_TO_GET}"
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
    return diagnosis_dataset(rows, folder, faults, KNOWN_DIAGNOSES, HOW_TO_GET, PUBLISHED, progress)


@dataclass(frozen=True)
class _NamedFile:
    path: Path
    diagnosis: str
    patient: str


def _find_files(folder: Path) -> list[tuple[Path, str, str]]:
    """Return (path, part, kind) for each image file in a folder PART/KIND, sorted by depth of the folder, then by path."""
    files = []
    # Kaggle's archive contains a second copy of all files, one folder deeper, and hidden macOS files.
    for root, folders, names in os.walk(folder):
        folders.sort()
        part, kind = Path(root).parent.name.lower(), Path(root).name.upper()
        if part in PARTS and kind in KINDS and "__MACOSX" not in Path(root).parts:
            paths = [Path(root, name) for name in sorted(names) if not name.startswith(".")]
            files += [(path, part, kind) for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(files, key=lambda file: (len(file[0].parts), file[0]))


def _parse_name(path: Path) -> _NamedFile | None:
    if match := PERSON.fullmatch(path.stem):
        return _NamedFile(path, GERMS[match[2].lower()], match[1].lower())
    if match := MENDELEY.fullmatch(path.stem):
        return _NamedFile(path, GERMS[match[1].lower()], match[2])
    if match := SERIES.fullmatch(path.stem):
        return _NamedFile(path, "normal", match[1].upper())
    return None
