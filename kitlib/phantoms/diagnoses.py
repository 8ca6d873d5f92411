"""Write phantoms in the layouts of data sets with one diagnosis per image: Kermany's, ieee8023's, COVIDx and others.

In each layout, one image file is damaged, one image is a near-duplicate of another patient's image, and some patients have
two or four images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.atomic import replacing, write_csv, write_text
from kitlib.classes import CHEXPERT_OBSERVATIONS
from kitlib.phantoms.drawing import render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import draw_exposure, draw_finding, draw_near_duplicate, draw_opacities, draw_patient
from kitlib.phantoms.plan import apportion
from kitlib.xrays.writing import write_xray

LEAST_IMAGES = 24
# Diagnosis -> the finding that is drawn. The findings look different, so that a network can distinguish the diagnoses.
SHOWN_BY = {
    "viral": "Infiltration",
    "bacterial": "Consolidation",
    "pneumonia": "Pneumonia",
    "normal": "No Finding",
    "other": "Mass",
}
# Numbers of images of the first patients with a diagnosis, if it has enough images; other patients have one image.
SEVERAL = (4, 2, 2)
# Diagnosis -> values in the column `finding` of the last releases of ieee8023's table.
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
    """One image of a data set of phantoms, before it is drawn.

    `number` counts images from 1, `patient` counts patients from 1 over all diagnoses, and `follow_up` counts a patient's
    images from 0.
    """

    number: int
    diagnosis: str  # a key of FINDINGS
    patient: int
    follow_up: int
    test: bool  # whether the patient is in the official test set
    age: int
    sex: str
    patient_seed: int
    seed: int
    is_copy: bool = False  # whether the image is the previous one, cropped and exposed again
    damaged: bool = False


@dataclass(frozen=True)
class _Layout:
    shares: dict[str, float]  # diagnosis -> share of the images
    adults: bool
    make_path: Callable[[Planned], str]  # returns an image's path below the layout's folder
    identifying_file: str  # a file whose content distinguishes phantoms from the real data set
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
    """Write synthetic X-rays, one of them damaged, in the layout of a data set; return the new folder, FOLDER/LAYOUT.

    `images`, at least 24, is the number of images. `side`, at least 32, is the length in pixels of an image's longer side.
    The same `seed` gives the same images. `layout` is one of the following. "kermany" has
    `chest_xray/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg`. "covid_chestxray" has `images/*.png` and `metadata.csv`, which also
    has rows for a lateral image, a CT slice and an unlabelled image, all without files. "covidx" has `{train,test}/*.png`
    with lists of each image's class and source. "covidgr" has `{P,N}/*.jpg`. "ricord" has DICOM files, all of them COVID-19.
    "bimcv" has a positive and a negative set of PNG files, with tables of report labels. "chexpert" has JPEG files in
    `train` and `valid`; its tables of observations, some of them uncertain or blank, also have rows for lateral images
    without files. For `workers`, `progress` and other errors see `write_phantoms`. Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    return write_phantoms(
        Path(folder) / layout,
        (LAYOUTS[layout].identifying_file,),
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
    """Return the planned images of a layout, ordered by diagnosis, patient and follow-up."""
    rng = np.random.default_rng([seed, 60, list(LAYOUTS).index(layout)])
    diagnoses = apportion(images, LAYOUTS[layout].shares)
    planned: list[Planned] = []
    patient = 0
    for diagnosis in dict.fromkeys(diagnoses):
        remaining, sizes = diagnoses.count(diagnosis), list(SEVERAL)
        while remaining:
            patient += 1
            # If a diagnosis has few images, each has its own patient, so that every fold can get one.
            size = sizes.pop(0) if sizes and remaining >= 2 * sum(sizes) + 2 else 1
            low, high = (18, 90) if LAYOUTS[layout].adults else (1, 6)
            plan_image = partial(
                Planned,
                diagnosis=diagnosis,
                patient=patient,
                test=patient % 6 == 0,
                age=int(rng.integers(low, high)),
                sex=str(rng.choice(["F", "M"])),
                patient_seed=int(rng.integers(2**31)),
            )
            for follow_up in range(size):
                image_seed = int(rng.integers(2**31))
                planned.append(plan_image(number=len(planned) + 1, follow_up=follow_up, seed=image_seed))
            remaining -= size
    # The near-duplicate and the damaged file are taken from the end of the first diagnosis, which has many patients with one
    # image, so that the rarer diagnoses lose no images. Its last image becomes a copy of the image before it.
    copy = diagnoses.count(diagnoses[0]) - 1
    planned[copy] = replace(
        planned[copy], is_copy=True, patient_seed=planned[copy - 1].patient_seed, seed=planned[copy - 1].seed
    )
    planned[copy - 2] = replace(planned[copy - 2], damaged=True)
    return planned


def _write_image(root: Path, image: Planned, layout: str, side: int) -> None:
    path = root / LAYOUTS[layout].make_path(image)
    if image.damaged:
        with replacing(path) as temporary_path:
            temporary_path.write_bytes(b"\xff\xd8\xff\xe0 cut off")
        return
    rng = np.random.default_rng(image.seed)
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    if image.diagnosis == "COVID-19":
        opacities = draw_opacities(rng, "typical")
    else:
        patient, opacities = draw_finding(rng, SHOWN_BY[image.diagnosis], patient)
    exposure = draw_exposure(rng, side)
    if layout == "kermany":
        # As in the real data sets, every image has a marker R, and no image has an unexposed border.
        exposure = replace(exposure, marker="R", border=0.0)
    if image.is_copy:
        exposure = draw_near_duplicate(rng, exposure)
    grey, _ = render(patient, exposure, opacities)
    pixels = np.rint(grey * np.float32(255)).astype(np.uint8)
    if path.suffix == ".dcm":
        write_xray(path, pixels, transfer_syntax=ExplicitVRLittleEndian, patient_id=str(image.patient))
        return
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if path.suffix in (".jpg", ".jpeg") else []
    with replacing(path) as temporary_path:
        cv2.imwrite(str(temporary_path), pixels, options)


def _kermany_path(image: Planned) -> str:
    part = "test" if image.test else "train"
    if image.diagnosis == "normal":
        return f"chest_xray/{part}/NORMAL/IM-{image.patient:04d}-{image.follow_up + 1:04d}.jpeg"
    germ = {"viral": "virus", "bacterial": "bacteria"}[image.diagnosis]
    return f"chest_xray/{part}/PNEUMONIA/person{image.patient}_{germ}_{image.number}.jpeg"


def _covid_chestxray_path(image: Planned) -> str:
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
            "filename": Path(_covid_chestxray_path(image)).name,
            "doi": "",
            "url": "",
            "license": ("CC BY-NC-SA", "CC BY 3.0", "")[image.patient % 3],
            "clinical_notes": "",
            "other_notes": "",
        }
        for image in planned
    ]
    unusable = ({"view": "L"}, {"view": "Axial", "modality": "CT", "folder": "volumes"}, {"finding": "todo"})
    rows += [rows[0] | changes | {"filename": f"other-{index}.png"} for index, changes in enumerate(unusable)]
    write_csv(root / "metadata.csv", pd.DataFrame(rows))


def _covidx_path(image: Planned) -> str:
    return f"{'test' if image.test else 'train'}/phantom-{image.patient:04d}-{image.follow_up}.png"


def _covidx_lists(root: Path, planned: list[Planned], written: list[None]) -> None:
    for part in ("train", "test"):
        lines = []
        for image in planned:
            if image.test == (part == "test"):
                source = "cohen" if image.diagnosis == "COVID-19" else "rsna"
                name = Path(_covidx_path(image)).name
                lines.append(f"phantom{image.patient} {name} {image.diagnosis.lower()} {source}\n")
        write_text(root / f"{part}_COVIDx5.txt", "".join(lines))


def _covidgr_path(image: Planned) -> str:
    return f"{'P' if image.diagnosis == 'COVID-19' else 'N'}/{image.number:04d}.jpg"


def _ricord_path(image: Planned) -> str:
    return f"MIDRC-RICORD-1C-{image.patient:06d}/study-{image.follow_up + 1}/series/1-1.dcm"


def _bimcv_set(image: Planned) -> str:
    return "posi" if image.diagnosis == "COVID-19" else "neg"


def _bimcv_path(image: Planned) -> str:
    patient, session = f"sub-S{image.patient:05d}", f"ses-E{image.number:05d}"
    name = f"{patient}_{session}_run-1_bp-chest_vp-{('ap', 'pa')[image.patient % 2]}_cr.png"
    return f"covid19_{_bimcv_set(image)}/{patient}/{session}/mod-rx/{name}"


def _bimcv_tables(root: Path, planned: list[Planned], written: list[None]) -> None:
    for name in ("posi", "neg"):
        images = [image for image in planned if _bimcv_set(image) == name]
        labels = [f"E{image.number:05d}\t['{BIMCV_LABELS[image.diagnosis]}']\n" for image in images]
        table = f"labels_covid19_{name}.tsv"
        write_text(root / f"covid19_{name}" / "derivatives" / "labels" / table, "".join(["ReportID\tLabels\n", *labels]))
        people = {f"sub-S{image.patient:05d}\t[{image.age}]\t{image.sex}\n": None for image in images}
        write_text(root / f"covid19_{name}" / "participants.tsv", "".join(["participant\tage\tgender\n", *people]))


def _chexpert_path(image: Planned) -> str:
    part = "valid" if image.test else "train"
    return f"{CHEXPERT}/{part}/patient{image.patient:05d}/study{image.follow_up + 1}/view1_frontal.jpg"


def _chexpert_tables(root: Path, planned: list[Planned], written: list[None]) -> None:
    rows = []
    for image in planned:
        path, observations = _chexpert_path(image), CHEXPERT_CELLS[image.diagnosis]
        row: dict[str, str] = {
            "Path": path,
            "Sex": {"F": "Female", "M": "Male"}[image.sex],
            "Age": "0" if image.number % 10 == 0 else str(image.age),  # 0: unknown, as in the real tables
            "Frontal/Lateral": "Frontal",
            "AP/PA": ("PA", "AP")[image.patient % 2],
            **{name: observations[image.number % len(observations)].get(name, "") for name in CHEXPERT_OBSERVATIONS},
        }
        rows.append(row)
        if image.number % 3 == 0:
            lateral = {"Path": path.replace("view1_frontal", "view2_lateral"), "Frontal/Lateral": "Lateral", "AP/PA": ""}
            rows.append(row | lateral)
    for name in ("train", "valid"):
        table = pd.DataFrame([row for row in rows if row["Path"].startswith(f"{CHEXPERT}/{name}/")])
        write_csv(root / CHEXPERT / f"{name}.csv", table)


CHEXPERT = "CheXpert-v1.0-small"  # the archive's folder, with which the paths in its tables begin
# Diagnosis -> cells of its images' observations, in turn: "1.0" positive, "0.0" negative, "-1.0" uncertain, others blank.
CHEXPERT_CELLS = {
    "normal": ({"No Finding": "1.0"}, {"No Finding": "1.0", "Support Devices": "0.0"}),
    "pneumonia": ({"Pneumonia": "1.0"}, {"Pneumonia": "1.0", "Consolidation": "-1.0"}),
    "other": ({"Lung Lesion": "1.0"}, {"Lung Lesion": "1.0", "Pneumonia": "-1.0", "Support Devices": "1.0"}),
}
BIMCV_LABELS = {"COVID-19": "COVID 19", "normal": "normal", "pneumonia": "pneumonia"}
LAYOUTS = {
    # The shares are those of Kermany's images in each class (Cell 2018).
    "kermany": _Layout(
        {"bacterial": 2780 / 5856, "viral": 1493 / 5856, "normal": 1583 / 5856},
        adults=False,
        make_path=_kermany_path,
        identifying_file="chest_xray/train/PNEUMONIA/person1_bacteria_1.jpeg",
    ),
    "covid_chestxray": _Layout(
        {"COVID-19": 0.62, "viral": 0.08, "bacterial": 0.12, "normal": 0.08, "pneumonia": 0.05, "other": 0.05},
        adults=True,
        make_path=_covid_chestxray_path,
        identifying_file="metadata.csv",
        tables=_covid_chestxray_table,
    ),
    # The shares are those of COVIDx5's images in each class (ResUNet + ensembles, section 3.2).
    "covidx": _Layout(
        {"normal": 8066 / 14258, "pneumonia": 5575 / 14258, "COVID-19": 617 / 14258},
        adults=True,
        make_path=_covidx_path,
        identifying_file="train_COVIDx5.txt",
        tables=_covidx_lists,
    ),
    "covidgr": _Layout(
        {"COVID-19": 0.5, "normal": 0.5}, adults=True, make_path=_covidgr_path, identifying_file="P/0001.jpg"
    ),
    "ricord": _Layout(
        {"COVID-19": 1.0},
        adults=True,
        make_path=_ricord_path,
        identifying_file="MIDRC-RICORD-1C-000001/study-1/series/1-1.dcm",
    ),
    "bimcv": _Layout(
        {"COVID-19": 0.6, "normal": 0.2, "pneumonia": 0.2},
        adults=True,
        make_path=_bimcv_path,
        identifying_file="covid19_posi/derivatives/labels/labels_covid19_posi.tsv",
        tables=_bimcv_tables,
    ),
    # A larger share than in CheXpert is normal, so that few phantoms suffice to supply normal images for another data set.
    "chexpert": _Layout(
        {"normal": 0.6, "pneumonia": 0.2, "other": 0.2},
        adults=True,
        make_path=_chexpert_path,
        identifying_file=f"{CHEXPERT}/train.csv",
        tables=_chexpert_tables,
    ),
}
