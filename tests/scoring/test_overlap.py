import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score

from kitlib.scoring.overlap import overlap


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_agreement_is_that_of_two_classes_of_pixels(seed, many, others, shape):
    rng = np.random.default_rng(seed)
    found, truth = rng.random(shape) < many, rng.random(shape) < others
    dice, jaccard = overlap(found, truth)
    assert dice == pytest.approx(f1_score(truth.ravel(), found.ravel(), zero_division=1.0))
    assert jaccard == pytest.approx(jaccard_score(truth.ravel(), found.ravel(), zero_division=1.0))
    assert jaccard == pytest.approx(dice / (2 - dice)) and overlap(truth, found) == (dice, jaccard)


def test_closed_forms():
    one, other, empty = (np.zeros((10, 10), bool) for _ in range(3))
    one[:4], other[2:8] = True, True  # 40 and 60 pixels, 20 of them shared
    assert overlap(one, other) == (pytest.approx(40 / 100), pytest.approx(20 / 80))
    assert overlap(one, one) == (1, 1) and overlap(one, ~one) == (0, 0)
    assert overlap(empty, empty) == (1, 1) and overlap(one, empty) == overlap(empty, one) == (0, 0)


def test_masks_of_two_sizes_are_not_compared():
    with pytest.raises(ValueError, match=r"masks of \(10, 9\) and \(9, 10\) pixels cannot be compared"):
        overlap(np.ones((10, 9), bool), np.ones((9, 10), bool))
