"""The area under the ROC curve against scikit-learn's, and what is not defined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kitlib.scoring.metrics import mean_auc, roc_auc

rows = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(rows=rows)
def test_it_is_scikit_learns_with_ties_and_weights(rows):
    scores, positive, weight = (np.array(column) for column in zip(*rows, strict=True))
    area = roc_auc(scores, positive, weight)
    if not weight[positive].sum() or not weight[~positive].sum():
        assert np.isnan(area)
    else:
        assert area == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight), abs=1e-12)


def test_a_weight_counts_an_image_so_often():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    times = np.array([2, 1, 3, 0])
    assert roc_auc(scores, positive, times) == roc_auc(scores.repeat(times), positive.repeat(times))
    # of the pairs of the one positive: two won, three tied
    assert roc_auc(scores, positive, times) == (2 + 3 / 2) / 5


def test_the_mean_leaves_out_what_is_unknown_and_what_has_one_side_only():
    truth = np.array([[0, 1, np.nan, np.nan], [1, 1, 0.2, np.nan], [1, 1, 0.5, np.nan], [np.nan, 1, 1, np.nan]])
    found = np.array([[0.3, 0.1, 0.9, 0.5], [0.2, 0.2, 0.5, 0.5], [0.6, 0.3, 0.4, 0.5], [0, 0.4, 0.6, 0.5]])
    scores = mean_auc(truth, found, ["half", "all", "soft", "unknown"])
    assert scores["half"] == 0.5 and scores["soft"] == 0.5
    assert np.isnan(scores["all"]) and np.isnan(scores["unknown"])
    assert scores["score"] == 0.5
    assert np.isnan(mean_auc(truth[:, 1:2], found[:, 1:2], ["all"])["score"])
