"""How many workers load batches: as many as feed the GPU, and whose batches fit into /dev/shm, through which they pass."""

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

# How long a training waits for a batch. A worker that cannot pass on its batch is only noticed by this.
BATCH_TIMEOUT_S = 600.0
MOST_WORKERS = 8
PREFETCHED = 2  # batches that each worker of torch's loader has ready
SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory() -> float:
    """Return the free bytes of /dev/shm; infinity if it does not exist, as on systems whose shared memory has no folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def suitable_workers() -> int:
    """Return the number of processes that load batches for this process's training: 0 without a GPU.

    With a GPU the cores are divided among the folds that train at once and the processes of each, at most MOST_WORKERS each,
    because these prepare more images than a GPU trains on.
    """
    if not torch.cuda.is_available():
        return 0
    trainings = CANVASES.folds_at_once * data_parallel.rank_and_world_size()[1]
    return min(MOST_WORKERS, max(1, usable_cores() // trainings))


def workers_that_fit(workers: int, bytes_per_worker: int, free_bytes: Callable[[], float] = free_shared_memory) -> int:
    """Return `workers`, or fewer with a warning if the batches that they prefetch do not fit into /dev/shm.

    With fewer workers the training has the same result, but takes longer. Workers whose batches do not fit would be killed,
    or keep the training waiting for BATCH_TIMEOUT_S. Each has batches of `bytes_per_worker` ready. Folds that train side by
    side share /dev/shm, which this function does not see.
    """
    needed, free = workers * bytes_per_worker, free_bytes() if workers else math.inf
    if needed <= free:
        return workers
    fitting = int(free // bytes_per_worker)
    logger.warning(
        "%s has %.1f MB free, but the batches of %d workers need %.1f MB; training continues more slowly with workers = %d. "
        "To use all workers, enlarge it (docker run --shm-size=%dm), or lower `workers`, `batch_size` or `image_size`",
        *(SHARED_MEMORY, free / 1e6, workers, needed / 1e6, fitting, 2 * needed // 2**20 + 1),
    )
    return fitting


@contextmanager
def explaining_timeouts() -> Iterator[None]:
    """Raise TrainingError, which says what to do, instead of torch's RuntimeError for a missing batch."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("DataLoader timed out", "Bus error")):
            raise
        raise TrainingError(
            f"no batch arrived ({error}): a worker hangs, or could not pass on its batch because "
            f"{SHARED_MEMORY} is full ({free_shared_memory() / 1e6:.1f} MB free). Set `workers` to 0, or enlarge it "
            "(docker run --shm-size=1g); the same run then resumes"
        ) from error
