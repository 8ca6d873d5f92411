"""Reads the YAML files of plans, kernels and tables: plain values only, with errors that name the file, line and key."""

import math
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kitlib.errors import SettingsError, TableError

# Limits after aliases (*name) are replaced by what they stand for: nine lines of nested aliases can stand for 10**9 values.
MOST_VALUES, DEEPEST = 100_000, 50
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that dates are read as text, because no setting is a date and JSON has no dates."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]  # PyYAML's stubs call it an instance variable
        first: [(tag, pattern) for tag, pattern in resolvers if tag in PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises SettingsError, which names the file, if the encoding is neither UTF-8 nor UTF-16, if `parse_yaml` rejects the
    text, or if the text is not a mapping.
    """
    # Imported here, because it loads pandas, which the process of each run of a plan does not need.
    from kitlib.tables import read_text

    try:
        values = parse_yaml(read_text(path), str(path))
    except TableError as error:
        raise SettingsError(str(error)) from error
    if not isinstance(values, dict):
        found = {type(None): "an empty file", list: "a list"}.get(type(values), repr(values)[:60])
        raise SettingsError(f"{path}: expected a mapping, lines of the form `key: value`, got {found}")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text: text, finite numbers, booleans, null, lists, or mappings with unique text keys.

    Raises SettingsError, which starts with `where` and names the line, for invalid YAML, values of other types, an alias
    inside the value that it stands for, more than 100,000 values, or more than 50 levels of lists and mappings.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(loader, node, where, [0], ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with blanks instead of tabs" if "\\t" in (error.problem or "") else ""
        raise SettingsError(f"{where}, line {line}: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise SettingsError(f"{where}: the values are nested more than {DEEPEST} levels deep") from error


def _check_node(loader: _Loader, node: yaml.Node, where: str, count: list[int], parents: tuple[yaml.Node, ...]) -> None:
    """Raise SettingsError for a node that `parse_yaml` refuses; `count` holds the number of nodes checked so far."""
    place = f"{where}, line {node.start_mark.line + 1}"
    count[0] += 1
    if any(node is parent for parent in parents):
        raise SettingsError(f"{place}: an alias is inside the value that it stands for; remove the alias")
    if len(parents) > DEEPEST:
        raise SettingsError(f"{place}: the values are nested more than {DEEPEST} levels deep")
    if count[0] > MOST_VALUES:
        raise SettingsError(f"{place}: more than {MOST_VALUES:,} values; an alias counts as all values that it stands for")
    if node.tag not in PLAIN:
        raise SettingsError(f"{place}: {node.tag} is not allowed; use text, numbers, true, false, null, lists and mappings")
    if isinstance(node, yaml.ScalarNode):
        kind = node.tag.rpartition(":")[2]
        try:
            value = loader.construct_object(node)
        except (ValueError, KeyError, IndexError) as error:  # !!int abc, !!bool x, thousands of digits
            raise SettingsError(f"{place}: {node.value[:60]!r} cannot be read as {kind} ({error})") from error
        if kind in ("int", "float") and ":" in node.value:
            raise SettingsError(f"{place}: {node.value} would be read as {value}, in base 60; write it in quotes")
        if kind == "float" and not math.isfinite(value):
            raise SettingsError(f"{place}: {node.value} is not a finite number")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(loader, item, where, count, (*parents, node))
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            line = f"{where}, line {key.start_mark.line + 1}"
            if key.tag.rpartition(":")[2] not in ("str", "merge"):
                if not isinstance(key, yaml.ScalarNode):
                    raise SettingsError(f"{line}: a key is a list or mapping; keys must be text")
                raise SettingsError(f'{line}: the key {key.value} is not text; write it in quotes, such as "{key.value}"')
            if key.value in keys:
                raise SettingsError(f"{line}: the key {key.value!r} is given twice; remove one")
            keys.add(key.value)
            _check_node(loader, value, where, count, (*parents, node))
