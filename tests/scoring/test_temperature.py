import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.scoring.temperature import BOUNDS, cross_scaled, fit_temperature, log_loss, scaled


@given(st.floats(0.1, 10), st.integers(2, 5), st.integers(0, 99))
def test_scaling_is_the_softmax_of_divided_logits_and_keeps_the_ranking(temperature, classes, seed):
    logits = np.random.default_rng(seed).normal(size=(20, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divided = np.exp(logits / temperature)
    found = scaled(probabilities, temperature)
    np.testing.assert_allclose(found, divided / divided.sum(axis=1, keepdims=True), atol=1e-9)
    assert (found.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    np.testing.assert_allclose(scaled(probabilities, 1.0), probabilities, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-6, *BOUNDS, 1e6])
def test_no_temperature_makes_small_or_equal_probabilities_overflow(temperature):
    """Rows need not sum to 1: all four classes of a study may be improbable."""
    found = scaled(np.array([[1e-7, 2e-7], [1e-7, 1.0], [0.5, 0.5], [0.0, 0.0]]), temperature)
    # p^(1/T) / sum: the ratio of the first row is 2^(1/T), that of the second 10^(7/T).
    odds = np.exp2(-np.array([1, 7 * np.log2(10), 0, 0]) / temperature)
    np.testing.assert_allclose(found, np.stack([odds, np.ones(4)], axis=1) / (1 + odds)[:, None], rtol=1e-9, atol=1e-300)


def calibrated(n, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities of three classes, and true classes drawn from them."""
    rng = np.random.default_rng(seed)
    found = rng.dirichlet(np.ones(3), n)
    return found, np.array([rng.choice(3, p=row) for row in found])


@pytest.mark.parametrize("spoilt", [0.5, 1.0, 3.0])
def test_the_fit_recovers_the_temperature_that_was_applied(spoilt):
    found, truth = calibrated(4000)
    fitted = fit_temperature(scaled(found, 1 / spoilt), truth)
    assert fitted == pytest.approx(spoilt, rel=0.06)  # about two standard errors
    assert (
        log_loss(scaled(scaled(found, 1 / spoilt), fitted), truth) <= log_loss(found, truth) + 1e-3
    )  # the power can be smaller than LEAST


def test_log_loss_is_the_mean_over_rows_and_finite():
    found = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert log_loss(found, np.array([0, 1])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert log_loss(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(7 * np.log(10))  # at least 1e-7


def test_temperature_in_closed_form_for_two_classes():
    # p = .9 everywhere, right 3 times in 4: logit 3 after scaling is log(.9/.1) / T = log 3, so T = 2
    found, truth = np.tile([0.9, 0.1], (4, 1)), np.array([0, 0, 0, 1])
    assert fit_temperature(found, truth) == pytest.approx(2, abs=1e-3)


def test_certain_scores_and_bounds_stay_finite():
    certain = np.tile([1.0, 0.0], (4, 1))
    assert np.isfinite(fit_temperature(certain, np.array([0, 0, 0, 1])))
    right = scaled(certain, fit_temperature(certain, np.zeros(4, int)))
    assert np.isfinite(right).all() and right[0, 0] == pytest.approx(1)
    # The more equal, the better; and the less equal, the better: the limits of the temperature.
    unsure = np.tile([0.6, 0.4], (4, 1))
    assert fit_temperature(unsure, np.ones(4, int)) == pytest.approx(50, rel=0.01)
    assert fit_temperature(unsure, np.zeros(4, int)) == pytest.approx(0.02, rel=0.01)
    with pytest.raises(ValueError, match="temperature is 0, expected a number above 0"):
        scaled(certain, 0)
    with pytest.raises(ValueError, match="no rows"):
        fit_temperature(certain[:0], np.array([], int))


def test_a_fold_is_scaled_by_the_temperature_of_the_others():
    found, truth = calibrated(300)
    table = pd.DataFrame(found, columns=["a", "b", "c"]).assign(fold=np.arange(300) % 3)
    after, temperatures = cross_scaled(table, ["a", "b", "c"], truth)
    other = truth.copy()
    other[table.fold == 1] = 0  # the truth of fold 1 affects only the other folds' temperatures
    again, changed = cross_scaled(table, ["a", "b", "c"], other)
    assert temperatures[1] == changed[1] and temperatures[0] != changed[0]
    pd.testing.assert_frame_equal(after[table.fold == 1], again[table.fold == 1])
    rest = table.fold != 2
    assert temperatures[2] == fit_temperature(found[rest], truth[rest])
    with pytest.raises(ValueError, match=r"all scores are from a single fold \(0\)"):
        cross_scaled(table[table.fold == 0], ["a", "b", "c"], truth[:100])
