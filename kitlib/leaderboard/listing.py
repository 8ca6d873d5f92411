"""What run folders say of themselves, finished or not: one entry each, none left out."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitlib.plans.one_run import state_file
from kitlib.plans.plan import RECORD as PLANNED
from kitlib.recipes.named import RECIPES
from kitlib.runs.record import METRICS, RECORD

# What a training leaves in a fold's folder.
FOLD_FILES = (METRICS, "checkpoints")

SHORT = 8  # digits of a fingerprint or a commit that are shown

# A file that only runs of a kind have; the first that fits.
KINDS = {
    "fusion": ("fusion.json",),
    "ensemble": ("ensemble/ensemble.json",),
    "study": ("tables/study_scores.parquet", "tables/image_scores.parquet"),
    "detector": ("tables/coverage.parquet", "tables/detections.parquet"),
    "findings": ("tables/class_scores.parquet",),
    "lungs": ("tables/mask_scores.parquet",),
    "applied lungs": ("tables/lungs.parquet",),
    "prepared": ("tables/folds.parquet",),
    "pseudo-labels": ("left_out.csv",),
    "report": ("comparison.csv",),
}


@dataclass(frozen=True)
class ListedRun:
    """A run folder: `state` is finished, unfinished, failed or damaged, `remark` says what there is to say about that.

    `record`, `metrics` and `plan` are the folder's JSON files, empty where one is missing or damaged; `folds` has the
    metrics of each fold that is trained, by its number or, of nested folds, by "outer/inner", such as "2/0".
    """

    name: str
    folder: Path
    kind: str
    state: str
    remark: str
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    folds: dict[int | str, dict[str, Any]] = field(default_factory=dict)

    @property
    def nested(self) -> bool:
        """Whether folds were held out from its models, so that none was trained on all of the prepared run's."""
        return any(isinstance(fold, str) for fold in self.folds)

    @property
    def parameters(self) -> dict[str, Any]:
        """Of its notebook: as it recorded them, else those that its plan gave."""
        return self.record.get("parameters") or self.plan.get("parameters") or {}


def list_runs(roots: Iterable[str | Path], skip: Iterable[str | Path] = ()) -> list[ListedRun]:
    """All runs in the folders `roots` or below them, without the folders `skip`.

    They are named by their path from the root, or by their whole path where there are several roots.
    Raises FileNotFoundError for a root that is no folder.
    """
    skipped, tops = {Path(folder).resolve() for folder in skip}, [Path(root) for root in roots]
    found: dict[Path, ListedRun] = {}
    for root in tops:
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder; name one with runs in or below it")
        for place, folders, _ in os.walk(root):
            folder = Path(place)
            if is_run(folder):
                # Whatever lies in a run is its own.
                folders.clear()
                if folder.resolve() not in skipped:
                    name = folder if len(tops) > 1 else folder.name if folder == root else folder.relative_to(root)
                    found.setdefault(folder.resolve(), list_run(folder, str(name)))
            else:
                folders[:] = sorted(each for each in folders if not each.startswith("."))
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a notebook or a plan has begun a run in this folder."""
    return any((folder / name).is_file() for name in (RECORD, METRICS, PLANNED)) or any(
        (fold / name).exists() for fold in _folds(folder).values() for name in FOLD_FILES
    )


def list_run(folder: Path, name: str) -> ListedRun:
    """One run folder, called `name`."""
    remarks: list[str] = []
    record, metrics, planned = (_read(folder / file, remarks) for file in (RECORD, METRICS, PLANNED))
    plan = planned.get("run", {})
    trained = {fold: path / METRICS for fold, path in _folds(folder).items() if (path / METRICS).is_file()}
    folds = {fold: _read(path, remarks) for fold, path in trained.items()}
    if not all(folds.values()) or ((folder / METRICS).is_file() and not metrics):
        state = "damaged"
    elif metrics:
        state = "finished"
        if not (folder / RECORD).is_file():
            remarks.append(f"no {RECORD}, as an older kitlib leaves it")
    elif plan and not plan.get("notebook") and (folder / f"done-{planned.get('key')}.json").is_file():
        state = "finished"
    else:
        state, told = _begun(folder, plan.get("name", ""))
        remarks += [told] if told else []
    return ListedRun(name, folder, _kind(folder, plan), state, "; ".join(remarks), record, metrics, plan, folds)


def describe(runs: Sequence[ListedRun]) -> dict[str, Any]:
    """What one run, or the runs of one model's folds together, say of how they came about; memory in MB of 10^6 bytes.

    kind, model, state, recipe, `changes` (from the recipe, and what else was not as usual), folds, `cross_fitted` (a
    fusion's score under settings that were tuned on other folds), started, wall_s, `training_s` (of all epochs, whatever
    sessions they took), memory_mb, gpu, gpu_memory_mb, host and commit; None or empty where nothing is said.
    """
    first, trained = runs[0], {fold: metrics for run in runs for fold, metrics in run.folds.items()}
    records, folds = [run.record for run in runs], list(trained.values())
    both = [*records, *folds]
    # A damaged file has no figures, and an older kitlib's not all of them.
    numbers = {
        key: [each[key] for each in both if isinstance(each.get(key), int | float)]
        for key in ("wall_s", "seconds", "peak_memory_mb", "peak_child_memory_mb", "peak_gpu_memory_mb")
    }
    gpus = dict.fromkeys(str(each["gpu"]) for each in both if each.get("gpu"))
    recipe, changes = _recipe(first, folds)
    asked = [fold for run in runs if "recipe" in run.parameters for fold in _asked(run)]
    commits = dict.fromkeys(_commit(record) for record in records if record)
    return {
        "kind": first.kind,
        "model": str(first.metrics.get("model") or next((fold.get("model", "") for fold in folds), "")),
        "state": first.state,
        "recipe": recipe,
        "changes": changes,
        "folds": ", ".join(map(str, sorted(trained, key=_in_order)))
        + (f" of {len(asked)}" if len(asked) > len(folds) else ""),
        "cross_fitted": first.metrics.get("cross_fitted_score"),
        "started": min((str(record["started"]) for record in records if "started" in record), default=""),
        "wall_s": sum(numbers["wall_s"]) or None,
        "training_s": sum(numbers["seconds"]) or None,
        "memory_mb": max((*numbers["peak_memory_mb"], *numbers["peak_child_memory_mb"]), default=None),
        "gpu": ", ".join(gpus),
        "gpu_memory_mb": max(numbers["peak_gpu_memory_mb"], default=None),
        "host": ", ".join(dict.fromkeys(str(record["host"]) for record in records if record.get("host"))),
        "commit": ", ".join(commits),
    }


def _read(path: Path, remarks: list[str]) -> dict[str, Any]:
    """The JSON object; empty where there is none, and if it cannot be read, a remark says so."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remarks.append(f"{path.parent.name}/{path.name} cannot be read ({error})")
        return {}
    if not isinstance(value, dict) or not value:
        remarks.append(f"{path.parent.name}/{path.name} holds no figures")
        return {}
    return value


def _begun(folder: Path, name: str) -> tuple[str, str]:
    """State and remark of a run without results: what the newest plan that has begun it says."""
    told = []
    for described in folder.parent.glob(".*/runs.json") if name else ():
        state = _read(state_file(described, name), [])
        if state.get("state") in ("failed", "running"):
            told.append(state)
    if not told:
        return "unfinished", ""
    newest = max(told, key=lambda state: state.get("started", 0))
    if newest["state"] == "failed":
        return "failed", str(newest.get("problem", "")).split("\n")[0]
    return "unfinished", f"at cell {newest.get('cell')} of {newest.get('cells')} on {newest.get('host')}, or killed there"


def _folds(folder: Path) -> dict[int | str, Path]:
    numbered = {path.name.removeprefix("fold"): path for path in folder.glob("fold*")}
    found: dict[int | str, Path] = {int(number): numbered[number] for number in sorted(numbered) if number.isdigit()}
    for path in sorted(folder.glob("outer*/fold*")):
        outer, inner = path.parent.name.removeprefix("outer"), path.name.removeprefix("fold")
        if outer.isdigit() and inner.isdigit():
            found[f"{outer}/{inner}"] = path
    return found


def _in_order(fold: int | str) -> list[int]:
    return [int(part) for part in str(fold).split("/")]


def _asked(run: ListedRun) -> list[Any]:
    """The folds, or pairs of an outer and an inner one, that its parameters ask for."""
    folds, outer_folds = (run.parameters.get(name) or [] for name in ("folds", "outer_folds"))
    return [(outer, fold) for outer in outer_folds for fold in folds if fold != outer] if outer_folds else folds


def _kind(folder: Path, plan: dict[str, Any]) -> str:
    for kind, names in KINDS.items():
        if any((place / name).is_file() for place in (folder, *_folds(folder).values()) for name in names):
            return kind
    return "command" if plan.get("command") else "other"


def _recipe(run: ListedRun, folds: list[dict[str, Any]]) -> tuple[str, str]:
    """The recipe's name and what differs from it; without a name, the recipe that it is exactly, if there is one."""
    made = next((fold["recipe"] for fold in folds if isinstance(fold.get("recipe"), dict)), None)
    name = run.parameters.get("recipe", "")
    known = {each: _plain(dataclasses.asdict(recipe)) for each, recipe in RECIPES.items()}
    if not name and made is not None:
        name = next((each for each, fields in known.items() if fields == made), "not stated")
    changed: dict[str, Any] = {}
    if made is not None and name in known:
        changed = {key: made.get(key) for key in sorted({*made, *known[name]}) if made.get(key) != known[name].get(key)}
    elif made is None:
        changed = dict(run.parameters.get("overrides") or {})
    usual = {"seed": 0, "limit_train": 0, "limit_validation": 0, "extra_run": ""}
    if "recipe" in run.parameters:
        changed |= {key: run.parameters[key] for key, value in usual.items() if run.parameters.get(key, value) != value}
    return str(name), ", ".join(f"{key}={value}" for key, value in changed.items())


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _commit(record: dict[str, Any]) -> str:
    """The commit, shortened; where there was no clone, the digest of the library."""
    commit, _, changes = str(record.get("git_commit") or "").partition("+")
    if commit:
        return commit[:SHORT] + (f"+{changes}" if changes else "")
    return f"kitlib {str(record.get('kitlib_digest', ''))[:SHORT]}"
