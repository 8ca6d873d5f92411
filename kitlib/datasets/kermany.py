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
KNOWN = ("viral", "bacterial", "normal")
GERMS = {"bacteria": "bacterial", "virus": "viral", "normal": "normal"}
# Kaggle's names, and those of Mendeley's third version. A third number is of one more image of the same series.
PERSON = re.compile(r"(person\d+)_(bacteria|virus)_\d+(?:_\d+)?", re.IGNORECASE)
SERIES = re.compile(r"(?:NORMAL2-)?(IM-\d+)-\d+(?:-\d+)?", re.IGNORECASE)
MENDELEY = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+", re.IGNORECASE)
GOT = "`kaggle datasets download paultimothymooney/chest-xray-pneumonia`, see inputs/README.md"
# Kermany et al. 2018, Cell: 5,232 images to train on, of which 3,883 of pneumonia, and 624 to test on.
PUBLISHED = {"images": 5856, "bacterial": 2780, "viral": 1493, "normal": 1583}


def read_kermany(folder: str | Path, progress: bool = True) -> Dataset:
    """The images in train, test and val of `folder`, or of a folder in it, each with NORMAL and PNEUMONIA.

    image_id is the file's name without suffix, after `PART-` where two parts share it. Diagnosis and patient are told by the
    name. The same number counts as the same patient wherever it occurs, in all parts and of both germs: nobody has said
    whether `person1` of the test folder is that of the training folder, and to join two people costs nothing, while to part
    one leaks. For that reason the official test folder, which shares its numbers, makes no split; it stands in the column
    `part`. All are children of one to five years: `age_group` is "child", `age` unknown. Left out, with a fault: copies of a
    part within the folder, names that do not say a diagnosis, or say another than their folder, and unreadable files. Raises
    DatasetError where no such folder or no image is there.
    """
    folder, faults = Path(folder), Faults()
    found: dict[tuple[str, str], _Named] = {}
    for path, part, kind in _files(folder):
        named, name = _named(path), str(path.relative_to(folder))
        if named is None:
            faults.add(name, path.stem, "the name says no diagnosis; left out")
        elif (named.diagnosis == "normal") != (kind == "NORMAL"):
            faults.add(name, path.stem, f"is called {named.diagnosis} in the folder {kind}; left out")
        elif (part, path.stem) in found:
            faults.add(name, path.stem, f"has the name of {found[part, path.stem].path}; left out")
        else:
            found[part, path.stem] = named
    if not found:
        raise DatasetError(
            f"{folder} holds no image in train, test or val with the folders {' and '.join(KINDS)}: unpack it there, {GOT}"
        )
    stems = pd.Series([stem for _, stem in found])
    shared = set(stems[stems.duplicated()])
    rows = pd.DataFrame(
        {
            "image_id": [f"{part}-{stem}" if stem in shared else stem for part, stem in found],
            "patient_id": [f"kermany-{named.patient}" for named in found.values()],
            "path": [str(named.path) for named in found.values()],
            "source": "kermany",
            "view": "AP",
            "diagnosis": [named.diagnosis for named in found.values()],
            "part": [part for part, _ in found],
            "age_group": "child",
            "licence": "CC BY 4.0",
        }
    )
    return diagnosis_dataset(rows, folder, faults, KNOWN, GOT, PUBLISHED, progress)


@dataclass(frozen=True)
class _Named:
    path: Path
    diagnosis: str
    patient: str


def _files(folder: Path) -> list[tuple[Path, str, str]]:
    """Path, part and kind of each image file whose folder is called as a kind, in one called as a part."""
    found = []
    # Kaggle's archive has all of it twice, once a folder deeper, and Apple's hidden files.
    for root, folders, names in os.walk(folder):
        folders.sort()
        part, kind = Path(root).parent.name.lower(), Path(root).name.upper()
        if part in PARTS and kind in KINDS and "__MACOSX" not in Path(root).parts:
            paths = [Path(root, name) for name in sorted(names) if not name.startswith(".")]
            found += [(path, part, kind) for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda each: (len(each[0].parts), each[0]))


def _named(path: Path) -> _Named | None:
    if match := PERSON.fullmatch(path.stem):
        return _Named(path, GERMS[match[2].lower()], match[1].lower())
    if match := MENDELEY.fullmatch(path.stem):
        return _Named(path, GERMS[match[1].lower()], match[2])
    if match := SERIES.fullmatch(path.stem):
        return _Named(path, "normal", match[1].upper())
    return None
