"""The tables boxes and folds as YOLO's folder of label files, and back: a line a box, normalised by the image's size.

Format: https://docs.ultralytics.com/datasets/detect. A line is `class cx cy width height`; an image without a box has an
empty file.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from kitlib.atomic import write_text
from kitlib.coco import CATEGORY, DECIMALS, AnnotationError, category_numbers, checked
from kitlib.tables import BOX, check_table

LABELS, CLASSES = "labels", "classes.txt"
# Most programs write six decimals, so that a box at the image's edge may seem to reach beyond it, as a share of its side.
OVERHANG = 1e-5


def write_yolo(folder: str | Path, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame | None = None) -> None:
    """Write FOLDER/labels with a file an image, `classes.txt` and `data.yaml`, which expects images in FOLDER/images.

    With `folds`, also `fold0.yaml` and so on: its lists of images to train on are all other folds'. Classes are the boxes'
    column `finding`, in the alphabet's order, or `opacity`. The labels appear whole. Raises FileExistsError where FOLDER has
    labels already, AnnotationError as `write_coco` does, and for a box that reaches beyond its image, since ultralytics
    would leave out the whole image.
    """
    folder = Path(folder)
    labels, beside = folder / LABELS, folder / f".{LABELS}.partial"
    if labels.exists():
        raise FileExistsError(f"{labels} is there already: choose another folder, so that no old label stays among the new")
    images, boxes, classes = checked(images, boxes)
    lines = _lines(images, boxes, category_numbers(boxes, classes))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for image_id in images["image_id"]:
        if "/" in image_id or image_id.startswith("."):
            raise AnnotationError(f"image_id {image_id!r} cannot name a file: wanted no '/' and no leading '.'")
        (beside / f"{image_id}.txt").write_text("".join(lines.get(image_id, ())), encoding="utf-8")
    names = {"names": dict(enumerate(classes))}
    write_text(folder / CLASSES, "".join(f"{name}\n" for name in classes))
    write_text(folder / "data.yaml", yaml.safe_dump({"train": "images", "val": "images", **names}, sort_keys=False))
    for fold in sorted(set(folds["fold"])) if folds is not None else ():
        lists = {"train": folds["id"][folds["fold"] != fold], "val": folds["id"][folds["fold"] == fold]}
        for part, image_ids in lists.items():
            write_text(folder / f"fold{fold}_{part}.txt", "".join(f"./images/{image_id}.png\n" for image_id in image_ids))
        files = {part: f"fold{fold}_{part}.txt" for part in lists}
        write_text(folder / f"fold{fold}.yaml", yaml.safe_dump({**files, **names}, sort_keys=False))
    beside.rename(labels)


def read_yolo(folder: str | Path, images: pd.DataFrame) -> pd.DataFrame:
    """The table boxes of FOLDER/labels, in the order of `images`, whose rows and columns make pixels of shares.

    Every coordinate that has at most nine decimals is the number that `write_yolo` was given, others are within 1e-9 pixels.
    Column `finding` as in `read_coco`. Raises AnnotationError with file and line, and where an image has no label file or a
    label file no image.
    """
    folder = Path(folder)
    images, _, _ = checked(images, pd.DataFrame(columns=["image_id", *BOX]))
    classes = _classes(folder / CLASSES)
    files = {path.stem: path for path in sorted((folder / LABELS).glob("*.txt"))}
    missing = sorted(set(images["image_id"]) - set(files))
    if missing:
        raise AnnotationError(
            f"{folder / LABELS} lacks {len(missing)} of {len(images)} files, first {missing[0]}.txt: "
            "an image without a box has an empty file"
        )
    strange = sorted(set(files) - set(images["image_id"]))
    if strange:
        raise AnnotationError(
            f"{len(strange)} files belong to none of the images, first {files[strange[0]]}: take them away"
        )
    rows = []
    for image in images.itertuples(index=False):
        size = np.array([image.columns, image.rows], dtype=float)
        path = files[image.image_id]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append((image.image_id, *_box(line, size, classes, f"{path}, line {number}")))
    table = pd.DataFrame(rows, columns=["image_id", *BOX, "finding"])
    return check_table(table.drop(columns="finding") if classes == [CATEGORY] else table, "boxes", str(folder))


def _lines(images: pd.DataFrame, boxes: pd.DataFrame, numbers: list[int]) -> dict[str, list[str]]:
    """image_id -> its lines."""
    sizes = images.set_index("image_id")[["columns", "rows"]].loc[boxes["image_id"]].to_numpy(float)
    low, high = boxes[["xmin", "ymin"]].to_numpy(), boxes[["xmax", "ymax"]].to_numpy()
    beyond = ((low < 0) | (high > sizes)).any(axis=1)
    if beyond.any():
        raise AnnotationError(
            f"image {boxes['image_id'][beyond].iloc[0]} has a box that reaches beyond it: cut it at the edge"
        )
    shares = np.concatenate([(low + high) / 2 / sizes, (high - low) / sizes], axis=1)
    lines: dict[str, list[str]] = {}
    for image_id, number, share in zip(boxes["image_id"], numbers, shares.tolist(), strict=True):
        lines.setdefault(image_id, []).append(f"{number} {' '.join(map(repr, share))}\n")
    return lines


def _classes(path: Path) -> list[str]:
    if not path.is_file():
        raise AnnotationError(f"{path} is missing: a text file with a class's name in each line, the first for class 0")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _box(line: str, size: np.ndarray, classes: list[str], place: str) -> tuple[float, float, float, float, str]:
    words = line.split()
    try:
        number, shares = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        number, shares = -1, []
    if len(shares) != 4 or not all(map(math.isfinite, shares)):
        raise AnnotationError(f"{place}: {line.strip()!r} is not `class cx cy width height`")
    if not 0 <= number < len(classes):
        raise AnnotationError(f"{place}: class {number}, but {CLASSES} names {len(classes)}, counted from 0")
    centre, extent = np.array(shares[:2]), np.array(shares[2:])
    low, high = centre - extent / 2, centre + extent / 2
    if (extent <= 0).any() or (low < -OVERHANG).any() or (high > 1 + OVERHANG).any():
        raise AnnotationError(
            f"{place}: the box {shares} reaches beyond the image or has no area; wanted shares of its size"
        )
    low, high = (np.round(edge.clip(0, 1) * size, DECIMALS).tolist() for edge in (low, high))
    return *low, *high, classes[number]
