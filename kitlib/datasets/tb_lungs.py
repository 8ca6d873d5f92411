"""Reads Montgomery and Shenzhen, the tuberculosis data sets of the National Library of Medicine, with lung masks."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, add_headers, one_hot
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif")
LABELS = {"0": "normal", "1": "tuberculosis"}  # last digit of an image's name -> label
READINGS = "ClinicalReadings"
SEX = re.compile(r"\bsex:\s*([mfo])|\b(male|femal)", re.IGNORECASE)
AGE = re.compile(r"(?:age:|male?)[\s,]*(\d+)\s*(y|month|day)", re.IGNORECASE)
YEARS = {"y": 1.0, "month": 1 / 12, "day": 1 / 365.25}
SAME_PATIENT = re.compile(r"same (?:pt|patient) as \w+?_(\d+)_", re.IGNORECASE)


@dataclass(frozen=True)
class _Cohort:
    source: str
    prefix: str
    how_to_get: str
    published: dict[str, int]


# Counts are from Jaeger et al. 2014 (Quantitative Imaging in Medicine and Surgery); of Shenzhen's masks, from Stirenko et
# al. 2018.
MONTGOMERY = _Cohort(
    "montgomery",
    "MCUCXR",
    how_to_get="unpack MontgomerySet there, see inputs/README.md",
    published={"images": 138, "normal": 80, "tuberculosis": 58, "masks": 138},
)
SHENZHEN = _Cohort(
    "shenzhen",
    "CHNCXR",
    how_to_get="unpack ChinaSet_AllFiles and the masks of shcxr-lung-mask there, see inputs/README.md",
    published={"images": 662, "normal": 326, "tuberculosis": 336, "masks": 566},
)


def read_montgomery(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images `MCUCXR_0001_0.png` and so on below `folder`, with lung masks and clinical readings.

    Masks are the files in a folder with "mask" in its name, and the files whose names end in "_mask". Each shows one lung
    (in `ManualMask/leftMask` and `rightMask`) or, in re-packed copies, both lungs. image_id and study_id are the file name
    without suffix. The patient is the number in the file name, unless a clinical reading states that two images show the
    same patient. Labels have the columns `normal` and `tuberculosis`; images have the columns `sex` (M, F, O, "") and `age`
    (years, NaN if unknown), from ClinicalReadings. An image without a mask, or with a mask of one lung only, has no mask and
    is a fault; without any masks, `Dataset.masks` is None. Left out and recorded in `Dataset.faults`: images with an
    unreadable header, further images with the same name. Raises DatasetError if there is no image.
    """
    return _read(DataFolder.of(folder), MONTGOMERY, progress)


def read_shenzhen(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read the images `CHNCXR_0001_0.png` and so on below `folder`, with lung masks and clinical readings.

    Most images have one mask of both lungs, `CHNCXR_0001_0_mask.png`. Tables, faults and errors are as in `read_montgomery`.
    """
    return _read(DataFolder.of(folder), SHENZHEN, progress)


def _read(source: DataFolder, cohort: _Cohort, progress: bool) -> Dataset:
    faults = source.faults
    files, mask_files, readings = _find_files(source, cohort)
    if not files:
        raise DatasetError(
            f"{source.folder} contains {len(source.paths)} files, but no image with a name such as "
            f"{cohort.prefix}_0001_0.png; {cohort.how_to_get}"
        )
    if not mask_files:
        problem = "there are no masks (files in a folder with mask in its name); name an input that has them in `beside`"
        faults.add("masks", "", problem)
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in readings.items()}
    faults.add_summary(READINGS, set(files) - set(texts), "have no reading; sex and age are unknown", "other images")
    patients = _find_patients(files, texts)
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
    images = add_headers(rows, source, progress)
    labels = one_hot(images.image_id, images.image_id.str[-1].map(LABELS), LABELS.values())
    masks = _find_masks(mask_files, images, faults) if mask_files else None
    return Dataset.from_tables(source, images, labels, cohort.published, masks=masks)


def _find_files(source: DataFolder, cohort: _Cohort) -> tuple[dict[str, Path], list[tuple[str, str, Path]], dict[str, Path]]:
    """Return the image files (dict name -> path), mask files (list of name, side, path) and readings (dict name -> path).

    `name` is the image's file name without suffix; the side of a mask is "left", "right", or "" for both lungs.
    """
    name_pattern = re.compile(rf"({cohort.prefix}_\d+_[01])(_mask)?", re.IGNORECASE)
    images: dict[str, Path] = {}
    readings: dict[str, Path] = {}
    masks: dict[tuple[str, str], Path] = {}
    copies: list[str] = []
    for path in source.find((*SUFFIXES, ".txt"), lambda path: name_pattern.fullmatch(path.stem) is not None):
        match, suffix = name_pattern.fullmatch(path.stem), path.suffix.lower()
        assert match
        name, parent_name = match[1].upper(), ("", *source.folders(path))[-1]
        if suffix == ".txt":
            readings[name] = path
        elif match[2] or "mask" in parent_name:
            side = next((side for side in ("left", "right") if side in parent_name), "")
            if (name, side) in masks:
                copies.append(source.name(path))
            masks.setdefault((name, side), path)
        elif name in images:
            copies.append(source.name(path))
        else:
            images[name] = path
    source.faults.add_summary("the folder", copies, "have the name of another file; left out", "others")
    return dict(sorted(images.items())), [(*key, path) for key, path in masks.items()], readings


def _find_masks(mask_files: list[tuple[str, str, Path]], images: pd.DataFrame, faults: Faults) -> pd.DataFrame:
    masks = pd.DataFrame(mask_files, columns=["image_id", "side", "path"]).astype(object)
    faults.add_summary("masks", set(masks.image_id) - set(images.image_id), "have masks but no image; left out")
    masks = masks[masks.image_id.isin(images.image_id)]
    for image_id, sides in masks.groupby("image_id").side.agg(set).items():
        if len(sides) == 1 and "" not in sides:
            faults.add("masks", image_id, f"has a mask of the {sides.pop()} lung only; the mask is left out")
            masks = masks[masks.image_id != image_id]
    faults.add_summary("masks", set(images.image_id) - set(masks.image_id), "have no mask", "other images")
    masks = pd.DataFrame({"image_id": masks.image_id, "structure": "lungs", "path": masks.path.map(str)})
    return masks.sort_values(["image_id", "path"])


def _find_patients(names: Iterable[str], texts: dict[str, str]) -> dict[str, str]:
    """Return a dict from image name to patient number.

    Images get the same number if a reading in `texts` (image name -> text) says that they show the same patient.
    """
    patients = {name: name.split("_")[1] for name in names}
    for name, text in texts.items():
        if name not in patients:
            continue
        for number in SAME_PATIENT.findall(text):
            # The patient of the image with this number may already have another number because of an earlier reading.
            other = next((patient for other_name, patient in patients.items() if other_name.split("_")[1] == number), number)
            same_patient = {patients[name], other}
            patients |= {
                other_name: min(same_patient) for other_name, patient in patients.items() if patient in same_patient
            }
    return patients


def _sex(text: str) -> str:
    match = SEX.search(text)
    return (match[1] or match[2])[0].upper() if match else ""


def _age(text: str) -> float:
    match = AGE.search(text)
    return float(match[1]) * YEARS[match[2].lower()] if match else math.nan
