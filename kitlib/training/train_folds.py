"""Trains a model on several folds: one after the other, side by side with one GPU per fold, or each on several GPUs."""

import dataclasses
import logging
import logging.handlers
import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kitlib.deadline import Deadline, SessionOver, session_deadline
from kitlib.device import visible_gpus
from kitlib.errors import TrainingError
from kitlib.paths import find_input
from kitlib.processes import die_with_parent, kill_family
from kitlib.training import kept_memory
from kitlib.training.data_parallel import train_together
from kitlib.training.driver import train_fold
from kitlib.training.fold_folder import continue_from, start_over
from kitlib.training.task import Task

logger = logging.getLogger(__name__)

LOG = "train.log"
Train = Callable[[Task, int, Path], Any]  # such as train_fold
FAILED, SESSION_OVER = 1, 75  # exit codes of a fold's process; 75: try again later (sysexits.h)


def begin_session(run: Path, hours: float = 0, resume_from: str | Path = "") -> Deadline | None:
    """Return this session's deadline, and copy the folds of an earlier session to the folder `run`, to resume them.

    `hours` is the length of the session; returns None if it has no limit (see `session_deadline`). `resume_from` is the run
    folder of the earlier session, as a path or as the name of an attached input; if it is empty, nothing is copied. Prints
    for each fold whether it was copied.
    """
    deadline = session_deadline(hours)
    if resume_from:
        earlier = find_input(resume_from)
        # Nested folds are one folder deeper.
        nested = {path.parents[2] for path in earlier.glob("outer*/fold*/checkpoints/run.json")}
        for part in sorted(nested) or [earlier]:
            print(*continue_from(part, run / part.relative_to(earlier)), sep="\n")
    return deadline


def train_folds(
    task: Task,
    folds: Iterable[int],
    run: Path,
    at_once: int = 0,
    processes: int = 1,
    resume_name: str = "",
    train: Train = train_fold,
) -> list[Any]:
    """Run `train(task, fold, run / "fold<n>")` for each fold and return the results of the finished folds.

    `at_once` is the number of folds that train side by side, each in its own process with its own GPU, an equal share of the
    CPU threads and the log fold<n>/train.log. If it is 0, as many folds as there are GPUs train side by side; if it is 1,
    the folds train one after the other in this process. `processes` is the number of processes that train each fold together
    (see kitlib.training.data_parallel).

    If the end of the session stops a fold, no further fold is started, and a message is printed that says how to continue;
    the message gives `resume_name` (default: the name of `run`) as the run to resume from. Raises ValueError, before any
    training, if a fold does not exist, or if `at_once` and `processes` are not valid together. Raises TrainingError, which
    lists all failed folds, if folds that train side by side fail; the other folds finish first.
    """
    folds, gpus = list(folds), torch.cuda.device_count()
    if processes > 1 and at_once > 1:
        raise ValueError(f"`at_once` is {at_once} and `processes` is {processes}, but only one of the two may exceed 1")
    if processes < 1 or at_once < 0:
        raise ValueError(f"`at_once` is {at_once} and `processes` is {processes}; expected >= 0 and >= 1, respectively")
    available = sorted(set(task.tables["folds"]["fold"].tolist()))
    if unknown := sorted(set(folds) - set(available)):
        raise ValueError(f"the prepared run has no fold {', '.join(map(str, unknown))}; choose from {available}")
    side_by_side = min(len(folds), at_once or (max(1, gpus) if processes == 1 else 1))
    if not task.resume:
        for fold in folds:
            start_over(run / f"fold{fold}")
        task = dataclasses.replace(task, resume=True)  # otherwise reading the results below would train again
    if side_by_side > 1:
        _train_side_by_side(train, task, folds, run, side_by_side)
    results, session_over = [], side_by_side > 1
    for fold in folds:
        if session_over and not _is_finished(run, fold):
            # Without a finished epoch, a fold's epoch length is unknown, so it would start an epoch that cannot finish.
            continue
        try:
            if processes > 1:
                results.append(train_together(train, task, fold, run / f"fold{fold}", processes))
            else:
                results.append(train(task, fold, run / f"fold{fold}"))
        except SessionOver as stopped:
            session_over = True
            print(f"fold {fold} stopped after {stopped.done} of {stopped.epochs} epochs, because the session ends")
    if len(results) < len(folds):
        print(
            f"{len(folds) - len(results)} of {len(folds)} folds are not finished. To continue, run this notebook again with "
            "the same parameters; in a new Kaggle session attach this session's output and set resume_from to "
            f"{resume_name or run.name!r}"
        )
    return results


def _is_finished(run: Path, fold: int) -> bool:
    return (run / f"fold{fold}" / "metrics.json").is_file()


def _train_side_by_side(train: Train, task: Task, folds: list[int], run: Path, at_once: int) -> None:
    """Train the folds in processes, `at_once` at a time, until every fold is finished, stopped by the deadline, or failed.

    Raises TrainingError, after all processes have ended, if any fold failed.
    """
    visible = visible_gpus()
    threads = max(1, torch.get_num_threads() // at_once)
    # Spawned, because a forked process cannot use a GPU if its parent has initialised CUDA.
    context = multiprocessing.get_context("spawn")
    log_queue, remaining = context.Queue(), list(folds)
    running: dict[Any, tuple[multiprocessing.context.SpawnProcess, int, int]] = {}  # process, GPU slot and fold by sentinel
    failed: list[int] = []
    stopped: list[int] = []
    listener = logging.handlers.QueueListener(log_queue, _Printer())
    listener.start()
    try:
        while remaining or running:
            while remaining and len(running) < at_once:
                fold = remaining.pop(0)
                slot = min(set(range(at_once)) - {slot for _, slot, _ in running.values()})
                process_settings = visible[slot % len(visible)], threads, at_once, os.getpid(), log_queue
                process = context.Process(
                    target=_train_in_process, args=(train, task, fold, run / f"fold{fold}", *process_settings)
                )
                process.start()
                running[process.sentinel] = process, slot, fold
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, _, fold = running.pop(sentinel)
                process.join()
                if process.exitcode == SESSION_OVER:
                    # No further fold is started, because the length of its epochs is unknown.
                    stopped += [fold, *(other for other in remaining if not _is_finished(run, other))]
                    remaining.clear()
                elif process.exitcode:
                    failed.append(fold)
                logger.info("fold %d ended with exit code %s", fold, process.exitcode)
    finally:
        for process, _, _ in running.values():
            if process.pid is not None:
                kill_family(process.pid)
        listener.stop()
    if failed:
        messages = [f"fold {fold}: {_last_line(run / f'fold{fold}' / LOG)}" for fold in sorted(failed)]
        others = (
            f"the session's end stopped folds {', '.join(map(str, sorted(stopped)))}"
            if stopped
            else "the others are finished"
        )
        raise TrainingError("\n".join([f"{len(failed)} of {len(folds)} folds failed, {others}:", *messages]))


def _train_in_process(
    train: Train, task: Task, fold: int, run_folder: Path, gpu: str, threads: int, at_once: int, parent: int, log_queue: Any
) -> None:
    """Train one fold on one GPU in this process, which was started for it. Console output goes to run_folder/train.log.

    Ends the process with exit code SESSION_OVER if the end of the session stops the fold, or FAILED if `train` raises an
    error.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    die_with_parent(parent)  # otherwise folds would continue to train after their notebook was killed
    torch.set_num_threads(threads)
    kept_memory.CANVASES.folds_at_once = at_once
    log = run_folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    formatter = logging.Formatter(f"%(asctime)s fold {fold}: %(message)s", "%H:%M:%S")
    to_log, to_parent = logging.StreamHandler(), logging.handlers.QueueHandler(log_queue)
    to_log.setFormatter(formatter)
    to_parent.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[to_log, to_parent])
    try:
        train(task, fold, run_folder)
    except SessionOver as over:
        logging.info("%s", over)
        sys.exit(SESSION_OVER)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)


class _Printer(logging.Handler):
    """Log handler that prints each record, because a notebook does not show logs."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return f"{lines[-1] if lines else 'killed, without output'}\n  log: {log}"
