"""Reads COVIDx (Wang, Lin and Wong 2020): the images of several sets that its split lists name, with their sources."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults
from kitlib.datasets.diagnoses import diagnosis_dataset
from kitlib.datasets.rsna import MAPPING, nih_patients
from kitlib.errors import DatasetError

PARTS = ("train", "val", "test")
# Three classes, or of the later lists two; who is negative may have any other pneumonia, or none.
CLASSES = {"normal": "normal", "pneumonia": "pneumonia", "covid-19": "COVID-19", "positive": "COVID-19", "negative": "other"}
KNOWN = ("COVID-19", "pneumonia", "normal", "other")
# Its sources -> the name of the same set, and of its patients, in this kit: pooled with that set, a patient stays one.
SOURCES = {
    "cohen": ("ieee8023", "ieee"),
    "ricord": ("ricord", "ricord"),
    "bimcv": ("bimcv", "bimcv"),
}
RSNA = "rsna"
UNTOLD = "covidx"  # the source of lists of three columns
GOT = "`kaggle datasets download andyczhao/covidx-cxr2`, see inputs/README.md"


def read_covidx(folder: str | Path, progress: bool = True) -> Dataset:
    """The images in train/, test/ and, where there is one, val/ that one list each names: patient, file, class and source.

    A list is called `train.txt`, or `train_COVIDx5.txt` and the like; older ones have no source. Columns are parted by
    blanks, and a file's name may have some. image_id is the file's name without suffix, with it where two share it. `split`
    is "test" for the official test set, and "train". Patients of sources that the kit reads by themselves have the id that
    they have there. RSNA's patientIds are images, and most share an NIH patient with another: with RSNA's MAPPING in the
    folder their patients are NIH's, without it a fault says that they leak. Left out, with a fault: lines that cannot be
    understood, files named again, missing or damaged. Raises DatasetError where the list of train or test is missing, there
    are several, or no image is there.
    """
    folder, faults = Path(folder), Faults()
    found: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    for part in PARTS:
        listed = _list_of(folder, part)
        if listed is None:
            continue
        for number, cells in _lines(listed):
            if cells is None:
                faults.add(listed.name, str(number), "the line is no patient, file, class and source; left out")
                continue
            patient, name, shown, source = cells
            path = folder / part / name
            if not path.is_file():
                missing.append(f"{part}/{name}")
            elif str(path) in found:
                faults.add(listed.name, name, "an earlier line names the same file; left out")
            else:
                found[str(path)] = (patient, CLASSES[shown], source, "test" if part == "test" else "train")
    faults.count("train, val, test", missing, "have no file; left out")
    if not found:
        raise DatasetError(f"{folder / 'train'} and {folder / 'test'} hold no image that a list names: {GOT}")
    maybe_rsna = any(source in (RSNA, UNTOLD) for _, _, source, _ in found.values())
    people = nih_patients(folder / MAPPING, faults) if maybe_rsna else {}
    names = pd.Series([Path(path).name for path in found], dtype=object)
    stems = names.map(lambda name: Path(name).stem)
    ids = stems.mask(stems.duplicated(keep=False), names)
    placed = pd.Series([f"{Path(path).parent.name}-" for path in found], dtype=object)
    rows = pd.DataFrame(
        {
            "image_id": ids.mask(ids.duplicated(keep=False), placed + ids),
            "patient_id": [_patient(patient, source, people) for patient, _, source, _ in found.values()],
            "path": list(found),
            "source": [SOURCES.get(source, (source,))[0] for _, _, source, _ in found.values()],
            "view": "",
            "diagnosis": [diagnosis for _, diagnosis, _, _ in found.values()],
            "split": [split for *_, split in found.values()],
        }
    )
    return diagnosis_dataset(rows, folder, faults, KNOWN, GOT, progress=progress)


def _list_of(folder: Path, part: str) -> Path | None:
    lists = sorted(path for path in folder.glob(f"{part}*.txt"))
    if len(lists) > 1:
        raise DatasetError(f"{folder} has several lists, {', '.join(path.name for path in lists)}: keep one of each part")
    if not lists and part != "val":
        raise DatasetError(f"{folder}/{part}.txt, or {part}_COVIDx5.txt and the like, is missing: {GOT}")
    return lists[0] if lists else None


def _lines(path: Path) -> Iterator[tuple[int, tuple[str, str, str, str] | None]]:
    """Number from 1, and patient, file, class and source in small letters; None where a line is of another form."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        cells = line.split()
        if not cells or (number == 1 and "filename" in line.lower()):
            continue
        # Of three columns where the last is a class.
        source = UNTOLD if cells[-1].lower() in CLASSES else cells.pop().lower()
        understood = len(cells) >= 3 and cells[-1].lower() in CLASSES
        yield number, (cells[0], " ".join(cells[1:-1]), cells[-1].lower(), source) if understood else None


def _patient(patient: str, source: str, people: dict[str, str]) -> str:
    if source == RSNA or patient in people:
        return people.get(patient, patient)
    bare = patient.removeprefix("MIDRC-RICORD-1C-").removeprefix("sub-")
    return f"{SOURCES.get(source, ('', f'covidx-{source}'))[1]}-{bare}"
