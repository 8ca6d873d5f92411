"""Lists run folders, finished or not, with each run's kind, state, parameters, recipe, duration, memory and versions."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitlib.plans.one_run import state_file
from kitlib.plans.plan import RECORD as PLANNED
from kitlib.recipes.named import RECIPES
from kitlib.runs import run_kinds
from kitlib.runs.kaggle_scores import KAGGLE, current_score
from kitlib.runs.record import METRICS, RECORD
from kitlib.runs.run_kinds import find_kind, fold_folders, walk_runs

SHORT = 8  # number of digits shown for a fingerprint or commit


@dataclass(frozen=True)
class ListedRun:
    """One run folder: its name, kind, state and the contents of its JSON files.

    `kind` is "command", "other" or a kind in kitlib.runs.run_kinds.KINDS, such as "study". `state` is "finished",
    "unfinished", "failed" or "damaged"; `remark` explains it. `record`, `metrics`, `plan` and `kaggle` are the contents of
    the folder's JSON files; each is empty if its file is missing or damaged. `folds` maps each trained fold to its metrics;
    the key is the fold's number or, for nested folds, "outer/inner", such as "2/0".
    """

    name: str
    folder: Path
    kind: str
    state: str
    remark: str
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    kaggle: dict[str, Any] = field(default_factory=dict)
    folds: dict[int | str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_nested(self) -> bool:
        """Whether the run is a nested cross-validation, in which each model was trained without its outer fold."""
        return any(isinstance(fold, str) for fold in self.folds)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the run's notebook, from its record or, if the record has none, from its plan."""
        return self.record.get("parameters") or self.plan.get("parameters") or {}


def list_runs(roots: Iterable[str | Path], skip: Iterable[str | Path] = ()) -> list[ListedRun]:
    """Return all runs in and below the folders `roots`, except those whose folder is in `skip`.

    A run's name is its path relative to the root, or its full path if there are several roots. Raises FileNotFoundError if
    one of `roots` is not a folder.
    """
    skipped, root_folders = {Path(folder).resolve() for folder in skip}, [Path(root) for root in roots]
    runs: dict[Path, ListedRun] = {}
    for root in root_folders:
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; give a run folder, or a folder with runs below it")
        for folder in walk_runs(root, is_run):
            if folder.resolve() not in skipped:
                name = folder if len(root_folders) > 1 else folder.name if folder == root else folder.relative_to(root)
                runs.setdefault(folder.resolve(), list_run(folder, str(name)))
    return list(runs.values())


def is_run(folder: Path) -> bool:
    """Return whether `folder` is a run folder, that is, whether a notebook or a plan has started a run in it."""
    return (folder / PLANNED).is_file() or run_kinds.is_run(folder)


def list_run(folder: Path, name: str) -> ListedRun:
    """Return the run in `folder` as a ListedRun called `name`; its state and remark report missing and damaged files."""
    remarks: list[str] = []
    files = (RECORD, METRICS, PLANNED, KAGGLE)
    record, metrics, planned, kaggle = (_read_json(folder / file, remarks) for file in files)
    plan = planned.get("run", {})
    trained = {fold: path / METRICS for fold, path in fold_folders(folder).items() if (path / METRICS).is_file()}
    folds = {fold: _read_json(path, remarks) for fold, path in trained.items()}
    if not all(folds.values()) or ((folder / METRICS).is_file() and not metrics):
        state = "damaged"
    elif metrics:
        state = "finished"
        if not (folder / RECORD).is_file():
            remarks.append(f"no {RECORD}: the run was written by an older kitlib")
    elif plan and not plan.get("notebook") and (folder / f"done-{planned.get('key')}.json").is_file():
        state = "finished"
    else:
        state, problem = _read_plan_state(folder, plan.get("name", ""))
        remarks += [problem] if problem else []
    return ListedRun(
        name,
        folder,
        find_kind(folder) or ("command" if plan.get("command") else "other"),
        state,
        "; ".join(remarks),
        record,
        metrics,
        plan,
        kaggle,
        folds,
    )


def describe(runs: Sequence[ListedRun]) -> dict[str, Any]:
    """Return how one model was trained, from its runs, as a dictionary for one row of the leaderboard.

    The keys are `kind`, `model`, `state`, `recipe`, `changes` (settings that differ from the recipe, and parameters that
    differ from their defaults), `folds`, `cross_fitted` (a fusion's score with settings tuned on the other folds),
    `kaggle_public` and `kaggle_private` (Kaggle's scores of the last submission that used the run's fusion), `started`,
    `wall_s`, `training_s` (seconds of all epochs in all sessions), `memory_mb` and `gpu_memory_mb` (peaks, in MB of 10^6
    bytes), `gpu`, `host` and `commit`. A value that is not recorded is None or "".
    """
    first, trained = runs[0], {fold: metrics for run in runs for fold, metrics in run.folds.items()}
    records, folds = [run.record for run in runs], list(trained.values())
    sources = [*records, *folds]
    # Keys may be missing, because a damaged file counts as empty and older versions of kitlib recorded fewer keys.
    numbers = {
        key: [source[key] for source in sources if isinstance(source.get(key), int | float)]
        for key in ("wall_s", "seconds", "peak_memory_mb", "peak_child_memory_mb", "peak_gpu_memory_mb")
    }
    gpus = dict.fromkeys(str(source["gpu"]) for source in sources if source.get("gpu"))
    recipe, changes = _recipe_and_changes(first, folds)
    requested = [fold for run in runs if "recipe" in run.parameters for fold in _requested_folds(run)]
    commits = dict.fromkeys(_short_commit(record) for record in records if record)
    submission = current_score(first.kaggle, first.record)
    return {
        "kind": first.kind,
        "model": str(first.metrics.get("model") or next((fold.get("model", "") for fold in folds), "")),
        "state": first.state,
        "recipe": recipe,
        "changes": changes,
        "folds": ", ".join(map(str, sorted(trained, key=_fold_sort_key)))
        + (f" of {len(requested)}" if len(requested) > len(folds) else ""),
        "cross_fitted": first.metrics.get("cross_fitted_score"),
        "kaggle_public": submission.get("public_score"),
        "kaggle_private": submission.get("private_score"),
        "started": min((str(record["started"]) for record in records if "started" in record), default=""),
        "wall_s": sum(numbers["wall_s"]) or None,
        "training_s": sum(numbers["seconds"]) or None,
        "memory_mb": max((*numbers["peak_memory_mb"], *numbers["peak_child_memory_mb"]), default=None),
        "gpu": ", ".join(gpus),
        "gpu_memory_mb": max(numbers["peak_gpu_memory_mb"], default=None),
        "host": ", ".join(dict.fromkeys(str(record["host"]) for record in records if record.get("host"))),
        "commit": ", ".join(commits),
    }


def _read_json(path: Path, remarks: list[str]) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file is missing or damaged.

    If it is damaged, a message about it is appended to the list `remarks`.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remarks.append(f"{path.parent.name}/{path.name} cannot be read ({error})")
        return {}
    if not isinstance(value, dict) or not value:
        remarks.append(f"{path.parent.name}/{path.name} is not a JSON object with values")
        return {}
    return value


def _read_plan_state(folder: Path, name: str) -> tuple[str, str]:
    """Return the state and the remark of a run without results, as recorded by the last plan that started the run."""
    states = []
    for described in folder.parent.glob(".*/runs.json") if name else ():
        state = _read_json(state_file(described, name), [])
        if state.get("state") in ("failed", "running"):
            states.append(state)
    if not states:
        return "unfinished", ""
    newest = max(states, key=lambda state: state.get("started", 0))
    if newest["state"] == "failed":
        return "failed", str(newest.get("problem", "")).split("\n")[0]
    return "unfinished", f"at cell {newest.get('cell')} of {newest.get('cells')} on {newest.get('host')}, running or killed"


def _fold_sort_key(fold: int | str) -> list[int]:
    return [int(part) for part in str(fold).split("/")]


def _requested_folds(run: ListedRun) -> list[Any]:
    """Return the list of folds in the run's parameters: numbers or, for nested folds, pairs (outer, inner)."""
    folds, outer_folds = (run.parameters.get(name) or [] for name in ("folds", "outer_folds"))
    return [(outer, fold) for outer in outer_folds for fold in folds if fold != outer] if outer_folds else folds


def _recipe_and_changes(run: ListedRun, folds: list[dict[str, Any]]) -> tuple[str, str]:
    """Return two texts: the name of the run's recipe, and the differences from this recipe, such as "epochs=3, seed=2".

    If the run's parameters do not name a recipe, the name is that of the published recipe with the same fields or, if there
    is none, "not stated".
    """
    used = next((fold["recipe"] for fold in folds if isinstance(fold.get("recipe"), dict)), None)
    name = run.parameters.get("recipe", "")
    recipes = {recipe_name: _as_json(dataclasses.asdict(recipe)) for recipe_name, recipe in RECIPES.items()}
    if not name and used is not None:
        name = next((recipe_name for recipe_name, fields in recipes.items() if fields == used), "not stated")
    changed: dict[str, Any] = {}
    if used is not None and name in recipes:
        changed = {key: used.get(key) for key in sorted({*used, *recipes[name]}) if used.get(key) != recipes[name].get(key)}
    elif used is None:
        changed = dict(run.parameters.get("overrides") or {})
    defaults = {"seed": 0, "limit_train": 0, "limit_validation": 0, "extra_run": ""}
    if "recipe" in run.parameters:
        changed |= {key: run.parameters[key] for key, value in defaults.items() if run.parameters.get(key, value) != value}
    return str(name), ", ".join(f"{key}={value}" for key, value in changed.items())


def _as_json(value: Any) -> Any:
    """Return `value` as it would be after writing it to JSON and reading it back, with lists instead of tuples."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _short_commit(record: dict[str, Any]) -> str:
    """Return the shortened git commit in a run's record, or kitlib's digest if the run was not made in a git clone."""
    commit, _, changes = str(record.get("git_commit") or "").partition("+")
    if commit:
        return commit[:SHORT] + (f"+{changes}" if changes else "")
    return f"kitlib {str(record.get('kitlib_digest', ''))[:SHORT]}"
