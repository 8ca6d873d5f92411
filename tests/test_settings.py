"""Settings check every field against its annotation when they are created, and errors list what is valid."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.errors import SettingsError
from kitlib.fusion.flannel import ENSEMBLES, ensemble_settings
from kitlib.recipes.fields import (
    DetectorRecipe,
    FindingsRecipe,
    PatchRecipe,
    SegmenterRecipe,
    SparseSegmenterRecipe,
    StudyRecipe,
)
from kitlib.recipes.named import RECIPES, recipe
from kitlib.settings import (
    Distinct,
    Increasing,
    Ordered,
    Range,
    Settings,
    ZeroOrOdd,
    changed_fields,
    field_kinds,
    from_dict,
    override,
)
from kitlib.yaml_reader import read_yaml


@dataclass(frozen=True)
class Knobs(Settings):
    count: Annotated[int, Range(at_least=1)] = 1
    share: Annotated[float, Range(at_least=0, below=1)] = 0.5
    rate: Annotated[float, Range(above=0)] = 1.0
    any_number: float = 0.0
    side: Annotated[int, ZeroOrOdd()] = 0
    word: Literal["one", "two"] = "one"
    number: Literal[1, 3] = 1
    switch: bool = False
    name: str = ""
    optional: str | None = None
    pair: Annotated[tuple[float, float], Ordered()] = (0.0, 1.0)
    steps: Annotated[tuple[int, ...], Increasing()] = ()
    words: Annotated[tuple[Literal["a", "b"], ...], Distinct()] = ("a",)
    weights: dict[str, Annotated[float, Range(at_least=0)]] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)


NO_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, [1.0]]


@pytest.mark.parametrize(
    ("name", "values", "valid"),
    [
        ("count", [0, -5, 1.0, *NO_NUMBERS], "a whole number of at least 1"),
        ("share", [-0.1, 1.0, 10**400, *NO_NUMBERS], "a finite number of at least 0 and below 1"),
        ("rate", [0, -1.0, *NO_NUMBERS], "a finite number above 0"),
        ("any_number", NO_NUMBERS, "a finite number"),
        ("side", [2, -1, 3.0], "a whole number that is 0 or odd"),
        ("word", ["three", "One", 1, None], "one of 'one', 'two'"),
        ("number", [2, True, 1.0, "1"], "one of 1, 3"),
        ("switch", [0, 1, "yes", None], "true or false"),
        ("name", [1, None, b"x"], "a string"),
        ("optional", [1, ["x"]], "a string or null"),
        ("pair", [[1, 0], [1.0], [0, 1, 2], ["a", "b"], "ab", 1.0, [0, math.nan]], "a list of 2 items: a finite number; a"),
        ("steps", [[2, 1], [1, 1], ["x"], [1.5], 3], "a list, each item a whole number, each greater than the one before"),
        ("words", [[], ["a", "a"], ["c"], "a"], "a list, each item one of 'a', 'b', at least one, none repeated"),
        ("weights", [{"a": -1}, {"a": "b"}, {1: 1.0}, [1.0]], "a mapping, each value a finite number of at least 0"),
    ],
)
def test_an_invalid_value_is_refused_with_the_valid_ones(name, values, valid):
    for value in values:
        for make in (lambda **fields: Knobs(**fields), lambda **fields: override(Knobs(), **fields)):
            with pytest.raises(SettingsError, match=rf"^Knobs\.{name} is .*; expected {valid}"):
                make(**{name: value})
        with pytest.raises(SettingsError):
            from_dict(Knobs, {name: value})


def test_values_are_converted_to_their_annotated_type():
    knobs = Knobs(share=0, any_number=np.float64(2.5), pair=[1, 1], steps=[1, 4], words=["b", "a"], weights={"m": 2})
    assert (knobs.share, knobs.any_number, knobs.pair, knobs.steps, knobs.words) == (
        0.0,
        2.5,
        (1.0, 1.0),
        (1, 4),
        ("b", "a"),
    )
    assert type(knobs.share) is type(knobs.any_number) is type(knobs.pair[0]) is type(knobs.weights["m"]) is float
    assert Knobs(optional="x", anything={"a": [None]}).anything == {"a": [None]}


# Larger whole numbers cannot be represented as floats.
@given(st.integers(-(2**53), 2**53) | st.floats() | st.booleans() | st.text(max_size=3) | st.none())
def test_a_number_is_accepted_exactly_if_it_is_in_its_range(value):
    number = type(value) in (int, float)
    inside = {
        "count": type(value) is int and value >= 1,
        "share": number and 0 <= value < 1,
        "rate": number and 0 < value < math.inf,
        "any_number": number and abs(value) < math.inf,
        "side": type(value) is int and (value == 0 or (value > 0 and value % 2 == 1)),
    }
    for name, valid in inside.items():
        try:
            assert getattr(Knobs(**{name: value}), name) == value and valid
        except SettingsError:
            assert not valid


WRONG = [
    (StudyRecipe, "keep", "worst", "one of 'best', 'last'"),
    (StudyRecipe, "optimizer", "lion", "one of 'sgd', 'adam', 'adamw'"),
    (StudyRecipe, "placement", "squash", "one of 'letterbox', 'stretch', 'centre_crop'"),
    (StudyRecipe, "outputs", "all", "one of 'study', 'none', 'both'"),
    (StudyRecipe, "views", ["flip", "flip"], "a list, each item one of 'full', 'flip', .*, at least one, none repeated"),
    (StudyRecipe, "views", [], "a list, each item one of 'full'"),
    (StudyRecipe, "views", ["full", "left"], "a list, each item one of 'full'"),
    (StudyRecipe, "scale_x", ["a", "b"], "a list of 2 items: a finite number above 0; a finite number above 0, the lower"),
    (StudyRecipe, "scale_x", [1.0], "a list of 2 items"),
    (StudyRecipe, "scale_x", [1.2, 0.8], "a list of 2 items"),
    (StudyRecipe, "milestones", ["x"], "a list, each item a whole number of at least 1, each greater than the one before"),
    (StudyRecipe, "epochs", -5, "a whole number of at least 1"),
    (StudyRecipe, "batch_size", 0, "a whole number of at least 1"),
    (StudyRecipe, "image_size", 0, "a whole number of at least 8"),
    (StudyRecipe, "channels", 7, "one of 1, 3"),
    (StudyRecipe, "dropout", 3.0, "a finite number of at least 0 and below 1"),
    (StudyRecipe, "learning_rate", -1, "a finite number above 0"),
    (StudyRecipe, "learning_rate", math.nan, "a finite number above 0"),
    (StudyRecipe, "lungs", "mask", "one of 'darkness', 'masks'"),
    (StudyRecipe, "erase_p", 1.5, "a finite number of at least 0 and at most 1"),
    (StudyRecipe, "ema_decay", 1.0, "a finite number of at least 0 and below 1"),
    (DetectorRecipe, "family", "ssd", "one of 'faster_rcnn', 'retinanet', 'yolo'"),
    (DetectorRecipe, "negatives", -1.0, "a finite number of at least 0"),
    (PatchRecipe, "masked", False, "True"),
    (PatchRecipe, "multi_label", True, "False"),
    (PatchRecipe, "least_lungs", 1.0, "a finite number of at least 0 and below 1"),
    (FindingsRecipe, "judged_by", "f1", "one of 'auc', 'macro_f1', 'accuracy'"),
    (SegmenterRecipe, "loss", "focal", "one of 'dice', 'cross_entropy'"),
]


@pytest.mark.parametrize(("kind", "name", "value", "valid"), WRONG)
def test_a_recipe_refuses_an_invalid_value(kind, name, value, valid):
    with pytest.raises(SettingsError, match=rf"^{kind.__name__}\.{name} is .*; expected {valid}"):
        kind(**{name: value})


KINDS = [StudyRecipe, FindingsRecipe, PatchRecipe, DetectorRecipe, SegmenterRecipe, SparseSegmenterRecipe]


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_a_recipe_accepts_a_value_that_is_never_valid(kind):
    for one_field in fields(kind):
        mapping = {"a": [1]} if one_field.name == "backbone_options" else {"a": 1}
        for value in (math.nan, math.inf, -1, -0.5, None, object(), mapping, [[1]]):
            with pytest.raises(SettingsError, match=rf"^{kind.__name__}\.{one_field.name} is "):
                kind(**{one_field.name: value})


RANGES = [
    (kind, name, get_args(annotation)[0], rule)
    for kind in KINDS
    for name, annotation in field_kinds(kind).items()
    for rule in get_args(annotation)[1:]
    if isinstance(rule, Range)
]


@given(
    st.sampled_from(RANGES), st.integers(-5, 5) | st.floats(-5, 5) | st.sampled_from([0.0, 1.0, 7, 8, 179, 180, 181, 1e9])
)
def test_a_field_of_a_recipe_accepts_exactly_the_values_in_its_range(ranged, value):
    kind, name, number, rule = ranged
    refused = ""
    try:
        kind(**{name: value})
    except SettingsError as error:  # about this field, or about another that contradicts it
        refused = str(error)
    valid = rule.allows(value) and (number is float or type(value) is int)
    assert refused.startswith(f"{kind.__name__}.{name} is ") == (not valid)


def test_every_number_of_a_recipe_has_a_range():
    bare = [(kind.__name__, name) for kind in KINDS for name, type_ in field_kinds(kind).items() if type_ in (int, float)]
    assert bare == [] and len(RANGES) > 200  # 6 kinds with 30 to 50 numbers each


def test_only_changed_fields_are_listed():
    assert changed_fields(StudyRecipe()) == {}
    assert changed_fields(StudyRecipe(image_size=64, views=("full", "flip"))) == {
        "image_size": (64, StudyRecipe().image_size),
        "views": (("full", "flip"), ("full",)),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_returns_from_json_unchanged(name):
    recipe = RECIPES[name]
    assert from_dict(type(recipe), json.loads(json.dumps(asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping, lines of the form `key: value`, got an empty file"),
        (b"- a\n", "got a list"),
        (b"word", "got 'word'"),
        (b"a: 1\n\tb: 2\n", "line 2: .*; indent with blanks instead of tabs"),
        (b"a: [1\n", "line 2: expected"),
        (b"a: 1\n---\nb: 2\n", "line 2: but found another document"),
        (b"a: 1\nb: {c: 1, c: 2}\n", "line 2: the key 'c' is given twice"),
        (b"a: 1\non: 2\n", 'line 2: the key on is not text; write it in quotes, such as "on"'),
        (b"{[1, 2]: a}\n", "line 1: a key is a list or mapping; keys must be text"),
        (b"a: [.nan]\n", r"line 1: \.nan is not a finite number"),
        (b"a: 1.0e+999\n", r"line 1: 1\.0e\+999 is not a finite number"),
        (b"a: !!python/object/apply:os.getcwd []\n", "line 1: .*os.getcwd is not allowed"),
        (b"a: !!binary aGk=\n", "binary is not allowed"),
        (b"a: &x [*x]\n", "line 1: an alias is inside the value that it stands for"),
        (
            b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 10)) for name in b"bcdefghij"),
            "more than 100,000 values",
        ),
        (b"a: " + b"[" * 60 + b"]" * 60, "more than 50 levels"),
        (b"a: " + b"[" * 2000 + b"]" * 2000, "nested more than 50 levels deep"),
        (b"a: " + b"9" * 5000, "line 1: .* cannot be read as int"),
        (b"a: 1\nb: !!bool x\n", "line 2: 'x' cannot be read as bool"),
        (b"a: !!int ''\n", "line 1: '' cannot be read as int"),
        (b"a: !!int abc\n", "line 1: 'abc' cannot be read as int"),
        (b"minutes: 1:30\n", "line 1: 1:30 would be read as 90, in base 60; write it in quotes"),
        (b"a: 1\nb: \xe9t\xe9\n", r"line 2: the byte b'\\xe9' is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16-le"), "has a NUL character; save the file as UTF-8"),
        (b"a: \x07\n", "special characters are not allowed"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_names_the_line(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"x\.yaml.*{message}"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_yaml_file_may_be_of_windows(tmp_path, encoding):
    text = "a: &x [1, ä]\r\nb: *x\r\nc: {<<: {d: 1}, e: 2026-01-01}\r\n"
    (tmp_path / "x.yaml").write_bytes(text.encode(encoding))
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, "ä"], "b": [1, "ä"], "c": {"d": 1, "e": "2026-01-01"}}


@pytest.mark.parametrize("name", ["settings", "name", "kind"])
def test_a_field_with_the_name_of_an_argument_is_an_unknown_field(name):
    """Parameters of a YAML file are passed on by name."""
    for make in (
        lambda **fields: override(StudyRecipe(), **fields),
        lambda **fields: recipe("small_study", StudyRecipe, **fields),
        lambda **fields: ensemble_settings(next(iter(ENSEMBLES)), **fields),
    ):
        with pytest.raises(SettingsError, match=f"has no field '{name}'; it has: "):
            make(**{name: 1})
