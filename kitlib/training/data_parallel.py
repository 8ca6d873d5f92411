"""One model trained by several processes, a GPU each: what a process's share is, and how shares come together.

The recipe's batch is that of all processes together, so a recipe means the same with any number of them.
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


def share() -> tuple[int, int]:
    """This process's number, from 0, and how many train together; (0, 1) where one trains alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return share()[0] == 0


class Keys(Protocol):
    """The keys of an epoch's examples, in their order."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class SharedBatches(Sampler[list[Any]]):
    """Batches of keys, of which this process takes every so-manieth key; all have the same number of them.

    `sampler` gives the same order in every process. As with one process, a last batch that is not full is left out.
    """

    def __init__(self, sampler: Keys, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        rank, processes = share()
        batch: list[Any] = []
        for key in self.sampler:
            batch.append(key)
            if len(batch) == self.batch_size:
                yield batch[rank::processes]
                batch = []


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """`rows` with every row taken from the process that has made it: row i from the process i modulo their number."""
    rank, processes = share()
    if processes == 1:
        return rows
    for other, part in enumerate(_from_all(rows[rank::processes])):
        rows[other::processes] = part
    return rows


def gather_list(made: Sequence[Any]) -> list[Any]:
    """All that the processes have made, in the data's order: item i by the process i modulo their number."""
    parts = _from_all(list(made))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _from_all(value: Any) -> list[Any]:
    processes = share()[1]
    if processes == 1:
        return [value]
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, value)
    return found


def train_together(train: Callable[[Task, int, Path], Any], task: Task, fold: int, run_folder: Path, processes: int) -> Any:
    """`train(task, fold, run_folder)` by several processes, whose output goes to run_folder/processes; what it gives.

    The processes share the recipe's batch. If the task is not to be resumed, the folder is emptied of an earlier run once,
    before they start. Raises ValueError where they cannot share it, SessionOver as `train` does, and TrainingError for
    everything else that a process has raised.
    """
    _check(task.recipe, processes)
    if not task.resume:
        start_over(run_folder)
        # Or each process would empty the folder, and reading the results train them again.
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
            ended = elastic_launch(config, _one_of_them)(train, task, fold, run_folder)
        except ChildFailedError as error:
            told: Any = error.get_first_failure()[1].message  # a str, says torch; what a process raised is a dict
            told = told["message"] if isinstance(told, dict) else told
            raise TrainingError(f"{run_folder}: {told}\n  logs: {logs}") from error
        if ended[0] is not None:
            raise ended[0]
    return train(task, fold, run_folder)


def _check(recipe: TrainingRecipe, processes: int) -> None:
    if recipe.batch_size % processes:
        raise ValueError(f"{processes} processes cannot share a batch of {recipe.batch_size} images evenly")
    if later := getattr(recipe, "unfreeze_every", 0):
        # torch gathers the gradients of what learns at the start, and of nothing else.
        raise ValueError(f"recipe.unfreeze_every is {later}: what learns later is not shared by processes")
    if family_of(recipe).one_process:
        raise ValueError(f"a {family_of(recipe).name} is trained by one process; train its folds side by side, one a GPU")


def _one_of_them(train: Callable[[Task, int, Path], Any], task: Task, fold: int, run_folder: Path) -> Exception | None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        train(task, fold, run_folder)
    except SessionOver as over:
        return over
    return None
