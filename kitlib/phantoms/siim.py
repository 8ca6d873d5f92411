"""Write a phantom competition: SIIM's folder with DICOM files and tables and, separately, the test set's ground truth."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from kitlib.atomic import write_csv
from kitlib.classes import STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.phantom_marker import SHARED_MARKER
from kitlib.phantoms.drawing import render
from kitlib.phantoms.folder import LEAST_SIDE, write_phantoms
from kitlib.phantoms.patients import draw_exposure, draw_near_duplicate, draw_opacities, draw_patient
from kitlib.phantoms.plan import PlannedImage, PlannedStudy, plan_split
from kitlib.scoring.submission_csv import submission_ids, write_all_negative
from kitlib.xrays.writing import write_xray

COMPETITION = "siim-covid19-detection"
LABEL_TABLES = ("train_study_level.csv", "train_image_level.csv")
MARKER_INSIDE = "phantom.json"  # earlier versions wrote the marker inside the folder, under this name

# Shares in SIIM's training set.
MONOCHROME1_SHARE = 0.27
# Nine in ten of SIIM's files are uncompressed and the others JPEG Lossless; the other syntaxes occur in other hospitals.
SYNTAX_SHARES = {
    ExplicitVRLittleEndian: 0.62,
    JPEGLosslessSV1: 0.12,
    ImplicitVRLittleEndian: 0.08,
    JPEGLossless: 0.03,
    JPEGLSLossless: 0.03,
    JPEG2000Lossless: 0.03,
    RLELossless: 0.03,
    DeflatedExplicitVRLittleEndian: 0.02,
    ExplicitVRBigEndian: 0.02,
    JPEG2000: 0.01,
    JPEGBaseline8Bit: 0.01,
}
BITS_SHARES = {12: 0.62, 15: 0.19, 8: 0.08, 14: 0.05, 16: 0.04, 10: 0.02}


def write_competition(
    folder: str | Path,
    truth: str | Path,
    *,
    train_studies: int,
    test_studies: int,
    side: int,
    seed: int,
    damaged_test_files: int = 3,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write phantoms of SIIM's competition to FOLDER/siim-covid19-detection and return this folder.

    The returned folder has only the files of the real competition: `train/` and `test/` with <study>/<series>/<image>.dcm,
    `train_study_level.csv`, `train_image_level.csv` and `sample_submission.csv`. The test set's two label tables are written
    to the folder `truth`. `side` is the longer side of an image in pixels. In the training table, as in the real one, a
    near-duplicate image of a positive study has no box. In the test set's ground truth, near-duplicates have boxes, because
    the hidden labels were corrected. `damaged_test_files` is the number of test images that cannot be read completely; these
    have rows in the tables, too. The marker (see PhantomFolder) is FOLDER/.phantom.json. For other parameters and errors see
    `write_phantoms`. Raises ValueError if a split has fewer than four studies, if `side` is less than 32, or if more than
    half of the test images are damaged.
    """
    if min(train_studies, test_studies) < len(STUDY_CLASSES):
        raise ValueError(
            f"train_studies is {train_studies} and test_studies is {test_studies}; both must be at least "
            f"{len(STUDY_CLASSES)}, one study per class"
        )
    if side < LEAST_SIDE:
        raise ValueError(f"side is {side}; it must be at least {LEAST_SIDE} pixels")
    competition, truth = Path(folder) / COMPETITION, Path(truth)
    if (competition / MARKER_INSIDE).is_file():
        shutil.rmtree(competition)
    parameters = {"train_studies": train_studies, "test_studies": test_studies, "side": side, "seed": seed}
    return write_phantoms(
        competition,
        (*LABEL_TABLES, "sample_submission.csv"),
        parameters | {"damaged_test_files": damaged_test_files},
        lambda: plan_split("train", train_studies, seed, 0) + plan_split("test", test_studies, seed, damaged_test_files),
        partial(_write_study, side=side),
        partial(_write_tables, truth),
        least=(0, LEAST_SIDE),
        code=("kitlib.xrays.writing", __name__),
        marker=SHARED_MARKER,
        other_files=[truth / name for name in LABEL_TABLES],
        unit="study",
        workers=workers,
        progress=progress,
    )


def _write_study(root: Path, study: PlannedStudy, side: int) -> list[dict[str, Any]]:
    """Render and write the images of one study; return one dictionary per image.

    The keys are `split`, `study_id`, `image_id`, `study_class` and `boxes`. The value of `boxes` is an array (n, 4) of xmin,
    ymin, xmax, ymax in pixels of the image.
    """
    patient = draw_patient(np.random.default_rng(study.patient_seed))
    rng = np.random.default_rng(study.seed)
    opacities = draw_opacities(rng, study.study_class)
    first_exposure = draw_exposure(rng, side)
    rows = []
    for index, image in enumerate(study.images):
        exposure = first_exposure
        if image.duplicate:
            exposure = draw_near_duplicate(rng, first_exposure)
        elif index > 0:
            exposure = draw_exposure(rng, side)
        grey, boxes = render(patient, exposure, opacities)
        path = root / study.split / study.study_id / image.series_id / f"{image.image_id}.dcm"
        _write_dicom(path, grey, study, image, rng)
        _damage(path, image.damage, rng)
        annotated = study.split == "test" or not image.duplicate
        rows.append(
            {
                "split": study.split,
                "study_id": study.study_id,
                "image_id": image.image_id,
                "study_class": study.study_class,
                "boxes": boxes if annotated else boxes[:0],
            }
        )
    return rows


def _write_dicom(path: Path, grey: np.ndarray, study: PlannedStudy, image: PlannedImage, rng: np.random.Generator) -> None:
    """Write the image `grey`, 0..1, as a DICOM file.

    Bit depth, photometric interpretation, window and transfer syntax are chosen at random with `rng`.
    """
    syntax = ExplicitVRLittleEndian if image.oddity == "padding" else _draw(rng, SYNTAX_SHARES)
    bits = 8 if syntax == JPEGBaseline8Bit else _draw(rng, BITS_SHARES)
    photometric = "MONOCHROME1" if rng.random() < MONOCHROME1_SHARE else "MONOCHROME2"
    top = 2**bits - 1
    black, white = rng.uniform(0.0, 0.1) * top, rng.uniform(0.8, 1.0) * top
    levels = grey * np.float32(white - black)
    levels += np.float32(black)
    if photometric == "MONOCHROME1":
        np.subtract(np.float32(top), levels, out=levels)
        black, white = top - white, top - black
    stored = np.rint(levels, out=levels).astype(np.uint8 if bits == 8 else np.uint16)
    window = None
    if rng.random() < 0.6:
        window = (round((black + white) / 2, 1), round((white - black) * rng.uniform(0.9, 1.1), 1))
    function = _draw(rng, {"": 0.5, "LINEAR": 0.3, "LINEAR_EXACT": 0.1, "SIGMOID": 0.1}) if window else ""
    if image.oddity == "window width 0":
        window = (round((black + white) / 2, 1), 0.0)
    extra: dict[str, Any] = {
        "Modality": _draw(rng, {"CR": 0.45, "DX": 0.55}),
        "ViewPosition": _draw(rng, {"AP": 0.5, "PA": 0.3, "": 0.2}),
        "PatientSex": _draw(rng, {"F": 0.45, "M": 0.55}),
        "BodyPartExamined": "SKULL" if image.oddity == "skull" else "CHEST",
    }
    if rng.random() < 0.5:
        extra["PresentationLUTShape"] = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    if image.oddity == "padding":
        extra["PixelData"] = stored.tobytes() + b"\0" * (2 * (stored.nbytes // 120) + stored.nbytes % 2)
    write_xray(
        path,
        stored,
        transfer_syntax=syntax,
        photometric=photometric,
        bits_stored=bits,
        window=window,
        voi_function=function or None,
        patient_id=study.patient_id,
        study_id=study.study_id,
        series_id=image.series_id,
        image_id=image.image_id,
        extra=extra,
    )


def _damage(path: Path, kind: str, rng: np.random.Generator) -> None:
    content = path.read_bytes() if kind else b""
    if kind == "truncated":
        path.write_bytes(content[: max(1, int(0.5 * len(content)))])
    elif kind == "garbage":
        path.write_bytes(rng.bytes(min(len(content), 4096)))
    elif kind == "empty":
        path.write_bytes(b"")


def _write_tables(truth: Path, root: Path, studies: list[PlannedStudy], written: list[list[dict[str, Any]]]) -> None:
    table = pd.DataFrame([row for rows in written for row in rows])
    train, test = (table[table.split == split] for split in ("train", "test"))
    _write_label_tables(train, root)
    _write_label_tables(test, truth)
    ids = submission_ids(sorted(test.study_id.unique()), sorted(test.image_id))
    write_all_negative(root / "sample_submission.csv", ids)


def _write_label_tables(images: pd.DataFrame, folder: Path) -> None:
    studies = images.drop_duplicates("study_id").sort_values("study_id")
    study_level = pd.DataFrame({"id": studies.study_id + "_study"})
    for column, name in STUDY_LABEL_COLUMNS.items():
        study_level[column] = (studies.study_class == name).astype(int)
    images = images.sort_values("image_id")
    image_level = pd.DataFrame(
        {
            "id": images.image_id + "_image",
            "boxes": images.boxes.map(_boxes_cell),
            "label": images.boxes.map(_label_cell),
            "StudyInstanceUID": images.study_id,
        }
    )
    for name, table in zip(LABEL_TABLES, (study_level, image_level), strict=True):
        write_csv(folder / name, table)


def _boxes_cell(boxes: np.ndarray) -> str | None:
    cells = [dict(zip(("x", "y", "width", "height"), _origin_and_size(box), strict=True)) for box in boxes]
    return str(cells) if cells else None


def _label_cell(boxes: np.ndarray) -> str:
    corners = [(x, y, x + width, y + height) for x, y, width, height in map(_origin_and_size, boxes)]
    return " ".join("opacity 1 " + " ".join(f"{edge:.10g}" for edge in box) for box in corners) or "none 1 0 0 1 1"


def _origin_and_size(box: np.ndarray) -> tuple[float, float, float, float]:
    xmin, ymin, xmax, ymax = (round(float(edge), 5) for edge in box)
    return xmin, ymin, round(xmax - xmin, 5), round(ymax - ymin, 5)


def _draw(rng: np.random.Generator, shares: dict[Any, float]) -> Any:
    return list(shares)[int(rng.choice(len(shares), p=np.array(list(shares.values())) / sum(shares.values())))]
