"""Writes and reads boxes as YOLO label files (one per image, one line per box); writes folds as YAML files for training.

Format: https://docs.ultralytics.com/datasets/detect. A line is `class cx cy width height`, where the box's centre and size
are fractions of the image size; an image without a box has an empty file.
"""

import shutil
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pandas as pd
import yaml

from kitlib.atomic import write_text
from kitlib.datasets.data_folder import read_lines
from kitlib.errors import DatasetError
from kitlib.runs.coco import check_images_and_boxes, cut_annotated_boxes
from kitlib.tables import BOX, check_table

LABELS, CLASSES = "labels", "classes.txt"
MOST_FRACTION = 1000  # larger fractions are mistakes, such as 1e999, which no float can hold
# Coordinates are rounded to this number of decimals of a pixel. Fractions are written with the 28 digits of Python's
# decimals, so these decimals are correct, and a float of at least a thousandth of a pixel cannot hold more.
DECIMALS = 20


def write_yolo(folder: str | Path, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame | None = None) -> None:
    """Write FOLDER/labels with one file per image, FOLDER/classes.txt, and FOLDER/data.yaml for training.

    data.yaml expects the images in FOLDER/images. If `folds` is given, fold0.yaml and so on are also written: fold0.yaml is
    for validating on fold 0 and training on all other folds. The classes are the findings in `boxes` in alphabetical order
    or, if `boxes` is empty, only "opacity" (ONE_FINDING). FOLDER/labels appears only when it is complete. Raises
    FileExistsError if FOLDER/labels exists; DatasetError if an image's size is unknown, if an image_id cannot be a file
    name, or if a box belongs to none of the images or exceeds its image (ultralytics would drop the image).
    """
    folder = Path(folder)
    labels, temporary_folder = folder / LABELS, folder / f".{LABELS}.partial"
    if labels.exists():
        raise FileExistsError(f"{labels} exists already; choose another folder, so that old and new labels are not mixed")
    images, boxes, classes = check_images_and_boxes(images, boxes)
    lines = _label_lines(images, boxes, pd.Index(classes).get_indexer(boxes["finding"]).tolist())
    shutil.rmtree(temporary_folder, ignore_errors=True)
    temporary_folder.mkdir(parents=True)
    for image_id in images["image_id"]:
        if "/" in image_id or image_id.startswith("."):
            raise DatasetError(f"image_id {image_id!r} is not a valid file name; it must not contain '/' or start with '.'")
        (temporary_folder / f"{image_id}.txt").write_text("".join(lines.get(image_id, ())), encoding="utf-8")
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
    temporary_folder.rename(labels)


def read_yolo(folder: str | Path, images: pd.DataFrame) -> pd.DataFrame:
    """Return the boxes in FOLDER/labels as a `boxes` table, in pixels of the original images and in the order of `images`.

    The columns `rows` and `columns` of `images` convert fractions to pixels. If `write_yolo` wrote the labels, all
    coordinates are restored exactly, except those between 0 and 0.001 pixels. A box's finding is the name of its class.
    Raises DatasetError if a label is invalid (the message has the file and line), if an image has no label file, or if a
    label file has no image.
    """
    folder = Path(folder)
    images, _, _ = check_images_and_boxes(images, pd.DataFrame(columns=["image_id", *BOX]))
    classes = _read_classes(folder / CLASSES)
    files = {path.stem: path for path in sorted((folder / LABELS).glob("*.txt"))}
    missing = sorted(set(images["image_id"]) - set(files))
    if missing:
        raise DatasetError(
            f"{folder / LABELS} lacks {len(missing)} of {len(images)} files; the first is {missing[0]}.txt. An image "
            "without a box needs an empty file"
        )
    unmatched = sorted(set(files) - set(images["image_id"]))
    if unmatched:
        raise DatasetError(
            f"{len(unmatched)} files belong to none of the images; the first is {files[unmatched[0]]}. Remove them"
        )
    rows, places = [], []
    for image in images.itertuples(index=False):
        path = files[image.image_id]
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                places.append(f"{path}, line {number}")
                rows.append((image.image_id, *_parse_line(line, (image.columns, image.rows), classes, places[-1])))
    table = cut_annotated_boxes(pd.DataFrame(rows, columns=["image_id", *BOX, "finding"]), images, places, str(folder))
    return check_table(table, "boxes", str(folder))


def _label_lines(images: pd.DataFrame, boxes: pd.DataFrame, numbers: list[int]) -> dict[str, list[str]]:
    """Return the label lines of each image that has boxes, one line per box, as lists keyed by image_id.

    `numbers` has the class number of each row of `boxes`. Raises DatasetError if a box reaches beyond its image.
    """
    sizes = images.set_index("image_id")[["columns", "rows"]].loc[boxes["image_id"]].to_numpy(float)
    low, high = boxes[["xmin", "ymin"]].to_numpy(), boxes[["xmax", "ymax"]].to_numpy()
    exceeds = ((low < 0) | (high > sizes)).any(axis=1)
    if exceeds.any():
        raise DatasetError(f"image {boxes['image_id'][exceeds].iloc[0]} has a box that reaches beyond it; clip the box")
    lines: dict[str, list[str]] = {}
    corners = zip(low.tolist(), high.tolist(), sizes.astype(int).tolist(), strict=True)
    for image_id, number, (lows, highs, size) in zip(boxes["image_id"], numbers, corners, strict=True):
        edges = [(Decimal(lows[axis]), Decimal(highs[axis]), size[axis]) for axis in (0, 1)]
        fractions = [(first + last) / 2 / side for first, last, side in edges]
        fractions += [(last - first) / side for first, last, side in edges]
        lines.setdefault(image_id, []).append(f"{number} {' '.join(f'{fraction:f}' for fraction in fractions)}\n")
    return lines


def _read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing; write a text file with one class name per line, starting with class 0")
    return [line.strip() for line in read_lines(path) if line.strip()]


def _parse_line(line: str, size: tuple[int, int], classes: list[str], place: str) -> tuple[float, float, float, float, str]:
    """Return the values in a label line: xmin, ymin, xmax and ymax in pixels, and the class name.

    `size` is the image's size, (columns, rows). `classes` has the class names in order of their numbers. `place` is the file
    and line, for the error message.
    """
    words = line.split()
    try:
        number, fractions = int(words[0]), [Decimal(word) for word in words[1:]]
    except (ValueError, InvalidOperation):
        number, fractions = -1, []
    if len(fractions) != 4 or not all(fraction.is_finite() for fraction in fractions):
        raise DatasetError(f"{place}: {line.strip()!r} is not `class cx cy width height`")
    if not 0 <= number < len(classes):
        raise DatasetError(f"{place}: class {number} does not exist; {CLASSES} lists {len(classes)} classes, counted from 0")
    if not all(abs(fraction) < MOST_FRACTION for fraction in fractions) or min(fractions[2:]) <= 0:
        raise DatasetError(
            f"{place}: the box '{' '.join(words[1:])}' must be in fractions of the image (0..1), width and height above 0"
        )
    corners = [
        float(round((centre + sign * extent / 2) * side, DECIMALS))
        for sign in (-1, 1)
        for centre, extent, side in zip(fractions[:2], fractions[2:], size, strict=True)
    ]
    xmin, ymin, xmax, ymax = corners
    return xmin, ymin, xmax, ymax, classes[number]
