"""Reads one annotation file of V7's Darwin, JSON 1.0 or 2.0: whose image it describes, its tags, and its polygons filled."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kitlib.errors import MaskError
from kitlib.xrays.header import MAX_SAMPLES

LUNG_NAMES = ("lung", "lungs", "left lung", "right lung")  # in small letters


@dataclass(frozen=True)
class DarwinAnnotation:
    """What was said of one image."""

    names: tuple[str, ...]  # file names that the image may have: Darwin's own, then that of its source
    rows: int
    columns: int
    tags: tuple[str, ...]
    polygons: tuple[tuple[str, tuple[np.ndarray, ...]], ...]  # name, and closed paths (n, 2) of x, y in the image's pixels

    def has(self, names: Sequence[str] = LUNG_NAMES) -> bool:
        """Whether a polygon has one of `names`, given in small letters."""
        return any(name.lower() in names for name, _ in self.polygons)

    def mask(self, names: Sequence[str] = LUNG_NAMES) -> np.ndarray:
        """bool (rows, columns): what lies in any of the polygons of these names, each filled by itself."""
        inside = np.zeros((self.rows, self.columns), bool)
        for name, paths in self.polygons:
            if name.lower() in names:
                inside |= fill_even_odd(paths, self.rows, self.columns)
        return inside


def read_darwin_json(path: str | Path) -> DarwinAnnotation:
    """Raises MaskError for a file that is no such JSON, of a video, or without the image's size."""
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaskError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    try:
        names, rows, columns = _image(told)
        annotations = told["annotations"]
        tags = tuple(str(each["name"]) for each in annotations if "tag" in each)
        polygons = tuple((str(each["name"]).strip(), paths) for each in annotations if (paths := _paths(each)))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        version = told.get("version", "none") if isinstance(told, dict) else "none"
        raise MaskError(
            f"{path} is no annotation of one image in Darwin JSON 1.0 or 2.0 ({error!r}; it tells the version {version}): "
            "export it as Darwin JSON 2.0, or leave it out"
        ) from error
    if not 0 < rows * columns <= MAX_SAMPLES or min(rows, columns) < 1:
        raise MaskError(f"{path} says that its image has {rows} x {columns} pixels: fetch it again, or leave it out")
    return DarwinAnnotation(names, rows, columns, tags, polygons)


def fill_even_odd(paths: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """bool (rows, columns): the pixels whose middle lies within an odd number of closed `paths` (n, 2) of x, y.

    A pixel's left edge is its index. cv2.fillPoly also takes the pixels that an outline touches, half a pixel too many on
    every side.
    """
    crossings = np.zeros((rows, columns + 1), np.uint8)
    for path in paths:
        start, end = path, np.roll(path, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        # Rows whose middle lies between the ends of each edge, its lower end not counted: the next edge has that.
        first, last = (np.ceil(bound - 0.5).clip(0, rows).astype(int) for bound in (low, high))
        count = last - first
        edge = np.repeat(np.arange(len(path)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        run, rise = (end - start)[edge].T
        x = start[edge, 0] + (row + 0.5 - start[edge, 1]) * run / rise
        np.add.at(crossings, (row, np.ceil(x - 0.5).clip(0, columns).astype(int)), 1)
    return (np.cumsum(crossings, axis=1, dtype=np.uint8)[:, :columns] & 1).astype(bool)


def _image(told: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    """Names, rows and columns of the image."""
    if "item" in told:  # 2.0
        item, slot = told["item"], told["item"]["slots"][0]
        names = [item["name"], *(source["file_name"] for source in slot.get("source_files", ()))]
        size = slot
    else:
        size = told["image"]
        names = [size["filename"], size.get("original_filename") or size["filename"]]
    return tuple(dict.fromkeys(Path(str(name)).name for name in names)), int(size["height"]), int(size["width"])


def _paths(annotation: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The closed paths of a polygon, simple or complex; none of anything else."""
    polygon = annotation.get("polygon") or annotation.get("complex_polygon")
    if not polygon:
        return ()
    paths = polygon["paths"] if "paths" in polygon else polygon["path"]
    paths = [paths] if paths and isinstance(paths[0], dict) else list(paths)
    paths += polygon.get("additional_paths") or []
    points = tuple(np.array([(point["x"], point["y"]) for point in path], float).reshape(-1, 2) for path in paths)
    if not all(np.isfinite(path).all() for path in points):
        raise ValueError("a polygon's point is not finite")
    return points
