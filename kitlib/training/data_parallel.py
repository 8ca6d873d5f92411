"""Trains one model with several processes, each on its own GPU: starts them, splits batches and gathers results.

A recipe's `batch_size` is the total over all processes, so that the same recipe can be used with any number of processes.
"""

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import Sampler

from kitlib.deadline import SessionOver
from kitlib.errors import TrainingError
from kitlib.models.families import family_of
from kitlib.recipes.fields import TrainingRecipe
from kitlib.training.fold_folder import start_over
from kitlib.training.task import Task


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank (from 0) and the number of processes that train together.

    Returns (0, 1) if this process trains alone.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Return whether this process has rank 0. If several processes train together, only rank 0 writes files."""
    return rank_and_world_size()[0] == 0


class Keys(Protocol):
    """Protocol of a sampler: it has a length, and yields the keys with which a data set is indexed during one epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class SharedBatches(Sampler[list[Any]]):
    """Batch sampler that splits every batch among the processes that train together.

    `sampler` must yield the same keys (see Keys) in the same order in every process. Of n processes, the process with rank r
    gets the keys at positions r, r + n, r + 2n, ... of each batch. If the last batch is incomplete, it is dropped.
    """

    def __init__(self, sampler: Keys, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        rank, processes = rank_and_world_size()
        batch: list[Any] = []
        for key in self.sampler:
            batch.append(key)
            if len(batch) == self.batch_size:
                yield batch[rank::processes]
                batch = []


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Fill `rows` in place with the rows that the other processes have computed, and return the array.

    `rows` has the same shape in all n processes; row i is taken from the process with rank i modulo n.
    """
    rank, processes = rank_and_world_size()
    if processes == 1:
        return rows
    for other, part in enumerate(_all_gather(rows[rank::processes])):
        rows[other::processes] = part
    return rows


def gather_list(items: Sequence[Any]) -> list[Any]:
    """Join the lists of all n processes into one list, whose item i comes from the process with rank i modulo n."""
    parts = _all_gather(list(items))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _all_gather(value: Any) -> list[Any]:
    processes = rank_and_world_size()[1]
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    torch.distributed.all_gather_object(values, value)
    return values


def train_together(train: Callable[[Task, int, Path], Any], task: Task, fold: int, run_folder: Path, processes: int) -> Any:
    """Run `train(task, fold, run_folder)` in several processes that share each batch, and return its result.

    The console output of the processes is written to run_folder/processes. If the task's `resume` is False, an earlier run
    in the folder is deleted before the processes start. Raises ValueError if several processes cannot train this recipe;
    SessionOver if `train` raises it; TrainingError if a process fails in another way (the message contains the error of the
    first process that failed, and the log folder).
    """
    _check_can_share(task.recipe, processes)
    if not task.resume:
        start_over(run_folder)
        # Otherwise each process would empty the folder, and the last line, which reads the results, would train again.
        task = dataclasses.replace(task, resume=True)
    if not (run_folder / "metrics.json").is_file():
        logs = run_folder / "processes"
        logs.mkdir(parents=True, exist_ok=True)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            max_restarts=0,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="spawn",
            monitor_interval=0.5,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        )
        try:
            results = elastic_launch(config, _run_process)(train, task, fold, run_folder)
        except ChildFailedError as error:
            message: Any = error.get_first_failure()[1].message  # for an exception a dict, although torch annotates str
            message = message["message"] if isinstance(message, dict) else message
            raise TrainingError(f"{run_folder}: {message}\n  logs: {logs}") from error
        if results[0] is not None:
            raise results[0]
    return train(task, fold, run_folder)


def _check_can_share(recipe: TrainingRecipe, processes: int) -> None:
    if recipe.batch_size % processes:
        raise ValueError(
            f"{processes} processes cannot share a batch of {recipe.batch_size} images evenly; set batch_size to a multiple "
            f"of {processes}"
        )
    if unfreeze_every := getattr(recipe, "unfreeze_every", 0):
        # DDP synchronises only the gradients of parameters that are trainable at the start.
        raise ValueError(
            f"`unfreeze_every` is {unfreeze_every}, but several processes cannot train stages of the backbone that are "
            "unfrozen later; set `processes` to 1"
        )
    if family_of(recipe).one_process:
        raise ValueError(
            f"a {family_of(recipe).name} cannot be trained by several processes; set `processes` to 1 and train several "
            "folds at once, one per GPU"
        )


def _run_process(train: Callable[[Task, int, Path], Any], task: Task, fold: int, run_folder: Path) -> Exception | None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        train(task, fold, run_folder)
    except SessionOver as over:
        return over
    return None
