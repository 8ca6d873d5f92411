"""Decodes every X-ray once, in parallel; stores its pixels (8 bits, reduced) on disk, together with the original size."""

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from kitlib.atomic import replacing
from kitlib.errors import CacheError
from kitlib.paths import scratch_root
from kitlib.xrays.entry import parse_entry, read_entry, write_entry
from kitlib.xrays.modality import NOT_AN_XRAY
from kitlib.xrays.packed import PackedEntries
from kitlib.xrays.worker import LightContext, Outcome, decode_into, source_of, start_worker

# A worker process is replaced after this many files, so that a decoder's memory leaks stay small.
FILES_PER_WORKER = 500
STALE_SECONDS = 3600


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use; a shared machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_pool(workers: int) -> ProcessPool:
    """Return a pool of worker processes for `XrayCache.decode`.

    Starting a pool takes a second or two, so a caller that occasionally decodes single files should reuse its pool.
    """
    return ProcessPool(workers, max_tasks=FILES_PER_WORKER, initializer=start_worker, context=LightContext())


# Version of the decoder, part of the cache folder's name. Raise it whenever the same file may decode to other pixels, or an
# entry gets another format, so that older entries are not used. tests/xrays/test_cache.py holds the pixels of this version.
DECODING = 4


@dataclass(frozen=True)
class CachedXray:
    """One decoded X-ray, reduced to the cache's `longest_side`, and the size of the original image."""

    image_id: str
    pixels: np.ndarray  # uint8 (height, width), longest side at most the cache's `longest_side`, aspect ratio preserved
    rows: int  # size of the original image
    columns: int


class DecodedXrays(Protocol):
    """Interface of a store of decoded X-rays, read by image id. X-rays have at most `longest_side` pixels a side."""

    longest_side: int

    def read(self, image_id: str) -> CachedXray:
        """Return the reduced pixels and the original size of one image."""


class XrayCache:
    """Cache of decoded X-rays, 8 bits and at most `longest_side` pixels a side, in a subfolder of `folder`.

    Each image is one safetensors file (an entry), written atomically. `pack` moves all entries into one tar archive. A new
    XrayCache reads the archive, and writes further entries to a scratch folder. The name of the subfolder contains
    `longest_side` and the decoder's version, so entries with another `longest_side` or decoder are never used.

    `decode` reuses an entry if its checksum is right and the image file's size, modification time and sampled bytes (see
    `source_of`) are unchanged; the file may have moved. `read` verifies the checksum of an entry only the first time.
    Files that are not projection X-rays, such as CT, have a failed Outcome if `only_projections`, otherwise an Outcome with
    a warning (see kitlib.xrays.modality). Raises ValueError if `longest_side` is below 1, CacheError if an archive
    cannot be read.
    """

    def __init__(self, folder: str | Path, longest_side: int = 1024, only_projections: bool = False):
        if longest_side < 1:
            raise ValueError(f"longest_side is {longest_side}; expected at least 1 pixel")
        self.longest_side, self.only_projections = longest_side, only_projections
        self.folder = Path(folder) / f"{longest_side}px_v{DECODING}"
        self.packed = self.folder.with_suffix(".tar")
        self._verified: set[str] = set()  # image_ids whose checksum was right
        self._archive: PackedEntries | None = None
        if self.packed.is_file() and not self.folder.is_dir():
            self._archive, self.folder = PackedEntries(self.packed), _scratch_folder(self.packed)

    def decode(
        self,
        images: pd.DataFrame,
        workers: int | None = None,
        timeout_s: float | Callable[[], float] = 20.0,
        pool: ProcessPool | None = None,
    ) -> Generator[Outcome, None, None]:
        """Decode `images` (columns image_id and path) into the cache; yield one Outcome per image, in order of completion.

        `workers` processes (default: one per usable core) decode only a few files ahead of the caller. An image has a failed
        Outcome, without harm to other images, if the file is unreadable, crashes the process, needs gigabytes of memory or
        takes longer than `timeout_s` seconds (a number, or a function called for each file), or if the image_id cannot be a
        file name. When the iteration stops, the processes stop too, but a `pool` (from `decoding_pool`) keeps its processes
        for the next call. Raises CacheError if the cache cannot be written; RuntimeError if the pool is stopped; ValueError
        for missing columns or an image_id that occurs twice.
        """
        ids, paths = self._check_images(images)
        self._remove_abandoned()
        workers = workers or usable_cores()
        is_shared, pool = pool is not None, pool or decoding_pool(workers)
        running: dict[Future, tuple[str, float]] = {}
        try:
            for image_id, path in zip(ids, paths, strict=True):
                try:
                    outcome = self._cached_outcome(image_id, path)
                except CacheError as error:
                    outcome = Outcome(image_id, "failed", str(error))
                if outcome:
                    yield self._checked(outcome)
                    continue
                task = (self._entry_path(image_id), image_id, path, self.longest_side)
                limit_s = timeout_s() if callable(timeout_s) else timeout_s
                running[pool.schedule(decode_into, args=task, timeout=limit_s)] = (image_id, limit_s)
                if len(running) >= 2 * workers:
                    yield from self._collect_finished(running, pool)
            while running:
                yield from self._collect_finished(running, pool)
        finally:
            if not is_shared:
                pool.stop()
                pool.join()

    def fill(self, images: pd.DataFrame, workers: int | None = None, timeout_s: float = 20.0) -> pd.DataFrame:
        """Decode all of `images` (columns image_id and path) with a progress bar.

        Returns a table with one row per image, in the order of `images`, and the fields of Outcome as columns. Raises the
        same errors as `decode`.
        """
        outcomes = tqdm(self.decode(images, workers, timeout_s), total=len(images), desc="decoding", unit="image")
        rows = [asdict(outcome) for outcome in outcomes]
        table = pd.DataFrame(rows, columns=list(Outcome.__dataclass_fields__))
        return table.set_index("image_id").reindex(images["image_id"].astype(str)).reset_index()

    def read(self, image_id: str) -> CachedXray:
        """Return the reduced pixels and the original size of one image.

        Raises KeyError if the image was not decoded, CacheError if its entry is damaged.
        """
        if image_id not in self:
            other_versions = ", ".join(sorted(path.name for path in self.folder.parent.glob("*px_*") if path != self.folder))
            hint = (
                f"; images of another size or decoder version are in {other_versions}: prepare the run again"
                if other_versions
                else ""
            )
            raise KeyError(
                f"no image {image_id!r} in {self.folder}; decode it first. If decoding failed, its Outcome says why{hint}"
            )
        pixels, facts = self._read_entry(self._entry_path(image_id), verify=image_id not in self._verified)
        self._verified.add(image_id)
        return CachedXray(image_id, pixels, int(facts["rows"]), int(facts["columns"]))

    def put(self, xray: CachedXray) -> None:
        """Write `xray`, for example an edited image, as an entry without a source file; an existing entry is replaced."""
        facts = {"rows": str(xray.rows), "columns": str(xray.columns), "warnings": "[]"}
        write_entry(self._entry_path(xray.image_id), xray.pixels, facts)

    def pack(self) -> Path:
        """Replace the folder of entries with one tar archive and return its path.

        Packing is for Kaggle, which handles outputs of thousands of files badly. Call it last, because only a new XrayCache
        can read the packed entries. Raises CacheError if there are no entries.
        """
        entries = {entry.name: entry for entry in self.folder.glob("[!.]*.safetensors")}
        packed = self._archive.names() if self._archive else []
        if not entries and not packed:
            raise CacheError(f"{self.folder} has no entries to pack; decode the images first")
        with replacing(self.packed) as temporary_path, tarfile.open(temporary_path, "w") as archive:
            for name in sorted({*entries, *packed}):
                if name in entries:
                    archive.add(entries[name], name)
                elif self._archive:
                    member = tarfile.TarInfo(name)
                    content = self._archive.read(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        shutil.rmtree(self.packed.with_suffix(""), ignore_errors=True)
        return self.packed

    def __contains__(self, image_id: str) -> bool:
        entry = self._entry_path(image_id)
        return entry.is_file() or (self._archive is not None and entry.name in self._archive)

    def facts(self, image_id: str) -> dict[str, str]:
        """Return the metadata of an image's entry, a dict of strings with keys such as "rows", "columns" and "warnings".

        Raises OSError if the entry is missing, CacheError if it is damaged.
        """
        return self._read_entry(self._entry_path(image_id), verify=False)[1]

    def _read_entry(self, entry: Path, verify: bool = True) -> tuple[np.ndarray, dict[str, str]]:
        if self._archive and entry.name in self._archive and not entry.is_file():
            return parse_entry(self._archive.read(entry.name), self.packed / entry.name, verify)
        return read_entry(entry, verify)

    def _entry_path(self, image_id: str) -> Path:
        if not image_id or image_id.startswith(".") or "/" in image_id or "\0" in image_id or len(image_id) > 200:
            raise CacheError(
                f"image_id {image_id!r} cannot be a file name; use at most 200 characters, no '/' and no leading '.'"
            )
        return self.folder / f"{image_id}.safetensors"

    def _cached_outcome(self, image_id: str, path: str) -> Outcome | None:
        """Return an Outcome with status "cached" if the image has a valid entry and the file `path` is unchanged; else None.

        Unchanged means that `source_of` returns the same as when the entry was written.
        """
        entry = self._entry_path(image_id)
        try:
            _, facts = self._read_entry(entry)
            if not source_of(path).items() <= facts.items():
                return None
        except (OSError, CacheError):  # entry missing or damaged, or source file missing: the worker reports it
            return None
        return Outcome(
            image_id, "cached", "", tuple(json.loads(facts["warnings"])), int(facts["rows"]), int(facts["columns"])
        )

    def _collect_finished(self, running: dict[Future, tuple[str, float]], pool: ProcessPool) -> Iterator[Outcome]:
        """Wait until at least one task has finished, remove all finished tasks from `running` and yield their outcomes.

        `running` maps each task to the image id and the time limit in seconds. Raises CacheError if an entry cannot be
        written; RuntimeError if `pool` is stopped.
        """
        while not (finished := wait(running, timeout=1, return_when=FIRST_COMPLETED).done):
            if not pool.active:
                raise RuntimeError("the decoding processes were stopped")
        for future in finished:
            image_id, timeout_s = running.pop(future)
            try:
                yield self._checked(future.result())
            except TimeoutError:  # a subclass of OSError, so it must come first
                yield Outcome(image_id, "failed", f"not decoded in {timeout_s:g} s", seconds=timeout_s)
            except ProcessExpired as error:
                yield Outcome(image_id, "failed", f"the decoder crashed its process (exit code {error.exitcode})")
            except MemoryError:
                yield Outcome(image_id, "failed", "out of memory")
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "free some space or choose another folder" if full else "choose a writable folder"
                raise CacheError(f"{image_id} cannot be written to {self.folder}: {error}; {advice}") from error

    def _checked(self, outcome: Outcome) -> Outcome:
        """Return `outcome`, or a failed Outcome if `only_projections` is set and the image is not a projection X-ray."""
        other = next((warning for warning in outcome.warnings if warning.startswith(NOT_AN_XRAY)), "")
        refused = Outcome(outcome.image_id, "failed", other, seconds=outcome.seconds)
        return refused if self.only_projections and other else outcome

    def _check_images(self, images: pd.DataFrame) -> tuple[list[str], list[str]]:
        """Return the image ids and the paths in `images`. Raises ValueError if a column is missing or an id occurs twice."""
        missing = {"image_id", "path"} - set(images.columns)
        if missing:
            raise ValueError(
                f"the table lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(map(str, images.columns))}"
            )
        ids = images["image_id"].astype(str)
        if ids.duplicated().any():
            raise ValueError(f"image_id {ids[ids.duplicated()].iloc[0]!r} occurs twice; two files cannot share one entry")
        return ids.tolist(), images["path"].astype(str).tolist()

    def _remove_abandoned(self) -> None:
        """Delete temporary files that killed workers left in the cache folder.

        Files younger than STALE_SECONDS are kept, because another run may be writing them.
        """
        for temporary_path in self.folder.glob(".*.safetensors"):
            try:
                if time.time() - temporary_path.stat().st_mtime > STALE_SECONDS:
                    temporary_path.unlink()
            except FileNotFoundError:  # another run has deleted it already
                continue


def _scratch_folder(packed: Path) -> Path:
    """Return the folder for images decoded after the archive `packed` was written; each archive has its own folder."""
    status = packed.stat()
    digest = hashlib.sha256(f"{packed.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    return scratch_root() / "xrays" / digest
