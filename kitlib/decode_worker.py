"""What a worker of the decode-once cache does: one DICOM file to one entry. Imports little, so that it starts fast."""

import json
import logging
import multiprocessing.context
import os
import resource
import sys
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from safetensors.numpy import save

from kitlib.atomic import replacing
from kitlib.dicom import UnreadableXray, decode_xray
from kitlib.geometry import letterbox

# Beside the largest X-ray in every decoder's hands, this is room for a damaged file to fail in and not for two.
WORKER_DATA_BYTES = 3 * 2**30


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
        xray = decode_xray(path)
    except (UnreadableXray, OSError) as error:
        return Outcome(image_id, "failed", getattr(error, "reason", str(error)), seconds=time.perf_counter() - began)
    rows, columns = xray.pixels.shape
    told = {**source, "rows": str(rows), "columns": str(columns), "warnings": json.dumps(xray.warnings)}
    with replacing(entry) as beside:
        beside.write_bytes(save({"pixels": shrink(xray.pixels, longest_side)}, metadata=told))
    return Outcome(image_id, "decoded", "", xray.warnings, rows, columns, time.perf_counter() - began)


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """uint8 (rows, columns), longest side at most `longest_side`, by the mean of the area; smaller ones stay as they are."""
    if max(pixels.shape) <= longest_side:
        return pixels
    place = letterbox(*pixels.shape, longest_side)
    return cv2.resize(pixels, (place.inner_columns, place.inner_rows), interpolation=cv2.INTER_AREA)


def source_of(path: str) -> dict[str, str]:
    """What tells a changed file from the one that was decoded."""
    status = os.stat(path)
    return {"source_bytes": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}


def start_worker() -> None:
    """A decoder that wants too much memory gets MemoryError here, where it costs one file."""
    resource.setrlimit(resource.RLIMIT_DATA, (WORKER_DATA_BYTES, WORKER_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


class _LightProcess(multiprocessing.context.SpawnProcess):
    @staticmethod
    def _Popen(process):
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
