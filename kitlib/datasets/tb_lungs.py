"""Reads the two tuberculosis sets of the National Library of Medicine, Montgomery and Shenzhen, with their lung masks."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults, one_hot, with_headers
from kitlib.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif")
LABELS = {"0": "normal", "1": "tuberculosis"}  # by the last digit of an image's name
READINGS = "ClinicalReadings"
SEX = re.compile(r"\bsex:\s*([mfo])|\b(male|femal)", re.IGNORECASE)
AGE = re.compile(r"(?:age:|male?)[\s,]*(\d+)\s*(y|month|day)", re.IGNORECASE)
YEARS = {"y": 1.0, "month": 1 / 12, "day": 1 / 365.25}
SAME_PATIENT = re.compile(r"same (?:pt|patient) as \w+?_(\d+)_", re.IGNORECASE)


@dataclass(frozen=True)
class _Cohort:
    source: str
    prefix: str
    got: str
    published: dict[str, int]


# Counts of Jaeger et al. 2014 (Quantitative Imaging in Medicine and Surgery); Shenzhen's masks are of Stirenko et al. 2018.
MONTGOMERY = _Cohort(
    "montgomery",
    "MCUCXR",
    got="unpack MontgomerySet there, see inputs/README.md",
    published={"images": 138, "normal": 80, "tuberculosis": 58, "masks": 138},
)
SHENZHEN = _Cohort(
    "shenzhen",
    "CHNCXR",
    got="unpack ChinaSet_AllFiles and the masks of shcxr-lung-mask there, see inputs/README.md",
    published={"images": 662, "normal": 326, "tuberculosis": 336, "masks": 566},
)


def read_montgomery(folder: str | Path, progress: bool = True) -> Dataset:
    """`MCUCXR_0001_0.png` and so on below `folder`, with the masks of both lungs and the clinical readings.

    What lies in a folder whose name has "mask" is a mask, as is what ends in "_mask": the left and the right lung by
    themselves in `ManualMask/leftMask` and `rightMask`, or both in one file, as re-packed copies have it. image_id and
    study_id are the name, the patient its number, unless the reading says that two images are of one. Labels have the
    columns normal and tuberculosis; images the columns sex (F, M, O or "") and age (years, NaN where unknown), from
    ClinicalReadings. Images without a mask, or with that of one lung alone, stay without one, with a fault. Left out, with a
    fault: unreadable headers, second files of a name. Raises DatasetError where no image or no mask is there.
    """
    return _read(Path(folder), MONTGOMERY, progress)


def read_shenzhen(folder: str | Path, progress: bool = True) -> Dataset:
    """`CHNCXR_0001_0.png` and so on, with one mask of both lungs for most, `CHNCXR_0001_0_mask.png`; see read_montgomery."""
    return _read(Path(folder), SHENZHEN, progress)


def _read(folder: Path, cohort: _Cohort, progress: bool) -> Dataset:
    faults = Faults()
    files, drawn, readings = _files(folder, cohort, faults)
    if not files:
        raise DatasetError(f"{folder} holds no image called {cohort.prefix}_0001_0.png and so on: {cohort.got}")
    if not drawn:
        raise DatasetError(f"{folder} holds no mask, in a folder with mask in its name: {cohort.got}")
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in readings.items()}
    faults.count(READINGS, set(files) - set(texts), "have no reading; sex and age are unknown", "other images")
    patients = _patients(files, texts)
    rows = pd.DataFrame(
        {
            "image_id": list(files),
            "patient_id": [f"{cohort.source}-{patients[name]}" for name in files],
            "path": [str(path) for path in files.values()],
            "source": cohort.source,
            "view": "PA",
            "convention": "lung_fields",
            "sex": [_sex(texts.get(name, "")) for name in files],
            "age": [_age(texts.get(name, "")) for name in files],
        }
    )
    images = with_headers(rows, folder, faults, progress)
    labels = one_hot(images.image_id, images.image_id.str[-1].map(LABELS), LABELS.values())
    masks = _masks(drawn, images, faults)
    return Dataset.checked(folder, images, labels, faults, cohort.published, masks=masks)


def _files(
    folder: Path, cohort: _Cohort, faults: Faults
) -> tuple[dict[str, Path], list[tuple[str, str, Path]], dict[str, Path]]:
    """Images by name; masks as name, side ("left", "right" or "" for both) and file; readings by name."""
    named = re.compile(rf"({cohort.prefix}_\d+_[01])(_mask)?", re.IGNORECASE)
    images: dict[str, Path] = {}
    readings: dict[str, Path] = {}
    masks = []
    for path in sorted(folder.rglob("*")):
        match, suffix = named.fullmatch(path.stem), path.suffix.lower()
        if not match or suffix not in (*SUFFIXES, ".txt") or not path.is_file():
            continue
        name, within = match[1].upper(), path.parent.name.lower() if path.parent != folder else ""
        if suffix == ".txt":
            readings[name] = path
        elif match[2] or "mask" in within:
            side = next((side for side in ("left", "right") if side in within), "")
            masks.append((name, side, path))
        elif name in images:
            faults.add(str(path.relative_to(folder)), name, f"has the name of {images[name]}; left out")
        else:
            images[name] = path
    return images, masks, readings


def _masks(drawn: list[tuple[str, str, Path]], images: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    masks = pd.DataFrame(drawn, columns=["image_id", "side", "path"]).astype(object)
    faults.count("masks", set(masks.image_id) - set(images.image_id), "have masks and no image; left out")
    masks = masks[masks.image_id.isin(images.image_id)]
    for image_id, sides in masks.groupby("image_id").side.agg(set).items():
        if len(sides) == 1 and "" not in sides:
            faults.add("masks", image_id, f"has a mask of the {sides.pop()} lung alone; it is left out")
            masks = masks[masks.image_id != image_id]
    faults.count("masks", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    masks = pd.DataFrame({"image_id": masks.image_id, "structure": "lungs", "path": masks.path.map(str)})
    return masks.sort_values(["image_id", "path"], ignore_index=True)


def _patients(names: Iterable[str], texts: dict[str, str]) -> dict[str, str]:
    """Name -> the patient's number; readings that name another image join the two patients."""
    patients = {name: name.split("_")[1] for name in names}
    for name, text in texts.items():
        if name not in patients:
            continue
        for number in SAME_PATIENT.findall(text):
            # By the patient that this number has come to stand for, where an earlier reading has joined it to another.
            other = next((patient for each, patient in patients.items() if each.split("_")[1] == number), number)
            joined = {patients[name], other}
            patients |= {each: min(joined) for each, patient in patients.items() if patient in joined}
    return patients


def _sex(text: str) -> str:
    found = SEX.search(text)
    return (found[1] or found[2])[0].upper() if found else ""


def _age(text: str) -> float:
    found = AGE.search(text)
    return float(found[1]) * YEARS[found[2].lower()] if found else math.nan
