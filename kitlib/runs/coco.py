"""The tables images, boxes and folds as one COCO JSON file, and back: for annotation tools and other people's detectors.

COCO: https://cocodataset.org/#format-data. Its boxes are x, y, width, height in pixels of the original image.
"""

import json
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.atomic import write_text
from kitlib.errors import DatasetError
from kitlib.tables import BOX, check_table

CATEGORY = "opacity"  # of boxes without a column `finding`
# Digits enough for the exact sum or difference of any two coordinates as they are written: floats would lose the last one.
EXACT = Context(prec=400)
MOST_PIXELS = 1e9  # a larger coordinate is a mistake, as NaN is
# What COCO says of an image itself; a column of this name would get lost.
_TAKEN = {"id", "file_name", "width", "height", "fold"}


def write_coco(path: str | Path, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame | None = None) -> None:
    """Write every image of `images`, also those without a box, with all columns of its row and, if given, its fold.

    `file_name` is `<image_id>.png`. Categories are the boxes' column `finding`, in the alphabet's order, or `opacity`.
    Raises DatasetError: an image of unknown size, a box or fold of an unknown image.
    """
    images, boxes, categories = checked(images, boxes)
    taken = _TAKEN & set(images.columns)
    if taken:
        raise DatasetError(f"images have the column(s) {', '.join(sorted(taken))}, which COCO calls its own: rename them")
    known = images.drop(columns=["rows", "columns"])
    # JSON knows no NaN.
    rows = known.astype(object).where(known.notna(), None).to_dict("records")
    entries = [
        {"id": number, "file_name": f"{row['image_id']}.png", "width": width, "height": height, **row}
        for number, (row, width, height) in enumerate(
            zip(rows, images["columns"].tolist(), images["rows"].tolist(), strict=True), 1
        )
    ]
    if folds is not None:
        _add_folds(entries, check_table(folds, "folds"))
    number_of = {entry["image_id"]: entry["id"] for entry in entries}
    boxed = zip(boxes["image_id"], category_numbers(boxes, categories), boxes[list(BOX)].to_numpy().tolist(), strict=True)
    annotations = [
        _annotation(number, number_of[image_id], 1 + category, box)
        for number, (image_id, category, box) in enumerate(boxed, 1)
    ]
    separator = ",\n"
    named = [{"id": number, "name": name, "supercategory": "finding"} for number, name in enumerate(categories, 1)]
    parts = {"categories": _lines(named), "images": _lines(entries), "annotations": annotations}
    # An entry a line: a person can read it, and a version control system tell what has changed.
    lists = (f"{json.dumps(name)}: [\n{separator.join(lines)}\n]" for name, lines in parts.items())
    write_text(path, "{" + ",\n".join(lists) + "}\n")


def read_coco(path: str | Path) -> dict[str, pd.DataFrame]:
    """The tables `images` and `boxes` of any COCO file of boxes, and `folds` where `write_coco` was given them.

    Every coordinate is, bit for bit, the number that `write_coco` was given. Images keep their columns; of a file from
    elsewhere, image_id is the file's name without suffix, and study and patient are the image. Boxes have the column
    `finding` unless the only category is `opacity`. Raises DatasetError.
    """
    content = _content(Path(path))
    where = {name: f"{path}, {name}" for name in ("images", "annotations", "categories")}
    names = {category["id"]: str(category["name"]) for category in _entries(content, "categories", ("id", "name"), where)}
    entries = _entries(content, "images", ("id", "file_name", "width", "height"), where)
    if not entries:
        raise DatasetError(f"{where['images']}: the list is empty, so there is nothing to read")
    image_of = {entry["id"]: str(entry.get("image_id", Path(str(entry["file_name"])).stem)) for entry in entries}
    boxes = []
    for entry in _entries(content, "annotations", ("id", "image_id", "category_id", "bbox"), where):
        place = f"{where['annotations']}, id {entry['id']!r}"
        if not _known(entry["image_id"], image_of) or not _known(entry["category_id"], names):
            raise DatasetError(f"{place}: no image {entry['image_id']!r} or no category {entry['category_id']!r} is listed")
        boxes.append((image_of[entry["image_id"]], *_corners(entry["bbox"], place), names[entry["category_id"]]))
    table = pd.DataFrame(boxes, columns=["image_id", *BOX, "finding"])
    if list(names.values()) == [CATEGORY]:
        table = table.drop(columns="finding")
    images = pd.DataFrame([_image_row(entry, image_of[entry["id"]], where["images"]) for entry in entries])
    tables = {"images": images.drop(columns="fold", errors="ignore"), "boxes": table}
    if "fold" in images:
        tables["folds"] = images.loc[images["fold"].notna(), ["image_id", "fold"]].rename(columns={"image_id": "id"})
    return {name: check_table(table, name, str(path)) for name, table in tables.items()}


def read_coco_boxes(path: str | Path, images: pd.DataFrame) -> pd.DataFrame:
    """The table boxes of a COCO file about `images`, as annotation tools give it back: they drop all other columns.

    Raises DatasetError as `read_coco` does, and where the file lists an image that `images` lacks, lacks one of them, or
    gives it another size, since its boxes are then in other pixels.
    """
    tables = read_coco(path)
    sizes = images[["image_id", "rows", "columns"]].merge(
        tables["images"][["image_id", "rows", "columns"]],
        on="image_id",
        how="outer",
        suffixes=("", "_there"),
        indicator=True,
    )
    for side, problem in (("left_only", "are not in the file"), ("right_only", "of the file are unknown here")):
        alone = sizes.loc[sizes["_merge"] == side, "image_id"]
        if len(alone):
            raise DatasetError(f"{path}: {len(alone)} images {problem}, first {alone.iloc[0]}: export the same images")
    other = sizes[(sizes["rows"] != sizes["rows_there"]) | (sizes["columns"] != sizes["columns_there"])]
    if len(other):
        raise DatasetError(
            f"{path}: {len(other)} images have another size, first {other.image_id.iloc[0]} with "
            f"{other.columns_there.iloc[0]:.0f} x {other.rows_there.iloc[0]:.0f} instead of "
            f"{other['columns'].iloc[0]} x {other['rows'].iloc[0]} pixels: annotate images of full size"
        )
    return tables["boxes"]


def annotated_images(images: pd.DataFrame, boxes: pd.DataFrame) -> pd.DataFrame:
    """The rows of `images` of which all boxes are known, so that one without a box is a true negative.

    Left out: what no annotator looked at (SIIM's `false_none`), and NIH's images without a box, because its list boxes few
    of the images that show a finding.
    """
    unseen = images["false_none"].astype(bool) if "false_none" in images else pd.Series(False, images.index)
    unboxed = (images["source"] == "nih") & ~images["image_id"].isin(boxes["image_id"])
    return images[~unseen & ~unboxed].reset_index(drop=True)


def checked(images: pd.DataFrame, boxes: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Both tables, checked, and the categories of the boxes.

    Raises DatasetError where an image's size is unknown, a box belongs to no image or has no finding.
    """
    images, boxes = check_table(images, "images"), check_table(boxes, "boxes")
    unsized = images.loc[(images["rows"] < 1) | (images["columns"] < 1), "image_id"]
    if len(unsized):
        raise DatasetError(
            f"{len(unsized)} of {len(images)} images have no rows and columns, first {unsized.iloc[0]}: "
            "prepare the data set with notebook 10, which reads the sizes from the files"
        )
    strange = boxes.loc[~boxes["image_id"].isin(images["image_id"]), "image_id"]
    if len(strange):
        raise DatasetError(f"{len(strange)} boxes belong to none of the images, first {strange.iloc[0]}: leave them out")
    if "finding" not in boxes:
        return images, boxes, [CATEGORY]
    named = boxes["finding"].map(lambda name: isinstance(name, str) and name.strip() == name != "")
    if not named.all():
        raise DatasetError(f"image {boxes['image_id'][~named].iloc[0]} has a box whose finding is no name")
    return images, boxes, sorted(boxes["finding"].unique())


def category_numbers(boxes: pd.DataFrame, categories: list[str]) -> list[int]:
    """The place in `categories` of every box."""
    if "finding" not in boxes:
        return [0] * len(boxes)
    return boxes["finding"].map({name: place for place, name in enumerate(categories)}).tolist()


def _add_folds(entries: list[dict[str, Any]], folds: pd.DataFrame) -> None:
    fold_of = dict(zip(folds["id"], folds["fold"].tolist(), strict=True))
    strange = set(fold_of) - {entry["image_id"] for entry in entries}
    if strange:
        raise DatasetError(f"{len(strange)} images of the folds are none of the images, first {min(strange)}")
    for entry in entries:
        if entry["image_id"] in fold_of:
            entry["fold"] = fold_of[entry["image_id"]]


def _annotation(number: int, image: int, category: int, box: list[float]) -> str:
    """One annotation as JSON. The sizes are written by hand, for no float has all the digits of such a difference."""
    x, y, xmax, ymax = (Decimal(repr(edge)) for edge in box)
    width, height = EXACT.subtract(xmax, x), EXACT.subtract(ymax, y)
    return (
        f'{{"id": {number}, "image_id": {image}, "category_id": {category}, "bbox": [{x}, {y}, {width}, {height}], '
        f'"area": {float(width) * float(height)!r}, "iscrowd": 0}}'
    )


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    try:
        return [json.dumps(entry, allow_nan=False) for entry in entries]
    except (TypeError, ValueError) as error:
        raise DatasetError(f"a column of images holds what JSON has no words for ({error}): leave the column out") from error


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing: name a COCO JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no JSON ({error}): export it again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} is no COCO file: wanted an object with images, annotations and categories")
    return content


def _entries(content: dict[str, Any], name: str, wanted: tuple[str, ...], where: dict[str, str]) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list):
        raise DatasetError(f"{where[name]}: the list is missing; the file has: {', '.join(content)}")
    seen = set()
    for place, entry in enumerate(entries):
        missing = [key for key in wanted if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DatasetError(f"{where[name]}, entry {place}: lacks {', '.join(missing)}")
        if not isinstance(entry["id"], int | str) or entry["id"] in seen:
            raise DatasetError(f"{where[name]}, entry {place}: id {entry['id']!r} occurs again or is no id")
        seen.add(entry["id"])
    return entries


def _known(key: Any, among: dict[Any, str]) -> bool:
    return isinstance(key, int | str) and key in among


def _corners(bbox: Any, place: str) -> tuple[float, float, float, float]:
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(type(edge) in (int, Decimal) for edge in bbox)
    if not numbers or not all(abs(edge) < MOST_PIXELS for edge in bbox) or min(bbox[2:]) <= 0:
        raise DatasetError(f"{place}: bbox {bbox!r} is not x, y, width, height in pixels, the last two above 0")
    x, y, width, height = map(Decimal, bbox)
    return float(x), float(y), float(EXACT.add(x, width)), float(EXACT.add(y, height))


def _image_row(entry: dict[str, Any], image_id: str, where: str) -> dict[str, Any]:
    sizes = (entry["height"], entry["width"])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise DatasetError(f"{where}, id {entry['id']!r}: height {sizes[0]!r} and width {sizes[1]!r} are no pixels")
    row = {"study_id": image_id, "patient_id": image_id, "path": str(entry["file_name"]), "source": "coco", "view": ""}
    told = {
        name: float(value) if isinstance(value, Decimal) else value
        for name, value in entry.items()
        if name not in _TAKEN - {"fold"}
    }
    return {**row, **told, "image_id": image_id, "rows": sizes[0], "columns": sizes[1]}
