"""What a worker of the decode-once cache does: one image file to one entry. Imports little, so that it starts fast."""

import hashlib
import json
import logging
import multiprocessing.context
import os
import resource
import stat
import sys
import time
import types
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors.numpy import save

from kitlib.atomic import replacing
from kitlib.errors import UnreadableXray
from kitlib.letterbox import letterbox
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.image_file import decode_image, image_format

# Beside the largest X-ray in every decoder's hands, this is room for a damaged file to fail in and not for two.
WORKER_DATA_BYTES = 3 * 2**30
SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class Outcome:
    """What became of one image. `rows` and `columns` are the original size, 0 where it failed."""

    image_id: str
    status: str  # "decoded", "cached" (was there already) or "failed"
    reason: str = ""  # why it failed
    warnings: tuple[str, ...] = ()  # what the header said and could not be
    rows: int = 0
    columns: int = 0
    seconds: float = 0.0


def decode_into(entry: Path, image_id: str, path: str, longest_side: int) -> Outcome:
    """Decode `path`, shrink it, write `entry` whole. A file that cannot be read is an outcome; a full disk is an OSError."""
    began = time.perf_counter()
    try:
        source = source_of(path)
        xray = decode_image(path) if image_format(path) else decode_xray(path)
    except (UnreadableXray, OSError) as error:
        return Outcome(image_id, "failed", getattr(error, "reason", str(error)), seconds=time.perf_counter() - began)
    rows, columns = xray.pixels.shape
    told = {**source, "rows": str(rows), "columns": str(columns), "warnings": json.dumps(xray.warnings)}
    with replacing(entry) as beside:
        beside.write_bytes(save({"pixels": shrink(xray.pixels, longest_side)}, metadata=told))
    return Outcome(image_id, "decoded", "", xray.warnings, rows, columns, time.perf_counter() - began)


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """uint8 (rows, columns), longest side at most `longest_side`, by the mean of the area; smaller ones stay as they are."""
    rows, columns = pixels.shape
    if max(rows, columns) <= longest_side:
        return pixels
    place = letterbox(rows, columns, longest_side)
    return cv2.resize(pixels, (place.inner_columns, place.inner_rows), interpolation=cv2.INTER_AREA)


def source_of(path: str) -> dict[str, str]:
    """What tells another file from the one that was decoded: size, time of change, and first, middle and last 64 KiB.

    Size and time alone are equal for images unpacked from one archive; the samples hold the header with its ids, and
    pixels. Reading the whole would take as long as decoding. Raises OSError.
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
    told = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "samples": digest.hexdigest()}
    return {f"source_{name}": str(value) for name, value in told.items()}


def start_worker() -> None:
    """A decoder that wants too much memory gets MemoryError here, where it costs one file."""
    resource.setrlimit(resource.RLIMIT_DATA, (WORKER_DATA_BYTES, WORKER_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


class _LightProcess(multiprocessing.context.SpawnProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        # A spawned process imports its parent's main module again: with a training script, all of torch; with a script
        # that lacks `if __name__ == "__main__"`, the whole run. Workers need none of it.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return multiprocessing.context.SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class LightContext(multiprocessing.context.SpawnContext):
    """Fresh processes, safe beside threads and CUDA, that import what their task needs and no more."""

    Process = _LightProcess
