"""Write phantoms in the layouts of data sets with lung masks: JSRT with SCR, Montgomery, Shenzhen, V7's COVID-19 X-rays.

The masks are made from the drawn shapes and follow each data set's own definition of the lungs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from kitlib.atomic import replacing, write_json, write_text
from kitlib.datasets.darwin import CLASSES
from kitlib.datasets.darwin import LEAST_SIDE as DARWIN_SIDE
from kitlib.phantoms.drawing import draw_masks, render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import draw_exposure, draw_finding, draw_patient
from kitlib.phantoms.plan import apportion
from kitlib.xrays.image_file import JSRT_BITS, JSRT_SIDE

SCR_SIDE = 1024  # side of SCR's masks, pixels
MASKED_SHARE = 566 / 662  # share of Shenzhen's images with a mask
LATERAL_SHARE = 0.02  # share of Darwin's images, at least one, tagged as lateral, but drawn as frontal images
FIRST_DARWIN_ID = 965322


@dataclass(frozen=True)
class _Planned:
    number: int  # from 1
    shown: str  # one of the layout's classes
    patient_seed: int
    seed: int


@dataclass(frozen=True)
class _Drawn:
    """One drawn phantom: its image, its masks keyed by structure (see `draw_masks`), and the patient's sex and age.

    `pixels` is uint8 (rows, columns).
    """

    pixels: np.ndarray
    masks: dict[str, np.ndarray]
    sex: str
    age: int


@dataclass(frozen=True)
class _Layout:
    """How the phantoms of one data set are planned and written.

    `classes` maps each class to its share of the images and a tuple of findings, one of which is chosen at random for each
    image.
    """

    classes: dict[str, tuple[float, tuple[str, ...]]]
    identifying_file: str  # a file whose content distinguishes phantoms from the real data set
    write: Callable[[Path, _Planned, _Drawn], None]


def write_lungs(
    folder: str | Path,
    layout: str,
    *,
    images: int,
    seed: int,
    side: int = JSRT_SIDE,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `images` synthetic X-rays and their lung masks in the layout of a data set; return their folder, FOLDER/LAYOUT.

    `layout` is one of the following. "jsrt" has `All247images/*.IMG`, 2048 x 2048 pixels and 8 MB each, whatever `side` is,
    and `scratch/fold1` and `fold2` with masks of heart, left and right lung as GIF files of 1024 x 1024 pixels. "montgomery"
    has PNG files, a mask of each lung, and clinical readings. "shenzhen" has PNG files, a mask of both lungs for six images
    in seven, and clinical readings. "darwin" has images, and annotations with two polygons called Lung, which include the
    heart; the first image and every fiftieth one are tagged as lateral and have no polygons. Images in the last three
    layouts have `side` pixels on their longer side and are not square. `images` is at least 4 for "darwin", otherwise at
    least 2. For the other parameters and errors see `write_phantoms`. Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    # The shorter side has at least four fifths of the longer one.
    least_side = DARWIN_SIDE * 5 // 4 if layout == "darwin" else LEAST_SIDE
    side = JSRT_SIDE if layout == "jsrt" else side
    return write_phantoms(
        Path(folder) / layout,
        (LAYOUTS[layout].identifying_file,),
        {"images": images, "side": side, "seed": seed},
        partial(_plan, layout, images, seed),
        partial(_write, layout=layout, side=side),
        least=(len(LAYOUTS[layout].classes), least_side),
        code=(__name__,),
        workers=workers,
        progress=progress,
    )


def _plan(layout: str, images: int, seed: int) -> list[_Planned]:
    """Return the planned images of a layout, ordered by class as in JSRT, Montgomery and Shenzhen."""
    rng = np.random.default_rng([seed, 40, list(LAYOUTS).index(layout)])
    shown = apportion(images, {name: share for name, (share, _) in LAYOUTS[layout].classes.items()})
    seeds = rng.integers(2**31, size=(images, 2))
    return [
        _Planned(number, name, int(patient), int(image))
        for number, (name, (patient, image)) in enumerate(zip(shown, seeds, strict=True), start=1)
    ]


def _write(root: Path, image: _Planned, layout: str, side: int) -> None:
    rng = np.random.default_rng(image.seed)
    finding = str(rng.choice(LAYOUTS[layout].classes[image.shown][1]))
    patient, opacities = draw_finding(rng, finding, draw_patient(np.random.default_rng(image.patient_seed)))
    exposure = draw_exposure(rng, side)
    if layout == "jsrt":
        exposure = replace(exposure, rows=side, columns=side)
    grey, _ = render(patient, exposure, opacities)
    pixels = np.rint(grey * np.float32(255)).astype(np.uint8)
    drawn = _Drawn(pixels, draw_masks(patient, exposure), str(rng.choice(["F", "M"])), int(rng.integers(18, 90)))
    LAYOUTS[layout].write(root, image, drawn)


def _write_jsrt(root: Path, image: _Planned, drawn: _Drawn) -> None:
    # As in SCR, odd numbers are in fold 1 and even numbers in fold 2.
    fold = f"fold{2 - image.number % 2}"
    name = f"JPC{'LN' if image.shown == 'nodule' else 'NN'}{image.number:03d}"
    values = (255 - drawn.pixels.astype(">u2")) << (JSRT_BITS - 8)
    with replacing(root / "All247images" / f"{name}.IMG") as temporary_path:
        temporary_path.write_bytes(values.astype(">u2").tobytes())
    for structure, mask in drawn.masks.items():
        small = cv2.resize(mask.astype(np.uint8) * 255, (SCR_SIDE, SCR_SIDE), interpolation=cv2.INTER_AREA) > 127
        _save(root / "scratch" / fold / "masks" / structure.replace("_", " ") / f"{name}.gif", small)


def _write_montgomery(root: Path, image: _Planned, drawn: _Drawn) -> None:
    top = root / "MontgomerySet"
    name = f"MCUCXR_{image.number:04d}_{int(image.shown != 'normal')}"
    _save(top / "CXR_png" / f"{name}.png", drawn.pixels)
    for side in ("left", "right"):
        _save(top / "ManualMask" / f"{side}Mask" / f"{name}.png", drawn.masks[f"{side}_lung"])
    write_text(
        top / "ClinicalReadings" / f"{name}.txt",
        f"Patient's Sex: {drawn.sex}\nPatient's Age: {drawn.age:03d}Y\n{image.shown}\n",
    )


def _write_shenzhen(root: Path, image: _Planned, drawn: _Drawn) -> None:
    name = f"CHNCXR_{image.number:04d}_{int(image.shown != 'normal')}"
    _save(root / "CXR_png" / f"{name}.png", drawn.pixels)
    # Images without a mask are spread evenly over both classes.
    if int(image.number * MASKED_SHARE) > int((image.number - 1) * MASKED_SHARE):
        _save(root / "mask" / f"{name}_mask.png", drawn.masks["left_lung"] | drawn.masks["right_lung"])
    sex = {"F": "female", "M": "male"}[drawn.sex]
    write_text(root / "ClinicalReadings" / f"{name}.txt", f"{sex} {drawn.age}yrs\n{image.shown}\n")


def _write_darwin(root: Path, image: _Planned, drawn: _Drawn) -> None:
    name = f"{image.number:08d}.jpeg"
    with replacing(root / "images" / name) as temporary_path:
        cv2.imwrite(str(temporary_path), drawn.pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    rows, columns = drawn.pixels.shape
    lateral = int(image.number * LATERAL_SHARE) > int((image.number - 1) * LATERAL_SHARE) or image.number == 1
    tags = [image.shown, *(["Viral Pneumonia"] if image.shown == "COVID-19" else []), "Lateral" if lateral else "PA"]
    annotations: list[dict[str, Any]] = [{"name": tag, "tag": {}} for tag in tags]
    if not lateral:
        right, left, heart = (drawn.masks[structure] for structure in ("right_lung", "left_lung", "heart"))
        # The heart is split midway between the lungs, and each part is joined to the lung on its side.
        middle = (np.nonzero(right)[1].mean() + np.nonzero(left)[1].mean()) / 2
        is_right_side = np.arange(columns) < middle
        annotations += [_polygon(right | (heart & is_right_side)), _polygon(left | (heart & ~is_right_side))]
    record = {
        "dataset": "covid-19-chest-x-ray-dataset",
        "image": {"width": columns, "height": rows, "filename": name, "original_filename": f"phantom_{image.number}.jpeg"},
        "annotations": annotations,
    }
    write_json(root / "annotations" / "all-images" / f"{FIRST_DARWIN_ID + image.number - 1}.json", record)


def _polygon(mask: np.ndarray) -> dict[str, Any]:
    """Return a lung mask as an annotation in Darwin's format, with one closed path per contour of the mask.

    A path runs a quarter of a pixel inside of the outer edges of the mask's outermost pixels.
    """
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    paths = [[{"x": x / 2 + 0.25, "y": y / 2 + 0.25} for x, y in contour[:, 0].tolist()] for contour in contours]
    if len(paths) == 1:
        return {"name": "Lung", "polygon": {"path": paths[0]}}
    return {"name": "Lung", "complex_polygon": {"path": paths}}


def _save(path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels)
    with replacing(path) as temporary_path:
        image.save(temporary_path)


# Class -> number of images: Kermany's (Cell 2018), and V7's count of COVID-19 images.
DARWIN_COUNTS = dict(zip(CLASSES, (1583, 2780, 1493, 517), strict=True))
TUBERCULOSIS = ("Infiltration", "Consolidation", "Effusion")
LAYOUTS = {
    "jsrt": _Layout(
        {"nodule": (154 / 247, ("Nodule",)), "no nodule": (93 / 247, ("No Finding",))},
        "All247images/JPCLN001.IMG",
        _write_jsrt,
    ),
    "montgomery": _Layout(
        {"normal": (80 / 138, ("No Finding",)), "tuberculosis": (58 / 138, TUBERCULOSIS)},
        "MontgomerySet/CXR_png/MCUCXR_0001_0.png",
        _write_montgomery,
    ),
    "shenzhen": _Layout(
        {"normal": (326 / 662, ("No Finding",)), "tuberculosis": (336 / 662, TUBERCULOSIS)},
        "CXR_png/CHNCXR_0001_0.png",
        _write_shenzhen,
    ),
    "darwin": _Layout(
        {
            name: (count / sum(DARWIN_COUNTS.values()), (finding,))
            for (name, count), finding in zip(
                DARWIN_COUNTS.items(), ("No Finding", "Pneumonia", "Consolidation", "Infiltration"), strict=True
            )
        },
        f"annotations/all-images/{FIRST_DARWIN_ID}.json",
        _write_darwin,
    ),
}
