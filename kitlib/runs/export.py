"""A prepared run as COCO or YOLO files, with its images as PNG if wanted, and such files as the kit's tables."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
from tqdm.auto import tqdm

from kitlib.atomic import replacing
from kitlib.errors import DatasetError, UnreadableXray
from kitlib.runs.coco import annotated_images, read_coco, read_coco_boxes, write_coco
from kitlib.runs.finished_run import read_prepared
from kitlib.runs.yolo_labels import read_yolo, write_yolo
from kitlib.tables import write_table
from kitlib.xrays.cache import usable_cores
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.image_file import decode_image, image_format

COCO_FILE = "annotations.json"
FORMATS: dict[str, Callable[..., None]] = {
    "coco": lambda folder, *tables: write_coco(folder / COCO_FILE, *tables),
    "yolo": write_yolo,
}


def export_run(
    run: str | Path, folder: str | Path, file_format: str, with_images: bool = False, progress: bool = True
) -> list[str]:
    """Write FOLDER/annotations.json or FOLDER/labels (`file_format`: see FORMATS) of a prepared run; return what is amiss.

    Images of which not all boxes are known (see `annotated_images`) are left out: other programs would take them for images
    without an opacity. With `with_images` FOLDER/images has every image at its original size, 8-bit grey, decoded from its
    own file; one that cannot be decoded is left out of the labels too, and is a line of what is returned. Raises ValueError
    for another format, RunError and DatasetError, and FileExistsError where YOLO's labels are there already.
    """
    if file_format not in FORMATS:
        raise ValueError(f"no format is called {file_format!r}; there are: {', '.join(FORMATS)}")
    folder, tables, amiss = Path(folder), read_prepared(run), {}
    images = annotated_images(tables["images"], tables["boxes"])
    if with_images:
        with ThreadPoolExecutor(usable_cores()) as pool:
            write = partial(_write_png, folder / "images")
            told = pool.map(write, images["image_id"], images["path"])
            problems = list(tqdm(told, total=len(images), desc="images", unit="image", disable=not progress))
        amiss = {name: problem for name, problem in zip(images["image_id"], problems, strict=True) if problem}
        if len(amiss) == len(images):
            first = next(iter(amiss.items()), ("", "the run has none"))
            raise DatasetError(f"no image could be decoded, first {': '.join(first)}; are the files where {run} says?")
    images = images[~images["image_id"].isin(list(amiss))]
    boxes = tables["boxes"][tables["boxes"]["image_id"].isin(images["image_id"])]
    folds = tables["folds"][tables["folds"]["id"].isin(images["image_id"])]
    FORMATS[file_format](folder, images, boxes, folds)
    return [f"{image_id}: {problem}; left out" for image_id, problem in amiss.items()]


def import_tables(source: str | Path, out: str | Path, file_format: str, run: str | Path | None = None) -> dict[str, int]:
    """Write OUT/boxes.parquet and return the rows written, by table.

    `source` is COCO's JSON file, or the folder that holds YOLO's `labels`. With a prepared `run` the file must be about the
    images that `export_run` writes of it, as an annotation tool gives it back; YOLO's shares of an image's size always want
    one. Without, COCO's images, and folds if there are any, are written too. Raises ValueError for another format or YOLO
    without a run, RunError and DatasetError.
    """
    if file_format not in FORMATS:
        raise ValueError(f"no format is called {file_format!r}; there are: {', '.join(FORMATS)}")
    if file_format == "yolo" and run is None:
        raise ValueError("yolo wants a prepared run, whose images' sizes make pixels of its shares")
    if run is None:
        tables = read_coco(source)
    else:
        prepared = read_prepared(run)
        images = annotated_images(prepared["images"], prepared["boxes"])
        tables = {"boxes": (read_coco_boxes if file_format == "coco" else read_yolo)(source, images)}
    for name, table in tables.items():
        write_table(table, name, Path(out) / f"{name}.parquet")
    return {name: len(table) for name, table in tables.items()}


def _write_png(folder: Path, image_id: str, path: str) -> str:
    """Why the image could not be written, or "". A full disk is an OSError."""
    try:
        pixels = (decode_image(path) if image_format(path) else decode_xray(path)).pixels
    except (UnreadableXray, OSError) as error:
        return getattr(error, "reason", str(error))
    with replacing(folder / f"{image_id}.png") as beside:
        if not cv2.imwrite(str(beside), pixels):
            raise OSError(f"{beside} could not be written")
    return ""
