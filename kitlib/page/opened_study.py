"""A study that is open on the page: its images, their decoded copies, and what is known about them."""

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

TIMEOUT_S = 20.0  # for one file, as in a submission
MAX_COPIES = 500  # for each size; the oldest are deleted and decoded again on request


class DecodedCopies:
    """Decodes files into `folder`, once for each size, in long-running processes; may be shared between threads.

    A malicious file that hangs, crashes or fills the memory only fails itself; while it hangs, the other processes continue.
    `close` ends the processes.
    """

    def __init__(self, folder: str | Path, workers: int = 2) -> None:
        self.folder = Path(folder)
        self._pool, self._workers = decoding_pool(workers), workers
        for _ in range(workers):
            self._pool.schedule(os.getpid)  # starts the processes, so that the first file does not wait
        self._tidying = threading.Lock()

    def read(self, key: str, path: str | Path, longest_side: int) -> CachedXray:
        """Return the decoded copy of `path` with at most `longest_side` pixels a side. Raises UnreadableXray."""
        cache = XrayCache(self.folder, longest_side)
        if key not in cache and (outcome := self.decode(key, path, longest_side)).status == "failed":
            raise UnreadableXray(path, outcome.reason)
        return cache.read(key)

    def decode(self, key: str, path: str | Path, longest_side: int) -> Outcome:
        """Decode `path` into a copy named `key`; return the outcome. Raises CacheError, for example if the disk is full."""
        images = pd.DataFrame({"image_id": [key], "path": [str(path)]})
        cache = XrayCache(self.folder, longest_side)
        outcome = next(cache.decode(images, self._workers, TIMEOUT_S, self._pool))
        with self._tidying:
            copies = sorted(cache.folder.glob("[!.]*.safetensors"), key=lambda copy: copy.stat().st_mtime)
            for copy in copies[:-MAX_COPIES]:
                copy.unlink()
        return outcome

    def run(self, question: Callable[[str], T], path: str | Path) -> T:
        """Call `question`, a module-level function, with `path` in one of the processes. Raises UnreadableXray."""
        try:
            return self._pool.schedule(question, args=(str(path),), timeout=TIMEOUT_S).result()
        except TimeoutError:
            raise UnreadableXray(path, f"not read in {TIMEOUT_S:g} s") from None
        except ProcessExpired as error:
            raise UnreadableXray(path, f"reading it crashed its process (exit code {error.exitcode})") from None
        except MemoryError:
            raise UnreadableXray(path, "out of memory") from None

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()
        self._pool.join()


@dataclass(frozen=True)
class OpenedImage:
    """One image of an open study.

    `rows` and `columns` are its original size; `truth` (xmin, ymin, xmax, ymax) is in these pixels.
    """

    image_id: str  # its name in the rows of a submission
    key: str  # name of its decoded copy, equal only for equal files
    path: Path  # the original file, which may be missing if a run has the decoded copy
    rows: int
    columns: int
    is_dicom: bool = False
    facts: dict[str, str] = field(default_factory=dict)  # header values to display, nothing about the patient
    remarks: tuple[str, ...] = ()  # sentences about problems and how they were handled
    truth: pd.DataFrame | None = None  # annotated boxes; None if unknown


@dataclass(frozen=True)
class OpenedStudy:
    """Images that are predicted together.

    Decoded copies come from `run_cache`, the cache of a run, if it has them, and otherwise from `copies`.
    """

    study_id: str
    images: tuple[OpenedImage, ...]
    copies: DecodedCopies
    run_cache: XrayCache | None = None
    trained_on: str = ""  # data fingerprint of the prepared run that contains the study; "" if none does
    fold: int | None = None  # its fold in that run: only the models of this fold were not trained on it
    true_class: str = ""  # one of STUDY_CLASSES; "" if unknown
    remarks: tuple[str, ...] = ()  # sentences about the whole study

    def read(self, image: OpenedImage, longest_side: int) -> CachedXray:
        """Return the decoded copy of an image. Raises UnreadableXray if there is no copy and the file cannot be decoded."""
        if self.run_cache is not None and self.run_cache.longest_side == longest_side and image.key in self.run_cache:
            return self.run_cache.read(image.key)
        return self.copies.read(image.key, image.path, longest_side)

    def table(self) -> pd.DataFrame:
        """Return the study's rows of the table images, with `key` as image_id."""
        rows = [(image.key, self.study_id, image.rows, image.columns) for image in self.images]
        return pd.DataFrame(rows, columns=["image_id", "study_id", "rows", "columns"])
