"""Read plans from YAML files: runs of notebooks and commands, the runs that each needs, and whether they are done."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from kitlib.errors import PlanError, SettingsError
from kitlib.parameters import check_parameters, read_parameters
from kitlib.paths import project_root
from kitlib.recipes.named import check_recipe
from kitlib.settings import AtLeastOne, Count, NotNegative, Positive, Settings, from_dict
from kitlib.yaml_reader import read_yaml

# Notebook parameters that change a run's duration or where it resumes, but not its result.
WITHOUT_EFFECT = frozenset({"workers", "at_once", "session_hours", "resume_from", "packed"})
RECORD = "plan.json"  # in a run's folder: the run as it was started, and its key
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Step(Settings):
    """One step of a plan: a notebook or a command, which is run once or for several values.

    Exactly one of `notebook` and `command` is set. A step with a matrix has one run for each combination of the matrix's
    values. A matrix maps each name to a list of values, or to the placeholder of a variable of the plan that holds the list.

    Placeholders are replaced in any text. If `name` is a variable of the plan or a name in the step's own matrix, `{name}`
    becomes its value. `{run}` becomes the run's own folder. If `name` is another step, that step is executed first, and
    `{name}` becomes the folder of its run. If some names are in the matrices of both steps, it is the run with the same
    values for these names. If the matrix of the step `name` has further names, several runs match, and `{name}` becomes a
    list of their folders; inside another list, the folders become items of that list.
    """

    notebook: str = ""  # the notebook's name in notebooks/, such as 30_train_study
    parameters: dict[str, Any] = field(default_factory=dict)  # the notebook's parameters; the plan adds `run_folder`
    command: tuple[str | int | float, ...] = ()  # run in the project's folder; "python" is the running interpreter
    result: str = "{run}/metrics.json"  # a file that only a successful run writes
    matrix: dict[str, Any] = field(default_factory=dict)  # name -> list of values
    needs: tuple[str, ...] = ()  # further steps to run first, which no placeholder mentions
    threads: AtLeastOne = 1  # CPU threads
    gpus: Count = 0
    memory_gb: Positive = 4.0
    minutes: NotNegative = 0.0  # time limit of a run; 0: no limit


@dataclass(frozen=True)
class _PlanFile(Settings):
    extends: str = ""  # file name of a plan in the same folder; this file adds to its values or replaces them
    runs: str = ""  # the folder that contains the runs' folders; relative to the project's root
    published_time: str = ""  # how long the published system took to train; shown before the plan starts
    variables: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # notebook -> default values for steps with this notebook
    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan: what to execute, and with which resources. Except for paths, fields are equal on all machines."""

    name: str  # the step's name, followed by its values: study-0
    step: str
    values: dict[str, Any]  # values from the step's matrix, keyed by name
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
    key: str  # hash of everything that determines the result: parameters, notebook defaults, keys of the runs it needs

    @property
    def done_file(self) -> Path:
        """The path of the file that marks this run as done with its current parameters and inputs."""
        return self.done_file_of(self.key)

    def done_file_of(self, key: str) -> Path:
        """Return the path of the file that marks the run as done with `key`, which may be an earlier key of the run."""
        return self.folder / f"done-{key}.json"

    def state(self) -> str:
        """Return the run's state: "done", "new", "resumes" or "changed".

        "resumes" means that the folder was started with the run's key (hash of parameters and inputs), but not completed;
        "changed", that it was started or completed with another key.
        """
        if self.done_file.is_file():
            return "done"
        key = self.read_key()
        return "new" if key is None else "resumes" if key == self.key else "changed"

    def read_key(self) -> str | None:
        """Return the key (hash of parameters and inputs) in the run's folder, or None if the folder is missing or empty.

        Raises PlanError for a folder that no plan has made, because starting over would delete its files.
        """
        record = self.folder / RECORD
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))["key"]
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise PlanError(
                f"{self.folder} has files that no plan has made; move them away, or set `runs` to another folder"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        """Return a dictionary of the run's fields in JSON types, which `from_json` turns back into the run."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PlannedRun":
        """Return the run that `as_json` has turned into the dictionary `values`."""
        paths = {name: Path(values[name]) for name in ("folder", "result")}
        notebook = Path(values["notebook"]) if values["notebook"] else None
        lists = {name: tuple(values[name]) for name in ("command", "needs")}
        return cls(**{**values, **paths, **lists, "notebook": notebook})


@dataclass(frozen=True)
class Plan:
    """A plan of runs, read from the file `path`.

    `planned` maps names to runs, and each run comes after the runs that it needs. `runs` is the folder that contains the
    runs' folders.
    """

    path: Path
    runs: Path
    planned: dict[str, PlannedRun]
    published_time: str = ""  # how long the published system took to train; empty: not stated

    def states(self) -> dict[str, str]:
        """Return the state of each run (see `PlannedRun.state`), keyed by run name.

        A run that is done counts as "resumes" if a run that it needs is not done.
        """
        states: dict[str, str] = {}
        for name, run in self.planned.items():
            state = run.state()
            is_outdated = state == "done" and any(states[need] != "done" for need in run.needs)
            states[name] = "resumes" if is_outdated else state
        return states

    def runs_of_steps(self, steps: Iterable[str]) -> list[str]:
        """Return the names of all runs of `steps`. Raises PlanError if one of `steps` does not exist."""
        selected, valid = set(steps), {run.step for run in self.planned.values()}
        if selected - valid:
            raise PlanError(f"{self.path} has no steps {sorted(selected - valid)}; its steps are {sorted(valid)}")
        return [name for name, run in self.planned.items() if run.step in selected]

    def with_needs(self, only: Iterable[str] = ()) -> list[str]:
        """Return the names of the runs of the steps `only` (default: all) and of all runs that these need, in plan order.

        Raises PlanError if one of the steps does not exist.
        """
        names, waiting = set(), self.runs_of_steps(only) if only else list(self.planned)
        while waiting:
            name = waiting.pop()
            if name not in names:
                names.add(name)
                waiting += self.planned[name].needs
        return [name for name in self.planned if name in names]


class _FolderList(list):
    """A list of the folders of several runs. Inside a plain list, `_fill` replaces it by its folders."""


def read_plan(path: str | Path, runs: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan that the file at `path` describes.

    `changes` maps variables of the plan to new values. `runs` is the folder for the runs, instead of the one in the file.
    Raises PlanError, which names the file and usually the step, for a missing file, an unknown key, placeholder or variable,
    a notebook parameter that does not exist or has a wrong type, an invalid recipe, or steps that need each other.
    """
    path = Path(path)
    plan_file = _read_file(path)
    unknown = sorted(set(changes or {}) - set(plan_file.variables))
    if unknown:
        raise PlanError(f"{path} has no variables {unknown}; its variables are {list(plan_file.variables)}")
    variables = plan_file.variables | dict(changes or {})
    if not (runs or plan_file.runs):
        raise PlanError(f"{path}: the key `runs` is missing; set it to a folder for the runs, such as runs/siim")
    folder = (project_root() / (runs or plan_file.runs)).resolve()
    steps = {name: _parse_step(path, name, values, plan_file.defaults) for name, values in plan_file.steps.items()}
    _check_names(path, steps, variables)
    planned: dict[str, PlannedRun] = {}
    for name in _sort_steps(path, steps, variables):
        for values in _expand_matrix(path, name, steps[name].matrix, variables):
            try:
                run = _plan_run(name, steps, values, variables, folder, planned)
            except RecursionError as error:
                raise PlanError(f"{path}, step {name}: a variable that the step uses refers to itself") from error
            except (ValueError, FileNotFoundError) as error:
                raise PlanError(f"{path}, step {name}: {error}") from error
            planned[run.name] = run
    return Plan(path, folder, planned, plan_file.published_time)


def _read_file(path: Path, extending: tuple[Path, ...] = ()) -> _PlanFile:
    """Return the plan file `path`, merged with the plan that it extends; `extending` are the files that extend `path`."""
    if not path.is_file():
        available = ", ".join(sorted(other.name for other in path.parent.glob("*.yaml"))) or "none"
        raise PlanError(f"{path} does not exist; plans in its folder: {available}")
    if path.resolve() in extending:
        chain = " -> ".join(other.name for other in (*extending, path))
        raise PlanError(f"{path}: the plans extend each other: {chain}; remove the key `extends` from one of them")
    try:
        values = read_yaml(path)
    except SettingsError as error:
        raise PlanError(str(error)) from error
    plan_file = _make_plan_file(path, values)
    if not plan_file.extends:
        return plan_file
    base = asdict(_read_file((path.parent / plan_file.extends).resolve(), (*extending, path.resolve())))
    return _make_plan_file(path, _merge(base, {key: value for key, value in values.items() if key != "extends"}))


def _make_plan_file(path: Path, values: dict[str, Any]) -> _PlanFile:
    try:
        return from_dict(_PlanFile, values)
    except SettingsError as error:
        raise PlanError(f"{path}: {str(error).replace('_PlanFile', 'a plan')}") from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `changes`; if both have a mapping under the same key, the two mappings are merged too."""
    both = [key for key in base if isinstance(base[key], dict) and isinstance(changes.get(key), dict)]
    return base | changes | {key: _merge(base[key], changes[key]) for key in both}


def _parse_step(path: Path, name: str, values: Any, defaults: dict[str, Any]) -> Step:
    if not re.fullmatch(r"[a-z]\w*", name):
        raise PlanError(f"{path}: invalid step name {name!r}; use letters, digits and _, starting with a lower-case letter")
    try:
        notebook = values.get("notebook") if isinstance(values, dict) else None
        step_defaults = defaults.get(notebook, {}) if isinstance(notebook, str) else {}
        if not isinstance(step_defaults, dict):
            raise PlanError(f"{path}, defaults of {notebook}: expected a mapping of a step's fields, got {step_defaults!r}")
        step = from_dict(Step, _merge(step_defaults, values) if step_defaults else values)
    except SettingsError as error:
        raise PlanError(f"{path}, step {name}: {error}") from error
    if bool(step.notebook) == bool(step.command):
        raise PlanError(f"{path}, step {name}: expected exactly one of 'notebook' and 'command'")
    if step.command and step.parameters:
        raise PlanError(f"{path}, step {name}: a command has no parameters; write its arguments into the command")
    return step


def _check_names(path: Path, steps: dict[str, Step], variables: dict[str, Any]) -> None:
    """Raise PlanError if a name is used twice among steps, variables and matrix keys; a placeholder would be ambiguous."""
    names = [*steps, *variables, "run"]
    names += sorted({name for step in steps.values() for name in step.matrix})
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise PlanError(f"{path}: steps, variables, matrix keys and 'run' must have different names, but share {repeated}")


def _find_names(step: Step, variables: dict[str, Any]) -> set[str]:
    """Return the names that a step refers to: in `needs`, in placeholders, and in placeholders of the variables it uses."""
    names, texts = set(step.needs), [json.dumps([step.parameters, step.command, step.result])]
    while texts:
        new = set(PLACEHOLDER.findall(texts.pop())) - names
        names |= new
        texts += [json.dumps(variables[name]) for name in new if name in variables]
    return names


def _sort_steps(path: Path, steps: dict[str, Step], variables: dict[str, Any]) -> list[str]:
    """Return the names of the steps, each after the steps that it needs.

    Raises PlanError if a name is unknown or if steps need each other.
    """
    graph = {}
    for name, step in steps.items():
        missing = sorted(set(step.needs) - set(steps))
        if missing:
            raise PlanError(f"{path}, step {name}: 'needs' contains unknown steps {missing}; the steps are {list(steps)}")
        names, valid = _find_names(step, variables), [*variables, *step.matrix, *steps, "run"]
        if unknown := sorted(names.difference(valid)):
            raise PlanError(f"{path}, step {name}: unknown placeholder {{{unknown[0]}}}; valid: {', '.join(valid)}")
        graph[name] = [other for other in steps if other in names]
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise PlanError(f"{path}: steps need each other: {' -> '.join(error.args[1])}") from error


def _expand_matrix(path: Path, name: str, matrix: dict[str, Any], variables: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all combinations of a matrix's values, each as a dictionary from the matrix's names to one value per name.

    Raises PlanError unless each name has a list of different numbers or words, or the placeholder of such a list.
    """
    placeholders = {key: PLACEHOLDER.fullmatch(values) for key, values in matrix.items() if isinstance(values, str)}
    matrix = matrix | {key: variables.get(match[1], matrix[key]) for key, match in placeholders.items() if match}
    for key, values in matrix.items():
        texts = [str(value) for value in values] if isinstance(values, list) else []
        if not texts or len(set(texts)) < len(texts) or not all(re.fullmatch(r"[\w.]+", text) for text in texts):
            raise PlanError(
                f"{path}, step {name}: the matrix key {key!r} needs a list of different numbers or words, got {values!r}"
            )
    return [dict(zip(matrix, combination, strict=True)) for combination in itertools.product(*matrix.values())]


def _plan_run(
    name: str,
    steps: dict[str, Step],
    values: dict[str, Any],
    variables: dict[str, Any],
    folder: Path,
    planned: dict[str, PlannedRun],
) -> PlannedRun:
    """Return the run of the step `name` for `values`, a dictionary from the matrix's names to one value per name.

    `folder` is the parent folder of the runs. `planned` has the runs planned so far, among them all runs of the steps that
    the step `name` needs.
    """
    step, run_name = steps[name], "-".join([name, *map(str, values.values())])
    runs_by_step = {
        other: _matching_runs(planned.values(), other, steps[other].matrix, values) for other in steps if other != name
    }
    names_used = _find_names(step, variables)
    for other in runs_by_step:
        if other in names_used and not runs_by_step[other]:
            available = [run for run in planned if planned[run].step == other]
            raise PlanError(f"{run_name!r} needs a run of {other!r} with the same matrix values; {other!r} has {available}")

    def fill_texts(folders: Mapping[str, str]) -> Any:
        """Return the parameters, the command and the result of `step` as a list, with placeholders replaced.

        `folders` maps the name of each run to the text that replaces placeholders of this run.
        """
        runs = {
            other: _FolderList(folders[run.name] for run in matching)
            if set(steps[other].matrix) - set(values)
            else folders[matching[0].name]
            for other, matching in runs_by_step.items()
            if matching
        }
        names = variables | values | runs | {"run": folders[run_name]}
        return _fill([step.parameters, step.command, step.result], names)

    needs = [run for other in runs_by_step if other in names_used for run in runs_by_step[other]]
    folders = {run.name: str(run.folder) for run in planned.values()} | {run_name: str(folder / run_name)}
    parameters, command, result = fill_texts(folders)
    notebook = None
    if step.notebook:
        notebook = project_root() / "notebooks" / f"{step.notebook}.ipynb"
        if not notebook.is_file():
            existing = ", ".join(sorted(other.stem for other in notebook.parent.glob("*.ipynb")))
            raise PlanError(f"the notebook {step.notebook!r} does not exist; available: {existing}")
        parameters = {**parameters, "run_folder": folders[run_name]}
        check_parameters(notebook, parameters)
        check_recipe(read_parameters(notebook), parameters)
    # The key contains names instead of folders, so that runs stay done if the plan's folder is moved.
    named_texts = fill_texts({other: f"run {other}" for other in folders})
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
        key=_make_key(step, named_texts, [run.key for run in needs]),
    )


def _matching_runs(
    planned: Iterable[PlannedRun], step: str, matrix: dict[str, Any], values: dict[str, Any]
) -> list[PlannedRun]:
    """Return the runs of `step` with the same values as `values`, for all names in both `values` and the step's `matrix`."""
    shared = set(matrix) & set(values)
    candidates = [run for run in planned if run.step == step]
    return [run for run in candidates if all(run.values[key] == values[key] for key in shared)]


def _fill(value: Any, names: Mapping[str, Any]) -> Any:
    """Return `value` with every placeholder `{name}` replaced by `names[name]`, also inside lists and dictionaries.

    A text that is only a placeholder becomes the named value itself, such as a number. A text that mentions a list of
    folders becomes one text per folder.
    """
    if isinstance(value, dict):
        return {key: _fill(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        filled = (_fill(inner, names) for inner in value)
        return [item for entry in filled for item in (entry if isinstance(entry, _FolderList) else [entry])]
    if not isinstance(value, str):
        return value
    placeholders = PLACEHOLDER.findall(value)
    lists = [name for name in placeholders if isinstance(names[name], _FolderList)]
    if lists:
        return _FolderList(_fill(value, {**names, lists[0]: folder}) for folder in names[lists[0]])
    if PLACEHOLDER.fullmatch(value):
        return _fill(names[placeholders[0]], names)
    return PLACEHOLDER.sub(lambda match: str(_fill(names[match[1]], names)), value)


def _make_key(step: Step, texts: list[Any], needs: list[str]) -> str:
    """Return the run's key, 12 hexadecimal digits.

    The key is a hash of the notebook's name, of `texts` (parameters, command and result), of the notebook's defaults for
    other parameters, and of `needs`, the keys of the runs that this run needs. Parameters in WITHOUT_EFFECT do not count.
    """
    parameters, command, result = texts
    if step.notebook:
        parameters = read_parameters(project_root() / "notebooks" / f"{step.notebook}.ipynb") | parameters
        parameters = {name: value for name, value in parameters.items() if name not in WITHOUT_EFFECT}
    description = json.dumps([step.notebook, parameters, command, result, sorted(needs)], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()[:12]
