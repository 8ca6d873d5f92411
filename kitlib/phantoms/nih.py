"""Write phantoms in the layout of NIH ChestX-ray14: PNG files, the table of entries, the official lists and boxes."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from kitlib.atomic import replacing, write_csv, write_text
from kitlib.datasets.nih import BOXES, ENTRIES, LISTS, SIDE
from kitlib.phantoms.drawing import Opacity, render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import DRAWN_FINDINGS, draw_exposure, draw_finding, draw_patient
from kitlib.phantoms.plan import apportion, draw_patient_numbers

NAME = "nih-chest-xrays"
ARCHIVES = 12  # folders images_001 to images_012
# Half of the real images show no finding. Rare findings are drawn more often, so that few images suffice to learn them.
SHARES = dict(zip(DRAWN_FINDINGS, (0.08, 0.09, 0.12, 0.06, 0.07, 0.06, 0.07, 0.45), strict=True))
HEART_SHARE = 0.06  # share of images with another finding that also show Cardiomegaly, as a second label
TEST_SHARE = 0.228  # 25,596 of 112,120 images; whole patients are drawn
RGBA_SHARE = 0.005  # share of files with four channels, as some of the real files have
# Drawn findings with boxes -> their names in the real list of boxes, which contains only test images.
BOXED = {"Infiltration": "Infiltrate", "Mass": "Mass", "Nodule": "Nodule", "Pneumonia": "Pneumonia"}


@dataclass(frozen=True)
class _Planned:
    name: str
    archive: int
    patient: int  # from 1
    follow_up: int
    patient_seed: int
    seed: int
    findings: tuple[str, ...]  # in alphabetical order, as in the real table
    view: str
    rgba: bool
    test: bool


def write_nih(
    folder: str | Path, *, images: int, side: int, seed: int, workers: int | None = None, progress: bool = True
) -> Path:
    """Write `images` synthetic X-rays and NIH's tables to FOLDER/nih-chest-xrays, and return this folder.

    The folder has `images_001/images/*.png` to `images_012/images/*.png`, `Data_Entry_2017_v2020.csv`, `train_val_list.txt`,
    `test_list.txt` and, with boxes of test images only, `BBox_List_2017.csv`. Images have `side` x `side` pixels; the real
    ones have 1024 x 1024. One in 200, and at least one, is RGBA. Patients have up to four images, all in the same list. An
    image shows one of `kitlib.phantoms.patients.DRAWN_FINDINGS`, sometimes with Cardiomegaly as a second finding.
    `images` is at least 16 and `side` at least 32; for the other parameters and errors see `write_phantoms`.
    """
    return write_phantoms(
        Path(folder) / NAME,
        (ENTRIES[0], BOXES),
        {"images": images, "side": side, "seed": seed},
        partial(_plan, images, seed),
        partial(_write_image, side=side),
        partial(_write_tables, side=side),
        least=(2 * len(DRAWN_FINDINGS), LEAST_SIDE),
        code=(__name__,),
        workers=workers,
        progress=progress,
    )


def _plan(images: int, seed: int) -> list[_Planned]:
    """Return the planned images, ordered by patient and follow-up, as in the real table."""
    rng = np.random.default_rng([seed, 30])
    main_findings = rng.permutation(apportion(images, SHARES))
    numbers = draw_patient_numbers(images, rng)
    test = _test_patients(numbers, rng)
    rgba = set(rng.permutation(images)[: max(1, round(RGBA_SHARE * images))])
    first_index: dict[int, int] = {}
    planned = []
    for index, (number, finding) in enumerate(zip(numbers, main_findings, strict=True)):
        follow_up = index - first_index.setdefault(number, index)
        findings = {str(finding)}
        if finding not in ("No Finding", "Cardiomegaly") and rng.random() < HEART_SHARE:
            findings.add("Cardiomegaly")
        planned.append(
            _Planned(
                name=f"{number + 1:08d}_{follow_up:03d}.png",
                archive=1 + index * ARCHIVES // images,
                patient=number + 1,
                follow_up=follow_up,
                patient_seed=int(np.random.default_rng([seed, 31, number]).integers(2**31)),
                seed=int(rng.integers(2**31)),
                findings=tuple(sorted(findings)),
                view=str(rng.choice(["PA", "AP"], p=[0.6, 0.4])),
                rgba=index in rgba,
                test=number in test,
            )
        )
    return planned


def _test_patients(numbers: list[int], rng: np.random.Generator) -> set[int]:
    """Return the numbers of the patients in the test set, drawn at random until they have 22.8 % of the images.

    `numbers` has one patient number per image.
    """
    images = pd.Series(numbers).value_counts(sort=False)
    drawn = images.loc[rng.permutation(images.index)].cumsum()
    return set(drawn.index[: 1 + int((drawn < TEST_SHARE * len(numbers)).sum())])


def _write_image(root: Path, image: _Planned, side: int) -> np.ndarray:
    """Draw and write one image; return the boxes of its opacities.

    The boxes are (n, 4): xmin, ymin, xmax, ymax in pixels.
    """
    rng = np.random.default_rng(image.seed)
    patient = draw_patient(np.random.default_rng(image.patient_seed))
    opacities: tuple[Opacity, ...] = ()
    # Cardiomegaly is drawn last, because other findings limit the heart's size.
    for finding in sorted(image.findings, key="Cardiomegaly".__eq__):
        patient, added = draw_finding(rng, finding, patient)
        opacities += added
    exposure = replace(draw_exposure(rng, side), rows=side, columns=side)
    grey, boxes = render(patient, exposure, opacities)
    pixels = np.rint(grey * np.float32(255)).astype(np.uint8)
    if image.rgba:
        pixels = np.dstack([pixels] * 3 + [np.full_like(pixels, 255)])
    with replacing(root / f"images_{image.archive:03d}" / "images" / image.name) as temporary_path:
        cv2.imwrite(str(temporary_path), pixels)
    return boxes


def _write_tables(root: Path, planned: list[_Planned], boxes: list[np.ndarray], side: int) -> None:
    rng = np.random.default_rng(planned[0].seed)
    age = {image.patient: int(rng.integers(18, 90)) for image in planned}
    sex = {image.patient: str(rng.choice(["F", "M"])) for image in planned}
    entries = pd.DataFrame(
        {
            "Image Index": [image.name for image in planned],
            "Finding Labels": ["|".join(image.findings) for image in planned],
            "Follow-up #": [image.follow_up for image in planned],
            "Patient ID": [image.patient for image in planned],
            "Patient Age": [age[image.patient] for image in planned],
            "Patient Gender": [sex[image.patient] for image in planned],
            "View Position": [image.view for image in planned],
            # The real header is split at its commas. The size is that of the original image, not of the PNG.
            "OriginalImage[Width": 2 * side,
            "Height]": 2 * side,
            "OriginalImagePixelSpacing[x": 0.143,
            "y]": 0.143,
        }
    )
    write_csv(root / ENTRIES[0], entries)
    for split, name in LISTS.items():
        write_text(root / name, "".join(f"{image.name}\n" for image in planned if image.test == (split == "test")))
    # As in the real list, three columns have neither name nor values.
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,\n"]
    for image, image_boxes in zip(planned, boxes, strict=True):
        for finding in BOXED.keys() & set(image.findings) if image.test else ():
            # The list's boxes are in pixels of the published image size, even if the files have another size.
            lines += [
                f"{image.name},{BOXED[finding]},{x1:.6f},{y1:.6f},{x2 - x1:.6f},{y2 - y1:.6f}\n"
                for x1, y1, x2, y2 in image_boxes * SIDE / side
            ]
    write_text(root / BOXES, "".join(lines))
