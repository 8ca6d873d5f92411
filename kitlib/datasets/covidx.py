"""Reads COVIDx (Wang, Lin and Wong 2020): images from several data sets; text files list each image's class and source."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder, read_lines
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.datasets.rsna import read_nih_patients
from kitlib.errors import DatasetError

PARTS = ("train", "val", "test")
# Class in a list -> diagnosis. Early lists have three classes, later ones two; "negative" includes other pneumonias.
CLASSES = {"normal": "normal", "pneumonia": "pneumonia", "covid-19": "COVID-19", "positive": "COVID-19", "negative": "other"}
KNOWN_DIAGNOSES = ("COVID-19", "pneumonia", "normal", "other")
# COVIDx's source -> the source's name and the prefix of patient ids in this kit. The kit's reader of the original data set
# uses the same prefix, so that a patient has the same id if COVIDx and the original are pooled.
SOURCES = {
    "cohen": ("ieee8023", "ieee"),
    "ricord": ("ricord", "ricord"),
    "bimcv": ("bimcv", "bimcv"),
}
RSNA = "rsna"
UNKNOWN_SOURCE = "covidx"  # for lists with three columns, which do not state a source
HOW_TO_GET = "`kaggle datasets download andyczhao/covidx-cxr2`, see inputs/README.md"


def read_covidx(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images in the folders train, test and (if present) val, each described by a text file (list).

    The list is called `train.txt`, `train_COVIDx5.txt` or similar, and is next to the folder train or competition_train. If
    there are lists of several releases, `train.txt` is used, or else the latest release that has lists for both train and
    test; other lists are only recorded in `Dataset.faults`. Each line describes one image: patient, file, class and, except
    in older lists, source, separated by blanks. Patients and file names may also contain blanks: if a line can be divided in
    several ways, the first way in which the file exists is used. image_id is the file name without suffix, or with the
    suffix if two files have the same name. `split` is "test" for the official test set, otherwise "train".

    A patient has the same id as when the kit reads the original data set. RSNA's patientIds identify images, most of which
    come from an NIH patient with several images. If RSNA's list of NIH images (MAPPING) is in the folder, NIH's patient ids
    are used; otherwise `Dataset.faults` warns of leaks. Left out and recorded in `Dataset.faults`: invalid lines, repeated
    files, and missing or damaged files. Raises DatasetError if the list of train or test is missing, or no image is found.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    entries: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    for part, list_path in _find_lists(source).items():
        base = list_path.parent

        def find(name: str, exactly: bool = False, base: Path = base, part: str = part) -> Path | None:
            return source.find_listed(name, base, part, exactly) or source.find_listed(
                name, base, f"competition_{part}", exactly
            )

        lines = list(_read_lines(list_path, find))
        # A line whose file is missing must not get the file of another line that differs in its suffix.
        named_exactly = {find(cells[1], exactly=True) for _, cells in lines if cells}
        for number, cells in lines:
            if cells is None:
                faults.add(
                    list_path.name, str(number), "the line does not have the form patient, file, class, source; left out"
                )
                continue
            patient, name, class_name, origin = cells
            path = find(name, exactly=True) or find(name)
            if path is None or (path in named_exactly and not find(name, exactly=True)):
                missing.append(f"{part}/{name}")
            elif str(path) in entries:
                faults.add(list_path.name, name, "an earlier line lists the same file; left out")
            else:
                entries[str(path)] = (patient, CLASSES[class_name], origin, "test" if part == "test" else "train")
    faults.add_summary("train, val, test", missing, "have no file; left out")
    if not entries:
        raise DatasetError(
            f"{folder / 'train'} and {folder / 'test'} contain none of the {len(missing)} listed images"
            f"{f' (the first is {missing[0]})' if missing else ''}: {HOW_TO_GET}"
        )
    maybe_rsna = any(origin in (RSNA, UNKNOWN_SOURCE) for _, _, origin, _ in entries.values())
    nih_patient_ids = read_nih_patients(source) if maybe_rsna else {}
    names = pd.Series([Path(path).name for path in entries])
    stems = names.map(lambda name: Path(name).stem)
    ids = stems.mask(stems.duplicated(keep=False), names)
    prefixes = pd.Series([f"{Path(path).parent.name}-" for path in entries])
    rows = pd.DataFrame(
        {
            "image_id": ids.mask(ids.duplicated(keep=False), prefixes + ids),
            "patient_id": [_patient_id(patient, origin, nih_patient_ids) for patient, _, origin, _ in entries.values()],
            "path": list(entries),
            "source": [SOURCES.get(origin, (origin,))[0] for _, _, origin, _ in entries.values()],
            "view": "",
            "diagnosis": [diagnosis for _, diagnosis, _, _ in entries.values()],
            "split": [split for *_, split in entries.values()],
        }
    )
    return diagnosis_dataset(rows, source, KNOWN_DIAGNOSES, HOW_TO_GET, progress=progress)


def _find_lists(source: DataFolder) -> dict[str, Path]:
    """Return the text files that list the images, all of one release, keyed by "train", "test" and, if available, "val".

    Raises DatasetError if no release has lists for both train and test, or if files of the same name differ.
    """
    releases: dict[str, dict[str, Path]] = {}
    for part in PARTS:
        for name in {path.name for path in source.paths if re.fullmatch(rf"{part}.*\.txt", path.name, re.IGNORECASE)}:
            if path := source.find_table(name):
                releases.setdefault(name[len(part) :].lower(), {})[part] = path
    whole = [release for release, lists in releases.items() if {"train", "test"} <= set(lists)]
    if not whole:
        found = sorted(path.name for lists in releases.values() for path in lists.values())
        raise DatasetError(
            f"{source.folder} has no pair of lists such as train.txt and test.txt; it has {', '.join(found) or 'no list'}. "
            f"Get the data set: {HOW_TO_GET}"
        )
    # train.txt first, otherwise the highest number: COVIDx10 is later than COVIDx9A.
    chosen = max(whole, key=lambda name: (name == ".txt", [int(digits) for digits in re.findall(r"\d+", name)], name))
    others = [path.name for name, lists in releases.items() if name != chosen for path in lists.values()]
    source.faults.add_summary(source.folder.name, others, f"are lists of other releases than train{chosen}; not read")
    return releases[chosen]


def _read_lines(path: Path, find: Callable[[str], Path | None]) -> Iterator[tuple[int, tuple[str, str, str, str] | None]]:
    """Yield, for each line of a list, its number (from 1) and its cells: patient, file, class and source.

    Class and source are in lower case. The cells of an invalid line are None. Empty lines and a first line with column names
    are skipped. `find` is a function that returns the path of the image for a file name in a line, or None.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() or (number == 1 and "filename" in line.lower()):
            continue
        readings = list(_readings(line))
        if not readings:
            yield number, None
            continue
        yield number, next((reading for reading in readings if find(reading[1])), readings[0])


def _readings(line: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield each possible division of a line into patient, file, class and source.

    The source is UNKNOWN_SOURCE in lists with three columns. Only patient and file contain blanks, so the class is the last
    word or the one before it. The patient is the first word in the first division, and more words in later ones.
    """
    words = line.split()
    for tail in (2, 1):
        if len(words) > tail and words[-tail].lower() in CLASSES:
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
