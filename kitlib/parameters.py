"""Parameters of notebooks: reads the defaults in a notebook's `parameters` cell, and checks names and types of values."""

import ast
import difflib
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kitlib.errors import NotebookError, SettingsError
from kitlib.paths import project_root
from kitlib.settings import checked, describe
from kitlib.yaml_reader import parse_yaml

INJECTED = "# Parameters"  # first line of the cell in which papermill, or the build of a kernel, sets parameters


def read_parameters(notebook: str | Path) -> dict[str, Any]:
    """Return a notebook's parameters and their defaults, in the order of the cell tagged `parameters`.

    A notebook without such a cell has no parameters. Raises NotebookError if the file is missing or is not a notebook, or if
    a default is not a literal such as 1, "text" or [1, 2].
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        tagged = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        nodes = _assignments("".join(tagged[0])) if tagged else {}
        return {name: ast.literal_eval(node) for name, node in nodes.items()}
    except FileNotFoundError:
        raise NotebookError(f"{notebook} does not exist") from None
    except (ValueError, KeyError, AttributeError, TypeError, SyntaxError) as error:
        raise NotebookError(f"{notebook} is not a notebook ({type(error).__name__}: {error})") from error


def check_parameters(notebook: str | Path, parameters: Mapping[str, Any], as_option: bool = False) -> None:
    """Raise SettingsError unless the notebook has all of `parameters`, and each has the type of its default.

    For an unknown name, the message lists the notebook's parameters, the most similar name first. For a wrong type, it gives
    a valid value as YAML or, with `as_option`, as an option of the papermill command. An int is valid for a float. If the
    default is None, any value is valid. If the default is an empty list, any list is valid.
    """
    defaults, name_of_notebook = read_parameters(notebook), Path(notebook).name
    for name in parameters:
        if name not in defaults:
            closest = difflib.get_close_matches(str(name), defaults, 1, cutoff=0.0)
            listing = ", ".join([*closest, *(other for other in defaults if other not in closest)])
            raise SettingsError(f"{name_of_notebook} has no parameter {name!r}; it has: {listing or 'none'}")
    for name, value in parameters.items():
        kind = _kind(defaults[name])
        if not _is_valid(value, kind):
            # JSON, because its strings need no escaping in a shell.
            valid = f"{{{name}: {json.dumps(_closest_valid(value, kind, defaults[name]))}}}"
            advice = f"give -y {shlex.quote(valid)}" if as_option else f"write {valid}"
            raise SettingsError(f"{name_of_notebook}: {name!r} must be {describe(kind)}, got {value!r}; {advice}")


def begin_notebook(name: str, values: Mapping[str, Any]) -> None:
    """Check a running notebook's parameters, and make it show kitlib's log and full tables. Each notebook calls this first.

    `name` is the notebook's file name in notebooks/ without extension, `values` are its `globals()`. The types of all
    parameters are checked. Names are checked only in cells that papermill or the build of a Kaggle kernel has inserted: a
    person may assign any names. Raises SettingsError as `check_parameters` does.
    """
    notebook = project_root() / "notebooks" / f"{name}.ipynb"
    # IPython keeps the source of all executed cells in `In`.
    cells = [source for source in values.get("In", []) if source.startswith(INJECTED)]
    names = [*read_parameters(notebook), *(name for source in cells for name in _assignments(source))]
    check_parameters(notebook, {name: values[name] for name in names if name in values}, as_option=True)
    # Imported here, because the process of each run of a plan imports this file, and pandas takes longest to load.
    import pandas as pd

    warnings.filterwarnings("ignore", "IProgress not found")  # of packages whose progress bars want widgets
    pd.set_option("display.max_colwidth", None, "display.max_columns", None)
    logger = logging.getLogger("kitlib")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stdout)]  # also if the cell is run again


def _assignments(source: str) -> dict[str, ast.expr]:
    """Return the names that Python code assigns at its top level, with the expressions of their values."""
    found: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def _kind(default: Any) -> Any:
    """Return the type annotation that a value must match to replace `default`; see kitlib.settings."""
    if isinstance(default, list | tuple):
        kinds = {type(item) for item in default}
        return tuple[kinds.pop() if len(kinds) == 1 else Any, ...]  # type: ignore[misc]
    return Any if default is None else dict[str, Any] if isinstance(default, dict) else type(default)


def _is_valid(value: Any, kind: Any) -> bool:
    try:
        checked(value, kind)
    except (ValueError, OverflowError):
        return False
    return True


def _closest_valid(value: Any, kind: Any, default: Any) -> Any:
    """Return a valid replacement for the invalid `value`: parsed as YAML, in a list, or as a string; else `default`."""
    candidates: Iterable[Any] = [[value], str(value)]
    if isinstance(value, str):
        with suppress(SettingsError):
            meant = parse_yaml(value, "")
            candidates = [meant, [meant], *candidates]
    return next((candidate for candidate in candidates if _is_valid(candidate, kind)), default)
