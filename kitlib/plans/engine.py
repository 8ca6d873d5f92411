"""Carry out a plan with Snakemake: it decides what runs when and where, this file asks it and shows how far it is."""

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
from kitlib.plans.one_run import SHARED_GPUS, state_file
from kitlib.plans.plan import Plan
from kitlib.processes import exiting_on_signals, handling, kill_family

ENGINE_LOG = "engine.log"
POLL_S = 0.5
ENDING_S = 60.0  # for the engine to end its runs, or to cancel them on a cluster, before it is killed


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
    """Do what is not done yet of the plan, or of the steps `only` and what they need; what is told of each run, by its name.

    `engine` are further arguments of Snakemake, such as --executor slurm --jobs 8. Without an executor runs share this
    machine: its `cores` (default: all) and `gpus` (default: those that are visible). With one, `gpus` are the most that a
    run asks for: with 0 all use the CPU. `afresh` removes all that is in the plan's folder first. A run that fails stops
    only those that need it. SIGTERM and SIGHUP end the runs, too, and raise SystemExit. Raises PlanError, and PlanError in
    the end if a run has failed.
    """
    folder = plan.runs / f".{plan.path.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "runs.json"
    with ExitStack() as held:
        held.enter_context(exiting_on_signals())
        _lock(folder / "lock", plan, held)
        if afresh:
            _remove_runs(plan, folder / "lock", held)
        states = plan.states()  # refuses foreign folders before anything starts
        wanted = plan.of_steps(only) if only else list(plan.planned)
        write_json(described, {name: run.as_json() for name, run in plan.planned.items()})
        for name, state in states.items():
            if state != "done":
                state_file(described, name).unlink(missing_ok=True)
        local = not {"--executor", "-e", "--profile"} & {argument.partition("=")[0] for argument in engine}
        shared = _shared_gpus(gpus) if local else list(map(str, range(gpus or 0)))
        # On this machine a run that asks for more than there is gets what there is, and the machine for itself.
        most = {"gpu": len(shared)} if local or gpus is not None else {}
        most |= {"mem_mb": psutil.virtual_memory().total // 2**20} if local else {}
        write_json(folder / "config.json", configuration(plan, described, wanted, most, retries))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("plan.smk"))]
        command += ["--configfile", str(folder / "config.json"), "--directory", str(folder), "--keep-going", "--nocolor"]
        # Marks carry the key of all that they follow from: they alone decide. The lock is ours, and gone with its process.
        command += ["--rerun-incomplete", "--rerun-triggers", "input", "--nolock"]
        if local:
            command += ["--cores", str(cores or len(os.sched_getaffinity(0)))]
            command += ["--resources", *(f"{name}={value}" for name, value in most.items())]
        environment = {**os.environ, **({SHARED_GPUS: ",".join(shared)} if local else {})}
        code = _follow(plan, described, states, [*command, *engine], environment, console)
    told = {name: _told(described, name) for name in plan.planned}
    ended = plan.states()
    unfinished = [name for name in _with_needs(plan, wanted) if ended[name] != "done"]
    if code or unfinished:
        done = sum(state == "done" for state in ended.values())
        raise PlanError(_failure(plan, told, done, unfinished, folder / ENGINE_LOG))
    return told


def _lock(path: Path, plan: Plan, held: ExitStack) -> None:
    lock = held.enter_context(open(path, "w"))  # noqa: SIM115  `held` closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PlanError(f"{plan.path} is being carried out in {plan.runs} already; wait for that") from error


def _remove_runs(plan: Plan, own: Path, held: ExitStack) -> None:
    """Empty the plan's folder but for its locks, which would hold nobody off once they were removed."""
    locks = sorted(plan.runs.glob(".*/lock"))
    for lock in locks:
        if lock != own:  # of another plan with the same folder
            _lock(lock, plan, held)
    for folder in (plan.runs, *(lock.parent for lock in locks)):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if entry / "lock" not in locks:
                    shutil.rmtree(entry)
            elif entry not in locks:
                entry.unlink()


def describe_plan(plan: Plan) -> Table:
    """What would be done: each step with the state of its runs, and what a run of it asks for."""
    table = Table("step", "runs", "does", "asks for", title=str(plan.path), box=SIMPLE)
    for column in (table.columns[0], table.columns[2], table.columns[3]):
        column.no_wrap = True
    table.columns[2].max_width = 24
    states = plan.states()
    for step in dict.fromkeys(run.step for run in plan.planned.values()):
        runs = [plan.planned[name] for name in plan.of_steps([step])]
        by_state: dict[str, list[str]] = {}
        for run in runs:
            by_state.setdefault(states[run.name], []).append(run.name.removeprefix(step).removeprefix("-"))
        said = "; ".join(" ".join([state, *labels]).strip() for state, labels in by_state.items())
        what = runs[0].notebook.stem if runs[0].notebook else shlex.join(runs[0].command)
        asked = {"CPU": runs[0].threads, "GPU": runs[0].gpus, "GB": runs[0].memory_gb, "min": runs[0].minutes}
        asks = ", ".join(f"{value:g} {unit}" for unit, value in asked.items() if value)
        table.add_row(step, said, what, asks)
    return table


def configuration(plan: Plan, described: Path, wanted: list[str], most: dict[str, int], retries: int) -> dict[str, Any]:
    """What plan.smk reads: a rule for each run with its inputs, command and resources, none above `most`."""
    runs = []
    for number, (name, run) in enumerate(plan.planned.items()):
        asked = {"mem_mb": round(run.memory_gb * 1024), "gpu": run.gpus, "runtime": math.ceil(run.minutes)}
        resources = {what: min(amount, most.get(what, amount)) for what, amount in asked.items()}
        resources = {what: amount for what, amount in resources.items() if amount}
        # The project's folder is where `inputs` and `notebooks` lie, and -m kitlib is found from it without being installed.
        command = ["cd", str(project_root()), "&&", sys.executable, "-m", "kitlib", "run-planned", str(described), name]
        runs.append(
            {
                # By number, as names that differ in a sign alone would become one.
                "rule": f"r{number}_{name.replace('-', '_').replace('.', '_')}",
                "input": [str(plan.planned[need].mark) for need in run.needs],
                "mark": str(run.mark),
                "threads": run.threads,
                "resources": resources,
                "command": " ".join(word if word == "&&" else shlex.quote(word) for word in command),
            }
        )
    return {"runs": runs, "targets": [str(plan.planned[name].mark) for name in wanted], "retries": retries}


def _shared_gpus(wanted: int | None) -> list[str]:
    there = _gpu_indices() if wanted != 0 else []
    if wanted is not None and len(there) < wanted:
        raise PlanError(f"{wanted} GPUs are asked for; there are: {', '.join(there) or 'none'}")
    return there[:wanted]


def _gpu_indices() -> list[str]:
    """The GPUs that a process started here may use. By nvidia-smi: importing torch takes seconds and memory on the GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [each for each in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if each and each != "-1"]
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return []
    return [str(index) for index, _ in enumerate(line for line in found.stdout.splitlines() if line.startswith("GPU "))]


def _follow(
    plan: Plan,
    described: Path,
    states: dict[str, str],
    command: list[str],
    environment: dict[str, str],
    console: Console,
) -> int:
    """Run the engine to its end and show how far the plan is; the engine's exit code."""
    with (described.parent / ENGINE_LOG).open("w", encoding="utf-8") as log, _Board(plan, states, console) as board:
        # A session of its own, so that an interruption reaches it once and from here. It can be interrupted also where this
        # process cannot: scripts ignore SIGINT for `&`.
        with handling({signal.SIGINT: signal.default_int_handler}):
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            while True:
                code = process.poll()
                for name in list(board.waiting):
                    board.show(name, _told(described, name))
                if code is not None:
                    return code
                time.sleep(POLL_S)
        except BaseException:
            try:
                with suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    console.print("ending the runs that are going on; the same command goes on with the plan")
                    process.wait(ENDING_S)
            finally:
                kill_family(process.pid)
                process.wait()
            raise


class _Board:
    """How far a plan is: on a terminal a bar for it and one for each run that has begun, elsewhere a line a change."""

    def __init__(self, plan: Plan, states: dict[str, str], console: Console) -> None:
        self.waiting = [name for name, state in states.items() if state != "done"]
        self.runs, self.shown = len(states), dict.fromkeys(states, "")
        self.bars: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            TextColumn("{task.fields[cell]:>12}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.overall = self.progress.add_task(plan.path.stem, total=self.runs, cell=self._done())

    def __enter__(self) -> "_Board":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, name: str, told: dict[str, Any]) -> None:
        if not told:
            return
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=None, cell="starts")
        if told["state"] == "done":
            self.waiting.remove(name)
            self.progress.update(self.bars[name], total=1, completed=1, cell="done")
        elif told["state"] == "failed":
            self.progress.update(self.bars[name], cell="failed")
        elif told.get("cells"):
            cell = f"cell {told['cell']}/{told['cells']}"
            self.progress.update(self.bars[name], total=told["cells"], completed=told["cell"] - 1, cell=cell)
        self.progress.update(self.overall, completed=self.runs - len(self.waiting), cell=self._done())
        if told["state"] != self.shown[name] and self.progress.disable:
            self.progress.console.print(
                f"{time.strftime('%H:%M:%S')} {name} {told['state']}, {self._done()}", highlight=False
            )
        self.shown[name] = told["state"]

    def _done(self) -> str:
        return f"{self.runs - len(self.waiting)}/{self.runs} done"


def _told(described: Path, name: str) -> dict[str, Any]:
    path = state_file(described, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _with_needs(plan: Plan, wanted: Iterable[str]) -> list[str]:
    found, waiting = set(), list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += plan.planned[name].needs
    return [name for name in plan.planned if name in found]


def _failure(plan: Plan, told: dict[str, dict[str, Any]], done: int, unfinished: list[str], log: Path) -> str:
    failed = [name for name in unfinished if told[name].get("state") == "failed"]
    # A killed process could not say that it has failed.
    vanished = [name for name in unfinished if told[name].get("state") == "running"]
    waiting = [name for name in unfinished if name not in (*failed, *vanished)]
    lines = [f"{plan.path}: {done} of {len(plan.planned)} runs are done"]
    lines += [f"{name} failed on {told[name]['host']}: {told[name]['problem']}" for name in failed]
    lines += [
        f"{name} was killed on {told[name]['host']} without a word; its folder: {plan.planned[name].folder}"
        for name in vanished
    ]
    lines += [f"not begun: {', '.join(waiting)}"] if waiting else []
    if not failed and not vanished:
        lines += [f"the engine says, in {log}:", log_tail(log)]
    return "\n".join([*lines, "the same command goes on with what is not done"])
