"""The schedule, the split, early stopping as pure functions, and who may use a run folder."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_xrays import RECIPE, SmallXrays

from kitlib.recipes import override
from kitlib.training import (
    Fitted,
    ResumeError,
    best_row,
    draw_curves,
    is_over,
    learning_rate_factor,
    make_optimizer,
    open_run,
    split,
)


def test_the_schedule_is_the_published_one():
    # lr_t = (0.5 (1 + cos(pi t / T)) 0.95 + 0.05) lr_0: 1 at the start, 0.525 half-way, 0.05 at the end
    assert [learning_rate_factor(step, 100, 0) for step in (0, 50, 100)] == pytest.approx([1, 0.525, 0.05])
    assert learning_rate_factor(25, 100, 0) == pytest.approx(0.5 * (1 + math.sqrt(0.5)) * 0.95 + 0.05)


def test_warm_up_is_linear_and_the_cosine_takes_the_rest():
    assert [learning_rate_factor(step, 24, 4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert learning_rate_factor(14, 24, 4) == pytest.approx(0.525)


@given(st.integers(1, 200), st.integers(0, 50))
def test_the_learning_rate_stays_in_bounds_and_falls_after_the_warm_up(total, warmup):
    factors = [learning_rate_factor(step, total, warmup) for step in range(total + warmup + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(later <= earlier for earlier, later in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def rows(*scores):
    return [{"score": score} for score in scores]


@pytest.mark.parametrize(
    ("scores", "best", "over"),
    [
        ([0.1], 0, False),
        ([0.1, 0.3, 0.2], 1, False),
        ([0.3, 0.2, 0.2], 0, True),  # two epochs without a better one
        ([0.3, 0.3, 0.3], 0, True),  # equal is not better
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4, True),  # epochs used up
    ],
)
def test_patience_and_epochs_end_a_training(scores, best, over):
    assert best_row(rows(*scores)) == best
    assert is_over(rows(*scores), epochs=5, patience=2) is over


def test_biases_and_norms_do_not_decay_and_what_is_frozen_is_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, override(RECIPE, weight_decay=0.1))
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert len(decays) == 4 and decays[id(model[2].weight)] == 0.1
    assert decays[id(model[2].bias)] == decays[id(model[1].weight)] == 0
    with pytest.raises(ValueError, match="'lion'; there are: sgd, adamw"):
        make_optimizer(model, override(RECIPE, optimizer="lion"))


def test_the_split_keeps_folds_apart_and_drops_false_none_images():
    small = SmallXrays(32)
    marked = small.images.assign(false_none=small.images.image_id == "image002")
    train, validation = split(marked, small.fold_table, 1, seed=0)
    assert len(train) == 15 and len(validation) == 16
    assert set(train.patient_id).isdisjoint(validation.patient_id)
    assert set(validation.image_id) == set(small.fold_table.id[small.fold_table.fold == 1])


SMALL = SmallXrays(32)  # four images a patient


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 16), st.integers(0, 20))
def test_limits_keep_patients_whole(limit, seed):
    train, validation = split(SMALL.images, SMALL.fold_table, 0, seed, limit_train=limit, limit_validation=4)
    assert len(train) == limit // 4 * 4 and len(validation) == 4
    assert (train.patient_id.value_counts() == 4).all()


def test_an_impossible_split_is_named():
    small = SmallXrays(16)
    with pytest.raises(ValueError, match=r"fold 7 leaves nothing.*folds: \[0, 1\]"):
        split(small.images, small.fold_table, 7, seed=0)
    with pytest.raises(ValueError, match="1 images of the folds are not in the table images, first image000"):
        split(small.images[1:], small.fold_table, 0, seed=0)


def test_a_run_folder_belongs_to_one_run(tmp_path):
    identity = {"fold": 0, "recipe": {"epochs": 3, "rates": (1, 2)}, "data_fingerprint": "abc"}
    assert open_run(tmp_path, identity, resume=True) is False
    assert open_run(tmp_path, identity, resume=True) is False
    other = identity | {"recipe": {"epochs": 5, "rates": (1, 2)}, "data_fingerprint": "abd"}
    with pytest.raises(ResumeError, match=r"data_fingerprint: 'abc' there, 'abd' here; recipe\.epochs: 3 there, 5 here"):
        open_run(tmp_path, other, resume=True)
    (tmp_path / "metrics.json").write_text("{}")
    assert open_run(tmp_path, identity, resume=True) is True
    assert open_run(tmp_path, other, resume=False) is False
    assert not (tmp_path / "metrics.json").exists()
    assert open_run(tmp_path, other, resume=True) is False


def test_curves_show_what_was_logged(tmp_path):
    columns = {"epoch": [1, 2], "seconds": [1.0, 1.0], "images_per_s": [9.0, 9.0], "learning_rate": [0.1, 0.05]}
    history = pd.DataFrame(columns | {"train_loss": [2.0, 1.0], "score": [0.4, 0.5], "typical": [math.nan, 0.5]})
    draw_curves(Fitted(history, 2), tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
