"""The drawing of a plan."""

import json

import pytest
from matplotlib.colors import to_rgba

from kitlib.plans.graph import COLOURS, draw_plan
from kitlib.plans.plan import RECORD, read_plan
from tests.plans.test_engine import shell, write_plan


@pytest.fixture
def drawn(tmp_path):
    """The axes and the texts of a plan in which `train` is half done and `fuse` needs `prepare` also indirectly."""
    steps = {
        "prepare": shell("true"),
        "train": shell("true", matrix={"fold": [0, 1]}, needs=["prepare"]),
        "other": shell("true", needs=["prepare"]),
        "fuse": shell("true", needs=["prepare", "train"]),
    }
    plan = read_plan(write_plan(tmp_path, steps))
    for name in ("prepare", "train-0"):
        run = plan.planned[name]
        run.folder.mkdir(parents=True)
        (run.folder / RECORD).write_text(json.dumps({"key": run.key}))
        run.done_file.write_text("{}")
    (axes,) = draw_plan(plan).axes
    return axes, {text.get_text().split("\n")[0]: text for text in axes.texts if text.get_text()}


def test_every_step_is_inside_the_picture_right_of_those_it_needs(drawn):
    axes, texts = drawn
    at = {step: text.get_position() for step, text in texts.items()}
    assert set(at) == {"prepare", "train", "other", "fuse"} and len(set(at.values())) == 4
    assert at["prepare"][0] < at["train"][0] == at["other"][0] < at["fuse"][0]
    for x, y in at.values():
        assert min(axes.get_xlim()) < x < max(axes.get_xlim()) and min(axes.get_ylim()) < y < max(axes.get_ylim())


def test_arrows_show_direct_needs_only(drawn):
    axes, texts = drawn
    step_at = {text.get_position(): step for step, text in texts.items()}
    arrows = {(step_at[text.xyann], step_at[text.xy]) for text in axes.texts if not text.get_text()}
    # The first of a pair is the arrow's end. `fuse` needs `prepare` through `train`.
    assert arrows == {("prepare", "train"), ("prepare", "other"), ("train", "fuse")}


def test_a_step_has_the_colour_of_the_run_that_is_farthest_from_done(drawn):
    colours = {step: text.get_bbox_patch().get_facecolor() for step, text in drawn[1].items()}
    states = {"prepare": "done", "train": "new", "other": "new", "fuse": "new"}
    assert colours == {step: to_rgba(COLOURS[state]) for step, state in states.items()}
    assert drawn[1]["train"].get_text() == "train\n1 of 2 runs" and drawn[1]["fuse"].get_text() == "fuse"


def test_the_legend_explains_the_colours(drawn):
    axes, _ = drawn
    legend = axes.get_legend()
    colours = [to_rgba(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    assert dict(zip([text.get_text() for text in legend.get_texts()], colours, strict=True)) == {
        state: to_rgba(colour) for state, colour in COLOURS.items()
    }
    assert axes.get_title() == "plan"
