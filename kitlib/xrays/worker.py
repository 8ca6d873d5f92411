"""The task of the cache's worker processes: decode one image file into one cache entry.

The module imports little, so that a worker starts fast.
"""

import hashlib
import json
import logging
import multiprocessing.context
import os
import resource
import stat
import sys
import threading
import time
import types
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kitlib.errors import UnreadableXray
from kitlib.letterbox import letterbox
from kitlib.xrays.entry import write_entry
from kitlib.xrays.image_file import decode_file
from kitlib.xrays.json_header import MAX_JSON_BYTES, json_header_path

# Memory limit of a worker: enough to decode the largest X-ray, and low enough that a damaged file fails early.
WORKER_DATA_BYTES = 3 * 2**30
SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class Outcome:
    """Result of decoding one image. `rows` and `columns` are the image's original size, 0 if decoding failed."""

    image_id: str
    status: str  # "decoded", "cached" (decoded earlier) or "failed"
    reason: str = ""  # why decoding failed
    warnings: tuple[str, ...] = ()  # about invalid header elements
    rows: int = 0
    columns: int = 0
    seconds: float = 0.0


def decode_into(entry: Path, image_id: str, path: str, longest_side: int) -> Outcome:
    """Decode the file `path`, reduce the image to at most `longest_side` pixels a side and write it atomically to `entry`.

    Returns a failed Outcome if the file cannot be read. Raises OSError if the entry cannot be written, as on a full disk.
    """
    start = time.perf_counter()
    try:
        source = source_of(path)
        xray = decode_file(path)
    except (UnreadableXray, OSError, MemoryError) as error:
        reason = "out of memory" if isinstance(error, MemoryError) else getattr(error, "reason", str(error))
        return Outcome(image_id, "failed", reason, seconds=time.perf_counter() - start)
    rows, columns = xray.pixels.shape
    metadata = {**source, "rows": str(rows), "columns": str(columns), "warnings": json.dumps(xray.warnings)}
    write_entry(entry, shrink(xray.pixels, longest_side), metadata)
    return Outcome(image_id, "decoded", "", xray.warnings, rows, columns, time.perf_counter() - start)


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """Return an image, uint8 (rows, columns), reduced by area averaging to at most `longest_side` pixels a side.

    Smaller images are returned unchanged.
    """
    rows, columns = pixels.shape
    if max(rows, columns) <= longest_side:
        return pixels
    placement = letterbox(rows, columns, longest_side)
    return cv2.resize(pixels, (placement.inner_columns, placement.inner_rows), interpolation=cv2.INTER_AREA)


def source_of(path: str) -> dict[str, str]:
    """Return a dict that identifies a file's content: size, modification time, and a digest of three samples of 64 KiB.

    The keys are source_bytes, source_mtime_ns and source_samples, as in the metadata of a cache entry. The samples are the
    beginning, the middle and the end of the file, so they contain the ids in the header, and pixels. Size and time alone do
    not suffice, because they can be the same for images unpacked from one archive. Hashing the whole file would take as long
    as decoding it. If a PNG has its DICOM header in a JSON file, the digest includes the JSON file. Raises OSError if the
    file cannot be read or is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        end = max(0, status.st_size - SAMPLE_BYTES)
        for start in (0, end // 2, end):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    if header := json_header_path(path):
        digest.update(header.read_bytes()[:MAX_JSON_BYTES])
    facts = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "samples": digest.hexdigest()}
    return {f"source_{name}": str(value) for name, value in facts.items()}


def start_worker() -> None:
    """Initialise a worker process: limit its memory and silence warnings.

    With the limit, a file that needs too much memory fails without affecting other files.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (WORKER_DATA_BYTES, WORKER_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


_STARTING = threading.Lock()  # several threads may start processes


class _LightProcess(multiprocessing.context.SpawnProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        # A spawned process imports its parent's main module again. For a training script, this would import all of torch;
        # for a script without `if __name__ == "__main__"`, it would repeat the whole run. Workers do not need that module.
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return multiprocessing.context.SpawnProcess._Popen(process)
            finally:
                sys.modules["__main__"] = main


class LightContext(multiprocessing.context.SpawnContext):
    """Multiprocessing context whose new processes import only what their task needs; safe with threads and CUDA."""

    Process = _LightProcess
