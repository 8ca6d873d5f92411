import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from kitlib.fusion.box_fusion import calibrate_scores, fit_calibration


def test_fit_recovers_a_known_slope_and_offset():
    # Hits drawn with probability expit(0.7 logit(score) - 1.5); over 200,000 boxes the standard errors are below 0.01.
    rng = np.random.default_rng(0)
    score = rng.uniform(0.001, 0.999, 200_000)
    hit = rng.random(len(score)) < expit(0.7 * logit(score) - 1.5)
    assert fit_calibration(score, hit) == pytest.approx((0.7, -1.5), abs=0.03)


def test_calibrated_scores_are_right_on_average():
    # At the maximum likelihood, probabilities sum to the targets, which Platt's smoothing moves by 2 / (n + 2) at most.
    rng = np.random.default_rng(1)
    score = rng.beta(0.5, 3, 5000)
    hit = rng.random(5000) < score**2
    line = fit_calibration(score, hit)
    assert calibrate_scores(score, *line).mean() == pytest.approx(hit.mean(), abs=1e-3)


def test_fit_stays_finite_if_the_score_separates_hits_from_misses():
    slope, offset = fit_calibration([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert 0 < slope < 100 and np.isfinite(offset)
    # With two hits and two misses Platt's targets are 3/4 and 1/4, and by symmetry these are the mean probabilities.
    calibrated = calibrate_scores(np.array([0.1, 0.2, 0.8, 0.9]), slope, offset)
    assert calibrated[:2].mean() == pytest.approx(0.25, abs=0.02) and calibrated[2:].mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("hit", [[True] * 3, [False] * 3, [True, False, False]])
def test_fit_returns_none_if_there_is_nothing_to_learn(hit):
    assert fit_calibration([0.1, 0.5, 0.9], hit) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.05, 20), st.floats(-10, 10), st.floats(-50, 50))
def test_calibration_keeps_the_ranking_and_stays_between_0_and_1(scores, slope, offset, far):
    scores = np.sort(scores)
    for value in (offset, far):
        calibrated = calibrate_scores(scores, slope, value)
        assert ((calibrated > 0) & (calibrated < 1)).all() and (np.diff(calibrated) >= 0).all()
    assert calibrate_scores(scores, 1.0, 0.0) == pytest.approx(scores, abs=1e-6)
