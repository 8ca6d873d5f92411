"""Checks the inputs that a plan does not make itself: data folders, weights and runs must exist before its first run."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kitlib.competitions.registry import choose_folder, find_data
from kitlib.errors import BundleError, InputNotFound, PlanError
from kitlib.parameters import read_parameters
from kitlib.paths import find_input, find_run, find_starting_weights, project_root
from kitlib.plans.plan import Plan, PlannedRun

# Parameters of notebooks that name a run, or several.
RUNS = (
    *("prepare_run", "runs", "study_ensemble", "extra_run", "extra_runs", "lungs_run", "fuse_run", "published_fuse_run"),
    *("source_run", "segmenter", "also_on", "probes", "heat_runs", "resume_from"),
)


def check_inputs(plan: Plan, names: Iterable[str]) -> None:
    """Raise PlanError if unfinished runs in `names` read inputs that do not exist; the message lists all these inputs."""
    states = plan.states()
    if missing := missing_inputs(plan, [name for name in names if states[name] != "done"]):
        raise PlanError("\n  ".join([f"{plan.path}: inputs are missing, so nothing was started:", *missing]))


def missing_inputs(plan: Plan, names: Iterable[str]) -> list[str]:
    """Return one line for each missing input of the runs `names`. Inputs that a run needed by `names` makes are not missing.

    A run is assumed to make all inputs in its own folder and, if it is a command, in all folders among the command's
    arguments, such as the folder of phantoms. Pickled weights count as missing, because they are never loaded.
    """
    readers: dict[str, list[str]] = {}
    for name in names:
        run = plan.planned[name]
        made = [folder for other in _all_needs(plan, run) for folder in _made_by(other)]
        for parameter, value in _inputs(run):
            path = project_root() / value
            if not any(path.is_relative_to(folder) for folder in made) and (problem := _problem(parameter, value)):
                readers.setdefault(problem, []).append(run.step)
    return [f"{', '.join(dict.fromkeys(steps))}: {problem}" for problem, steps in readers.items()]


def _inputs(run: PlannedRun) -> Iterator[tuple[str, str]]:
    """Yield a pair for each input of a notebook's run: a kind ("competition", "starting_weights" or "run"), and a name."""
    if not run.notebook:
        return
    values = read_parameters(run.notebook) | run.parameters
    # Notebook 80 reads competition files only if `truth` is set, notebook 50 only if `source_run` is empty, notebook 60
    # never.
    reads = values.get("truth", "read") and not values.get("source_run") and run.notebook.stem != "60_fuse"
    if "competition" in values and reads:
        named = values["competition"]
        yield "competition", find_data(values["dataset"], named)[1] if "dataset" in values else choose_folder(named)
    yield from (("competition", folder) for folder in (*values.get("pool", {}).values(), *values.get("beside", [])))
    if weights := values["overrides"].get("starting_weights") if "recipe" in values else "":
        yield "starting_weights", weights
    if run.notebook.stem != "90_leaderboard":  # its parameter `runs` has folders that are searched for runs, not runs
        for parameter in RUNS:
            value: Any = values.get(parameter) or []
            yield from (("run", name) for name in ([value] if isinstance(value, str) else value))


def _all_needs(plan: Plan, run: PlannedRun) -> list[PlannedRun]:
    """Return all runs that `run` needs, directly or through other runs."""
    needs: dict[str, None] = {}
    waiting = list(run.needs)
    while waiting:
        name = waiting.pop()
        if name not in needs:
            needs[name] = None
            waiting += plan.planned[name].needs
    return [plan.planned[name] for name in needs]


def _made_by(run: PlannedRun) -> list[Path]:
    return [run.folder, *(project_root() / word for word in run.command if "/" in word)]


def _problem(parameter: str, value: str) -> str:
    """Return why `value`, an input of kind `parameter`, cannot be used, or "". Paths are relative to the project."""
    path = project_root() / value
    try:
        if parameter == "competition":
            find_input(path if "/" in value and path.is_dir() else value)
        elif parameter == "run":
            find_run(path if path.is_dir() and "/" in value else value)
        else:
            find_starting_weights(path if path.exists() else value)
    except (InputNotFound, BundleError) as error:
        return re.sub(r"[.;:]? (Available|Found)?:?$", "", str(error).splitlines()[0])
    return ""
