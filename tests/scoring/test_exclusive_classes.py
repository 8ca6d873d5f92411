"""Weights in closed form, and scores against scikit-learn's own averages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from kitlib.scoring.exclusive_classes import class_weights, exclusive_scores

CLASSES = ["COVID-19", "viral", "bacterial", "normal"]


def test_a_class_weighs_all_images_by_the_number_of_classes_and_its_own():
    # N / (C n): 8 / (4 x 1), 8 / (4 x 2), 8 / (4 x 1), 8 / (4 x 4)
    label = np.eye(4)[[0, 1, 1, 2, 3, 3, 3, 3]]
    assert class_weights(label).tolist() == [2.0, 1.0, 2.0, 0.5]
    unknown = np.concatenate([label, np.full((5, 4), np.nan)])
    assert class_weights(unknown).tolist() == [2.0, 1.0, 2.0, 0.5]


def test_a_class_without_images_weighs_nothing_and_the_others_as_if_it_were_not():
    # 6 / (2 x 2), 6 / (2 x 4)
    assert class_weights(np.eye(3)[[0, 0, 2, 2, 2, 2]]).tolist() == [1.5, 0.0, 0.75]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_an_image_weighs_one_on_average(numbers):
    label = np.eye(4)[numbers]
    assert (label @ class_weights(label)).mean() == pytest.approx(1)


@given(st.integers(0, 1000), st.integers(5, 60))
def test_scores_are_scikit_learns(seed, count):
    rng = np.random.default_rng(seed)
    actual = np.concatenate([np.arange(4), rng.integers(0, 4, count)])  # each occurs
    found = rng.dirichlet(np.ones(4), len(actual))
    by_f1, by_accuracy = (exclusive_scores(np.eye(4)[actual], found, CLASSES, name) for name in ("macro_f1", "accuracy"))
    called = found.argmax(axis=1)
    assert by_f1["score"] == pytest.approx(f1_score(actual, called, average="macro", zero_division=0))
    assert by_accuracy["score"] == pytest.approx(accuracy_score(actual, called))
    for number, name in enumerate(CLASSES):
        assert by_accuracy[name] == pytest.approx((called[actual == number] == number).mean())
    assert list(by_f1) == ["score", *CLASSES]


def test_a_class_that_does_not_occur_is_not_in_the_mean():
    truth = np.eye(4)[[0, 0, 1, 1]]
    found = np.eye(4)[[0, 0, 1, 3]]
    scores = exclusive_scores(truth, found, CLASSES, "macro_f1")
    # F1 of the first 1, of the second 2 x 1 x 0.5 / 1.5; the fourth is called once and never true
    assert scores["score"] == pytest.approx((1 + 2 / 3) / 2) and scores["viral"] == pytest.approx(2 / 3)
    assert np.isnan([scores["bacterial"], scores["normal"]]).all()
    truth[3] = np.nan
    assert exclusive_scores(truth, found, CLASSES, "accuracy")["score"] == 1
    assert np.isnan(exclusive_scores(truth * np.nan, found, CLASSES, "accuracy")["score"])
