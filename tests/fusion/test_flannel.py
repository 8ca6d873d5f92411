"""FLANNEL's module and loss: counts and closed forms. Its numpy forward is held against loops in test_ensembles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from kitlib.fusion.flannel import FlannelWeights, class_weights, focal_loss


def drawn(n, learners, classes, seed=0) -> torch.Tensor:
    return torch.rand((n, learners, classes), generator=torch.Generator().manual_seed(seed)).mul(4).softmax(dim=2)


def test_five_learners_of_four_classes_have_the_published_number_of_parameters():
    # W = tanh(Linear(400, 5)): 5 * 400 + 5
    model = FlannelWeights(5, 4)
    assert sum(each.numel() for each in model.parameters()) == 2005
    assert model(drawn(3, 5, 4)).shape == (3, 4) and model.weights(drawn(3, 5, 4)).shape == (3, 5)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_no_probability_passes_the_bound(learners, classes, seed):
    torch.manual_seed(seed)
    model = FlannelWeights(learners, classes).double()
    with torch.no_grad():
        model.linear.bias.fill_(50.0)  # every weight at its largest, 1
        sure = torch.zeros(1, learners, classes, dtype=torch.float64)
        sure[:, :, 0] = 1
        bound = math.e**learners / (math.e**learners + classes - 1)
        found = model(torch.cat([sure, drawn(20, learners, classes, seed).double()])).softmax(dim=1)
    assert found[0, 0].item() == pytest.approx(bound, abs=1e-12)  # reached where all learners are sure
    assert found.max().item() <= bound + 1e-12


def test_permuted_learners_have_permuted_weights():
    learners, classes, order = 4, 3, [2, 0, 3, 1]
    model, permuted = FlannelWeights(learners, classes), FlannelWeights(learners, classes)
    pairs = torch.arange((learners * classes) ** 2).reshape(learners, classes, learners, classes)
    with torch.no_grad():
        permuted.linear.weight.copy_(model.linear.weight[order][:, pairs[order][:, :, order].flatten()])
        permuted.linear.bias.copy_(model.linear.bias[order])
        found = drawn(10, learners, classes)
        torch.testing.assert_close(permuted.weights(found[:, order]), model.weights(found)[:, order])
        torch.testing.assert_close(permuted(found[:, order]), model(found))


def test_without_gamma_it_is_the_weighted_cross_entropy():
    logits = torch.randn((50, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target, alpha = torch.arange(50) % 4, torch.tensor([0.5, 1, 2, 3], dtype=torch.float64)
    expected = cross_entropy(logits, target, weight=alpha, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, alpha, 0.0), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 10.0])
def test_it_and_its_gradient_are_finite_at_0_and_1_and_it_falls_as_the_class_gets_likelier(gamma):
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
