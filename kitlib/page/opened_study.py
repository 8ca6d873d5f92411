"""A study that is open on the page: its images, their decoded copies, and what is known about the images."""

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
MAX_COPIES = 500  # of each size; older copies are deleted, and decoded again when needed


class DecodedCopies:
    """Decodes image files in worker processes and keeps the decoded copies in `folder`; may be shared between threads.

    A decoded copy is the X-ray, decoded to 8 bits and reduced in size. If a malicious file hangs, crashes a worker process
    or fills the memory, only that file fails and the other processes continue. `close` terminates the processes.
    """

    def __init__(self, folder: str | Path, workers: int = 2) -> None:
        self.folder = Path(folder)
        self._pool, self._workers = decoding_pool(workers), workers
        for _ in range(workers):
            self._pool.schedule(os.getpid)  # starts the processes, so that the first file does not have to wait for them
        self._tidying = threading.Lock()

    def read(self, key: str, path: str | Path, longest_side: int) -> CachedXray:
        """Return the decoded copy `key` with at most `longest_side` pixels a side. If it is missing, decode the file `path`.

        Raises UnreadableXray if the file cannot be decoded.
        """
        cache = XrayCache(self.folder, longest_side)
        if key not in cache and (outcome := self.decode(key, path, longest_side)).status == "failed":
            raise UnreadableXray(path, outcome.reason)
        return cache.read(key)

    def decode(self, key: str, path: str | Path, longest_side: int) -> Outcome:
        """Decode the file `path` into a copy called `key` with at most `longest_side` pixels a side; return the outcome.

        Raises CacheError if the copy cannot be written, for example because the disk is full.
        """
        images = pd.DataFrame({"image_id": [key], "path": [str(path)]})
        cache = XrayCache(self.folder, longest_side)
        outcome = next(cache.decode(images, self._workers, TIMEOUT_S, self._pool))
        with self._tidying:
            copies = sorted(cache.folder.glob("[!.]*.safetensors"), key=lambda copy: copy.stat().st_mtime)
            for copy in copies[:-MAX_COPIES]:
                copy.unlink()
        return outcome

    def run(self, question: Callable[[str], T], path: str | Path) -> T:
        """Return the result of `question(path)`, called in a worker process, in case a malicious file crashes it.

        `question` must be a module-level function. Raises UnreadableXray if the process takes too long, crashes or runs out
        of memory. Errors that `question` raises are passed on.
        """
        try:
            return self._pool.schedule(question, args=(str(path),), timeout=TIMEOUT_S).result()
        except TimeoutError:
            raise UnreadableXray(path, f"not read in {TIMEOUT_S:g} s") from None
        except ProcessExpired as error:
            raise UnreadableXray(path, f"the process that read it crashed (exit code {error.exitcode})") from None
        except MemoryError:
            raise UnreadableXray(path, "out of memory") from None

    def close(self) -> None:
        """Terminate the decoding processes."""
        self._pool.stop()
        self._pool.join()


@dataclass(frozen=True)
class OpenedImage:
    """One image of an open study.

    `rows` and `columns` are the size of the original image; `truth` has the annotated boxes (finding, xmin, ymin, xmax,
    ymax) in pixels of the original image.
    """

    image_id: str  # name of the image in a submission
    key: str  # name of the decoded copy; different files have different keys
    path: Path  # the original file, which may be missing if a run has the decoded copy
    rows: int
    columns: int
    is_dicom: bool = False
    facts: dict[str, str] = field(default_factory=dict)  # header values to display, nothing about the patient
    remarks: tuple[str, ...] = ()  # sentences about problems and how they were handled
    truth: pd.DataFrame | None = None  # annotated boxes; None if unknown


@dataclass(frozen=True)
class OpenedStudy:
    """Images of one study, which are predicted together.

    A decoded copy is read from `run_cache`, the cache of a prepared run (notebook 10), if it has the copy, otherwise from
    `copies`.
    """

    study_id: str
    images: tuple[OpenedImage, ...]
    copies: DecodedCopies
    run_cache: XrayCache | None = None
    trained_on: str = ""  # data fingerprint of the prepared run that contains the study; "" if none does
    fold: int | None = None  # the study's fold in that run; only the models of this fold were not trained on the study
    true_classes: tuple[str, ...] = ()  # annotated classes; () if unknown or none
    findings: tuple[str, ...] = ()  # of all annotated boxes in that run
    remarks: tuple[str, ...] = ()  # sentences about the whole study

    def read(self, image: OpenedImage, longest_side: int) -> CachedXray:
        """Return the decoded copy of an image with at most `longest_side` pixels a side.

        Raises UnreadableXray if there is no copy and the file cannot be decoded.
        """
        if self.run_cache is not None and self.run_cache.longest_side == longest_side and image.key in self.run_cache:
            return self.run_cache.read(image.key)
        return self.copies.read(image.key, image.path, longest_side)

    def table(self) -> pd.DataFrame:
        """Return a table of the study's images: `image_id` (the image's `key`), `study_id`, `rows` and `columns`."""
        rows = [(image.key, self.study_id, image.rows, image.columns) for image in self.images]
        return pd.DataFrame(rows, columns=["image_id", "study_id", "rows", "columns"])
