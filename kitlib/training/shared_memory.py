"""Whether the batches of a data loader's workers fit into /dev/shm, through which torch passes them to the training."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kitlib.errors import TrainingError

logger = logging.getLogger(__name__)

# How long a training waits for a batch. A worker that cannot pass on its batch is only noticed by this.
BATCH_TIMEOUT_S = 600.0
SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory() -> float:
    """Return the free bytes of /dev/shm; infinity if it does not exist, as on systems whose shared memory has no folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def workers_that_fit(
    workers: int, batch_bytes: int, prefetched: int = 2, free_bytes: Callable[[], float] = free_shared_memory
) -> int:
    """Return `workers`, or 0 with a warning if the batches that they prefetch do not fit into /dev/shm.

    Without workers the training has the same result, but takes longer. If they were started nevertheless, it would wait for
    ever for the first batch that does not fit. Each worker has `prefetched` batches of `batch_bytes` ready, and one more is
    in use. If several processes train together, `batch_bytes` is the size of their shares together.
    """
    if not workers:
        return 0
    needed = (workers * prefetched + 1) * batch_bytes
    free = free_bytes()
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
    """Raise TrainingError, which says what to do, instead of torch's RuntimeError for a batch that does not arrive."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        raise TrainingError(
            f"no batch arrived in {BATCH_TIMEOUT_S:g} s: a worker hangs, or could not pass on its batch because "
            f"{SHARED_MEMORY} is full ({free_shared_memory() / 1e6:.1f} MB free). Set `workers` to 0, or enlarge it "
            "(docker run --shm-size=1g); the same run then resumes"
        ) from error
