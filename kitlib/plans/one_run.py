"""One run of a plan, in a process of its own: on this machine, or wherever a cluster has sent it."""

import fcntl
import json
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kitlib.atomic import write_json
from kitlib.errors import NotebookError, PlanError
from kitlib.notebook import log_tail, run_notebook
from kitlib.paths import project_root
from kitlib.plans.plan import RECORD, PlannedRun
from kitlib.processes import kill_family

logger = logging.getLogger(__name__)
# GPUs that runs on this machine share out among themselves, such as "0,1"; not set where a cluster gives each job its own.
SHARED_GPUS = "KIT_SHARED_GPUS"


def planned_runs(described: str | Path) -> dict[str, PlannedRun]:
    """The runs of a file that `kitlib.plans.engine` has written."""
    runs = json.loads(Path(described).read_text(encoding="utf-8"))
    return {name: PlannedRun.from_json(run) for name, run in runs.items()}


def state_file(described: str | Path, name: str) -> Path:
    """Where a run says how far it is: state (running, done, failed), cell, cells, host, started, ended and problem."""
    return Path(described).parent / "states" / f"{name}.json"


def run_planned(described: str | Path, name: str) -> None:
    """Do one run of a plan, unless it is done; goes on in its folder if that was begun with the same key, else starts over.

    What is done with another key is renamed to NAME.old-KEY, in place of an older one of that key, and said in the log.
    Raises PlanError, and PlanError for a folder that no plan has begun.
    """
    run, told = planned_runs(described)[name], state_file(described, name)
    state: dict[str, Any] = {"state": "running", "host": platform.node(), "started": time.time()}

    def tell(**more: Any) -> None:
        state.update(more)
        write_json(told, state)

    # A termination must reach the notebook's kernel too, which leads a process group of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _held(run.folder):
        # The job of an engine that was killed may have gone on, and ended this run while we waited for its folder.
        if run.mark.is_file():
            tell(state="done", ended=time.time())
            return
        tell(cell=0, cells=0)
        _begin(run)
        try:
            with claimed_gpus(run.gpus) as environment:
                if run.notebook:
                    _run_notebook(run, run.notebook, environment, lambda cell, cells: tell(cell=cell, cells=cells))
                else:
                    _run_command(run, environment)
        except BaseException as error:
            tell(state="failed", ended=time.time(), problem=str(error) or type(error).__name__)
            raise
        write_json(run.mark, {**state, "state": "done", "ended": time.time()})
        tell(state="done", ended=time.time())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the system lets go of it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process works in %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _begin(run: PlannedRun) -> None:
    begun = run.begun_key()
    if begun not in (None, run.key):
        if run.mark_of(begun).is_file():
            # Days of training may be in it, and a forgotten --set looks like a wish for another run.
            old = run.folder.with_name(f"{run.name}.old-{begun}")
            shutil.rmtree(old, ignore_errors=True)
            run.folder.rename(old)
            logger.warning("%s: done with other parameters or on other inputs, kept as %s", run.folder, old)
        else:
            logger.warning("%s: begun with other parameters or on other inputs, starting over", run.folder)
            shutil.rmtree(run.folder)
    write_json(run.folder / RECORD, {"key": run.key, "run": run.as_json()})


@contextmanager
def claimed_gpus(count: int) -> Iterator[dict[str, str]]:
    """What tells a process its GPUs: `count` of those that are shared out here, or as many as there are, held meanwhile."""
    if SHARED_GPUS not in os.environ:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"kit-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    shared = list(filter(None, os.environ[SHARED_GPUS].split(",")))
    held: dict[str, IO] = {}
    count = min(count, len(shared))
    try:
        while len(held) < count:
            for gpu in shared:
                if gpu not in held and len(held) < count and (lock := _try_lock(folder / gpu)):
                    held[gpu] = lock
            if len(held) < count:
                # Two that each kept what they have would wait for each other for ever.
                _let_go(held)
                time.sleep(random.uniform(0.5, 1.5))
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
    finally:
        _let_go(held)


def _let_go(held: dict[str, IO]) -> None:
    for lock in held.values():
        lock.close()
    held.clear()


def _try_lock(path: Path) -> IO | None:
    lock = open(path, "w")  # noqa: SIM115  whoever asked closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _run_notebook(run: PlannedRun, notebook: Path, environment: dict[str, str], on_cell: Callable[[int, int], None]) -> None:
    output, limit = run.folder / "notebook.ipynb", run.minutes * 60 or None
    try:
        run_notebook(notebook, output, run.parameters, run.result, on_cell, run.threads, limit, environment)
    except NotebookError as error:
        raise PlanError(str(error)) from error


def _run_command(run: PlannedRun, environment: dict[str, str]) -> None:
    log = run.folder / "command.log"
    command = [sys.executable if word == "python" and not place else word for place, word in enumerate(run.command)]
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(run.threads)}
    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(command, stdout=kept, stderr=subprocess.STDOUT, cwd=project_root(), env=environment)
        try:
            code = process.wait(run.minutes * 60 or None)
            problem = f"exit code {code}" if code else "" if run.result.is_file() else f"it ended without {run.result}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after its {run.minutes:g} minutes"
        finally:
            kill_family(process.pid)
            process.wait()
    if problem:
        raise PlanError(f"{' '.join(run.command)}: {problem}\n  log: {log}\n{log_tail(log)}")
