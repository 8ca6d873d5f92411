"""A study that somebody looks at: its images, where their decoded copies come from, and what is known of it."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
from pebble import ProcessExpired

from kitlib.errors import UnreadableXray
from kitlib.xrays.cache import CachedXray, XrayCache, decoding_pool
from kitlib.xrays.worker import Outcome

T = TypeVar("T")

TIMEOUT_S = 20.0  # for one file; a submission's own limit
MOST_COPIES = 500  # at each size; the oldest go, and are made again where they are asked for


class DecodedCopies:
    """Decoded copies in `folder`, each made once at every size asked for, by processes that stay warm; threads may share it.

    The processes bear what a hostile file does: one that hangs, crashes or wants gigabytes fails alone, and while it hangs
    the other `workers` go on. `close` ends them.
    """

    def __init__(self, folder: str | Path, workers: int = 2) -> None:
        self.folder = Path(folder)
        self._pool, self._workers = decoding_pool(workers), workers
        for _ in range(workers):
            self._pool.schedule(os.getpid)  # so that the first file does not wait for a process to start
        self._tidying = threading.Lock()

    def read(self, key: str, path: str | Path, longest_side: int) -> CachedXray:
        """The copy of `path` with at most `longest_side` pixels a side. Raises UnreadableXray."""
        cache = XrayCache(self.folder, longest_side)
        if key not in cache and (outcome := self.decode(key, path, longest_side)).status == "failed":
            raise UnreadableXray(path, outcome.reason)
        return cache.read(key)

    def decode(self, key: str, path: str | Path, longest_side: int) -> Outcome:
        """What became of `path`; its copy goes by the name `key`. Raises CacheError for a full disk."""
        images = pd.DataFrame({"image_id": [key], "path": [str(path)]})
        cache = XrayCache(self.folder, longest_side)
        outcome = next(cache.decode(images, self._workers, TIMEOUT_S, self._pool))
        with self._tidying:
            copies = sorted(cache.folder.glob("[!.]*.safetensors"), key=lambda copy: copy.stat().st_mtime)
            for copy in copies[:-MOST_COPIES]:
                copy.unlink()
        return outcome

    def ask(self, question: Callable[[str], T], path: str | Path) -> T:
        """What `question`, a function of a module, says of `path` in one of the processes. Raises UnreadableXray."""
        try:
            return self._pool.schedule(question, args=(str(path),), timeout=TIMEOUT_S).result()
        except TimeoutError:
            raise UnreadableXray(path, f"not read in {TIMEOUT_S:g} s") from None
        except ProcessExpired as error:
            raise UnreadableXray(path, f"reading it crashed its process (exit code {error.exitcode})") from None
        except MemoryError:
            raise UnreadableXray(path, "out of memory") from None

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()


@dataclass(frozen=True)
class OpenedImage:
    """One image. `rows` and `columns` are its original size, in whose pixels `truth` (xmin, ymin, xmax, ymax) is."""

    image_id: str  # as a submission's row names it
    key: str  # the name of its decoded copy: the same for the same file, another for another
    path: Path  # the file itself, which may be gone where a run keeps the decoded copy
    rows: int
    columns: int
    is_dicom: bool = False
    facts: dict[str, str] = field(default_factory=dict)  # what its header says of the image, nothing of the patient
    remarks: tuple[str, ...] = ()  # sentences: what was odd and what was done about it
    truth: pd.DataFrame | None = None  # annotated boxes; None: not known


@dataclass(frozen=True)
class OpenedStudy:
    """Images that are answered together. `kept` holds decoded copies of a run; without one `copies` makes them."""

    study_id: str
    images: tuple[OpenedImage, ...]
    copies: DecodedCopies
    kept: XrayCache | None = None
    trained_on: str = ""  # data fingerprint of the prepared run it is part of; "": of none
    fold: int | None = None  # of that run: only models of this fold have not learnt from it
    true_class: str = ""  # of STUDY_CLASSES; "": not known
    remarks: tuple[str, ...] = ()  # sentences on the study as a whole

    def read(self, image: OpenedImage, longest_side: int) -> CachedXray:
        """Raises UnreadableXray where the copy is not at hand and the file cannot be decoded."""
        if self.kept is not None and self.kept.longest_side == longest_side and image.key in self.kept:
            return self.kept.read(image.key)
        return self.copies.read(image.key, image.path, longest_side)

    def table(self) -> pd.DataFrame:
        """Its rows of a table images, named by `key`."""
        rows = [(image.key, self.study_id, image.rows, image.columns) for image in self.images]
        return pd.DataFrame(rows, columns=["image_id", "study_id", "rows", "columns"])
