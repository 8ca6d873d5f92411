import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from kitlib.fusion.box_fusion import calibrated, fit_calibration


def test_a_known_line_is_found_again():
    # Hits drawn with probability expit(0.7 logit(score) - 1.5); over 200,000 boxes the standard errors are below 0.01.
    rng = np.random.default_rng(0)
    score = rng.uniform(0.001, 0.999, 200_000)
    hit = rng.random(len(score)) < expit(0.7 * logit(score) - 1.5)
    assert fit_calibration(score, hit) == pytest.approx((0.7, -1.5), abs=0.03)


def test_what_is_fitted_is_right_on_average():
    # The maximum of the likelihood: probabilities sum to the targets, which Platt's smoothing moves by 2 / (n + 2) at most.
    rng = np.random.default_rng(1)
    score = rng.beta(0.5, 3, 5000)
    hit = rng.random(5000) < score**2
    line = fit_calibration(score, hit)
    assert calibrated(score, *line).mean() == pytest.approx(hit.mean(), abs=1e-3)


def test_a_fit_stays_finite_where_hits_and_misses_are_apart():
    slope, offset = fit_calibration([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert 0 < slope < 100 and np.isfinite(offset)
    # Platt's targets are 3/4 and 1/4 with two of each: the mean probability of either side is that, by symmetry.
    found = calibrated(np.array([0.1, 0.2, 0.8, 0.9]), slope, offset)
    assert found[:2].mean() == pytest.approx(0.25, abs=0.02) and found[2:].mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("hit", [[True] * 3, [False] * 3, [True, False, False]])
def test_without_anything_to_learn_there_is_no_line(hit):
    assert fit_calibration([0.1, 0.5, 0.9], hit) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.05, 20), st.floats(-10, 10), st.floats(-50, 50))
def test_the_order_stays_and_scores_stay_inside(scores, slope, offset, far):
    scores = np.sort(scores)
    for each in (offset, far):
        found = calibrated(scores, slope, each)
        assert ((found > 0) & (found < 1)).all() and (np.diff(found) >= 0).all()
    assert calibrated(scores, 1.0, 0.0) == pytest.approx(scores, abs=1e-6)
