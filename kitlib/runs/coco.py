"""Writes and reads `images`, `boxes` and `folds` tables as a COCO JSON file, for annotation tools and other detectors.

COCO: https://cocodataset.org/#format-data. Its boxes are x, y, width, height in pixels of the original image.
"""

import json
import logging
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.atomic import write_text
from kitlib.classes import ONE_FINDING
from kitlib.datasets.data_folder import listed_id
from kitlib.errors import DatasetError
from kitlib.tables import BOX, check_table, cut_boxes, findings_of

logger = logging.getLogger(__name__)

# Enough digits for the exact sum or difference of any two coordinates in the file; floats would lose the last digit.
EXACT = Context(prec=400)
MOST_PIXELS = 1e9  # larger coordinates, and NaN, are rejected as mistakes
# Keys of an image entry that this module writes; a column of `images` with such a name would be overwritten.
_RESERVED = {"id", "file_name", "width", "height", "fold"}


def write_coco(path: str | Path, images: pd.DataFrame, boxes: pd.DataFrame, folds: pd.DataFrame | None = None) -> None:
    """Write the tables `images`, `boxes` and, if given, `folds` as one COCO JSON file, atomically.

    Each row of `images` becomes an image entry, even if the image has no box. The entry has all columns of the row and, if
    `folds` is given, the image's fold; its `file_name` is `<image_id>.png`. The categories are the findings of the boxes in
    alphabetical order, or only "opacity" (ONE_FINDING) if there is no box. Raises DatasetError if an image has no known
    size, if `boxes` or `folds` has an image that `images` lacks, or if a column of `images` has a name that COCO reserves or
    a value that JSON cannot hold.
    """
    images, boxes, categories = check_images_and_boxes(images, boxes)
    codes = pd.Index(categories).get_indexer(boxes["finding"]).tolist()
    reserved = _RESERVED & set(images.columns)
    if reserved:
        raise DatasetError(
            f"the COCO file needs these column names of `images` for itself: {sorted(reserved)}; rename these columns"
        )
    columns = images.drop(columns=["rows", "columns"])
    # JSON has no NaN.
    rows = columns.astype(object).where(columns.notna(), None).to_dict("records")
    entries = [
        {"id": number, "file_name": f"{row['image_id']}.png", "width": width, "height": height, **row}
        for number, (row, width, height) in enumerate(
            zip(rows, images["columns"].tolist(), images["rows"].tolist(), strict=True), 1
        )
    ]
    if folds is not None:
        _add_folds(entries, check_table(folds, "folds"))
    number_of = {entry["image_id"]: entry["id"] for entry in entries}
    box_rows = zip(boxes["image_id"], codes, boxes[list(BOX)].to_numpy().tolist(), strict=True)
    annotations = [
        _annotation(number, number_of[image_id], 1 + category, box)
        for number, (image_id, category, box) in enumerate(box_rows, 1)
    ]
    separator = ",\n"
    category_entries = [
        {"id": number, "name": name, "supercategory": "finding"} for number, name in enumerate(categories, 1)
    ]
    parts = {"categories": _json_lines(category_entries), "images": _json_lines(entries), "annotations": annotations}
    # One entry per line, so that people can read the file and version control can show what changed.
    lists = (f"{json.dumps(name)}: [\n{separator.join(lines)}\n]" for name, lines in parts.items())
    write_text(path, "{" + ",\n".join(lists) + "}\n")


def read_coco(path: str | Path) -> dict[str, pd.DataFrame]:
    """Return the tables in a COCO file, keyed by name: "images", "boxes" and, if the file contains folds, "folds".

    A box's finding is the name of its category. Boxes are cut at the edges of their images (see `cut_annotated_boxes`). If
    `write_coco` wrote the file, the table `images` has all its columns again, and the coordinates of boxes that were not cut
    are exactly those passed to `write_coco`. If another program wrote the file, image_id is the file name without folders
    and suffix, and each image is its own study and patient. Raises DatasetError, which mentions the file and the entry, if
    the file is missing or invalid, or if a box cannot be used, for example because it is thinner than a pixel.
    """
    content = _read_json(Path(path))
    where = {name: f"{path}, {name}" for name in ("images", "annotations", "categories")}
    names = {category["id"]: str(category["name"]) for category in _entries(content, "categories", ("id", "name"), where)}
    entries = _entries(content, "images", ("id", "file_name", "width", "height"), where)
    if not entries:
        raise DatasetError(f"{where['images']}: the list is empty, so there is nothing to read")
    image_of = {entry["id"]: str(entry.get("image_id", listed_id(str(entry["file_name"])))) for entry in entries}
    boxes, places = [], []
    for entry in _entries(content, "annotations", ("id", "image_id", "category_id", "bbox"), where):
        place = f"{where['annotations']}, id {entry['id']!r}"
        for key, listed in (("image", image_of), ("category", names)):
            if not _is_listed(value := entry[f"{key}_id"], listed):
                raise DatasetError(f"{place}: {key}_id is {value!r}, but the file lists no {key} with this id")
        boxes.append((image_of[entry["image_id"]], *_corners(entry["bbox"], place), names[entry["category_id"]]))
        places.append(place)
    table = pd.DataFrame(boxes, columns=["image_id", *BOX, "finding"])
    images = pd.DataFrame([_image_row(entry, image_of[entry["id"]], where["images"]) for entry in entries])
    tables = {"images": images.drop(columns="fold", errors="ignore"), "boxes": table}
    if "fold" in images:
        tables["folds"] = images.loc[images["fold"].notna(), ["image_id", "fold"]].rename(columns={"image_id": "id"})
    tables = {name: check_table(table, name, str(path)) for name, table in tables.items()}
    return tables | {"boxes": cut_annotated_boxes(tables["boxes"], tables["images"], places, str(path))}


def read_coco_boxes(path: str | Path, images: pd.DataFrame) -> pd.DataFrame:
    """Return the `boxes` table of a COCO file that an annotation tool wrote for `images`.

    Raises DatasetError if the file is invalid (see `read_coco`), if it does not list exactly the images in `images`, or if
    it gives another size for an image: the boxes are then in pixels of a resized image.
    """
    tables = read_coco(path)
    sizes = images[["image_id", "rows", "columns"]].merge(
        tables["images"][["image_id", "rows", "columns"]],
        on="image_id",
        how="outer",
        suffixes=("", "_file"),
        indicator=True,
    )
    for side, problem in (("left_only", "are not in the file"), ("right_only", "in the file are not in the `images` table")):
        unmatched = sizes.loc[sizes["_merge"] == side, "image_id"]
        if len(unmatched):
            raise DatasetError(
                f"{path}: {len(unmatched)} images {problem}; the first is {unmatched.iloc[0]!r}. The file must list "
                "exactly the images of the `images` table"
            )
    resized = sizes[(sizes["rows"] != sizes["rows_file"]) | (sizes["columns"] != sizes["columns_file"])]
    if len(resized):
        raise DatasetError(
            f"{path}: {len(resized)} images have another size than in the `images` table. The first is "
            f"{resized.image_id.iloc[0]!r}: {resized.columns_file.iloc[0]:.0f} x {resized.rows_file.iloc[0]:.0f} pixels in "
            f"the file, {resized['columns'].iloc[0]} x {resized['rows'].iloc[0]} in the table. Annotate at full resolution"
        )
    return tables["boxes"]


def cut_annotated_boxes(boxes: pd.DataFrame, images: pd.DataFrame, places: list[str], file: str) -> pd.DataFrame:
    """Return `boxes`, cut at the edges of their images (see kitlib.tables.cut_boxes); log a warning if any had to be cut.

    `places` says for each box where in `file` it was read, such as a line. Raises DatasetError if boxes cannot be used; the
    message says how many, and where the first of them was read.
    """
    cut, overhang, problems = cut_boxes(boxes, images)
    wrong = np.flatnonzero(problems != "")
    if len(wrong):
        corners = ", ".join(f"{name} {boxes[name].iloc[wrong[0]]:g}" for name in BOX)
        raise DatasetError(
            f"{places[wrong[0]]}: {problems.iloc[wrong[0]]} ({corners}, in pixels). {len(wrong)} of {len(boxes)} boxes "
            "cannot be used. Correct or remove them; if there are many, they may have been drawn on resized images"
        )
    if (overhang > 0).any():
        logger.warning(
            "%s: %d of %d boxes were cut at their image's edge; the first is at %s; at most %.2f pixels were cut off",
            *(file, (overhang > 0).sum(), len(boxes), places[int((overhang > 0).argmax())], overhang.max()),
        )
    return cut


def annotated_images(images: pd.DataFrame, boxes: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of fully annotated images. If such an image has no box, it shows no finding.

    Excludes SIIM's images that no annotator looked at (`false_none`), and NIH's images without a box, because in NIH only a
    few of the images with a finding have boxes.
    """
    unannotated = images["false_none"].astype(bool) if "false_none" in images else pd.Series(False, images.index)
    unboxed = (images["source"] == "nih") & ~images["image_id"].isin(boxes["image_id"])
    return images[~unannotated & ~unboxed].reset_index(drop=True)


def check_images_and_boxes(images: pd.DataFrame, boxes: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    """Return the tables `images` and `boxes`, checked, and the findings (classes) of the boxes in alphabetical order.

    If there is no box, the only finding is "opacity" (ONE_FINDING). Raises DatasetError if an image's size is unknown, if a
    box belongs to none of the images, or if a finding begins or ends with a space, which a text file would lose.
    """
    images, boxes = check_table(images, "images"), check_table(boxes, "boxes")
    unsized = images.loc[(images["rows"] < 1) | (images["columns"] < 1), "image_id"]
    if len(unsized):
        raise DatasetError(
            f"{len(unsized)} of {len(images)} images have no size in the columns `rows` and `columns`; the first is "
            f"{unsized.iloc[0]!r}. Prepare the data set with notebook 10, which reads the sizes from the files"
        )
    unmatched = boxes.loc[~boxes["image_id"].isin(images["image_id"]), "image_id"]
    if len(unmatched):
        raise DatasetError(
            f"{len(unmatched)} boxes have an image_id that is not in `images`, first {unmatched.iloc[0]!r}; remove the boxes"
        )
    findings = findings_of(boxes) or (ONE_FINDING,)
    padded = [name for name in findings if name.strip() != name]
    if padded:
        raise DatasetError(f"the finding {padded[0]!r} in `boxes` begins or ends with a space; remove the space")
    return images, boxes, findings


def _add_folds(entries: list[dict[str, Any]], folds: pd.DataFrame) -> None:
    fold_of = dict(zip(folds["id"], folds["fold"].tolist(), strict=True))
    unmatched = set(fold_of) - {entry["image_id"] for entry in entries}
    if unmatched:
        raise DatasetError(
            f"{len(unmatched)} ids in `folds` are not in `images`, first {min(unmatched)!r}; remove their rows"
        )
    for entry in entries:
        if entry["image_id"] in fold_of:
            entry["fold"] = fold_of[entry["image_id"]]


def _annotation(number: int, image: int, category: int, box: list[float]) -> str:
    """Return one COCO annotation as JSON text, with the box's exact width and height, which floats would round."""
    x, y, xmax, ymax = (Decimal(repr(edge)) for edge in box)
    width, height = EXACT.subtract(xmax, x), EXACT.subtract(ymax, y)
    return (
        f'{{"id": {number}, "image_id": {image}, "category_id": {category}, "bbox": [{x}, {y}, {width}, {height}], '
        f'"area": {float(width) * float(height)!r}, "iscrowd": 0}}'
    )


def _json_lines(entries: list[dict[str, Any]]) -> list[str]:
    try:
        return [json.dumps(entry, allow_nan=False) for entry in entries]
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"a value in the `images` table cannot be written as JSON ({error}); drop the column that contains it"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing; give the path of a COCO JSON file")
    try:
        content = json.loads(path.read_bytes(), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); export it again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} is not a COCO file; expected an object with images, annotations and categories")
    return content


def _entries(content: dict[str, Any], name: str, keys: tuple[str, ...], where: dict[str, str]) -> list[dict[str, Any]]:
    """Return the list of entries under the key `name` of a COCO file, whose JSON is `content`.

    Error messages start with `where[name]`. Raises DatasetError if there is no such list, or if
    an entry lacks one of `keys` or has no unique id.
    """
    entries = content.get(name)
    if not isinstance(entries, list):
        raise DatasetError(f"{where[name]}: the list is missing; the keys of the file are {list(content)}")
    ids = set()
    for index, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DatasetError(f"{where[name]}, entry {index}: lacks the keys {missing}")
        if not isinstance(entry["id"], int | str):
            raise DatasetError(f"{where[name]}, entry {index}: the id {entry['id']!r} is neither an integer nor text")
        if entry["id"] in ids:
            raise DatasetError(f"{where[name]}, entry {index}: an earlier entry also has the id {entry['id']!r}")
        ids.add(entry["id"])
    return entries


def _is_listed(key: Any, names: dict[Any, str]) -> bool:
    return isinstance(key, int | str) and key in names


def _corners(bbox: Any, place: str) -> tuple[float, float, float, float]:
    is_box = isinstance(bbox, list) and len(bbox) == 4 and all(type(edge) in (int, Decimal) for edge in bbox)
    if not is_box or not all(abs(edge) < MOST_PIXELS for edge in bbox) or min(bbox[2:]) <= 0:
        raise DatasetError(f"{place}: bbox {bbox!r} is not x, y, width, height in pixels, with width and height above 0")
    x, y, width, height = map(Decimal, bbox)
    return float(x), float(y), float(EXACT.add(x, width)), float(EXACT.add(y, height))


def _image_row(entry: dict[str, Any], image_id: str, where: str) -> dict[str, Any]:
    sizes = (entry["height"], entry["width"])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise DatasetError(
            f"{where}, id {entry['id']!r}: height {sizes[0]!r} and width {sizes[1]!r} are not positive whole numbers of "
            "pixels"
        )
    defaults = {"study_id": image_id, "patient_id": image_id, "path": str(entry["file_name"]), "source": "coco", "view": ""}
    columns = {
        name: float(value) if isinstance(value, Decimal) else value
        for name, value in entry.items()
        if name not in _RESERVED - {"fold"}
    }
    return {**defaults, **columns, "image_id": image_id, "rows": sizes[0], "columns": sizes[1]}
