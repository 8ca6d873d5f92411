"""The tables boxes and folds as YOLO's folder of label files, and back: a line a box, normalised by the image's size.

Format: https://docs.ultralytics.com/datasets/detect. A line is `class cx cy width height`; an image without a box has an
empty file.
"""

import shutil
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pandas as pd
import yaml

from kitlib.atomic import write_text
from kitlib.errors import DatasetError
from kitlib.runs.coco import CATEGORY, category_numbers, checked
from kitlib.tables import BOX, check_table

LABELS, CLASSES = "labels", "classes.txt"
# Most programs write six decimals, so that a box at the image's edge may seem to reach beyond it, as a share of its side.
OVERHANG = Decimal("1e-5")
# Shares are written with the 28 digits of Python's decimals. So many decimals of a pixel survive: more than a float of a
# thousandth of a pixel has, so that nothing is lost.
DECIMALS = 20


def write_yolo(folder: str | Path, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame | None = None) -> None:
    """Write FOLDER/labels with a file an image, `classes.txt` and `data.yaml`, which expects images in FOLDER/images.

    With `folds`, also `fold0.yaml` and so on: its lists of images to train on are all other folds'. Classes are the boxes'
    column `finding`, in the alphabet's order, or `opacity`. The labels appear whole. Raises FileExistsError where FOLDER has
    labels already, DatasetError as `write_coco` does, and for a box that reaches beyond its image, since ultralytics
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
            raise DatasetError(f"image_id {image_id!r} cannot name a file: wanted no '/' and no leading '.'")
        (beside / f"{image_id}.txt").write_text("".join(lines.get(image_id, ())), encoding="utf-8")
    names = {"names": dict(enumerate(classes))}
    write_text(folder / CLASSES, "".join(f"{name}\n" for name in classes))
    write_text(folder / "data.yaml", yaml.safe_dump({"train": "images", "val": "images", **names}, sort_keys=False))
    folds = pd.DataFrame(columns=["id", "fold"]) if folds is None else folds
    for fold in sorted(set(folds["fold"])):
        lists = {"train": folds["id"][folds["fold"] != fold], "val": folds["id"][folds["fold"] == fold]}
        for part, image_ids in lists.items():
            write_text(folder / f"fold{fold}_{part}.txt", "".join(f"./images/{image_id}.png\n" for image_id in image_ids))
        files = {part: f"fold{fold}_{part}.txt" for part in lists}
        write_text(folder / f"fold{fold}.yaml", yaml.safe_dump({**files, **names}, sort_keys=False))
    beside.rename(labels)


def read_yolo(folder: str | Path, images: pd.DataFrame) -> pd.DataFrame:
    """The table boxes of FOLDER/labels, in the order of `images`, whose rows and columns make pixels of shares.

    Every coordinate that is 0 or at least a thousandth of a pixel is, bit for bit, the number that `write_yolo` was given.
    Column `finding` as in `read_coco`. Raises DatasetError with file and line, and where an image has no label file or a
    label file no image.
    """
    folder = Path(folder)
    images, _, _ = checked(images, pd.DataFrame(columns=["image_id", *BOX]))
    classes = _classes(folder / CLASSES)
    files = {path.stem: path for path in sorted((folder / LABELS).glob("*.txt"))}
    missing = sorted(set(images["image_id"]) - set(files))
    if missing:
        raise DatasetError(
            f"{folder / LABELS} lacks {len(missing)} of {len(images)} files, first {missing[0]}.txt: "
            "an image without a box has an empty file"
        )
    strange = sorted(set(files) - set(images["image_id"]))
    if strange:
        raise DatasetError(f"{len(strange)} files belong to none of the images, first {files[strange[0]]}: take them away")
    rows = []
    for image in images.itertuples(index=False):
        path = files[image.image_id]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append((image.image_id, *_box(line, (image.columns, image.rows), classes, f"{path}, line {number}")))
    table = pd.DataFrame(rows, columns=["image_id", *BOX, "finding"])
    return check_table(table.drop(columns="finding") if classes == [CATEGORY] else table, "boxes", str(folder))


def _lines(images: pd.DataFrame, boxes: pd.DataFrame, numbers: list[int]) -> dict[str, list[str]]:
    """image_id -> its lines."""
    sizes = images.set_index("image_id")[["columns", "rows"]].loc[boxes["image_id"]].to_numpy(float)
    low, high = boxes[["xmin", "ymin"]].to_numpy(), boxes[["xmax", "ymax"]].to_numpy()
    beyond = ((low < 0) | (high > sizes)).any(axis=1)
    if beyond.any():
        raise DatasetError(f"image {boxes['image_id'][beyond].iloc[0]} has a box that reaches beyond it: cut it at the edge")
    lines: dict[str, list[str]] = {}
    corners = zip(low.tolist(), high.tolist(), sizes.astype(int).tolist(), strict=True)
    for image_id, number, (lows, highs, size) in zip(boxes["image_id"], numbers, corners, strict=True):
        edges = [(Decimal(lows[axis]), Decimal(highs[axis]), size[axis]) for axis in (0, 1)]
        shares = [(first + last) / 2 / side for first, last, side in edges]
        shares += [(last - first) / side for first, last, side in edges]
        lines.setdefault(image_id, []).append(f"{number} {' '.join(f'{share:f}' for share in shares)}\n")
    return lines


def _classes(path: Path) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing: a text file with a class's name in each line, the first for class 0")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _box(line: str, size: tuple[int, int], classes: list[str], place: str) -> tuple[float, float, float, float, str]:
    """The corners and class of one line; `size` is the image's columns and rows."""
    words = line.split()
    try:
        number, shares = int(words[0]), [Decimal(word) for word in words[1:]]
    except (ValueError, InvalidOperation):
        number, shares = -1, []
    if len(shares) != 4 or not all(share.is_finite() for share in shares):
        raise DatasetError(f"{place}: {line.strip()!r} is not `class cx cy width height`")
    if not 0 <= number < len(classes):
        raise DatasetError(f"{place}: class {number}, but {CLASSES} names {len(classes)}, counted from 0")
    problem = f"{place}: the box {' '.join(words[1:])} reaches beyond the image or has no area; wanted shares of its size"
    if not all(0 <= share <= 1 + OVERHANG for share in shares) or not all(shares[2:]):
        raise DatasetError(problem)
    corners = []
    for sign in (-1, 1):
        for centre, extent, side in zip(shares[:2], shares[2:], size, strict=True):
            edge = centre + sign * extent / 2
            if not -OVERHANG <= edge <= 1 + OVERHANG:
                raise DatasetError(problem)
            corners.append(float(round(min(max(edge, Decimal(0)), Decimal(1)) * side, DECIMALS)))
    xmin, ymin, xmax, ymax = corners
    return xmin, ymin, xmax, ymax, classes[number]
