"""Write phantoms in the layouts of VinBigData, RSNA Pneumonia, RANZCR CLiP and SIIM-ACR, and their test sets' labels."""

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

from kitlib.atomic import replacing, write_csv, write_json
from kitlib.classes import NO_FINDING, PNEUMOTHORAX, RANZCR_LABELS, RSNA_CLASSES, VINBIGDATA_FINDINGS
from kitlib.competitions.registry import find_competition
from kitlib.datasets import ranzcr, rsna, siim_acr, vinbigdata
from kitlib.phantoms.drawing import draw_masks, draw_pneumothorax, render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import Opacity, Pneumothorax, Tube, draw_exposure, draw_finding, draw_patient
from kitlib.phantoms.plan import apportion, draw_patient_numbers
from kitlib.xrays.run_lengths import EMPTY, encode_mask
from kitlib.xrays.run_lengths import SIDE as RUN_LENGTHS_SIDE
from kitlib.xrays.writing import write_xray

DEFAULT_SIDE = 320


@dataclass(frozen=True)
class Planned:
    """One planned image. `shows` has the labels that the image shows, at most one from each of _Layout's groups."""

    split: str  # "train" or "test"
    image_id: str
    patient: str  # the patient's number of eight digits, counted over both splits
    patient_seed: int
    seed: int
    shows: tuple[str, ...]


Written = list[tuple[Planned, Any]]  # the images of a split, and what `draw` has returned for each


@dataclass(frozen=True)
class _Layout:
    """How the phantoms of one competition are planned, drawn and written.

    Each dict in `groups` maps mutually exclusive labels to their shares of the images; the label "" means none of them. An
    image gets one label from each group, independently of the other groups. `make_id` gets the split and 64 random
    hexadecimal digits and returns an image_id. `draw` gets a path, a planned image and a side length in pixels, writes the
    image file and returns the image's annotations for `tables`. `tables` returns the contents of the label files, keyed by
    file name. `label_table` is the name of one label file; its rows of the test images are the ground truth.
    """

    groups: tuple[dict[str, float], ...]
    make_id: Callable[[str, str], str]
    make_path: Callable[[Planned], str]
    draw: Callable[[Path, Planned, int], Any]
    tables: Callable[[Written], dict[str, Any]]
    label_table: str
    side: int | None = None  # fixed side of all images, pixels; None: any side


def write_challenge(
    folder: str | Path,
    name: str,
    *,
    images: int,
    seed: int,
    side: int | None = None,
    test_images: int = 0,
    truth: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write synthetic X-rays in a competition's layout, `images` for training and `test_images` for testing.

    `name` is one of the four competitions below. The returned folder, FOLDER/SLUG, has the X-rays and the label tables. If
    there are test images, it also has the sample submission, and the labels of the test images are written to the folder
    `truth`, in the format of the training labels. No patient is in both the training and the test set.

    "vinbigdata": `train/*.dicom` with five of the 14 findings; the boxes of three simulated radiologists differ a little,
    and one radiologist misses some boxes; the ground truth has the true boxes. "rsna-pneumonia":
    `stage_2_train_images/*.dcm` with the published shares of the classes, and the mapping to NIH's images. "ranzcr-clip":
    `train/*.jpg` with tubes and lines; the label of a line depends on the position of its tip. "siim-acr": DICOM files of
    1024 x 1024 pixels, the grid of the run lengths; a quarter of the images have a pneumothorax.

    `side` is the longer side in pixels (default: 320); RSNA's images are square. For the other parameters and errors see
    `write_phantoms`. Raises ValueError for an unknown name, for "siim-acr" with a `side` other than 1024, or for test images
    without `truth`.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown competition {name!r}; valid: {', '.join(LAYOUTS)}")
    layout, competition = LAYOUTS[name], find_competition(name)
    if layout.side and side not in (None, layout.side):
        raise ValueError(f"`side` is {side}, but images of {name!r} always have {layout.side} pixels a side; omit `side`")
    if test_images and truth is None:
        raise ValueError("test images require `truth`, a folder for their labels")
    side = layout.side or side or DEFAULT_SIDE
    other_files = [Path(truth) / layout.label_table] if truth and test_images else []
    return write_phantoms(
        Path(folder) / competition.slug,
        (layout.label_table, competition.sample),
        {"images": images, "test_images": test_images, "side": side, "seed": seed},
        partial(_plan, name, {"train": images, "test": test_images}, seed),
        partial(_write_image, name=name, side=side),
        partial(_write_tables, name, other_files),
        least=(max(map(len, layout.groups)), LEAST_SIDE),
        code=("kitlib.xrays.writing", __name__),
        other_files=other_files,
        workers=workers,
        progress=progress,
    )


def _plan(name: str, counts: dict[str, int], seed: int) -> list[Planned]:
    """Return the planned images: the training images and then the test images, each ordered by image_id."""
    layout, planned, patients = LAYOUTS[name], [], 20001  # above the numbers of NIH's phantoms, which are other patients
    for number, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, 50, list(LAYOUTS).index(name), number])
        shown = [rng.permutation(apportion(count, group)) for group in layout.groups] if count else []
        numbers = draw_patient_numbers(count, rng)
        for index, patient in enumerate(numbers):
            digits = hashlib.sha256(f"{name} {seed} {split} {index}".encode()).hexdigest()
            planned.append(
                Planned(
                    split=split,
                    image_id=layout.make_id(split, digits),
                    patient=f"{patients + patient:08d}",
                    patient_seed=int(np.random.default_rng([seed, 51, number, patient]).integers(2**31)),
                    seed=int(rng.integers(2**31)),
                    shows=tuple(str(group[index]) for group in shown if group[index]),
                )
            )
        patients += max(numbers, default=0) + 1
    return sorted(planned, key=lambda image: (image.split != "train", image.image_id))


def _write_image(root: Path, image: Planned, name: str, side: int) -> Any:
    layout = LAYOUTS[name]
    return layout.draw(root / layout.make_path(image), image, side)


def _write_tables(name: str, truth: list[Path], root: Path, planned: list[Planned], written: list[Any]) -> None:
    layout, competition = LAYOUTS[name], find_competition(name)
    pairs = list(zip(planned, written, strict=True))
    for file, table in layout.tables([pair for pair in pairs if pair[0].split == "train"]).items():
        (write_csv if isinstance(table, pd.DataFrame) else write_json)(root / file, table)
    test = [pair for pair in pairs if pair[0].split == "test"]
    for path in truth:
        write_csv(path, layout.tables(test)[layout.label_table])
        rows = competition.baseline_rows([image.image_id for image, _ in test])
        write_csv(root / competition.sample, pd.DataFrame(rows, columns=list(competition.header)))


def _write_dicom(path: Path, image: Planned, stored: np.ndarray, **options: Any) -> None:
    ids = {"study_id": f"1.2.276.0.{image.seed}.1", "series_id": f"1.2.276.0.{image.seed}.2"}
    write_xray(path, stored, image_id=f"1.2.276.0.{image.seed}.3", **(ids | options))


def _as_bytes(grey: np.ndarray) -> np.ndarray:
    return np.rint(grey * np.float32(255)).astype(np.uint8)


# VinBigData's findings that are drawn -> the finding of `draw_finding` that shows them.
DRAWN = {
    "Infiltration": "Infiltration",
    "Consolidation": "Consolidation",
    "Nodule/Mass": "Nodule",
    "Pleural effusion": "Effusion",
    "Cardiomegaly": "Cardiomegaly",
}
READERS = ("R8", "R9", "R10")
JITTER = 0.03  # standard deviation of a reader's corners, as a share of the box's sides
MISSED = 0.3  # share of the boxes that the last reader misses


def _draw_vinbigdata(path: Path, image: Planned, side: int) -> list[tuple[str, np.ndarray]]:
    """Draw and write one image; return a list of (finding, box), with the box as xmin, ymin, xmax, ymax in pixels."""
    rng = np.random.default_rng(image.seed)
    patient, names = draw_patient(np.random.default_rng(image.patient_seed)), []
    opacities: tuple[Opacity, ...] = ()
    for shown in image.shows or ("",):  # Cardiomegaly is in the last group, because other findings limit the heart's size
        patient, added = draw_finding(rng, DRAWN.get(shown, "No Finding"), patient)
        opacities += tuple(replace(opacity, boxed=True) for opacity in added)
        names += [shown] * len(added)
    exposure = draw_exposure(rng, side)
    grey, boxes = render(patient, exposure, opacities)
    found = list(zip(names, boxes, strict=True))
    if "Cardiomegaly" in image.shows:
        down, across = (np.flatnonzero(draw_masks(patient, exposure)["heart"].any(axis=axis)) for axis in (1, 0))
        found.append(("Cardiomegaly", np.array([across[0], down[0], across[-1] + 1, down[-1] + 1], dtype=float)))
    stored = np.rint(grey * np.float32(4095)).astype(np.uint16)
    inverted = rng.random() < 0.2
    _write_dicom(
        path,
        image,
        4095 - stored if inverted else stored,
        transfer_syntax=ExplicitVRLittleEndian,
        photometric="MONOCHROME1" if inverted else "MONOCHROME2",
        bits_stored=12,
    )
    return found


def _vinbigdata_tables(written: Written) -> dict[str, Any]:
    """Return {"train.csv": table}: training images have boxes by three simulated radiologists, test images true boxes."""
    classes, rows = (*VINBIGDATA_FINDINGS, NO_FINDING), []
    for image, found in written:
        rng = np.random.default_rng([image.seed, 1])
        for reader in READERS if image.split == "train" else ("R1",):
            # Nobody misses the first box, because the readers agree on which images show a finding.
            seen = [box for index, box in enumerate(found) if reader != READERS[-1] or index == 0 or rng.random() >= MISSED]
            for finding, box in seen or [(NO_FINDING, None)]:
                corners: Any = (None,) * 4
                if box is not None:
                    spread = JITTER * np.tile(box[2:] - box[:2], 2) if image.split == "train" else np.zeros(4)
                    corners = (box + rng.normal(0, 1, 4) * spread).clip(min=0).round().astype(int)
                rows.append((image.image_id, finding, classes.index(finding), reader, *corners))
    columns = ["image_id", "class_name", "class_id", "rad_id", *vinbigdata.CORNERS]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(vinbigdata.CORNERS, "Int64"))
    return {vinbigdata.LABELS: table}


# RSNA's class -> findings that its images show. RSNA's readers put nodules, which are not pneumonia, in the middle class.
SHOWN = {
    "Normal": ("No Finding",),
    "No Lung Opacity / Not Normal": ("Cardiomegaly", "Effusion", "Nodule"),
    "Lung Opacity": ("Infiltration", "Consolidation", "Pneumonia"),
}


def _draw_rsna(path: Path, image: Planned, side: int) -> np.ndarray:
    """Draw and write one image; return its boxes, (n, 4): x, y, width, height, as if the image had 1024 x 1024 pixels.

    Before this scaling, corners are at whole pixels of the written file. Only the class "Lung Opacity" has boxes.
    """
    rng, (shown,) = np.random.default_rng(image.seed), image.shows
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    patient, opacities = draw_finding(rng, str(rng.choice(SHOWN[shown])), patient)
    grey, boxes = render(patient, replace(draw_exposure(rng, side), rows=side, columns=side), opacities)
    extra = {"Modality": "CR", "ConversionType": "WSD", "ViewPosition": str(rng.choice(["PA", "AP"], p=[0.55, 0.45]))}
    extra["PatientSex"] = str(rng.choice(["F", "M"]))
    options = {"transfer_syntax": JPEGBaseline8Bit, "patient_id": image.image_id, "extra": extra}
    _write_dicom(path, image, _as_bytes(grey), **options)
    boxes = np.rint(boxes) * rsna.SIDE / side if shown == "Lung Opacity" else boxes[:0]
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _nih_names(written: Written) -> list[tuple[str, str]]:
    """Return a pair (image id, NIH's file name) for each image; NIH numbers the images of a patient from 000."""
    counts: Counter[str] = Counter()
    names = []
    for image, _ in written:
        names.append((image.image_id, f"{image.patient}_{counts[image.patient]:03d}.png"))
        counts[image.patient] += 1
    return names


def _rsna_tables(written: Written) -> dict[str, Any]:
    """Return the tables of labels and classes, both with a row per box as in RSNA's, and the mapping to NIH's images."""
    rows = [
        (image.image_id, *(box if box is not None else (None,) * 4), int(box is not None), *image.shows)
        for image, boxes in written
        for box in (boxes if len(boxes) else [None])
    ]
    table = pd.DataFrame(rows, columns=["patientId", "x", "y", "width", "height", "Target", "class"])
    mapping = pd.DataFrame(_nih_names(written), columns=["subset_img_id", "img_id"]).to_dict("records")
    return {rsna.LABELS: table.drop(columns="class"), rsna.CLASSES: table[["patientId", "class"]], rsna.MAPPING: mapping}


# Label -> points (u, v) of the line in thorax units, from its entry to its tip. The carina is at about v = -0.15.
_AIRWAY, _GULLET, _VEIN = ((0, -1.6), (0, -1.0)), ((0.03, -1.6), (0.04, -0.4)), ((-1.3, -0.7), (-0.8, -0.95), (-0.35, -0.75))
COURSES: dict[str, tuple[tuple[float, float], ...]] = {
    "ETT - Abnormal": (*_AIRWAY, (0, -0.2), (-0.22, 0.08)),
    "ETT - Borderline": (*_AIRWAY, (0, -0.22)),
    "ETT - Normal": (*_AIRWAY, (0, -0.5)),
    "NGT - Abnormal": (*_GULLET, (-0.2, 0.1), (-0.5, 0.55)),
    "NGT - Borderline": (*_GULLET, (0.04, 0.4), (0.1, 0.75)),
    "NGT - Incompletely Imaged": (*_GULLET, (0.04, 0.4), (0.25, 1.1), (0.4, 3)),
    "NGT - Normal": (*_GULLET, (0.04, 0.4), (0.12, 0.85), (0.45, 1.05), (0.6, 0.95)),
    "CVC - Abnormal": (*_VEIN, (-0.2, -1.0), (-0.18, -1.4)),
    "CVC - Borderline": (*_VEIN, (-0.2, -0.5), (-0.17, 0.4)),
    "CVC - Normal": (*_VEIN, (-0.2, -0.5), (-0.19, -0.1)),
    "Swan Ganz Catheter Present": ((-0.2, -1.6), (-0.19, -0.3), (-0.15, 0.4), (0.1, 0.6), (0.27, 0.3), (0.1, 0), (-0.3, 0)),
}
WIDTHS = {"ETT": 0.06, "NGT": 0.035, "CVC": 0.02, "Swan": 0.025}  # thorax units, by the first word of the label


def _draw_ranzcr(path: Path, image: Planned, side: int) -> None:
    rng = np.random.default_rng(image.seed)
    tubes = tuple(
        Tube(
            np.array(COURSES[label]) + rng.normal(0, 0.02, (len(COURSES[label]), 2)),
            WIDTHS[label.split()[0]],
            rng.uniform(0.12, 0.2),
        )
        for label in image.shows
    )
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    grey, _ = render(patient, draw_exposure(rng, side), tubes=tubes)
    with replacing(path) as temporary_path:
        cv2.imwrite(str(temporary_path), _as_bytes(grey), [cv2.IMWRITE_JPEG_QUALITY, 90])


def _ranzcr_tables(written: Written) -> dict[str, Any]:
    rows = [(image.image_id, *(int(label in image.shows) for label in RANZCR_LABELS), image.patient) for image, _ in written]
    return {ranzcr.LABELS: pd.DataFrame(rows, columns=[ranzcr.ID, *RANZCR_LABELS, "PatientID"])}


def _draw_siim_acr(path: Path, image: Planned, side: int) -> list[str]:
    """Draw and write one image; return the run lengths of each pneumothorax in it, as a list of 0 to 2 texts."""
    rng = np.random.default_rng(image.seed)
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    sides = rng.permutation([-1, 1])[: 1 + int(rng.random() < 0.2)] if image.shows else ()
    pneumothoraces = tuple(Pneumothorax(int(number), rng.uniform(0.1, 0.3)) for number in sides)
    exposure = replace(draw_exposure(rng, side), rows=side, columns=side)
    grey, _ = render(patient, exposure, pneumothoraces=pneumothoraces)
    _write_dicom(path, image, _as_bytes(grey), transfer_syntax=JPEGBaseline8Bit, patient_id=image.image_id)
    return [encode_mask(draw_pneumothorax(patient, exposure, pneumothorax)) for pneumothorax in pneumothoraces]


def _siim_acr_tables(written: Written) -> dict[str, Any]:
    """Return two tables, keyed by file name: the run lengths, with one row per lesion, and the mapping to NIH's images."""
    rows = [(image.image_id, runs) for image, lesions in written for runs in lesions or [EMPTY]]
    return {
        siim_acr.LABEL_TABLES[0]: pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"]),
        siim_acr.MAPPINGS[0]: pd.DataFrame(_nih_names(written), columns=["Kaggle_ID", "NIH_ID"]),
    }


def _siim_acr_id(split: str, digits: str) -> str:
    return f"ID_{digits[:9]}" if split == "test" else f"1.2.276.0.7230010.3.1.4.8323329.{int(digits[:16], 16)}"


def _siim_acr_path(image: Planned) -> str:
    if image.split == "test":
        return f"stage_2_images/{image.image_id}.dcm"
    return f"dicom-images-train/1.2.276.0.{image.seed}.1/1.2.276.0.{image.seed}.2/{image.image_id}.dcm"


def _evenly(share: float, *labels: str) -> dict[str, float]:
    """Return a group (see _Layout) in which `share` of the images have one of `labels`, each label equally often."""
    return {"": 1 - share, **dict.fromkeys(labels, share / len(labels))}


# In VinBigData and RANZCR, rare classes are more frequent than in the real data, so that few images suffice to learn them.
LAYOUTS = {
    "vinbigdata": _Layout(
        groups=(_evenly(0.4, *list(DRAWN)[:4]), _evenly(0.15, "Cardiomegaly")),
        make_id=lambda split, digits: digits[:32],
        make_path=lambda image: f"{image.split}/{image.image_id}.dicom",
        draw=_draw_vinbigdata,
        tables=_vinbigdata_tables,
        label_table=vinbigdata.LABELS,
    ),
    "rsna-pneumonia": _Layout(
        groups=({name: rsna.PUBLISHED[name] / rsna.PUBLISHED["images"] for name in RSNA_CLASSES},),
        make_id=lambda split, digits: str(uuid.UUID(digits[:32], version=4)),
        make_path=lambda image: f"stage_2_{image.split}_images/{image.image_id}.dcm",
        draw=_draw_rsna,
        tables=_rsna_tables,
        label_table=rsna.LABELS,
    ),
    "ranzcr-clip": _Layout(
        groups=tuple(
            _evenly(share, *(label for label in RANZCR_LABELS if label.startswith(device)))
            for device, share in {"ETT": 0.6, "NGT": 0.64, "CVC": 0.9, "Swan": 0.25}.items()
        ),
        make_id=lambda split, digits: f"1.2.826.0.1.3680043.8.498.{int(digits, 16) % 10**38:038d}",
        make_path=lambda image: f"{image.split}/{image.image_id}.jpg",
        draw=_draw_ranzcr,
        tables=_ranzcr_tables,
        label_table=ranzcr.LABELS,
    ),
    "siim-acr": _Layout(
        groups=(_evenly(0.25, PNEUMOTHORAX),),
        make_id=_siim_acr_id,
        make_path=_siim_acr_path,
        draw=_draw_siim_acr,
        tables=_siim_acr_tables,
        label_table=siim_acr.LABEL_TABLES[0],
        side=RUN_LENGTHS_SIDE,
    ),
}
