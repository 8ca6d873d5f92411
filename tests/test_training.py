"""The schedule, early stopping and the optimiser's groups as pure functions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_xrays import RECIPE

from kitlib.recipes import override
from kitlib.training import learning_rate_factor, make_optimizer
from kitlib.training_run import best_row, is_over


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
