"""Reads COVIDx (Wang, Lin and Wong 2020): images of several data sets, listed with their classes and sources."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.datasets.rsna import MAPPING, read_nih_patients
from kitlib.errors import DatasetError

PARTS = ("train", "val", "test")
# Three classes; later lists have two, of which "negative" includes any other pneumonia.
CLASSES = {"normal": "normal", "pneumonia": "pneumonia", "covid-19": "COVID-19", "positive": "COVID-19", "negative": "other"}
KNOWN_DIAGNOSES = ("COVID-19", "pneumonia", "normal", "other")
# COVIDx's source -> the source's name and the patients' prefix in this kit. Pooled with the original data set, a patient
# keeps one id.
SOURCES = {
    "cohen": ("ieee8023", "ieee"),
    "ricord": ("ricord", "ricord"),
    "bimcv": ("bimcv", "bimcv"),
}
RSNA = "rsna"
UNKNOWN_SOURCE = "covidx"  # for lists of three columns, which have no source
HOW_TO_GET = "`kaggle datasets download andyczhao/covidx-cxr2`, see inputs/README.md"


def read_covidx(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the images in train/, test/ and (if present) val/, each with a list of patient, file, class and source.

    A list is named `train.txt`, or `train_COVIDx5.txt` and the like; older lists have no source. Columns are separated by
    blanks, which a file name may also contain. image_id is the file name without suffix, or with it if two files share it.
    `split` is "test" for the official test set, otherwise "train". Patients of sources that the kit also reads by themselves
    have the same id as there. RSNA's patientIds identify images, most of which share an NIH patient with another: with
    RSNA's MAPPING in the folder patients are NIH's, without it a fault warns of leaks. Left out, with a fault: invalid
    lines, files that are listed again, missing or damaged. Raises DatasetError if the list of train or test is missing, a
    part has several lists, or no image is found.
    """
    folder, faults = Path(folder), Faults()
    entries: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    for part in PARTS:
        list_path = _find_list(folder, part)
        if list_path is None:
            continue
        for number, cells in _read_lines(list_path):
            if cells is None:
                faults.add(
                    list_path.name, str(number), "the line does not consist of patient, file, class and source; left out"
                )
                continue
            patient, name, class_name, source = cells
            path = folder / part / name
            if not path.is_file():
                missing.append(f"{part}/{name}")
            elif str(path) in entries:
                faults.add(list_path.name, name, "an earlier line lists the same file; left out")
            else:
                entries[str(path)] = (patient, CLASSES[class_name], source, "test" if part == "test" else "train")
    faults.add_summary("train, val, test", missing, "have no file; left out")
    if not entries:
        raise DatasetError(f"{folder / 'train'} and {folder / 'test'} hold no image that a list names: {HOW_TO_GET}")
    maybe_rsna = any(source in (RSNA, UNKNOWN_SOURCE) for _, _, source, _ in entries.values())
    nih_patient_ids = read_nih_patients(folder / MAPPING, faults) if maybe_rsna else {}
    names = pd.Series([Path(path).name for path in entries], dtype=object)
    stems = names.map(lambda name: Path(name).stem)
    ids = stems.mask(stems.duplicated(keep=False), names)
    prefixes = pd.Series([f"{Path(path).parent.name}-" for path in entries], dtype=object)
    rows = pd.DataFrame(
        {
            "image_id": ids.mask(ids.duplicated(keep=False), prefixes + ids),
            "patient_id": [_patient_id(patient, source, nih_patient_ids) for patient, _, source, _ in entries.values()],
            "path": list(entries),
            "source": [SOURCES.get(source, (source,))[0] for _, _, source, _ in entries.values()],
            "view": "",
            "diagnosis": [diagnosis for _, diagnosis, _, _ in entries.values()],
            "split": [split for *_, split in entries.values()],
        }
    )
    return diagnosis_dataset(rows, folder, faults, KNOWN_DIAGNOSES, HOW_TO_GET, progress=progress)


def _find_list(folder: Path, part: str) -> Path | None:
    """Return the list of a part, None if val has none. Raises DatasetError if there are several or another is missing."""
    lists = sorted(path for path in folder.glob(f"{part}*.txt"))
    if len(lists) > 1:
        raise DatasetError(f"{folder} has several lists, {', '.join(path.name for path in lists)}: keep one for each part")
    if not lists and part != "val":
        raise DatasetError(f"{folder}/{part}.txt, or {part}_COVIDx5.txt and the like, is missing: {HOW_TO_GET}")
    return lists[0] if lists else None


def _read_lines(path: Path) -> Iterator[tuple[int, tuple[str, str, str, str] | None]]:
    """Yield the number (from 1) of each line and its patient, file, class and source, None if the line is invalid.

    Class and source are in lower case.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        cells = line.split()
        if not cells or (number == 1 and "filename" in line.lower()):
            continue
        # A class in the last column means that the list has three columns, without a source.
        source = UNKNOWN_SOURCE if cells[-1].lower() in CLASSES else cells.pop().lower()
        is_valid = len(cells) >= 3 and cells[-1].lower() in CLASSES
        yield number, (cells[0], " ".join(cells[1:-1]), cells[-1].lower(), source) if is_valid else None


def _patient_id(patient: str, source: str, nih_patient_ids: dict[str, str]) -> str:
    if source == RSNA or patient in nih_patient_ids:
        return nih_patient_ids.get(patient, patient)
    number = patient.removeprefix("MIDRC-RICORD-1C-").removeprefix("sub-")
    return f"{SOURCES.get(source, ('', f'covidx-{source}'))[1]}-{number}"
