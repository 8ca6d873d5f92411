"""Writes phantoms laid out as the sets with one diagnosis an image: Kermany's, and ieee8023's covid-chestxray-dataset.

In each layout one file is damaged, one patient has four images and others two, and one image is another patient's again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kitlib.atomic import replacing, write_csv
from kitlib.phantoms.drawing import render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import draw_exposure, draw_finding, draw_near_duplicate, draw_opacities, draw_patient
from kitlib.phantoms.plan import apportion

LEAST_IMAGES = 24
# Diagnosis -> what shows it: each by its own look, so that a network can tell them apart.
SHOWN_BY = {
    "viral": "Infiltration",
    "bacterial": "Consolidation",
    "pneumonia": "Pneumonia",
    "normal": "No Finding",
    "other": "Mass",
}
SEVERAL = (4, 2, 2)  # images of the first patients of each diagnosis, where it has enough; others have one
# What ieee8023's table says of a diagnosis, in its last releases.
FINDINGS = {
    "COVID-19": ("Pneumonia/Viral/COVID-19",),
    "viral": ("Pneumonia/Viral/SARS", "Pneumonia/Viral/Influenza"),
    "bacterial": ("Pneumonia/Bacterial/Streptococcus", "Pneumonia/Bacterial/Klebsiella"),
    "pneumonia": ("Pneumonia",),
    "normal": ("No Finding",),
    "other": ("Tuberculosis",),
}


@dataclass(frozen=True)
class Planned:
    """One image: `number` from 1, `follow_up` from 0 within its patient, who is numbered from 1 over all diagnoses."""

    number: int
    diagnosis: str  # of DIAGNOSES
    patient: int
    follow_up: int
    test: bool  # of an official test set, by patient
    age: int
    sex: str
    patient_seed: int
    seed: int
    again: bool = False  # drawn as the image before, cropped and exposed anew
    damaged: bool = False


@dataclass(frozen=True)
class _Layout:
    shares: dict[str, float]  # of the diagnoses
    adults: bool
    place: Callable[[Planned], str]  # an image's path in the folder
    tell_tale: str  # a file by whose bytes phantoms are told from a real set
    tables: Callable[[Path, list[Planned], list[None]], None] | None = None


def write_diagnoses(
    folder: str | Path,
    layout: str,
    *,
    images: int,
    side: int,
    seed: int,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write FOLDER/LAYOUT, one of LAYOUTS, with `images` files, one of them damaged, `side` pixels long; return it.

    kermany: `chest_xray/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg`. covid_chestxray: `metadata.csv`, `images/*.png`, and rows
    of a lateral image, a CT slice and an image that nobody has labelled, which have no file. At least LEAST_IMAGES images of
    32 pixels; for the rest see `write_phantoms`. Raises ValueError for another layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no set of diagnoses is called {layout!r}; there are: {', '.join(LAYOUTS)}")
    return write_phantoms(
        Path(folder) / layout,
        (LAYOUTS[layout].tell_tale,),
        {"images": images, "side": side, "seed": seed},
        partial(plan_diagnoses, layout, images, seed),
        partial(_write_image, layout=layout, side=side),
        LAYOUTS[layout].tables,
        least=(LEAST_IMAGES, LEAST_SIDE),
        code=(__name__,),
        workers=workers,
        progress=progress,
    )


def plan_diagnoses(layout: str, images: int, seed: int) -> list[Planned]:
    """In the order of the diagnoses, patients and their images."""
    rng = np.random.default_rng([seed, 60, list(LAYOUTS).index(layout)])
    shown = apportion(images, LAYOUTS[layout].shares)
    planned: list[Planned] = []
    patient = 0
    for diagnosis in dict.fromkeys(shown):
        left, several = shown.count(diagnosis), list(SEVERAL)
        while left:
            patient += 1
            # A diagnosis of few images has as many patients, so that each fold can get one.
            size = several.pop(0) if several and left >= 2 * sum(several) + 2 else 1
            low, high = (18, 90) if LAYOUTS[layout].adults else (1, 6)
            of_patient = partial(
                Planned,
                diagnosis=diagnosis,
                patient=patient,
                test=patient % 6 == 0,
                age=int(rng.integers(low, high)),
                sex=str(rng.choice(["F", "M"])),
                patient_seed=int(rng.integers(2**31)),
            )
            for follow_up in range(size):
                drawn = int(rng.integers(2**31))
                planned.append(of_patient(number=len(planned) + 1, follow_up=follow_up, seed=drawn))
            left -= size
    # The first diagnosis has the most patients of one image; its last two are the copy and what it is a copy
    # of; the rarer ones keep what they have.
    last = shown.count(shown[0]) - 1
    planned[last] = replace(
        planned[last], again=True, patient_seed=planned[last - 1].patient_seed, seed=planned[last - 1].seed
    )
    planned[last - 2] = replace(planned[last - 2], damaged=True)
    return planned


def _write_image(root: Path, image: Planned, layout: str, side: int) -> None:
    path = root / LAYOUTS[layout].place(image)
    if image.damaged:
        with replacing(path) as beside:
            beside.write_bytes(b"\xff\xd8\xff\xe0 cut off")
        return
    rng = np.random.default_rng(image.seed)
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    if image.diagnosis == "COVID-19":
        opacities = draw_opacities(rng, "typical")
    else:
        patient, opacities = draw_finding(rng, SHOWN_BY[image.diagnosis], patient)
    exposure = draw_exposure(rng, side)
    if layout == "kermany":
        # As its real ones: an R in every image, and nothing unexposed.
        exposure = replace(exposure, marker="R", border=0.0)
    if image.again:
        exposure = draw_near_duplicate(rng, exposure)
    grey, _ = render(patient, exposure, opacities)
    pixels = np.rint(grey * np.float32(255)).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if path.suffix == ".jpeg" else []
    with replacing(path) as beside:
        cv2.imwrite(str(beside), pixels, options)


def _kermany_place(image: Planned) -> str:
    part = "test" if image.test else "train"
    if image.diagnosis == "normal":
        return f"chest_xray/{part}/NORMAL/IM-{image.patient:04d}-{image.follow_up + 1:04d}.jpeg"
    germ = {"viral": "virus", "bacterial": "bacteria"}[image.diagnosis]
    return f"chest_xray/{part}/PNEUMONIA/person{image.patient}_{germ}_{image.number}.jpeg"


def _covid_chestxray_place(image: Planned) -> str:
    return f"images/phantom-{image.patient:04d}-{image.follow_up}.png"


def _covid_chestxray_table(root: Path, planned: list[Planned], written: list[None]) -> None:
    rows = [
        {
            "patientid": str(image.patient),
            "offset": str(2 * image.follow_up) if image.number % 3 else "",
            "sex": image.sex if image.number % 7 else "",
            "age": str(image.age) if image.number % 5 else "",
            "finding": FINDINGS[image.diagnosis][image.patient % len(FINDINGS[image.diagnosis])],
            "survival": "Y" if image.number % 2 else "",
            "view": ("PA", "AP", "AP Supine")[image.patient % 3],
            "modality": "X-ray",
            "date": "2020",
            "location": "drawn",
            "folder": "images",
            "filename": Path(_covid_chestxray_place(image)).name,
            "doi": "",
            "url": "",
            "license": ("CC BY-NC-SA", "CC BY 3.0", "")[image.patient % 3],
            "clinical_notes": "",
            "other_notes": "",
        }
        for image in planned
    ]
    others = ({"view": "L"}, {"view": "Axial", "modality": "CT", "folder": "volumes"}, {"finding": "todo"})
    rows += [rows[0] | other | {"filename": f"other-{place}.png"} for place, other in enumerate(others)]
    write_csv(root / "metadata.csv", pd.DataFrame(rows))


LAYOUTS = {
    # chest_xray/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg, in the shares of Kermany's images of each class (Cell 2018).
    "kermany": _Layout(
        {"bacterial": 2780 / 5856, "viral": 1493 / 5856, "normal": 1583 / 5856},
        adults=False,
        place=_kermany_place,
        tell_tale="chest_xray/train/PNEUMONIA/person1_bacteria_1.jpeg",
    ),
    # metadata.csv and images/*.png. The table also has a lateral image, a CT slice and an image that nobody has labelled;
    # these have no file.
    "covid_chestxray": _Layout(
        {"COVID-19": 0.62, "viral": 0.08, "bacterial": 0.12, "normal": 0.08, "pneumonia": 0.05, "other": 0.05},
        adults=True,
        place=_covid_chestxray_place,
        tell_tale="metadata.csv",
        tables=_covid_chestxray_table,
    ),
}
