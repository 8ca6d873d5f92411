"""Whether the batches of a data loader's workers fit into /dev/shm, through which torch passes them to the training."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kitlib.errors import TrainingError

logger = logging.getLogger(__name__)

# How long a training waits for a batch. A worker that cannot pass on its batch is only noticed by this.
BATCH_TIMEOUT_S = 600.0
PREFETCHED = 2  # batches that each worker of torch's loader has ready
SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory() -> float:
    """Return the free bytes of /dev/shm; infinity if it does not exist, as on systems whose shared memory has no folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def workers_that_fit(workers: int, bytes_per_worker: int, free_bytes: Callable[[], float] = free_shared_memory) -> int:
    """Return `workers`, or 0 with a warning if the batches that they prefetch do not fit into /dev/shm.

    Without workers the training has the same result, but takes longer. Workers whose batches do not fit would be killed, or
    keep the training waiting for BATCH_TIMEOUT_S. Each has batches of `bytes_per_worker` ready. Folds that train side by
    side share /dev/shm, which this function does not see.
    """
    needed, free = workers * bytes_per_worker, free_bytes() if workers else math.inf
    if needed <= free:
        return workers
    logger.warning(
        "%s has %.1f MB free, but the batches of %d workers need %.1f MB; training continues, slower, as with workers: 0. "
        "To use workers, enlarge it (docker run --shm-size=%dm), or lower `workers`, `batch_size` or `image_size`",
        *(SHARED_MEMORY, free / 1e6, workers, needed / 1e6, 2 * needed // 2**20 + 1),
    )
    return 0


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
