"""A folder of phantoms: whole or not there at all, left alone where it fits, never in the place of anything else."""

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
from tqdm.auto import tqdm

from kitlib.atomic import write_json
from kitlib.xrays.cache import usable_cores
from kitlib.xrays.worker import LightContext

LEAST_SIDE = 32  # pixels; a smaller chest shows nothing
DRAWING = ("kitlib.phantoms.drawing", "kitlib.phantoms.patients", "kitlib.phantoms.plan")

Item = TypeVar("Item")
Written = TypeVar("Written")


@dataclass(frozen=True)
class PhantomFolder:
    """`marker` lies beside `folder`, which has the data set's own files and no other; it says what they were made from.

    `tables` are the names of the folder's tables, by whose bytes phantoms are told from a real data set.
    """

    folder: Path
    marker: Path
    tables: tuple[str, ...]

    def made_with(self, parameters: dict[str, Any]) -> bool:
        """Whether the folder is there and fits `parameters`. Raises FileExistsError where it holds something else."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        made = json.loads(self.marker.read_text(encoding="utf-8")) if self.marker.is_file() else {}
        # The tables tell ours from a real data set that was unpacked where phantoms were once.
        if made.get("tables") != self._digest(self.folder):
            raise FileExistsError(f"{self.folder} holds something else than phantoms; choose another folder or move it away")
        return parameters.items() <= made.items()

    @contextmanager
    def replacing(self, parameters: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder beside, to be filled; when the block ends without an error it takes the place of `folder`."""
        partial, replaced = (self.folder.with_name(f".{self.folder.name}.{suffix}") for suffix in ("partial", "replaced"))
        for left_behind in (partial, replaced):
            shutil.rmtree(left_behind, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        # Killed between any two of these, the next call finds either phantoms that fit their marker or none.
        if self.folder.exists():
            self.folder.rename(replaced)
        write_json(self.marker, parameters | {"tables": self._digest(partial)})
        partial.rename(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _digest(self, folder: Path) -> str:
        tables = [folder / name for name in self.tables]
        return hashlib.sha256(b"".join(table.read_bytes() for table in tables if table.is_file())).hexdigest()[:16]


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
    elsewhere: Sequence[Path] = (),
    unit: str = "image",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `folder`, a set of phantoms with `tables` (see PhantomFolder), unless it is there and fits; return it.

    It is made from `parameters`, the numbers `images` and `side` (pixels) among them, by the modules `code` and those that
    draw: the same ones give the same bytes, whatever `workers` (default: the machine's cores, fewer for a small set). Every
    item of the `plan` is handed to `write`, maybe in another process, and what that returns to `finish`, both with the
    folder to write into. It appears when it is whole: after an interruption, call again. If it is there and made in this
    way, which the file `marker` beside it says (`.NAME.json` unless told), and so are the files `elsewhere`, nothing is
    done; made otherwise, it is replaced. Raises FileExistsError where it holds something else, ValueError for fewer images
    or less of a side than `least`.
    """
    images, side = parameters.get("images", 0), parameters["side"]
    if images < least[0] or side < least[1]:
        raise ValueError(f"wanted at least {least[0]} images of {least[1]} pixels, got {images} of {side}")
    parameters = parameters | {"generator": fingerprint(*code)}
    target = PhantomFolder(folder, folder.with_name(marker or f".{folder.name}.json"), tables)
    if target.made_with(parameters) and all(path.is_file() for path in elsewhere):
        logging.getLogger(__name__).info("%s is there already, made with these parameters", folder)
        return folder
    planned = plan()
    with target.replacing(parameters) as root:
        drawn = each_in_order(partial(write, root), planned, workers or default_workers(len(planned)), side)
        written = list(tqdm(drawn, total=len(planned), desc="phantoms", unit=unit, disable=not progress))
        if finish:
            finish(root, planned, written)
    return folder


def fingerprint(*code: str) -> str:
    """16 hexadecimal digits of the code of these modules and of those that draw: an older kit's phantoms are drawn anew."""
    files = [Path(inspect.getfile(importlib.import_module(name))) for name in (*DRAWING, *code)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def default_workers(images: int) -> int:
    """One process for every hundred images, since starting one takes as long as drawing many; at most one a core."""
    return min(usable_cores(), 1 + images // 100)


def each_in_order(write: Callable[[Item], Written], items: Sequence[Item], workers: int, side: int) -> Iterator[Written]:
    """What `write` returns for each item, in the items' order, so that results do not depend on `workers`.

    `write` and the items cross to other processes; `side`, pixels of an image, sets how many go at once.
    """
    if workers <= 1:
        yield from map(write, items)
        return
    with ProcessPoolExecutor(workers, mp_context=LightContext(), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(write, items, chunksize=max(1, min(8, 2000 // side)))
