"""Reads COVIDx (Wang, Lin and Wong 2020): images from several data sets, with lists of each image's class and source."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, find_listed, index_files, read_lines
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.datasets.rsna import MAPPING, read_nih_patients
from kitlib.errors import DatasetError

PARTS = ("train", "val", "test")
# Class in a list -> diagnosis. Early lists have three classes, later ones two; "negative" includes other pneumonias.
CLASSES = {"normal": "normal", "pneumonia": "pneumonia", "covid-19": "COVID-19", "positive": "COVID-19", "negative": "other"}
KNOWN_DIAGNOSES = ("COVID-19", "pneumonia", "normal", "other")
# COVIDx's source -> the source's name and the prefix of patient ids in this kit. The prefix is that of the original data
# set, so that a patient has the same id in both if they are pooled.
SOURCES = {
    "cohen": ("ieee8023", "ieee"),
    "ricord": ("ricord", "ricord"),
    "bimcv": ("bimcv", "bimcv"),
}
RSNA = "rsna"
UNKNOWN_SOURCE = "covidx"  # for lists with three columns, which do not state a source
HOW_TO_GET = "`kaggle datasets download andyczhao/covidx-cxr2`, see inputs/README.md"


def read_covidx(folder: str | Path, progress: bool = True) -> Dataset:
    """Read the images in the folders train, test and (if present) val, each of which has a list of its images.

    A list is called `train.txt`, `train_COVIDx5.txt` or similar. A line has an image's patient, file, class and, except in
    older lists, source, separated by blanks. A patient and a file name may also contain blanks: if a line can be divided in
    several ways, the first one that names a file is used. image_id is the file name without suffix, or with the suffix if
    two files share a name. `split` is "test" for the official test set, otherwise "train". Patients
    from data sets that the kit can also read directly get the same ids as there. RSNA's patientIds identify images, most of
    which come from an NIH patient with several images: if RSNA's MAPPING is in the folder, patients are NIH's; otherwise a
    fault warns of leaks. Left out, with a fault: invalid lines, repeated files, and missing or damaged files. Raises
    DatasetError if the list of train or test is missing, a part has several lists, or no image is found.
    """
    folder, faults = Path(folder), Faults()
    entries: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    for part in PARTS:
        list_path = _find_list(folder, part)
        if list_path is None:
            continue
        files = index_files(folder / part)
        for number, cells in _read_lines(list_path, files):
            if cells is None:
                faults.add(
                    list_path.name, str(number), "the line does not have the form patient, file, class, source; left out"
                )
                continue
            patient, name, class_name, source = cells
            path = find_listed(files, name)
            if path is None:
                missing.append(f"{part}/{name}")
            elif str(path) in entries:
                faults.add(list_path.name, name, "an earlier line lists the same file; left out")
            else:
                entries[str(path)] = (patient, CLASSES[class_name], source, "test" if part == "test" else "train")
    faults.add_summary("train, val, test", missing, "have no file; left out")
    if not entries:
        raise DatasetError(
            f"{folder / 'train'} and {folder / 'test'} contain none of the {len(missing)} listed images"
            f"{f', such as {missing[0]}' if missing else ''}: {HOW_TO_GET}"
        )
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
    """Return the path of the list of `part` (train, val or test), or None if val has no list.

    Raises DatasetError if there are several lists, or if the list of train or test is missing.
    """
    lists = sorted(path for path in folder.glob(f"{part}*.txt"))
    if len(lists) > 1:
        raise DatasetError(
            f"{folder} has several lists, {', '.join(path.name for path in lists)}: keep one list for each part"
        )
    if not lists and part != "val":
        raise DatasetError(f"{folder} has no list {part}.txt, {part}_COVIDx5.txt or similar: {HOW_TO_GET}")
    return lists[0] if lists else None


def _read_lines(path: Path, files: dict[str, Path]) -> Iterator[tuple[int, tuple[str, str, str, str] | None]]:
    """Yield, for each line of a list, its number (from 1) and its cells: patient, file, class and source.

    Class and source are in lower case. If a line is invalid, None stands for the cells. Empty lines and a first line with
    column names are skipped. `files` are those of the list's part (see `index_files`).
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() or (number == 1 and "filename" in line.lower()):
            continue
        readings = list(_readings(line))
        if not readings:
            yield number, None
            continue
        yield number, next((reading for reading in readings if find_listed(files, reading[1])), readings[0])


def _readings(line: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield each way to divide a line into patient, file, class and source; in lists with three columns, without a source.

    Only patient and file contain blanks, so the last or the last but one word is the class. The patient is the first word,
    or more words in later readings.
    """
    words = line.split()
    for tail in (2, 1):
        if len(words) > tail + 1 and words[-tail].lower() in CLASSES:
            source = words[-1].lower() if tail == 2 else UNKNOWN_SOURCE
            start = line.rstrip()
            for word in reversed(words[-tail:]):
                start = start.removesuffix(word).rstrip()
            for blank in re.finditer(r"\s+", start := start.lstrip()):
                yield start[: blank.start()], start[blank.end() :], words[-tail].lower(), source


def _patient_id(patient: str, source: str, nih_patient_ids: dict[str, str]) -> str:
    if source == RSNA or patient in nih_patient_ids:
        return nih_patient_ids.get(patient, patient)
    number = patient.removeprefix("MIDRC-RICORD-1C-").removeprefix("sub-")
    return f"{SOURCES.get(source, ('', f'covidx-{source}'))[1]}-{number}"
