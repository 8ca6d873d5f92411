"""The decode-once cache: every X-ray decoded in parallel, one time, and kept small beside its original size."""

import errno
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from pebble import ProcessExpired, ProcessPool
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from kitlib.atomic import replacing
from kitlib.errors import CacheError
from kitlib.paths import scratch_root
from kitlib.xrays.worker import LightContext, Outcome, decode_into, source_of, start_worker

# A worker is replaced after so many files, so that what a decoder leaks stays small.
FILES_A_WORKER = 500
STALE_SECONDS = 3600


def usable_cores() -> int:
    """The cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_pool(workers: int) -> ProcessPool:
    """Processes for `XrayCache.decode`. Starting them takes a second or two: who decodes a file now and then keeps them."""
    return ProcessPool(workers, max_tasks=FILES_A_WORKER, initializer=start_worker, context=LightContext())


# Part of an entry's place: raise it whenever the same file may become other pixels, so that entries made before are not
# seen. tests/xrays/test_cache.py holds the pixels of this version.
DECODING = 1


@dataclass(frozen=True)
class CachedXray:
    image_id: str
    pixels: np.ndarray  # uint8 (height, width), longest side at most the cache's, aspect kept
    rows: int  # original size
    columns: int


class DecodedXrays(Protocol):
    """Whatever reads decoded X-rays, at most `longest_side` pixels a side, by their ids."""

    longest_side: int

    def read(self, image_id: str) -> CachedXray: ...


class XrayCache:
    """Decoded X-rays in `folder`, at most `longest_side` pixels a side.

    An entry is one safetensors file, written whole or not at all; `pack` makes one file of all, which is read alike. Entries
    of another side or another version of the decoder lie in another sub-folder and are not seen. An entry serves for a file,
    wherever it lies, with the size, the time of change and the samples of bytes (see `source_of`) of the one it was made
    from; for any other it is made again.
    """

    def __init__(self, folder: str | Path, longest_side: int = 1024):
        if longest_side < 1:
            raise ValueError(f"longest_side is {longest_side}, wanted at least 1 pixel")
        self.longest_side = longest_side
        self.folder = Path(folder) / f"{longest_side}px_v{DECODING}"
        self.packed = self.folder.with_suffix(".tar")
        if self.packed.is_file() and not self.folder.is_dir():
            self.folder = _unpacked(self.packed)

    def decode(
        self, images: pd.DataFrame, workers: int | None = None, timeout_s: float = 20.0, pool: ProcessPool | None = None
    ) -> Generator[Outcome, None, None]:
        """Yield one Outcome an image as they get done, in any order. `images` has the columns image_id and path.

        Work goes to `workers` processes (default: the cores this process may use), only a few files ahead of what is
        consumed. A file that hangs longer than `timeout_s`, crashes its worker or asks for gigabytes fails alone. Stopping
        the iteration stops the workers, unless they are of a `pool` (see `decoding_pool`), which stays open for the next
        images. Raises CacheError where the cache cannot be written, ValueError for wrong columns.
        """
        ids, paths = self._checked(images)
        self._remove_abandoned()
        workers = workers or usable_cores()
        kept, pool = pool is not None, pool or decoding_pool(workers)
        running: dict[Future, tuple[str, float]] = {}
        try:
            for image_id, path in zip(ids, paths, strict=True):
                if known := self._fresh(image_id, path):
                    yield known
                    continue
                task = (self._entry(image_id), image_id, path, self.longest_side)
                running[pool.schedule(decode_into, args=task, timeout=timeout_s)] = (image_id, timeout_s)
                if len(running) >= 2 * workers:
                    yield from self._finished(running)
            while running:
                yield from self._finished(running)
        finally:
            if not kept:
                pool.stop()
                pool.join()

    def fill(self, images: pd.DataFrame, workers: int | None = None, timeout_s: float = 20.0) -> pd.DataFrame:
        """Decode all of `images` with a progress bar; one row an image in their order, with the columns of Outcome."""
        outcomes = tqdm(self.decode(images, workers, timeout_s), total=len(images), desc="decoding", unit="image")
        rows = [asdict(outcome) for outcome in outcomes]
        table = pd.DataFrame(rows, columns=list(Outcome.__dataclass_fields__))
        return table.set_index("image_id").reindex(images["image_id"].astype(str)).reset_index()

    def read(self, image_id: str) -> CachedXray:
        """Raises KeyError where the image was not decoded, CacheError where its entry is damaged."""
        entry = self._entry(image_id)
        if not entry.is_file():
            others = ", ".join(sorted(path.name for path in self.folder.parent.glob("*px_*") if path != self.folder))
            why = (
                f"; {others} are of another size or another version of the decoder: prepare the run again" if others else ""
            )
            raise KeyError(
                f"no image {image_id!r} in {self.folder}: decode it first; if it failed, its Outcome says why{why}"
            )
        try:
            with safe_open(entry, framework="numpy") as opened:
                told = opened.metadata()
                return CachedXray(image_id, opened.get_tensor("pixels"), int(told["rows"]), int(told["columns"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise CacheError(f"{entry} is damaged ({error}): delete it and decode again") from error

    def put(self, xray: CachedXray) -> None:
        """Write an entry that is no file's decoded copy, such as one that was changed; it replaces what is there."""
        entry = self._entry(xray.image_id)
        told = {"rows": str(xray.rows), "columns": str(xray.columns), "warnings": "[]"}
        with replacing(entry) as beside:
            beside.write_bytes(save({"pixels": np.ascontiguousarray(xray.pixels)}, metadata=told))

    def pack(self) -> Path:
        """Make one file of all entries, in place of them: Kaggle chokes on an output of thousands of files.

        It is for the end: entries are read again by a new XrayCache, which unpacks them outside of what Kaggle keeps.
        """
        if not self.folder.is_dir():
            raise CacheError(f"{self.folder} has no entries to pack; decode the images first")
        with replacing(self.packed) as beside, tarfile.open(beside, "w") as archive:
            for entry in sorted(self.folder.glob("[!.]*.safetensors")):
                archive.add(entry, entry.name)
        shutil.rmtree(self.packed.with_suffix(""), ignore_errors=True)
        return self.packed

    def __contains__(self, image_id: str) -> bool:
        return self._entry(image_id).is_file()

    def _entry(self, image_id: str) -> Path:
        if not image_id or image_id.startswith(".") or "/" in image_id or "\0" in image_id or len(image_id) > 200:
            raise CacheError(f"image_id {image_id!r} cannot name a file: wanted no '/', no leading '.', at most 200 letters")
        return self.folder / f"{image_id}.safetensors"

    def _fresh(self, image_id: str, path: str) -> Outcome | None:
        """The outcome kept with an entry of this very source file."""
        try:
            with safe_open(self._entry(image_id), framework="numpy") as opened:
                told = opened.metadata() or {}
            if not source_of(path).items() <= told.items():
                return None
        except (OSError, SafetensorError):  # no entry, a damaged one, or no source any more: the worker will tell
            return None
        return Outcome(image_id, "cached", "", tuple(json.loads(told["warnings"])), int(told["rows"]), int(told["columns"]))

    def _finished(self, running: dict[Future, tuple[str, float]]) -> Iterator[Outcome]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            image_id, timeout_s = running.pop(future)
            try:
                yield future.result()
            except TimeoutError:  # before OSError, of which it is one
                yield Outcome(image_id, "failed", f"not decoded in {timeout_s:g} s", seconds=timeout_s)
            except ProcessExpired as error:
                yield Outcome(image_id, "failed", f"the decoder crashed its process (exit code {error.exitcode})")
            except MemoryError:
                yield Outcome(image_id, "failed", "out of memory")
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "free some space or choose another folder" if full else "choose a folder that can be written"
                raise CacheError(f"{self.folder} cannot take {image_id}: {error}; {advice}") from error

    def _checked(self, images: pd.DataFrame) -> tuple[list[str], list[str]]:
        missing = {"image_id", "path"} - set(images.columns)
        if missing:
            raise ValueError(f"images lacks {', '.join(sorted(missing))}; has {', '.join(map(str, images.columns))}")
        ids = images["image_id"].astype(str)
        if ids.duplicated().any():
            raise ValueError(f"image_id {ids[ids.duplicated()].iloc[0]!r} comes twice: two files would share an entry")
        for image_id in ids:
            self._entry(image_id)
        return ids.tolist(), images["path"].astype(str).tolist()

    def _remove_abandoned(self) -> None:
        """What killed workers left beside their entries; younger files may be another run's."""
        for part in self.folder.glob(".*.safetensors"):
            try:
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()
            except FileNotFoundError:  # the other run was quicker
                continue


def _unpacked(packed: Path) -> Path:
    """A folder with a packed cache's entries, made once a machine; where the archive changes, another one."""
    told = packed.stat()
    place = hashlib.sha256(f"{packed.resolve()} {told.st_size} {told.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = scratch_root() / "xrays" / place
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(beside, filter="data")
        beside.rename(folder)
    except (tarfile.TarError, OSError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if not folder.is_dir():  # else another process was quicker
            raise CacheError(f"{packed} cannot be unpacked into {folder.parent}: {error}") from error
    return folder
