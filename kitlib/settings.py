"""Dataclasses of settings, changed and read strictly: an unknown name or a wrong type is an error that lists what is."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

R = TypeVar("R")


class RecipeError(ValueError):
    """An unknown recipe, an unknown field, or a value of the wrong type."""


def override(settings: R, **overrides: Any) -> R:
    """A copy of a frozen dataclass with fields replaced, names and types checked. An int passes for a float."""
    hints = typing.get_type_hints(type(settings))
    fields = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    for name, value in overrides.items():
        if name not in fields:
            raise RecipeError(f"{type(settings).__name__} has no field {name!r}; it has: {', '.join(fields)}")
        overrides[name] = _checked(value, fields[name], f"{type(settings).__name__}.{name}")
    return dataclasses.replace(settings, **overrides)


def from_dict(kind: type[R], values: dict[str, Any]) -> R:
    """A settings dataclass from JSON or YAML: missing fields keep their default, unknown or ill-typed ones are errors."""
    if not isinstance(values, dict):
        raise RecipeError(f"{kind.__name__} wants a mapping of its fields, got {values!r}")
    return override(kind(), **values)


def _checked(value: Any, kind: Any, place: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        return _checked(value, next(choice for choice in choices if choice is not type(None)), place)
    if kind is float and type(value) is int:
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if type(value) is not (origin or kind):
        raise RecipeError(f"{place} wants {getattr(kind, '__name__', kind)}, got {value!r} ({type(value).__name__})")
    return value
