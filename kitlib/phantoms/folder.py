"""Write a folder of phantoms atomically; reuse it if its parameters are the same; never replace other data."""

import hashlib
import importlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

from kitlib.atomic import write_json
from kitlib.phantom_marker import digest_tables
from kitlib.xrays.cache import usable_cores
from kitlib.xrays.worker import LightContext

LEAST_SIDE = 32  # pixels; in smaller images nothing is recognisable
DRAWING = ("kitlib.phantoms.drawing", "kitlib.phantoms.patients", "kitlib.phantoms.plan")

Item = TypeVar("Item")
Written = TypeVar("Written")


@dataclass(frozen=True)
class PhantomFolder:
    """A folder of phantoms (synthetic X-rays), and a marker: a JSON file that records how the phantoms were made.

    `folder` contains only files of the data set's layout; `marker` is outside of it. `tables` are the names of files in
    `folder`. The marker records one digest of these files, which distinguishes phantoms from a real data set.
    """

    folder: Path
    marker: Path
    tables: tuple[str, ...]

    def is_made_with(self, parameters: dict[str, Any]) -> bool:
        """Return whether the folder exists and was made with `parameters`.

        Raises FileExistsError if the folder contains anything but phantoms.
        """
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        recorded = json.loads(self.marker.read_text(encoding="utf-8")) if self.marker.is_file() else {}
        # The digest detects a real data set that was unpacked where phantoms had been.
        if recorded.get("tables") != digest_tables(self.folder, self.tables):
            raise FileExistsError(
                f"{self.folder} contains files that are not phantoms; choose another folder or move this one"
            )
        return (parameters | self._identity()).items() <= recorded.items()

    @contextmanager
    def replacing(self, parameters: dict[str, Any]) -> Iterator[Path]:
        """Yield an empty temporary folder to fill; it replaces `folder` if the `with` block ends without an error.

        The marker is then written, with `parameters` and the digest of the tables.
        """
        partial, replaced = (self.folder.with_name(f".{self.folder.name}.{suffix}") for suffix in ("partial", "replaced"))
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        # If the process is killed between two of these steps, the next call finds phantoms that fit the marker, or none.
        if self.folder.exists():
            self.folder.rename(replaced)
        write_json(self.marker, parameters | self._identity() | {"tables": digest_tables(partial, self.tables)})
        partial.rename(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _identity(self) -> dict[str, Any]:
        # Without these, kitlib.phantom_marker.holds_phantoms could not relate the marker to the folder.
        return {"folder": self.folder.name, "table_names": list(self.tables)}


def write_phantoms(
    folder: Path,
    tables: tuple[str, ...],
    parameters: dict[str, Any],
    plan: Callable[[], list[Item]],
    write: Callable[[Path, Item], Written],
    finish: Callable[[Path, list[Item], list[Written]], None] | None = None,
    *,
    least: tuple[int, int],
    code: tuple[str, ...],
    marker: str = "",
    other_files: Sequence[Path] = (),
    unit: str = "image",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write phantoms to `folder`, unless it already has phantoms made with the same parameters and code; return `folder`.

    `plan` returns the items to write. `write` gets a temporary folder and an item, and writes the item, possibly in another
    process. `finish` then gets the temporary folder, all items, and what `write` returned for them. `parameters` contains
    `side` in pixels and, for most sets, `images`, the number of images. `least` has the smallest valid values of (`images`,
    `side`).

    The same parameters and code (the modules in `code` and the drawing modules) give the same bytes, for any number of
    `workers` (default: one per core, fewer for a small set). `tables` are the names of files by whose content phantoms are
    recognised (see PhantomFolder); `marker` is the name of the marker file next to the folder, by default `.NAME.json`. The
    folder appears only when it is complete; after an interruption, call again. If one of `other_files` is missing, all
    phantoms are written again. `unit` is what the progress bar calls an item. Raises ValueError if `parameters` are below
    `least`, and FileExistsError if the folder contains anything but phantoms.
    """
    images, side = parameters.get("images", 0), parameters["side"]
    if images < least[0] or side < least[1]:
        raise ValueError(f"expected images >= {least[0]} and side >= {least[1]}, got images = {images} and side = {side}")
    parameters = parameters | {"generator": hash_code(*code)}
    target = PhantomFolder(folder, folder.with_name(marker or f".{folder.name}.json"), tables)
    if target.is_made_with(parameters) and all(path.is_file() for path in other_files):
        logging.getLogger(__name__).info("%s already exists and was made with these parameters", folder)
        return folder
    planned = plan()
    with target.replacing(parameters) as root:
        results = map_in_order(partial(write, root), planned, workers or choose_workers(len(planned)), side)
        written = list(tqdm(results, total=len(planned), desc="phantoms", unit=unit, disable=not progress))
        if finish:
            finish(root, planned, written)
    return folder


def hash_code(*code: str) -> str:
    """Return a hash, 16 hexadecimal digits, of the source code of the modules named in `code` and of the drawing modules.

    Phantoms that were made with another version of this code are drawn again.
    """
    files = [Path(inspect.getfile(importlib.import_module(name))) for name in (*DRAWING, *code)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def choose_workers(images: int) -> int:
    """Return how many processes to use for this number of images: one for each hundred, but at most one per core.

    Starting a process takes as long as drawing many images.
    """
    return min(usable_cores(), 1 + images // 100)


def map_in_order(write: Callable[[Item], Written], items: Sequence[Item], workers: int, side: int) -> Iterator[Written]:
    """Yield the result of `write` for each item, in the order of `items`, computed in `workers` processes.

    If `workers` is at most 1, this process computes them. Otherwise `write` and the items are pickled. `side`, the images'
    longer side in pixels, sets how many items a process gets at once.
    """
    if workers <= 1:
        yield from map(write, items)
        return
    with ProcessPoolExecutor(workers, mp_context=LightContext(), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(write, items, chunksize=max(1, min(8, 2000 // side)))
