"""Published figures against the counts behind them: UNet + HRNet paper, Tables 6 and 7: 41 positives, 50 others a fold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.reports.reported_counts import CountsError, check, figures_of, pooled


def row(accuracy, sensitivity, specificity):
    return {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity}


# Table 6; 10 folds of 410 COVID-19 and 500 other images have 41 and 50 each.
FOLDS = [
    *(row(98.78, 97.56, 98.03), row(100, 100, 100), row(98.78, 97.56, 98.03), row(98.78, 97.56, 98.03)),
    *(row(100, 100, 100), row(100, 100, 100), row(100, 100, 100), row(98.78, 97.56, 98.03), row(100, 100, 100)),
    row(97.80, 95.12, 96.15),
]


def test_the_specificities_of_table_6_are_negative_predictive_values():
    verdicts = [check(41, 50, fold) for fold in FOLDS]
    assert [each.consistent for each in verdicts] == [False, True, False, False, True, True, True, False, True, False]
    # 40 of 41 found, no false alarm: 50 / 51 = 98.039 (cut off), and the accuracy is (97.56 + 100) / 2, not 90 / 91 = 98.90.
    first = verdicts[0]
    assert first.renamed == {"accuracy": ("balanced accuracy",), "specificity": ("npv",)}
    assert first.counts[["true_positives", "true_negatives"]].to_numpy().tolist() == [[40, 50]]
    # 39 of 41: 50 / 52 = 96.15, and 89 / 91 = 97.80 is right.
    assert verdicts[9].renamed == {"specificity": ("npv",)}
    assert "impossible under these names. With 39 true positives, 2 false negatives" in verdicts[9].says()
    assert "specificity is the npv" in verdicts[9].says()
    # facts: pooled from the folds
    assert pooled(verdicts) == {"sensitivity": (404, 410), "specificity": (500, 500), "accuracy": (904, 910)}


def test_table_7_has_one_such_row_among_two_right_ones():
    assert check(41, 50, row(94.50, 95.12, 94.00)).counts.true_negatives.tolist() == [47]  # 86 / 91 = 94.505, cut off
    assert check(41, 50, row(93.40, 90.24, 96.00)).counts.true_positives.tolist() == [37]
    efficientnet = check(41, 50, row(97.56, 95.12, 96.15))
    assert efficientnet.renamed == {"accuracy": ("balanced accuracy",), "specificity": ("npv",)}


@given(st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_real_figures_are_always_possible_and_their_counts_among_those_found(positives, negatives, data):
    tp, tn = data.draw(st.integers(0, positives)), data.draw(st.integers(0, negatives))
    figures = figures_of(tp, positives - tp, tn, negatives - tn)
    printed = {name: np.round(float(figures[name]), 2) for name in ("sensitivity", "specificity", "accuracy")}
    verdict = check(positives, negatives, printed)
    assert verdict.consistent
    assert [tp, tn] in verdict.counts[["true_positives", "true_negatives"]].to_numpy().tolist()


def test_nonsense_is_said_to_be_nonsense():
    nothing = check(3, 3, row(51.0, 49.0, 12.0))
    assert nothing.counts.empty and not nothing.consistent and "no counts give these figures" in nothing.says()
    with pytest.raises(CountsError, match=r"not exactly one possible count"):
        pooled([nothing])
    with pytest.raises(CountsError, match=r"figures \['auc'\]; there are: sensitivity, specificity"):
        check(3, 3, {"auc": 50})
    with pytest.raises(CountsError, match="wanted percent"):
        check(3, 3, {"accuracy": 150})
    with pytest.raises(CountsError, match="wanted at least one of each"):
        check(0, 3, {"accuracy": 50})
