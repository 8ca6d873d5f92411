"""Run a plan with Snakemake, which schedules the runs; show the plan's progress and report the runs that fail."""

import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from kitlib.atomic import write_json
from kitlib.errors import PlanError
from kitlib.notebook import log_tail
from kitlib.paths import project_root
from kitlib.plans.inputs import check_inputs
from kitlib.plans.one_run import SHARED_GPUS, state_file
from kitlib.plans.plan import Plan
from kitlib.plans.trainings import describe_trainings
from kitlib.processes import exiting_on_signals, handling, kill_family

ENGINE_LOG = "engine.log"
POLL_S = 0.5
ENDING_S = 60.0  # how long the engine may take to end its runs, or to cancel them on a cluster, before it is killed


def run_plan(
    plan: Plan,
    console: Console,
    only: Iterable[str] = (),
    cores: int | None = None,
    gpus: int | None = None,
    retries: int = 0,
    engine: Sequence[str] = (),
    afresh: bool = False,
) -> dict[str, dict[str, Any]]:
    """Execute the runs of a plan that are not done yet; return the state records of all its runs, keyed by run name.

    `state_file` describes the keys of a record; a run that was not started has an empty record. `only` limits the plan to
    the named steps and the steps that they need. `engine` has further arguments for Snakemake, such as `--executor slurm`.
    Without an executor, the runs share this machine's `cores` (default: all) and `gpus` (default: all visible ones). With an
    executor, `gpus` is the largest number of GPUs that one run requests. If `gpus` is 0, all runs use the CPU. A run that
    fails is tried again `retries` times; if it still fails, only the runs that need it are skipped. `afresh` first deletes
    everything in the folder of the plan's runs. SIGTERM and SIGHUP end the runs and raise SystemExit. Raises PlanError if
    another process is running the plan, if a run's folder has files that no plan has made, if an input is missing, or if
    there are fewer GPUs than `gpus`. If a run fails, raises PlanError after the other runs have ended.
    """
    folder = plan.runs / f".{plan.path.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    runs_file = folder / "runs.json"
    with ExitStack() as stack:
        stack.enter_context(exiting_on_signals())
        _lock(folder / "lock", plan, stack)
        if afresh:
            _remove_runs(plan, folder / "lock", stack)
        states = plan.states()  # raises PlanError for folders that no plan has made, before anything starts
        targets = plan.with_needs(only)
        check_inputs(plan, targets)
        console.print(describe_trainings(plan, targets), highlight=False)
        write_json(runs_file, {name: run.as_json() for name, run in plan.planned.items()})
        for name, state in states.items():
            if state != "done":
                state_file(runs_file, name).unlink(missing_ok=True)
        is_local = not {"--executor", "-e", "--profile"} & {argument.partition("=")[0] for argument in engine}
        shared_gpus = _select_gpus(gpus) if is_local else list(map(str, range(gpus or 0)))
        # On this machine, a run that requests more of a resource than the machine has gets all of it and runs alone.
        limits = {"gpu": len(shared_gpus)} if is_local or gpus is not None else {}
        limits |= {"mem_mb": psutil.virtual_memory().total // 2**20} if is_local else {}
        write_json(folder / "config.json", make_configuration(plan, runs_file, targets, limits, retries))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("plan.smk"))]
        command += ["--configfile", str(folder / "config.json"), "--directory", str(folder), "--keep-going", "--nocolor"]
        # Only the done files decide which runs are done, because their names contain a hash of all inputs. Snakemake's lock
        # is off, because it would remain if the process were killed; our lock ends with the process.
        command += ["--rerun-incomplete", "--rerun-triggers", "input", "--nolock"]
        if is_local:
            command += ["--cores", str(cores or len(os.sched_getaffinity(0)))]
            command += ["--resources", *(f"{name}={value}" for name, value in limits.items())]
        environment = {**os.environ, **({SHARED_GPUS: ",".join(shared_gpus)} if is_local else {})}
        code = _run_engine(plan, runs_file, states, [*command, *engine], environment, console)
    records = {name: _read_record(runs_file, name) for name in plan.planned}
    final_states = plan.states()
    unfinished = [name for name in targets if final_states[name] != "done"]
    if code or unfinished:
        done = sum(state == "done" for state in final_states.values())
        raise PlanError(_failure_message(plan, records, done, unfinished, folder / ENGINE_LOG))
    return records


def _lock(path: Path, plan: Plan, stack: ExitStack) -> None:
    """Lock the file `path` until `stack` is closed. Raises PlanError if another process has locked it."""
    lock = stack.enter_context(open(path, "w"))  # noqa: SIM115  `stack` closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PlanError(f"{plan.path} is already being run in {plan.runs}; wait until it has ended") from error


def _remove_runs(plan: Plan, own_lock: Path, stack: ExitStack) -> None:
    """Empty the plan's folder, except for lock files: a deleted lock file would no longer keep out other processes."""
    locks = sorted(plan.runs.glob(".*/lock"))
    for lock in locks:
        if lock != own_lock:  # the lock of another plan that uses the same folder
            _lock(lock, plan, stack)
    for folder in (plan.runs, *(lock.parent for lock in locks)):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if entry / "lock" not in locks:
                    shutil.rmtree(entry)
            elif entry not in locks:
                entry.unlink()


def describe_plan(plan: Plan) -> Table:
    """Return a table with one row per step: the states of its runs, its notebook or command, and the resources per run."""
    table = Table("step", "runs", "does", "asks for", title=str(plan.path), box=SIMPLE)
    for column in (table.columns[0], table.columns[2], table.columns[3]):
        column.no_wrap = True
    table.columns[2].max_width = 24
    states = plan.states()
    for step in dict.fromkeys(run.step for run in plan.planned.values()):
        runs = [plan.planned[name] for name in plan.runs_of_steps([step])]
        by_state: dict[str, list[str]] = {}
        for run in runs:
            by_state.setdefault(states[run.name], []).append(run.name.removeprefix(step).removeprefix("-"))
        state_summary = "; ".join(" ".join([state, *labels]).strip() for state, labels in by_state.items())
        task = runs[0].notebook.stem if runs[0].notebook else shlex.join(runs[0].command)
        amounts = {"CPU": runs[0].threads, "GPU": runs[0].gpus, "GB": runs[0].memory_gb, "min": runs[0].minutes}
        resources = ", ".join(f"{value:g} {unit}" for unit, value in amounts.items() if value)
        table.add_row(step, state_summary, task, resources)
    return table


def make_configuration(
    plan: Plan, runs_file: Path, targets: list[str], limits: dict[str, int], retries: int
) -> dict[str, Any]:
    """Return the configuration for plan.smk, which describes one Snakemake rule for each run of the plan.

    A rule's description has the run's inputs, command and resources. `targets` has the names of the runs to execute.
    `limits` maps the names of resources to the largest amount that one run may request. `retries` is how often a failed run
    is tried again.
    """
    runs = []
    for number, (name, run) in enumerate(plan.planned.items()):
        requested = {"mem_mb": round(run.memory_gb * 1024), "gpu": run.gpus, "runtime": math.ceil(run.minutes)}
        resources = {resource: min(amount, limits.get(resource, amount)) for resource, amount in requested.items()}
        resources = {resource: amount for resource, amount in resources.items() if amount}
        # The command runs in the project's folder, from which relative paths and `-m kitlib` (not installed) are resolved.
        command = ["cd", str(project_root()), "&&", sys.executable, "-m", "kitlib", "run-planned", str(runs_file), name]
        runs.append(
            {
                # The number distinguishes names that differ only in a replaced character.
                "rule": f"r{number}_{name.replace('-', '_').replace('.', '_')}",
                "input": [str(plan.planned[need].done_file) for need in run.needs],
                "done_file": str(run.done_file),
                "threads": run.threads,
                "resources": resources,
                "command": " ".join(word if word == "&&" else shlex.quote(word) for word in command),
            }
        )
    return {"runs": runs, "targets": [str(plan.planned[name].done_file) for name in targets], "retries": retries}


def _select_gpus(count: int | None) -> list[str]:
    """Return the indices of the first `count` GPUs, or of all GPUs if `count` is None.

    Raises PlanError if there are fewer than `count`.
    """
    available = _find_gpus() if count != 0 else []
    if count is not None and len(available) < count:
        raise PlanError(f"{count} GPUs were requested; available indices: {', '.join(available) or 'none'}")
    return available[:count]


def _find_gpus() -> list[str]:
    """Return the indices, as text, of the GPUs that a child process may use.

    They come from CUDA_VISIBLE_DEVICES or else from nvidia-smi, not from torch, whose import takes seconds and GPU memory.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [index for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if index and index != "-1"]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return []
    return [str(index) for index, _ in enumerate(line for line in listing.stdout.splitlines() if line.startswith("GPU "))]


def _run_engine(
    plan: Plan,
    runs_file: Path,
    states: dict[str, str],
    command: list[str],
    environment: dict[str, str],
    console: Console,
) -> int:
    """Run Snakemake's `command` to its end while showing the plan's progress; return Snakemake's exit code.

    `states` has the state of each run before the start. If this process is interrupted, Snakemake is interrupted too, and
    killed if it has not ended after a minute (ENDING_S).
    """
    with (
        (runs_file.parent / ENGINE_LOG).open("w", encoding="utf-8") as log,
        _ProgressDisplay(plan, states, console) as board,
    ):
        # Snakemake gets its own session, so that Ctrl-C reaches it only once, from here. If a script has started this
        # process with `&`, it ignores SIGINT, which child processes inherit; the handler makes Snakemake react to SIGINT.
        with handling({signal.SIGINT: signal.default_int_handler}):
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            while True:
                code = process.poll()
                for name in list(board.waiting):
                    board.show(name, _read_record(runs_file, name))
                if code is not None:
                    return code
                time.sleep(POLL_S)
        except BaseException:
            try:
                with suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    console.print("stopping the current runs; run the same command again to resume the plan")
                    process.wait(ENDING_S)
            finally:
                kill_family(process.pid)
                process.wait()
            raise


class _ProgressDisplay:
    """Display of a plan's progress.

    On a terminal, it shows a bar for the plan and one for each started run; elsewhere it prints a line when a run's state
    changes. In both cases, trainings also print a line per epoch.
    """

    def __init__(self, plan: Plan, states: dict[str, str], console: Console) -> None:
        self.waiting = [name for name, state in states.items() if state != "done"]
        self.runs, self.shown, self.shown_epoch = len(states), dict.fromkeys(states, ""), dict.fromkeys(states, "")
        self.bars: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            TextColumn("{task.fields[cell]:>12}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.overall = self.progress.add_task(plan.path.stem, total=self.runs, cell=self._done())

    def __enter__(self) -> "_ProgressDisplay":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, name: str, record: dict[str, Any]) -> None:
        """Update the display from the state record of the run `name`; an empty record (run not started) changes nothing."""
        if not record:
            return
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=None, cell="starts")
        if record["state"] == "done":
            self.waiting.remove(name)
            self.progress.update(self.bars[name], total=1, completed=1, cell="done")
        elif record["state"] == "failed":
            self.progress.update(self.bars[name], cell="failed")
        elif record.get("cells"):
            cell = f"cell {record['cell']}/{record['cells']}"
            self.progress.update(self.bars[name], total=record["cells"], completed=record["cell"] - 1, cell=cell)
        self.progress.update(self.overall, completed=self.runs - len(self.waiting), cell=self._done())
        epoch = record.get("epoch", "")  # "" after a retry has started
        if epoch and epoch != self.shown_epoch[name]:
            line = f"{time.strftime('%H:%M:%S')} {name}: {epoch}"
            self.progress.console.print(line, highlight=False, markup=False)
        self.shown_epoch[name] = epoch
        if record["state"] != self.shown[name] and self.progress.disable:
            self.progress.console.print(
                f"{time.strftime('%H:%M:%S')} {name} {record['state']}, {self._done()}", highlight=False
            )
        self.shown[name] = record["state"]

    def _done(self) -> str:
        return f"{self.runs - len(self.waiting)}/{self.runs} done"


def _read_record(runs_file: Path, name: str) -> dict[str, Any]:
    """Return the state record of the run `name`, or {} if the run was not started."""
    path = state_file(runs_file, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _failure_message(plan: Plan, records: dict[str, dict[str, Any]], done: int, unfinished: list[str], log: Path) -> str:
    """Return the error message for a plan that has ended with `done` runs done and the runs `unfinished` not done.

    `records` are the state records of all runs, and `log` is Snakemake's log file.
    """
    failed = [name for name in unfinished if records[name].get("state") == "failed"]
    # The record of a killed process still has the state "running".
    killed = [name for name in unfinished if records[name].get("state") == "running"]
    not_started = [name for name in unfinished if name not in (*failed, *killed)]
    lines = [f"{plan.path}: {done} of {len(plan.planned)} runs are done"]
    lines += [f"{name} failed on {records[name]['host']}: {records[name]['problem']}" for name in failed]
    lines += [
        f"{name} was killed on {records[name]['host']} without an error message; its folder: {plan.planned[name].folder}"
        for name in killed
    ]
    lines += [f"not started: {', '.join(not_started)}"] if not_started else []
    if not failed and not killed:
        lines += [f"Snakemake's log, {log}, ends with:", log_tail(log)]
    return "\n".join([*lines, "run the same command again to resume the plan"])
