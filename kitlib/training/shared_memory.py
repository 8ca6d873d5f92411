"""Chooses the number of worker processes that load batches: enough for the GPU, but no more than fit into /dev/shm.

Workers pass batches to the training process through /dev/shm.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kitlib.errors import TrainingError
from kitlib.training import data_parallel
from kitlib.training.kept_memory import CANVASES
from kitlib.xrays.cache import usable_cores

logger = logging.getLogger(__name__)

# Time limit for a batch to arrive. Without it, a worker that cannot pass on its batch would keep training waiting forever.
BATCH_TIMEOUT_S = 600.0
MOST_WORKERS = 8
PREFETCHED = 2  # batches that each worker of torch's loader has ready
SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory() -> float:
    """Return the number of free bytes in /dev/shm, or infinity if the folder does not exist, as on macOS."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def suitable_workers() -> int:
    """Return the number of worker processes that should load batches for this process: 0 without a GPU.

    With a GPU, the cores are divided equally among all processes of all folds that train at once. Each process gets at least
    1 and at most 8 (MOST_WORKERS) workers, because 8 load images faster than a GPU can train on them.
    """
    if not torch.cuda.is_available():
        return 0
    trainings = CANVASES.folds_at_once * data_parallel.rank_and_world_size()[1]
    return min(MOST_WORKERS, max(1, usable_cores() // trainings))


def workers_that_fit(workers: int, bytes_per_worker: int, free_bytes: Callable[[], float] = free_shared_memory) -> int:
    """Return `workers` if their batches fit into /dev/shm; otherwise warn, and return the number of workers that fit.

    `bytes_per_worker` is the size of the batches that each worker prefetches. With fewer workers, training has the same
    result but takes longer. With too many workers, the workers would be killed, or training would fail after waiting 10
    minutes (BATCH_TIMEOUT_S) for a batch. Folds that train side by side also use /dev/shm, but this function counts only one
    fold.
    """
    needed, free = workers * bytes_per_worker, free_bytes() if workers else math.inf
    if needed <= free:
        return workers
    fitting = int(free // bytes_per_worker)
    logger.warning(
        "%s has %.1f MB free, but the batches of %d workers need %.1f MB; training continues more slowly with workers = %d. "
        "To use all workers, enlarge the folder (docker run --shm-size=%dm), or lower `batch_size` or `image_size`",
        *(SHARED_MEMORY, free / 1e6, workers, needed / 1e6, fitting, 2 * needed // 2**20 + 1),
    )
    return fitting


@contextmanager
def explaining_timeouts() -> Iterator[None]:
    """Context manager that replaces torch's RuntimeError for a missing batch by a TrainingError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("DataLoader timed out", "Bus error")):
            raise
        raise TrainingError(
            f"no batch arrived ({error}): a worker hangs, or could not pass on its batch because "
            f"{SHARED_MEMORY} is full ({free_shared_memory() / 1e6:.1f} MB free). Set `workers` to 0, or enlarge the folder "
            "(docker run --shm-size=1g), and run again: the training resumes"
        ) from error
