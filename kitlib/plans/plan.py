"""A plan: many runs of notebooks and commands, what each needs, and which of them are done. Read strictly from YAML."""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from kitlib.errors import PlanError, SettingsError
from kitlib.notebook import check_parameters
from kitlib.paths import project_root
from kitlib.settings import Settings, from_dict

# Parameters of notebooks that change how long a run takes, or where it goes on, and not what comes out of it.
WITHOUT_EFFECT = frozenset({"workers", "at_once", "session_hours", "resume_from", "packed"})
RECORD = "plan.json"  # in a run's folder: which plan has begun it, with which key
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Step(Settings):
    """One step as the YAML says it: exactly one of `notebook` and `command`.

    A step with a matrix has a run for each combination of its values. In any string, `{name}` stands for a variable, a value
    of the step's own matrix, the run's own folder (`{run}`), or the folder of another step's run, which is then needed
    first: of the run with the same values, where both steps have a matrix of these names. Where the other step's matrix has
    names that this one lacks, it is a list of all such runs, and in a list they take their places among the others.
    """

    notebook: str = ""  # its name below notebooks/, such as 30_train_study
    parameters: dict[str, Any] = field(default_factory=dict)  # of the notebook; `run_folder` is given by the plan
    command: tuple[str | int | float, ...] = ()  # "python" is the interpreter of this kit; runs in the project's folder
    result: str = "{run}/metrics.json"  # the file that only a success leaves
    matrix: dict[str, Any] = field(default_factory=dict)  # name -> list of values
    needs: tuple[str, ...] = ()  # further steps, whose folders it does not name
    threads: int = 1  # CPU threads
    gpus: int = 0
    memory_gb: float = 4.0
    minutes: float = 0.0  # it is stopped then; 0: no limit


@dataclass(frozen=True)
class _File(Settings):
    extends: str = ""  # another plan's file, beside this one: what stands here is added to it or replaces it
    runs: str = ""  # the folder of the runs' folders; relative to the project's root
    variables: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # notebook -> fields of its steps that do not say otherwise
    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run. Everything but the folders is the same wherever the plan runs."""

    name: str  # the step's, followed by its values: study-0
    step: str
    values: dict[str, Any]  # of its step's matrix
    folder: Path
    notebook: Path | None
    parameters: dict[str, Any]
    command: tuple[str, ...]
    result: Path
    needs: tuple[str, ...]  # names of runs
    threads: int
    gpus: int
    memory_gb: float
    minutes: float
    key: str  # of all that its result follows from: parameters with the notebook's defaults, and the keys of what it needs

    @property
    def mark(self) -> Path:
        """The file that says: this run is done, with these parameters and on these inputs."""
        return self.mark_of(self.key)

    def mark_of(self, key: str) -> Path:
        """The file that says the same of another key, with which this folder may have been begun."""
        return self.folder / f"done-{key}.json"

    def state(self) -> str:
        """done, new, "goes on" (begun with this key), or changed (done or begun with another)."""
        if self.mark.is_file():
            return "done"
        begun = self.begun_key()
        return "new" if begun is None else "goes on" if begun == self.key else "changed"

    def begun_key(self) -> str | None:
        """The key with which its folder was begun, None where there is no such folder.

        Raises PlanError for a folder that no plan has begun: starting over would delete somebody's work.
        """
        record = self.folder / RECORD
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))["key"]
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise PlanError(f"{self.folder} holds something that no plan has made; move it away, or name other `runs`")
        return None

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PlannedRun":
        paths = {name: Path(values[name]) for name in ("folder", "result")}
        notebook = Path(values["notebook"]) if values["notebook"] else None
        lists = {name: tuple(values[name]) for name in ("command", "needs")}
        return cls(**{**values, **paths, **lists, "notebook": notebook})


@dataclass(frozen=True)
class Plan:
    """Runs by name, each after those that it needs."""

    path: Path
    runs: Path
    planned: dict[str, PlannedRun]

    def states(self) -> dict[str, str]:
        """State by run; a done run goes on again where something that it needs is not done."""
        states: dict[str, str] = {}
        for name, run in self.planned.items():
            state = run.state()
            again = state == "done" and any(states[need] != "done" for need in run.needs)
            states[name] = "goes on" if again else state
        return states

    def of_steps(self, steps: Iterable[str]) -> list[str]:
        """Names of the runs of some steps. Raises PlanError for a step that is not there."""
        chosen, known = set(steps), {run.step for run in self.planned.values()}
        if chosen - known:
            raise PlanError(
                f"{self.path} has no step {', '.join(sorted(chosen - known))}; it has: {', '.join(sorted(known))}"
            )
        return [name for name, run in self.planned.items() if run.step in chosen]


class _Several(list):
    """The folders of several runs: a list that opens into the list around it."""


def read_plan(path: str | Path, runs: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan at `path`, with `changes` to its variables and its runs in `runs` instead of where it says.

    Raises PlanError with every step's first fault: unknown keys and placeholders, unknown parameters of a notebook, cycles.
    """
    path = Path(path)
    read = _read_file(path)
    unknown = sorted(set(changes or {}) - set(read.variables))
    if unknown:
        raise PlanError(f"{path} has no variable {', '.join(unknown)}; it has: {', '.join(read.variables) or 'none'}")
    variables = read.variables | dict(changes or {})
    if not (runs or read.runs):
        raise PlanError(f"{path}: runs is missing, the folder for the runs' folders, such as runs/siim")
    folder = (project_root() / (runs or read.runs)).resolve()
    steps = {name: _step(path, name, values, read.defaults) for name, values in read.steps.items()}
    _check_names(path, steps, variables)
    planned: dict[str, PlannedRun] = {}
    for name in _in_order(path, steps, variables):
        for values in _combinations(path, name, steps[name].matrix):
            try:
                run = _planned(name, steps, values, variables, folder, planned)
            except RecursionError as error:
                raise PlanError(f"{path}, step {name}: a variable that stands for itself") from error
            except (ValueError, FileNotFoundError) as error:
                raise PlanError(f"{path}, step {name}: {error}") from error
            planned[run.name] = run
    return Plan(path, folder, planned)


def _read_file(path: Path) -> _File:
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in path.parent.glob("*.yaml"))) or "none"
        raise PlanError(f"no plan {path}; in that folder there are: {there}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        read = from_dict(_File, values)
    except (yaml.YAMLError, SettingsError) as error:
        raise PlanError(f"{path}: {str(error).replace('_File', 'a plan')}") from error
    if not read.extends:
        return read
    base = asdict(_read_file(path.parent / read.extends))
    return from_dict(_File, _merged(base, {key: value for key, value in values.items() if key != "extends"}))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], changes[key]) for key in base if isinstance(base[key], dict) and key in changes}
    return base | changes | both


def _step(path: Path, name: str, values: Any, defaults: dict[str, Any]) -> Step:
    if not re.fullmatch(r"[a-z]\w*", name):
        raise PlanError(f"{path}: a step cannot be called {name!r}: letters, digits and _, a small letter first")
    try:
        notebook = values.get("notebook") if isinstance(values, dict) else None
        usual = defaults.get(notebook, {}) if isinstance(notebook, str) else {}
        step = from_dict(Step, _merged(usual, values) if usual else values)
    except SettingsError as error:
        raise PlanError(f"{path}, step {name}: {error}") from error
    if bool(step.notebook) == bool(step.command):
        raise PlanError(f"{path}, step {name}: wanted exactly one of notebook and command")
    if step.command and step.parameters:
        raise PlanError(f"{path}, step {name}: parameters are a notebook's; a command has its arguments")
    return step


def _check_names(path: Path, steps: dict[str, Step], variables: dict[str, Any]) -> None:
    """Raise PlanError where a placeholder could mean two things."""
    taken = [*steps, *variables, "run"]
    taken += sorted({name for step in steps.values() for name in step.matrix})
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        raise PlanError(f"{path}: {', '.join(twice)}: a step, a variable and a matrix need names of their own")


def _named(step: Step, variables: dict[str, Any]) -> set[str]:
    """All names that a step's texts need: of variables, those in their own texts too."""
    named, waiting = set(step.needs), [json.dumps([step.parameters, step.command, step.result])]
    while waiting:
        new = set(PLACEHOLDER.findall(waiting.pop())) - named
        named |= new
        waiting += [json.dumps(variables[name]) for name in new if name in variables]
    return named


def _in_order(path: Path, steps: dict[str, Step], variables: dict[str, Any]) -> list[str]:
    graph = {}
    for name, step in steps.items():
        missing = sorted(set(step.needs) - set(steps))
        if missing:
            raise PlanError(f"{path}, step {name}: needs {', '.join(missing)}; there are: {', '.join(steps)}")
        named, known = _named(step, variables), [*variables, *step.matrix, *steps, "run"]
        if unknown := sorted(named.difference(known)):
            raise PlanError(f"{path}, step {name}: {{{unknown[0]}}} stands for nothing; there are: {', '.join(known)}")
        graph[name] = [other for other in steps if other in named]
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise PlanError(f"{path}: steps that wait for each other: {' -> '.join(error.args[1])}") from error


def _combinations(path: Path, name: str, matrix: dict[str, Any]) -> list[dict[str, Any]]:
    for key, values in matrix.items():
        texts = [str(value) for value in values] if isinstance(values, list) else []
        if not texts or len(set(texts)) < len(texts) or not all(re.fullmatch(r"[\w.]+", text) for text in texts):
            raise PlanError(f"{path}, step {name}: matrix {key} wants a list of different numbers or words, got {values!r}")
    return [dict(zip(matrix, chosen, strict=True)) for chosen in itertools.product(*matrix.values())]


def _planned(
    name: str,
    steps: dict[str, Step],
    values: dict[str, Any],
    variables: dict[str, Any],
    folder: Path,
    planned: dict[str, PlannedRun],
) -> PlannedRun:
    step, run_name = steps[name], "-".join([name, *map(str, values.values())])
    meant = {other: _meant(planned.values(), other, steps[other].matrix, values) for other in steps if other != name}
    named = _named(step, variables)
    for other in meant:
        if other in named and not meant[other]:
            there = ", ".join(run for run in planned if planned[run].step == other)
            raise PlanError(f"{run_name} needs a run of {other} with the same values; there are: {there}")

    def filled(places: Mapping[str, str]) -> Any:
        """The step's texts with a run's place wherever its name stands."""
        runs = {
            other: _Several(places[run.name] for run in found)
            if set(steps[other].matrix) - set(values)
            else places[found[0].name]
            for other, found in meant.items()
            if found
        }
        names = variables | values | runs | {"run": places[run_name]}
        return _filled([step.parameters, step.command, step.result], names)

    needs = [run for other in meant if other in named for run in meant[other]]
    folders = {run.name: str(run.folder) for run in planned.values()} | {run_name: str(folder / run_name)}
    parameters, command, result = filled(folders)
    notebook = None
    if step.notebook:
        notebook = project_root() / "notebooks" / f"{step.notebook}.ipynb"
        if not notebook.is_file():
            there = ", ".join(sorted(other.stem for other in notebook.parent.glob("*.ipynb")))
            raise PlanError(f"there is no notebook {step.notebook!r}; there are: {there}")
        parameters = {**parameters, "run_folder": folders[run_name]}
        check_parameters(notebook, parameters)
    # By names and not by folders, so that a plan that is moved stays done.
    stated = filled({other: f"run {other}" for other in folders})
    return PlannedRun(
        name=run_name,
        step=name,
        values=values,
        folder=folder / run_name,
        notebook=notebook,
        parameters=parameters,
        command=tuple(map(str, command)),
        result=Path(result),
        needs=tuple(dict.fromkeys(run.name for run in needs)),
        threads=step.threads,
        gpus=step.gpus,
        memory_gb=step.memory_gb,
        minutes=step.minutes,
        key=_key(step, stated, [run.key for run in needs]),
    )


def _meant(planned: Iterable[PlannedRun], step: str, matrix: dict[str, Any], values: dict[str, Any]) -> list[PlannedRun]:
    shared = set(matrix) & set(values)
    found = [run for run in planned if run.step == step]
    return [run for run in found if all(run.values[key] == values[key] for key in shared)]


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """`value` with every placeholder replaced; a string that is nothing but one becomes what it stands for."""
    if isinstance(value, dict):
        return {key: _filled(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        filled = (_filled(inner, names) for inner in value)
        return [one for each in filled for one in (each if isinstance(each, _Several) else [each])]
    if not isinstance(value, str):
        return value
    found = PLACEHOLDER.findall(value)
    several = [name for name in found if isinstance(names[name], _Several)]
    if several:
        return _Several(_filled(value, {**names, several[0]: one}) for one in names[several[0]])
    if PLACEHOLDER.fullmatch(value):
        return _filled(names[found[0]], names)
    return PLACEHOLDER.sub(lambda match: str(_filled(names[match[1]], names)), value)


def _key(step: Step, stated: list[Any], needs: list[str]) -> str:
    parameters, command, result = stated
    if step.notebook:
        import papermill  # a process that does one command of a plan does not wait for it

        path = project_root() / "notebooks" / f"{step.notebook}.ipynb"
        known = papermill.inspect_notebook(str(path)).items()
        parameters = {name: ast.literal_eval(told["default"]) for name, told in known} | parameters
        parameters = {name: value for name, value in parameters.items() if name not in WITHOUT_EFFECT}
    told = json.dumps([step.notebook, parameters, command, result, sorted(needs)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]
