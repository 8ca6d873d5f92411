"""Write phantoms in the layout of the training set of the RSNA Pneumonia Detection Challenge."""

import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydicom.uid import JPEGBaseline8Bit

from kitlib.atomic import write_csv, write_json
from kitlib.classes import RSNA_CLASSES
from kitlib.datasets.rsna import CLASSES, IMAGES, LABELS, MAPPING, PUBLISHED, SIDE
from kitlib.phantoms.drawing import render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import draw_exposure, draw_finding, draw_patient
from kitlib.phantoms.plan import apportion, draw_patient_numbers
from kitlib.xrays.writing import write_xray

SLUG = "rsna-pneumonia-detection-challenge"
# Class -> findings that its images show. RSNA's readers put nodules, which are not pneumonia, in the middle class, unboxed.
SHOWN = {
    "Normal": ("No Finding",),
    "No Lung Opacity / Not Normal": ("Cardiomegaly", "Effusion", "Nodule"),
    "Lung Opacity": ("Infiltration", "Consolidation", "Pneumonia"),
}
# First patient number in the mapping to NIH's images; larger than in phantoms of NIH's layout, which are other patients.
FIRST_PATIENT = 20001


@dataclass(frozen=True)
class _Planned:
    patient_id: str  # the challenge's patientId, which identifies one image
    nih_name: str
    patient_seed: int
    seed: int
    shown_class: str


def write_rsna(
    folder: str | Path, *, images: int, side: int, seed: int, workers: int | None = None, progress: bool = True
) -> Path:
    """Write `images` images and the tables to FOLDER/rsna-pneumonia-detection-challenge, and return that folder.

    The folder has `stage_2_train_images/<patientId>.dcm` (8-bit baseline JPEG, `side` x `side` pixels, where the real images
    have 1024), the two label tables, and RSNA's mapping to NIH's images. The labels have the real set's class shares, and
    boxes in whole pixels. In the mapping, patients have up to four images. `images` is at least 3 and `side` at least 32;
    for the other parameters and errors see `write_phantoms`.
    """
    return write_phantoms(
        Path(folder) / SLUG,
        (LABELS, CLASSES),
        {"images": images, "side": side, "seed": seed},
        partial(_plan, images, seed),
        partial(_write_image, side=side),
        partial(_write_tables, side=side),
        least=(len(RSNA_CLASSES), LEAST_SIDE),
        code=("kitlib.xrays.writing", __name__),
        workers=workers,
        progress=progress,
    )


def _plan(images: int, seed: int) -> list[_Planned]:
    """Return the planned images, ordered by patientId, as in the real tables."""
    rng = np.random.default_rng([seed, 20])
    total = sum(PUBLISHED[name] for name in RSNA_CLASSES)
    classes = rng.permutation(apportion(images, {name: PUBLISHED[name] / total for name in RSNA_CLASSES}))
    numbers = draw_patient_numbers(images, rng)
    first = {number: index for index, number in reversed(list(enumerate(numbers)))}
    planned = []
    for index, (number, shown_class) in enumerate(zip(numbers, classes, strict=True)):
        planned.append(
            _Planned(
                patient_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"phantom {seed} {index}")),
                nih_name=f"{FIRST_PATIENT + number:08d}_{index - first[number]:03d}.png",
                patient_seed=int(np.random.default_rng([seed, 21, number]).integers(2**31)),
                seed=int(rng.integers(2**31)),
                shown_class=str(shown_class),
            )
        )
    return sorted(planned, key=lambda image: image.patient_id)


def _write_image(root: Path, image: _Planned, side: int) -> np.ndarray:
    """Draw and write one image; return the boxes of its opacities.

    The boxes are (n, 4): xmin, ymin, xmax, ymax in whole pixels. Only images of the class Lung Opacity have boxes.
    """
    rng = np.random.default_rng(image.seed)
    finding = str(rng.choice(SHOWN[image.shown_class]))
    patient, opacities = draw_finding(rng, finding, draw_patient(np.random.default_rng(image.patient_seed)))
    exposure = replace(draw_exposure(rng, side), rows=side, columns=side)
    grey, boxes = render(patient, exposure, opacities)
    write_xray(
        root / IMAGES / f"{image.patient_id}.dcm",
        np.rint(grey * np.float32(255)).astype(np.uint8),
        transfer_syntax=JPEGBaseline8Bit,
        patient_id=image.patient_id,
        study_id=f"1.2.276.0.{image.seed}.1",
        series_id=f"1.2.276.0.{image.seed}.2",
        image_id=f"1.2.276.0.{image.seed}.3",
        extra={
            "Modality": "CR",
            "ConversionType": "WSD",
            "ViewPosition": str(rng.choice(["PA", "AP"], p=[0.55, 0.45])),
            "PatientSex": str(rng.choice(["F", "M"])),
        },
    )
    return np.rint(boxes) if image.shown_class == "Lung Opacity" else np.zeros((0, 4))


def _write_tables(root: Path, planned: list[_Planned], boxes: list[np.ndarray], side: int) -> None:
    rows: list[dict[str, Any]] = []
    classes = []
    for image, image_boxes in zip(planned, boxes, strict=True):
        # The table's boxes are in pixels of the published image size, even if the files have another size.
        for box in image_boxes * SIDE / side if len(image_boxes) else [None]:
            # As in the real set, both tables have one row for each box.
            cells = (*box[:2], *(box[2:] - box[:2])) if box is not None else (None,) * 4
            rows.append(
                {
                    "patientId": image.patient_id,
                    **dict(zip(("x", "y", "width", "height"), cells, strict=True)),
                    "Target": int(box is not None),
                }
            )
            classes.append((image.patient_id, image.shown_class))
    write_csv(root / LABELS, pd.DataFrame(rows))
    write_csv(root / CLASSES, pd.DataFrame(classes, columns=["patientId", "class"]))
    write_json(root / MAPPING, [{"subset_img_id": image.patient_id, "img_id": image.nih_name} for image in planned])
