"""Execute one run of a plan in its own process, on this machine or on a node of a cluster."""

import fcntl
import json
import logging
import os
import platform
import random
import shlex
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
# The GPUs that runs on this machine share, such as "0,1"; not set on a cluster, which assigns GPUs to each job.
SHARED_GPUS = "KIT_SHARED_GPUS"


def read_planned_runs(runs_file: str | Path) -> dict[str, PlannedRun]:
    """Return the runs in the file runs.json, which `kitlib.plans.engine` writes, keyed by run name."""
    runs = json.loads(Path(runs_file).read_text(encoding="utf-8"))
    return {name: PlannedRun.from_json(run) for name, run in runs.items()}


def state_file(runs_file: str | Path, name: str) -> Path:
    """Return the path of the JSON file that holds the state record of the run `name`.

    The record has the keys `state` ("running", "done" or "failed"), `cell` (number of the notebook cell being executed),
    `cells` (number of all cells), `epoch` (last line about an epoch in the log of a training), `host`, `started` and `ended`
    (Unix times), and `problem` (an error message).
    """
    return Path(runs_file).parent / "states" / f"{name}.json"


def run_planned(runs_file: str | Path, name: str) -> None:
    """Execute the run `name` of a plan and write its done file, unless the run is already done.

    `runs_file` is the plan's runs.json. A run's key is a hash of its parameters and inputs. If the run's folder was started
    with the same key, the run is resumed; otherwise it starts over. A folder that was completed with another key is renamed
    to NAME.old-KEY, with a warning, replacing an earlier folder of that name. Raises PlanError if the run fails, or if the
    folder has files that no plan has made.
    """
    run, record_path = read_planned_runs(runs_file)[name], state_file(runs_file, name)
    state: dict[str, Any] = {"state": "running", "host": platform.node(), "started": time.time()}

    def save_state(**changes: Any) -> None:
        state.update(changes)
        write_json(record_path, state)

    # SIGTERM must run the clean-up code, because the notebook's kernel is in its own process group and would continue.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _locked(run.folder):
        # A job that outlived its killed engine may have finished this run while this process waited for the folder.
        if run.done_file.is_file():
            save_state(state="done", ended=time.time())
            return
        save_state(cell=0, cells=0)
        _prepare_folder(run)
        try:
            with claim_gpus(run.gpus) as environment:
                if run.notebook:
                    _run_notebook(run, run.notebook, environment, save_state)
                else:
                    _run_command(run, environment)
        except BaseException as error:
            save_state(state="failed", ended=time.time(), problem=str(error) or type(error).__name__)
            raise
        write_json(run.done_file, {**state, "state": "done", "ended": time.time()})
        save_state(state="done", ended=time.time())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process, waiting until no other process has locked it.

    The lock ends with the `with` block or, if the process is killed, with the process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is working in %s; waiting until that process ends", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare_folder(run: PlannedRun) -> None:
    """Make the run's folder, and write the run's key (hash of parameters and inputs) into it.

    If the folder exists and was completed with another key, it is renamed first. If it was only started with another key, it
    is deleted first.
    """
    previous_key = run.read_key()
    if previous_key not in (None, run.key):
        if run.done_file_of(previous_key).is_file():
            # The folder may contain days of training, and the key may differ only because an option --set was forgotten.
            backup = run.folder.with_name(f"{run.name}.old-{previous_key}")
            shutil.rmtree(backup, ignore_errors=True)
            run.folder.rename(backup)
            logger.warning("%s has a finished run with other parameters or inputs; it was renamed to %s", run.folder, backup)
        else:
            logger.warning("%s has an unfinished run with other parameters or inputs; deleting it to start over", run.folder)
            shutil.rmtree(run.folder)
    write_json(run.folder / RECORD, {"key": run.key, "run": run.as_json()})


@contextmanager
def claim_gpus(count: int) -> Iterator[dict[str, str]]:
    """Reserve `count` of the GPUs that runs share, or all if there are fewer; yield environment variables that select them.

    Waits until enough GPUs are free. On a cluster, which assigns the GPUs itself, yields an empty dictionary at once.
    """
    if SHARED_GPUS not in os.environ:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"kit-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    shared = list(filter(None, os.environ[SHARED_GPUS].split(",")))
    locks: dict[str, IO] = {}
    count = min(count, len(shared))
    try:
        while len(locks) < count:
            for gpu in shared:
                if gpu not in locks and len(locks) < count and (lock := _try_lock(folder / gpu)):
                    locks[gpu] = lock
            if len(locks) < count:
                # Release before waiting, because two processes that keep some GPUs would wait for each other forever.
                _release(locks)
                time.sleep(random.uniform(0.5, 1.5))
        yield {"CUDA_VISIBLE_DEVICES": ",".join(locks)}
    finally:
        _release(locks)


def _release(locks: dict[str, IO]) -> None:
    for lock in locks.values():
        lock.close()
    locks.clear()


def _try_lock(path: Path) -> IO | None:
    lock = open(path, "w")  # noqa: SIM115  the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _run_notebook(run: PlannedRun, notebook: Path, environment: dict[str, str], save_state: Callable[..., None]) -> None:
    output, limit = run.folder / "notebook.ipynb", run.minutes * 60 or None
    try:
        run_notebook(
            notebook,
            output,
            run.parameters,
            run.result,
            on_cell=lambda cell, cells: save_state(cell=cell, cells=cells),
            on_epoch=lambda line: save_state(epoch=line),
            threads=run.threads,
            time_limit_s=limit,
            variables=environment,
        )
    except NotebookError as error:
        raise PlanError(str(error)) from error


def _run_command(run: PlannedRun, environment: dict[str, str]) -> None:
    log = run.folder / "command.log"
    command = [sys.executable if word == "python" and not index else word for index, word in enumerate(run.command)]
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(run.threads)}
    with log.open("w", encoding="utf-8") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, cwd=project_root(), env=environment)
        try:
            code = process.wait(run.minutes * 60 or None)
            problem = (
                f"exit code {code}" if code else "" if run.result.is_file() else f"it ended without writing {run.result}"
            )
        except subprocess.TimeoutExpired:
            problem = f"stopped at its time limit of {run.minutes:g} minutes"
        finally:
            kill_family(process.pid)
            process.wait()
    if problem:
        raise PlanError(f"{shlex.join(run.command)}: {problem}\n  log: {log}\n{log_tail(log)}")
