"""`Settings`: frozen dataclasses that check their values on construction, whether from Python, JSON or YAML.

A field's annotation says what is valid: `epochs: Annotated[int, Range(at_least=1)] = 50`, `schedule: Literal["cosine",
"step"] = "cosine"`. Rules that involve several fields belong in the class's __post_init__.
"""

import collections.abc
import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from kitlib.errors import SettingsError

R = TypeVar("R", bound="Settings")

NAMES = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Range:
    """Rule for a number. The bounds `at_least` and `at_most` are inclusive; `above` and `below` are exclusive."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = [f"{name.replace('_', ' ')} {bound:g}" for name, bound in vars(self).items() if math.isfinite(bound)]
        return ("of " if math.isfinite(self.at_least) else "") + " and ".join(bounds)


Probability = Annotated[float, Range(at_least=0, at_most=1)]
Share = Annotated[float, Range(at_least=0, below=1)]
NotNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Count = Annotated[int, Range(at_least=0)]
AtLeastOne = Annotated[int, Range(at_least=1)]


class ZeroOrOdd:
    """Rule for the side length of a filter in pixels: odd, or 0, which selects another filter."""

    def allows(self, value: int) -> bool:
        return value == 0 or (value > 0 and value % 2 == 1)

    def __str__(self) -> str:
        return "that is 0 or odd"


class Ordered:
    """Rule for a pair (from, to): the first is not above the second."""

    def allows(self, value: tuple[float, float]) -> bool:
        return value[0] <= value[1]

    def __str__(self) -> str:
        return "the lower one first"


class Increasing:
    """Rule for a list of numbers: each is greater than the one before it."""

    def allows(self, value: tuple[float, ...]) -> bool:
        return all(number < following for number, following in itertools.pairwise(value))

    def __str__(self) -> str:
        return "each greater than the one before"


class Distinct:
    """Rule for a list: at least one value, and no value twice."""

    def allows(self, value: tuple[Any, ...]) -> bool:
        return 0 < len(value) == len(set(value))

    def __str__(self) -> str:
        return "at least one, none repeated"


@dataclass(frozen=True)
class Settings:
    """Base class of checked settings: every field is validated against its annotation.

    Lists become tuples, and an int becomes a float if the field is a float; a bool is not accepted as a number. Annotations
    may be bool, int, float (finite), str, Any, Literal, unions, tuples, dicts, Callable, and Annotated with rules such as
    Range; the `str()` of a rule is used in messages. Raises SettingsError, which names the field, its value and what is
    valid.
    """

    def __post_init__(self) -> None:
        for name, kind in field_kinds(type(self)).items():  # type: ignore[arg-type]  # mypy: its hash is its instances'
            value = getattr(self, name)
            try:
                valid = checked(value, kind)
            except (ValueError, OverflowError):
                value = list(value) if isinstance(value, tuple) else value
                raise SettingsError(f"{type(self).__name__}.{name} is {value!r}; expected {describe(kind)}") from None
            object.__setattr__(self, name, valid)


def override(settings: R, /, **overrides: Any) -> R:
    """Return a copy of `settings` with some fields replaced. Raises SettingsError for an unknown name or invalid value."""
    _check_names(type(settings), overrides)
    return dataclasses.replace(settings, **overrides)


def from_dict(kind: type[R], values: dict[str, Any]) -> R:
    """Build settings of class `kind` from parsed JSON or YAML. Missing fields keep their defaults.

    Raises SettingsError for an unknown field or an invalid value.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{kind.__name__} must be a mapping from field names to values, got {values!r}")
    _check_names(kind, values)
    return kind(**values)


def describe(kind: Any) -> str:
    """Return a text that says which values the annotation `kind` allows, such as "a whole number of at least 1"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        base, *rules = parts
        comma = "," if typing.get_origin(base) is tuple else ""
        return " ".join([describe(base) + comma, ", ".join(map(str, rules))])
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        return "a list" + (f", each item {describe(parts[0])}" if parts[0] is not Any else "")
    if origin is tuple:
        return f"a list of {len(parts)} items: {'; '.join(map(describe, parts))}"
    if origin is dict:
        return "a mapping" + (f", each value {describe(parts[1])}" if parts[1] is not Any else "")
    if origin is collections.abc.Callable:
        return "a function"
    return NAMES.get(kind, "anything")


def _check_names(kind: type, values: Iterable[str]) -> None:
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            raise SettingsError(f"{kind.__name__} has no field {name!r}; it has: {', '.join(fields)}")


@functools.cache
def field_kinds(kind: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, by field name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def checked(value: Any, kind: Any) -> Any:
    """Return `value` converted as the annotation `kind` demands. Raises ValueError or OverflowError if it is not allowed."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = checked(value, parts[0])
        if all(rule.allows(value) for rule in parts[1:]):
            return value
    elif origin is Literal:
        for choice in parts:
            if type(value) is type(choice) and value == choice:
                return choice
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return checked(value, part)
            except (ValueError, OverflowError):
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        return tuple(checked(item, part) for item, part in zip(value, kinds, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {checked(key, parts[0]): checked(item, parts[1]) for key, item in value.items()}
    elif origin is collections.abc.Callable and callable(value):
        return value
    elif kind is float and (type(value) is int or isinstance(value, float)) and math.isfinite(value):
        return float(value)
    elif kind is not float and type(value) is kind:
        return value
    raise ValueError(value)


def changed_fields(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the value and the default of each field whose value is not its default, keyed by the field's name."""
    defaults = type(settings)()
    pairs = {
        field.name: (getattr(settings, field.name), getattr(defaults, field.name)) for field in dataclasses.fields(settings)
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
