"""Limits the resized images (canvases) kept in memory: all training processes together may use half of the free memory."""

import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from kitlib.training import data_parallel

logger = logging.getLogger(__name__)

SHARE = 0.5  # share of the memory that is free when the first data set is created; training and its workers use the rest
CGROUPS = Path("/sys/fs/cgroup")


def available_memory(own_cgroup: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Return the number of bytes that this process can still allocate on this machine or in its container.

    This is the minimum of the machine's available memory and of the free memory in each control group (cgroup, version 1 or
    2) that limits the process, including parent groups. Cached file contents that the system can drop count as free.
    `own_cgroup` is the file that lists the process's groups; `cgroups` is the folder with the files of all groups.
    """
    return max(0, min([psutil.virtual_memory().available, *_free_in_cgroups(own_cgroup, cgroups)]))


def _free_in_cgroups(own_cgroup: Path, cgroups: Path) -> Iterator[int]:
    lines = own_cgroup.read_text().splitlines() if own_cgroup.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        # In a container, this may be the path outside the container; the group's files are then directly in the root.
        for group in (root / path.strip("/"), *(root / path.strip("/")).parents):
            if not group.is_relative_to(root):
                break
            try:
                most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most != "max":
                yield int(most) - used + int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))


class KeptMemory:
    """Memory budget for the canvases (resized images) that this process's data sets keep in memory.

    All training processes together may use half (SHARE) of the free memory, each an equal part. `available` is a function
    that returns the number of free bytes. `folds_at_once` is the number of folds that train at the same time.
    """

    def __init__(self, available: Callable[[], int] = available_memory) -> None:
        self.available, self.folds_at_once = available, 1
        self._reserved = self._budget = 0

    def reserve(self, owner: object, count: int, bytes_each: int) -> int:
        """Reserve memory for up to `count` canvases of `bytes_each` bytes; return the number of canvases that fit.

        The memory is released when the object `owner` is deleted.
        """
        if not self._reserved:
            processes = self.folds_at_once * data_parallel.rank_and_world_size()[1]
            self._budget = int(SHARE * self.available()) // processes
        fitting = min(count, (self._budget - self._reserved) // bytes_each)
        if fitting < count:
            logger.warning(
                "%d of %d canvases (resized images) fit into the memory reserved for them (%.1f GB); the others are resized "
                "again in each epoch",
                *(fitting, count, self._budget / 1e9),
            )
        self._reserved += fitting * bytes_each
        weakref.finalize(owner, self._release, fitting * bytes_each)
        return fitting

    def _release(self, reserved: int) -> None:
        self._reserved -= reserved


CANVASES = KeptMemory()
