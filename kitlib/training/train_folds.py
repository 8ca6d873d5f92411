"""The folds of one model: one after the other, side by side with a GPU each, or each on several GPUs together."""

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
from kitlib.errors import TrainingError
from kitlib.paths import find_input
from kitlib.processes import kill_family
from kitlib.training.data_parallel import train_together
from kitlib.training.driver import train_fold
from kitlib.training.fold_folder import continue_from, start_over
from kitlib.training.task import Task

logger = logging.getLogger(__name__)

LOG = "train.log"
Train = Callable[[Task, int, Path], Any]  # such as train_fold
FAILED, OVER = 1, 75  # exit codes of a fold's process; 75: try again later (sysexits.h)


def begin_session(run: Path, hours: float = 0, resume_from: str | Path = "") -> Deadline | None:
    """The end of this session, see `session_deadline`; and the folds of an earlier one are copied into `run`, to go on with.

    `resume_from` is that session's run: an attached input's name, or a path. What becomes of each fold is printed.
    """
    deadline = session_deadline(hours)
    if resume_from:
        earlier = find_input(resume_from)
        # Nested folds lie a folder deeper.
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
    """What `train(task, fold, run / "fold<n>")` gives for each of `folds` that is finished.

    `at_once` folds train side by side, each in a process of its own with a GPU of its own, its share of the CPU's threads
    and its log in fold<n>/train.log; 0: as many as there are GPUs, 1: in this process. `processes` train each fold
    together, see kitlib.training.data_parallel. Folds that the session's end has stopped are left out, and said; once it
    has stopped one, no further fold is begun. Side by side, a fold that fails stops no other: TrainingError names them
    all. `resume_name` is what the next session is told to resume from, where it is not the folder `run` itself.
    """
    folds, gpus = list(folds), torch.cuda.device_count()
    if processes > 1 and at_once > 1:
        raise ValueError(f"at_once {at_once} and processes {processes}: choose folds side by side, or one on several GPUs")
    if processes < 1 or at_once < 0:
        raise ValueError(f"at_once {at_once} and processes {processes}; wanted at least 0 and 1")
    side_by_side = min(len(folds), at_once or (max(1, gpus) if processes == 1 else 1))
    if not task.resume:
        for fold in folds:
            start_over(run / f"fold{fold}")
        task = dataclasses.replace(task, resume=True)  # or reading the results would train them again
    if side_by_side > 1:
        _side_by_side(train, task, folds, run, side_by_side)
    trained, over = [], side_by_side > 1
    for fold in folds:
        if over and not _is_finished(run, fold):
            # Without a finished epoch nothing tells how long one takes, and it would be begun in vain.
            continue
        try:
            if processes > 1:
                trained.append(train_together(train, task, fold, run / f"fold{fold}", processes))
            else:
                trained.append(train(task, fold, run / f"fold{fold}"))
        except SessionOver as stopped:
            over = True
            print(f"fold {fold} stopped after {stopped.done} of {stopped.epochs} epochs: the session ends")
    if len(trained) < len(folds):
        print(
            f"{len(folds) - len(trained)} of {len(folds)} folds are not finished. Run this notebook again with the same "
            "parameters to go on; in a new Kaggle session attach this one's output and set resume_from to "
            f"{resume_name or run.name!r}"
        )
    return trained


def _is_finished(run: Path, fold: int) -> bool:
    return (run / f"fold{fold}" / "metrics.json").is_file()


def _side_by_side(train: Train, task: Task, folds: list[int], run: Path, at_once: int) -> None:
    """Train until each fold is finished, stopped by the deadline, or has failed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    threads = max(1, torch.get_num_threads() // at_once)
    # Spawned, because a forked process cannot use a GPU that its parent has touched.
    context = multiprocessing.get_context("spawn")
    said, waiting = context.Queue(), list(folds)
    running: dict[Any, tuple[multiprocessing.context.SpawnProcess, int, int]] = {}  # by what `wait` waits for
    failed: list[int] = []
    stopped: list[int] = []
    listener = logging.handlers.QueueListener(said, _Printer())
    listener.start()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                fold = waiting.pop(0)
                slot = min(set(range(at_once)) - {slot for _, slot, _ in running.values()})
                shared = visible[slot % len(visible)], threads, os.getpid(), said
                process = context.Process(target=_train_one, args=(train, task, fold, run / f"fold{fold}", *shared))
                process.start()
                running[process.sentinel] = process, slot, fold
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, _, fold = running.pop(sentinel)
                process.join()
                if process.exitcode == OVER:
                    # A fold without a finished epoch would be begun in vain: nothing tells how long one takes.
                    stopped += [fold, *(each for each in waiting if not _is_finished(run, each))]
                    waiting.clear()
                elif process.exitcode:
                    failed.append(fold)
                logger.info("fold %d ended with exit code %s", fold, process.exitcode)
    finally:
        for process, _, _ in running.values():
            if process.pid is not None:
                kill_family(process.pid)
        listener.stop()
    if failed:
        told = [f"fold {fold}: {_last_line(run / f'fold{fold}' / LOG)}" for fold in sorted(failed)]
        rest = f"the session's end has stopped {', '.join(map(str, sorted(stopped)))}" if stopped else "the others are done"
        raise TrainingError("\n".join([f"{len(failed)} of {len(folds)} folds failed, {rest}:", *told]))


def _train_one(
    train: Train, task: Task, fold: int, run_folder: Path, gpu: str, threads: int, parent: int, said: Any
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    _end_with(parent)
    torch.set_num_threads(threads)
    log = run_folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as kept:
        for stream in (1, 2):
            os.dup2(kept.fileno(), stream)
    form = logging.Formatter(f"%(asctime)s fold {fold}: %(message)s", "%H:%M:%S")
    to_log, to_parent = logging.StreamHandler(), logging.handlers.QueueHandler(said)
    to_log.setFormatter(form)
    to_parent.setFormatter(form)
    logging.basicConfig(level=logging.INFO, handlers=[to_log, to_parent])
    try:
        train(task, fold, run_folder)
    except SessionOver as over:
        logging.info("%s", over)
        sys.exit(OVER)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)


def _end_with(parent: int) -> None:
    """Have the system kill this process when the one that started it dies; without, a killed notebook's folds train on."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    if os.getppid() != parent:
        sys.exit(FAILED)


class _Printer(logging.Handler):
    """Shows lines in the notebook, which shows nothing of a log."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return f"{lines[-1] if lines else 'killed without a word'}\n  log: {log}"
