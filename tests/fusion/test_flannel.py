"""FLANNEL's network and loss, compared with closed forms; its training, early stopping and order of learners.

test_ensembles compares the numpy version of its forward pass with loops.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from kitlib.errors import SettingsError
from kitlib.fusion.flannel import (
    ENSEMBLES,
    EnsembleSettings,
    FlannelWeights,
    class_weights,
    ensemble_settings,
    focal_loss,
    train_flannel,
)
from kitlib.settings import override


def drawn(n, learners, classes, seed=0) -> torch.Tensor:
    return torch.rand((n, learners, classes), generator=torch.Generator().manual_seed(seed)).mul(4).softmax(dim=2)


def test_five_learners_of_four_classes_have_the_published_number_of_parameters():
    # W = tanh(Linear(400, 5)): 5 * 400 + 5
    model = FlannelWeights(5, 4)
    assert sum(each.numel() for each in model.parameters()) == 2005
    assert model(drawn(3, 5, 4)).shape == (3, 4) and model.weights(drawn(3, 5, 4)).shape == (3, 5)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_no_probability_exceeds_the_bound(learners, classes, seed):
    torch.manual_seed(seed)
    model = FlannelWeights(learners, classes).double()
    with torch.no_grad():
        model.linear.bias.fill_(50.0)  # every weight at its largest, 1
        sure = torch.zeros(1, learners, classes, dtype=torch.float64)
        sure[:, :, 0] = 1
        bound = math.e**learners / (math.e**learners + classes - 1)
        probabilities = model(torch.cat([sure, drawn(20, learners, classes, seed).double()])).softmax(dim=1)
    assert probabilities[0, 0].item() == pytest.approx(bound, abs=1e-12)  # reached where all learners are sure
    assert probabilities.max().item() <= bound + 1e-12


def test_permuted_learners_have_permuted_weights():
    learners, classes, order = 4, 3, [2, 0, 3, 1]
    model, permuted = FlannelWeights(learners, classes), FlannelWeights(learners, classes)
    pairs = torch.arange((learners * classes) ** 2).reshape(learners, classes, learners, classes)
    with torch.no_grad():
        permuted.linear.weight.copy_(model.linear.weight[order][:, pairs[order][:, :, order].flatten()])
        permuted.linear.bias.copy_(model.linear.bias[order])
        probabilities = drawn(10, learners, classes)
        torch.testing.assert_close(permuted.weights(probabilities[:, order]), model.weights(probabilities)[:, order])
        torch.testing.assert_close(permuted(probabilities[:, order]), model(probabilities))


def test_focal_loss_with_gamma_0_is_the_weighted_cross_entropy():
    logits = torch.randn((50, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target, alpha = torch.arange(50) % 4, torch.tensor([0.5, 1, 2, 3], dtype=torch.float64)
    expected = cross_entropy(logits, target, weight=alpha, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, alpha, 0.0), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 10.0])
def test_focal_loss_and_its_gradient_are_finite_and_the_loss_falls_with_the_probability(gamma):
    margins = torch.tensor([-1e4, -50, -1, 0, 1, 50, 1e4])
    logits = torch.stack([margins, torch.zeros(7)], dim=1).requires_grad_()
    loss = focal_loss(logits, torch.zeros(7, dtype=torch.long), torch.ones(2), gamma)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
    assert (loss.diff() <= 0).all() and loss[-1].item() == 0 and loss[0].item() == pytest.approx(1e4)
    # p = 1/2: 2^-gamma log 2
    assert loss[3].item() == pytest.approx(2**-gamma * math.log(2), rel=1e-6)


def test_class_weights_in_closed_form():
    target = torch.tensor([0, 0, 0, 1, 3, 3])
    assert class_weights(target, 4, "balanced").tolist() == pytest.approx([6 / 9, 6 / 3, 0, 6 / 6])  # N / (C n_c), C = 3
    assert class_weights(target, 4, "published").tolist() == pytest.approx([1000 / 3, 1000, 0, 500])


QUICK = ensemble_settings("flannel", epochs=6, batch_size=50)


@pytest.fixture(scope="module")
def lesson() -> tuple[np.ndarray, np.ndarray]:
    """300 rows of three learners and three classes: the second learner knows half of the truth, the others nothing."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    probabilities = rng.dirichlet(np.ones(3), (300, 3))
    probabilities[:, 1] = 0.5 * probabilities[:, 1] + 0.5 * np.eye(3)[truth]
    return probabilities, truth


def test_the_informed_learner_gets_the_largest_weight(lesson):
    learned, losses = train_flannel(*lesson, ensemble_settings("flannel", epochs=30, batch_size=50))
    assert learned["weight"].shape == (3, 81) and learned["bias"].shape == (3,)
    features = lesson[0].reshape(300, 9)
    pairs = (features[:, :, None] * features[:, None, :]).reshape(300, 81)
    weights = np.tanh(pairs @ learned["weight"].T + learned["bias"]).mean(axis=0)
    assert weights.argmax() == 1 and weights[1] > 0.6 > 0.5 > max(weights[0], weights[2]) and losses == []


def test_learners_in_another_order_get_the_same_weights_in_that_order(lesson):
    probabilities, truth = lesson
    order = [2, 0, 1]
    one, _ = train_flannel(probabilities, truth, QUICK)
    other, _ = train_flannel(probabilities[:, order], truth, QUICK)
    pairs = np.arange(81).reshape(3, 3, 3, 3)[order][:, :, order].ravel()
    np.testing.assert_allclose(other["weight"], one["weight"][order][:, pairs], atol=1e-5)
    np.testing.assert_allclose(other["bias"], one["bias"][order], atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_a_random_start_another(lesson):
    one, again = train_flannel(*lesson, QUICK)[0], train_flannel(*lesson, QUICK)[0]
    assert np.array_equal(one["weight"], again["weight"])
    drawn = ensemble_settings("flannel", epochs=6, batch_size=50, start="random")
    assert abs(train_flannel(*lesson, drawn)[0]["weight"] - one["weight"]).max() > 1e-3


def test_the_first_step_moves_weights_by_the_learning_rate(lesson):
    """Adam's first step is the learning rate, up or down, for all but the smallest gradients; one batch has all rows."""
    once = ensemble_settings("flannel", epochs=1, batch_size=300, weight_decay=0.0)
    slow, fast = (train_flannel(*lesson, override(once, learning_rate=rate))[0] for rate in (0.01, 0.03))
    for name in ("weight", "bias"):
        assert np.median(abs(fast[name] - slow[name])) == pytest.approx(0.02, rel=0.01)


def test_training_stops_early_and_returns_the_best_epoch(lesson):
    probabilities, truth = lesson
    held_out = np.arange(300) % 3 == 0
    # the held-out rows contradict the others, so every step raises their loss
    contrary = np.where(held_out, (truth + 1) % 3, truth)
    settings = ensemble_settings("flannel", epochs=50, batch_size=50, patience=2)
    learned, losses = train_flannel(probabilities, contrary, settings, held_out)
    assert len(losses) == 4 and losses == sorted(losses)
    one_epoch = ensemble_settings("flannel", epochs=1, batch_size=50)
    first, _ = train_flannel(probabilities[~held_out], contrary[~held_out], one_epoch)
    np.testing.assert_array_equal(learned["weight"], first["weight"])
    # with patience 0 no row is held out
    whole = ensemble_settings("flannel", epochs=2, batch_size=50, patience=0)
    one, none = train_flannel(probabilities, contrary, whole, held_out), train_flannel(probabilities, contrary, whole)
    assert one[1] == [] and np.array_equal(one[0]["weight"], none[0]["weight"])


@pytest.mark.parametrize("patience", [1, 3, 6])
def test_patience_counts_the_epochs_since_the_lowest_loss(lesson, patience):
    """The held-out loss falls for several epochs, because the second learner knows something, and then rises."""
    probabilities, truth = lesson
    rng = np.random.default_rng(1)
    held_out = np.arange(300) % 3 == 0
    # The second learner is right about all training rows, but only about two thirds of the held-out rows.
    informed = 0.1 * probabilities[:, 1] + 0.9 * np.eye(3)[truth]
    probabilities = np.stack([probabilities[:, 0], informed, probabilities[:, 2]], axis=1)
    mixed = np.where(held_out & (rng.random(300) < 0.5), rng.integers(0, 3, 300), truth)
    settings = ensemble_settings("flannel", epochs=40, batch_size=50, patience=40)
    _, losses = train_flannel(probabilities, mixed, settings, held_out)
    best = int(np.argmin(losses))
    assert 3 < best < 30 and losses[: best + 1] == sorted(losses[: best + 1], reverse=True)
    learned, until = train_flannel(probabilities, mixed, replace(settings, patience=patience), held_out)
    assert until == losses[: best + patience + 2]  # the best epoch, `patience` worse ones, and the one that is too many
    until_best = replace(settings, epochs=best + 1, patience=0)
    expected, _ = train_flannel(probabilities[~held_out], mixed[~held_out], until_best)
    np.testing.assert_array_equal(learned["weight"], expected["weight"])


def test_training_works_if_a_class_does_not_occur(lesson):
    probabilities, truth = lesson
    occurs = truth != 2
    learned, losses = train_flannel(probabilities[occurs], truth[occurs], QUICK, np.arange(occurs.sum()) < 20)
    assert np.isfinite(learned["weight"]).all() and np.isfinite(losses).all()
    with pytest.raises(ValueError, match="no rows to train on: 300 of 300 rows are held out"):
        train_flannel(probabilities, truth, QUICK, np.ones(300, bool))


def test_settings_are_strict_and_the_published_ones_equal_the_authors_code():
    published = ENSEMBLES["flannel_published"]
    assert (published.gamma, published.alpha, published.reduction, published.learning_rate) == (10, "published", "sum", 1e-5)
    assert (published.batch_size, published.epochs, published.stack_on) == (20, 200, "in_sample")
    assert (published.start, published.patience, published.learns) == ("random", 0, True)
    assert EnsembleSettings().stack_on == "out_of_fold" and EnsembleSettings().gamma == 2  # as in Lin et al.
    assert ENSEMBLES["flannel_in_sample"] == EnsembleSettings(stack_on="in_sample")
    methods = {name: (settings.method, settings.learns) for name, settings in ENSEMBLES.items()}
    assert [methods[name] for name in ("mean", "vote", "weighted", "flannel")] == [
        *(("mean", False), ("vote", False), ("weighted", True), ("flannel", True)),
    ]
    for wrong, message in (
        ({"method": "median"}, "method is 'median'; expected one of 'mean', 'vote'"),
        ({"gama": 1.0}, "has no field 'gama'"),
        ({"gamma": -1.0}, "gamma is -1.0; expected a finite number of at least 0"),
        ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"stack_on": "test"}, "stack_on is 'test'; expected one of 'out_of_fold', 'in_sample'"),
    ):
        with pytest.raises(SettingsError, match=message):
            ensemble_settings("flannel", **wrong)
    with pytest.raises(SettingsError, match="unknown ensemble 'flanel'; valid names are: mean"):
        ensemble_settings("flanel")
