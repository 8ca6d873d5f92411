"""Reads V7's Darwin JSON files (1.0 or 2.0): an image's size, tags, polygons and possible file names; fills polygons."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kitlib.errors import MaskError
from kitlib.tables import listed_name
from kitlib.xrays.header import MAX_SAMPLES

LUNG_NAMES = ("lung", "lungs", "left lung", "right lung")  # in lower case


@dataclass(frozen=True)
class DarwinAnnotation:
    """The annotation of one image: its tags and polygons, its possible file names, and its size in pixels."""

    names: tuple[str, ...]  # possible file names of the image: in Darwin, then in the original source
    rows: int
    columns: int
    tags: tuple[str, ...]
    polygons: tuple[tuple[str, tuple[np.ndarray, ...]], ...]  # (name, closed paths (n, 2) of x, y in image pixels)

    def has_polygon(self, names: Sequence[str] = LUNG_NAMES) -> bool:
        """Return whether any polygon's name, in lower case, is one of `names`, which must be in lower case."""
        return any(name.lower() in names for name, _ in self.polygons)

    def mask(self, names: Sequence[str] = LUNG_NAMES) -> np.ndarray:
        """Return the union of the polygons whose name, in lower case, is one of `names`, as a bool mask (rows, columns)."""
        inside = np.zeros((self.rows, self.columns), bool)
        for name, paths in self.polygons:
            if name.lower() in names:
                inside |= fill_even_odd(paths, self.rows, self.columns)
        return inside


def read_darwin_json(path: str | Path) -> DarwinAnnotation:
    """Return the annotation of one image from a file in Darwin JSON 1.0 or 2.0.

    Raises MaskError if the file has another format, annotates a video, or lacks a valid image size.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MaskError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    try:
        names, rows, columns = _image(content)
        annotations = content["annotations"]
        tags = tuple(str(entry["name"]) for entry in annotations if "tag" in entry)
        polygons = tuple((str(entry["name"]).strip(), paths) for entry in annotations if (paths := _paths(entry)))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        version = content.get("version", "none") if isinstance(content, dict) else "none"
        raise MaskError(
            f"{path} is not an annotation of one image in Darwin JSON 1.0 or 2.0 ({error!r}; version {version}): "
            "export it as Darwin JSON 2.0, or remove it"
        ) from error
    if min(rows, columns) < 1 or rows * columns > MAX_SAMPLES:
        raise MaskError(f"{path} states an invalid image size, {rows} x {columns} pixels: fetch it again, or remove it")
    return DarwinAnnotation(names, rows, columns, tags, polygons)


def fill_even_odd(paths: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Fill closed paths by the even-odd rule; returns a bool mask (rows, columns).

    Each of `paths` is an array (n, 2) with the x and y of its n corners. A pixel is inside if its centre is enclosed by an
    odd number of paths; the centre of pixel 0 is at 0.5. cv2.fillPoly would also fill the pixels that an outline touches,
    half a pixel too much on every side.
    """
    crossings = np.zeros((rows, columns + 1), np.uint8)
    for path in paths:
        start, end = path, np.roll(path, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        # An edge crosses the rows with a centre between its two ends. The end with the larger y belongs to the next edge.
        first, last = (np.ceil(bound - 0.5).clip(0, rows).astype(int) for bound in (low, high))
        count = last - first
        edge = np.repeat(np.arange(len(path)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        run, rise = (end - start)[edge].T
        x = start[edge, 0] + (row + 0.5 - start[edge, 1]) * run / rise
        np.add.at(crossings, (row, np.ceil(x - 0.5).clip(0, columns).astype(int)), 1)
    return (np.cumsum(crossings, axis=1, dtype=np.uint8)[:, :columns] & 1).astype(bool)


def _image(content: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    """Return the image's possible file names, its number of rows and its number of columns."""
    if "item" in content:  # 2.0
        item, slot = content["item"], content["item"]["slots"][0]
        names = [item["name"], *(source["file_name"] for source in slot.get("source_files", ()))]
        size = slot
    else:
        size = content["image"]
        names = [size["filename"], size.get("original_filename") or size["filename"]]
    return tuple(dict.fromkeys(listed_name(str(name)) for name in names)), int(size["height"]), int(size["width"])


def _paths(annotation: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Return the closed paths of a polygon, each an array (n, 2) of x and y; () for an annotation that is not a polygon."""
    polygon = annotation.get("polygon") or annotation.get("complex_polygon")
    if not polygon:
        return ()
    paths = polygon["paths"] if "paths" in polygon else polygon["path"]
    paths = [paths] if paths and isinstance(paths[0], dict) else list(paths)
    paths += polygon.get("additional_paths") or []
    points = tuple(np.array([(point["x"], point["y"]) for point in path], float).reshape(-1, 2) for path in paths)
    if not all(np.isfinite(path).all() for path in points):
        raise ValueError("a polygon has a coordinate that is not finite")
    return points
