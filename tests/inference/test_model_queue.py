"""The order and the time of a submission's models."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.inference.model_queue import Model, ModelQueue

KINDS = (("study", "none"), ("boxes",), ("classes",), ("masks",))


def make_model(*answers):
    return Model(SimpleNamespace(answers=frozenset(answers), folder=Path("-".join(answers)), classes=("opacity",)))


def make_queue(models, seconds=60.0, processes=1):
    return ModelQueue(models, SimpleNamespace(left=lambda: seconds), processes)


def predict(model, *image_ids):
    """Let a model predict images as a batch does."""
    counts = SimpleNamespace(model="m", fold=0, seen=list(image_ids), lungs_missed=0, overflowed=0)
    model.add(pd.DataFrame({"image_id": list(image_ids), "score": 0.5}), counts, model.predicted)
    model.running = False


@given(st.lists(st.sampled_from(KINDS), max_size=8), st.data())
def test_each_model_gets_a_turn_in_order_and_another_one_if_it_was_stopped(kinds, data):
    models = [make_model(*kind) for kind in kinds]
    queue, turns, first_of, answered = make_queue(models), [], [], set()
    while turn := queue.next():
        turns.append(turn.model)
        if turn.model.turns == 1:
            assert turn.may_stop == (not turn.model.answers <= answered)
            answered |= turn.model.answers
            first_of.append(turn.model)
            turn.model.stopped = turn.may_stop and data.draw(st.booleans())
        else:
            assert turn.may_stop and turn.budget == 60
        predict(turn.model, f"i{len(turns)}")
    again = [model for model in first_of if model.stopped]
    assert turns == [*models, *again]


@pytest.mark.parametrize(
    ("processes", "budgets"),
    # Three kinds have a first model, which share 60 s; the second study model may take what is left.
    [(1, [20, 60, 30, 60]), (2, [30, 60, 60, 60]), (3, [60, 60, 60, 60])],
)
def test_first_models_share_the_time_that_is_left(processes, budgets):
    models = [make_model("study"), make_model("study"), make_model("boxes"), make_model("masks")]
    queue, given_s = make_queue(models, processes=processes), []
    while turn := queue.next():
        given_s.append(turn.budget)
        predict(turn.model, "x")
    assert given_s == pytest.approx(budgets)


def test_a_model_that_runs_elsewhere_counts_as_the_first_of_its_kind():
    """The second process gets a model that must finish, because the first one predicts the same kind already."""
    queue = make_queue([make_model("boxes"), make_model("boxes")], processes=2)
    assert [queue.next().may_stop, queue.next().may_stop] == [True, False] and queue.next() is None


def test_a_stopped_model_waits_until_its_turn_has_ended_and_gets_none_once_it_is_dropped():
    boxes = make_model("boxes")
    queue = make_queue([boxes], processes=2)
    assert queue.next().model is boxes
    boxes.stopped = True  # the process that runs it has not ended its turn
    assert queue.next() is None and not boxes.may_be_fused
    predict(boxes, "x")
    assert boxes.may_be_fused
    boxes.drop()
    assert queue.next() is None and not boxes.may_be_fused


def test_predictions_of_a_first_turn_may_be_fused_during_the_second():
    boxes = make_model("boxes")
    queue = make_queue([boxes])
    queue.next()
    predict(boxes, "x")
    boxes.stopped = True
    assert queue.next().model is boxes and boxes.may_be_fused
    assert queue.next() is None


def test_images_of_boxes_and_masks_count_without_a_row_and_those_of_classes_only_with_a_number():
    """Detectors predict no row for an image without a box; a classifier's row of NaN is no prediction."""
    boxes, masks, classes = make_model("boxes"), make_model("masks"), make_model("classes")
    counts = SimpleNamespace(model="m", fold=0, seen=["x", "y", "z"], lungs_missed=0, overflowed=0)
    for model in (boxes, masks):
        model.add(pd.DataFrame({"image_id": ["x"]}), counts, model.predicted)
        assert model.count_predicted() == 3
    rows = pd.DataFrame({"image_id": ["x", "y", "z"], "a": [0.1, float("nan"), float("nan")], "b": [0.2, 0.3, float("nan")]})
    classes.add(rows, counts, classes.predicted)
    assert classes.count_predicted() == 2


def test_counts_of_a_second_turn_are_added_to_those_of_the_first():
    model = make_model("boxes")
    for missed, overflowed, seen in ((2, 1, ["a", "b"]), (3, 0, ["c"])):
        counts = SimpleNamespace(model="m", fold=4, seen=seen, lungs_missed=missed, overflowed=overflowed)
        model.add(pd.DataFrame({"image_id": seen}), counts, model.predicted)
    assert (model.predicted.lungs_missed, model.predicted.overflowed) == (5, 1)
    coverage = model.coverage()
    assert (
        coverage.image_id.tolist() == ["a", "b", "c"] and set(coverage.fold) == {4} and set(coverage.findings) == {"opacity"}
    )
