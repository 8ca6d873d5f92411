"""Exports a prepared run to COCO or YOLO files, optionally with its images as PNG, and imports such files as tables."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

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
    """Write a prepared run as FOLDER/annotations.json or FOLDER/labels; return a message per image that cannot be decoded.

    `file_format` is "coco" or "yolo". Images that are not fully annotated (see `annotated_images`) are left out without a
    message, because other programs would treat them as images without a finding. `with_images` also writes every image to
    FOLDER/images as an 8-bit grey PNG at its original size; an image that cannot be decoded is then left out of the labels
    too. Raises ValueError if the format is unknown; RunError if `run` is not finished; DatasetError if no image can be
    exported or the tables do not fit the format; FileExistsError if FOLDER/labels exists already.
    """
    if file_format not in FORMATS:
        raise ValueError(f"unknown format {file_format!r}; available: {', '.join(FORMATS)}")
    folder, tables, problem_of = Path(folder), read_prepared(run), {}
    images = annotated_images(tables["images"], tables["boxes"])
    if images.empty:
        raise DatasetError(f"{run} has no image whose boxes are all known, so there is nothing to export")
    if with_images:
        with ThreadPoolExecutor(usable_cores()) as pool:
            write = partial(_write_png, folder / "images")
            results = pool.map(write, images["image_id"], images["path"])
            problems = list(tqdm(results, total=len(images), desc="images", unit="image", disable=not progress))
        problem_of = {name: problem for name, problem in zip(images["image_id"], problems, strict=True) if problem}
        if len(problem_of) == len(images):
            problem = ": ".join(next(iter(problem_of.items())))
            raise DatasetError(
                f"no image could be decoded; the first problem: {problem}. Check that the files are at the paths in the "
                f"`images` table of {run}"
            )
    images = images[~images["image_id"].isin(list(problem_of))]
    boxes = tables["boxes"][tables["boxes"]["image_id"].isin(images["image_id"])]
    folds = tables["folds"][tables["folds"]["id"].isin(images["image_id"])]
    FORMATS[file_format](folder, images, boxes, folds)
    return [f"{image_id}: {problem}; left out" for image_id, problem in problem_of.items()]


def import_tables(source: str | Path, out: str | Path, file_format: str, run: str | Path | None = None) -> dict[str, int]:
    """Write the boxes of a COCO or YOLO data set as OUT/boxes.parquet; return the numbers of rows written, keyed by table.

    `file_format` is "coco" or "yolo". `source` is the COCO JSON file, or the folder that contains YOLO's `labels`. If the
    prepared run `run` is given, a COCO file must list exactly the images that `export_run` writes for it. YOLO requires
    `run`, because its labels are fractions of the image size. Without `run`, a COCO file's images, and its folds if it has
    any, are written too. Raises ValueError if the format is unknown, or for YOLO without `run`; RunError if `run` is not a
    prepared run; DatasetError if the annotations are invalid.
    """
    if file_format not in FORMATS:
        raise ValueError(f"unknown format {file_format!r}; available: {', '.join(FORMATS)}")
    if file_format == "yolo" and run is None:
        raise ValueError("the format 'yolo' requires a prepared run, because its labels are fractions of the image sizes")
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
    """Decode the file `path` and write it to `folder` as PNG; return "", or a message if it cannot be decoded.

    Raises OSError if the PNG cannot be written.
    """
    try:
        pixels = (decode_image(path) if image_format(path) else decode_xray(path)).pixels
    except (UnreadableXray, OSError) as error:
        return getattr(error, "reason", str(error))
    with replacing(folder / f"{image_id}.png") as temporary_path:
        if not cv2.imwrite(str(temporary_path), pixels):
            raise OSError(f"{temporary_path} could not be written")
    return ""
