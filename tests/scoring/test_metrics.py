"""ROC AUC, F1, accuracy, Dice and Jaccard equal scikit-learn's; class weights in closed form; undefined cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, roc_auc_score

from kitlib.scoring.metrics import (
    call_metrics,
    class_weights,
    exclusive_scores,
    mean_auc,
    most_probable,
    overlap,
    precision_recall_f1,
    roc_auc,
    threshold_map,
)

rows = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(rows=rows)
def test_roc_auc_equals_scikit_learns_with_ties_and_weights(rows):
    scores, positive, weight = (np.array(column) for column in zip(*rows, strict=True))
    area = roc_auc(scores, positive, weight)
    if not weight[positive].sum() or not weight[~positive].sum():
        assert np.isnan(area)
    else:
        assert area == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight), abs=1e-12)


def test_a_weight_counts_as_that_many_images():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    times = np.array([2, 1, 3, 0])
    assert roc_auc(scores, positive, times) == roc_auc(scores.repeat(times), positive.repeat(times))
    # of the pairs of the only positive two are won and three tied
    assert roc_auc(scores, positive, times) == (2 + 3 / 2) / 5


def test_the_mean_ignores_unknown_labels_and_classes_without_positives_or_negatives():
    truth = np.array([[0, 1, np.nan, np.nan], [1, 1, 0.2, np.nan], [1, 1, 0.5, np.nan], [np.nan, 1, 1, np.nan]])
    found = np.array([[0.3, 0.1, 0.9, 0.5], [0.2, 0.2, 0.5, 0.5], [0.6, 0.3, 0.4, 0.5], [0, 0.4, 0.6, 0.5]])
    scores = mean_auc(truth, found, ["half", "all", "soft", "unknown"])
    assert scores["half"] == 0.5 and scores["soft"] == 0.5
    assert np.isnan(scores["all"]) and np.isnan(scores["unknown"])
    assert scores["score"] == 0.5
    assert np.isnan(mean_auc(truth[:, 1:2], found[:, 1:2], ["all"])["score"])


CLASSES = ["COVID-19", "viral", "bacterial", "normal"]


def test_class_weights_are_images_by_classes_times_images_of_the_class():
    # N / (C n): 8 / (4 x 1), 8 / (4 x 2), 8 / (4 x 1), 8 / (4 x 4)
    label = np.eye(4)[[0, 1, 1, 2, 3, 3, 3, 3]]
    assert class_weights(label).tolist() == [2.0, 1.0, 2.0, 0.5]
    unknown = np.concatenate([label, np.full((5, 4), np.nan)])
    assert class_weights(unknown).tolist() == [2.0, 1.0, 2.0, 0.5]


def test_a_class_without_images_has_weight_0_and_does_not_affect_the_others():
    # 6 / (2 x 2), 6 / (2 x 4)
    assert class_weights(np.eye(3)[[0, 0, 2, 2, 2, 2]]).tolist() == [1.5, 0.0, 0.75]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_an_image_weighs_one_on_average(numbers):
    label = np.eye(4)[numbers]
    assert (label @ class_weights(label)).mean() == pytest.approx(1)


@given(st.integers(0, 1000), st.integers(5, 60))
def test_scores_are_scikit_learns(seed, count):
    rng = np.random.default_rng(seed)
    actual = np.concatenate([np.arange(4), rng.integers(0, 4, count)])  # each class occurs
    found = rng.dirichlet(np.ones(4), len(actual))
    by_f1, by_accuracy = (exclusive_scores(np.eye(4)[actual], found, CLASSES, name) for name in ("macro_f1", "accuracy"))
    called = found.argmax(axis=1)
    assert by_f1["score"] == pytest.approx(f1_score(actual, called, average="macro", zero_division=0))
    assert by_accuracy["score"] == pytest.approx(accuracy_score(actual, called))
    for number, name in enumerate(CLASSES):
        assert by_accuracy[name] == pytest.approx((called[actual == number] == number).mean())
    assert list(by_f1) == ["score", *CLASSES]


def test_a_class_that_does_not_occur_is_ignored_in_the_mean():
    truth = np.eye(4)[[0, 0, 1, 1]]
    found = np.eye(4)[[0, 0, 1, 3]]
    scores = exclusive_scores(truth, found, CLASSES, "macro_f1")
    # F1 of the first class is 1, of the second 2 x 1 x 0.5 / 1.5; the fourth is predicted once but never true
    assert scores["score"] == pytest.approx((1 + 2 / 3) / 2) and scores["viral"] == pytest.approx(2 / 3)
    assert np.isnan([scores["bacterial"], scores["normal"]]).all()
    truth[3] = np.nan
    assert exclusive_scores(truth, found, CLASSES, "accuracy")["score"] == 1
    assert np.isnan(exclusive_scores(truth * np.nan, found, CLASSES, "accuracy")["score"])


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_overlap_equals_scikit_learns_scores_of_pixels(seed, many, others, shape):
    rng = np.random.default_rng(seed)
    found, truth = rng.random(shape) < many, rng.random(shape) < others
    dice, jaccard = overlap(found, truth)
    assert dice == pytest.approx(f1_score(truth.ravel(), found.ravel(), zero_division=1.0))
    assert jaccard == pytest.approx(jaccard_score(truth.ravel(), found.ravel(), zero_division=1.0))
    assert jaccard == pytest.approx(dice / (2 - dice)) and overlap(truth, found) == (dice, jaccard)


def test_overlap_in_closed_form():
    one, other, empty = (np.zeros((10, 10), bool) for _ in range(3))
    one[:4], other[2:8] = True, True  # 40 and 60 pixels, 20 of them shared
    assert overlap(one, other) == (pytest.approx(40 / 100), pytest.approx(20 / 80))
    assert overlap(one, one) == (1, 1) and overlap(one, ~one) == (0, 0)
    assert overlap(empty, empty) == (1, 1) and overlap(one, empty) == overlap(empty, one) == (0, 0)


def test_masks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"masks of shape \(10, 9\) and \(9, 10\) cannot be compared"):
        overlap(np.ones((10, 9), bool), np.ones((9, 10), bool))


def test_called_classes_are_scored_where_they_are_known_and_occur():
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, np.nan, 0], [0, 1, 0]], dtype=float)
    called = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=bool)
    # First class: one of two calls right, one of two found. Second: two of two known. The third does not occur.
    expected = {"accuracy": 1 / 3, "precision": (0.5 + 1) / 2, "recall": (0.5 + 1) / 2, "f1": (0.5 + 1) / 2}
    assert call_metrics(truth, called) == pytest.approx(expected)
    assert np.isnan(list(call_metrics(truth * np.nan, called).values())).all()
    assert most_probable(np.array([[0.4, 0.4, 0.2], [0, 0.1, 0.9]])).tolist() == [[True, False, False], [False, False, True]]


def test_precision_and_recall_without_calls_or_without_the_class():
    one, none = np.array([True, False]), np.array([False, False])
    assert precision_recall_f1(one, one) == (1, 1, 1)
    assert precision_recall_f1(one, none) == (0, 0, 0)
    assert np.isnan(precision_recall_f1(none, one)).all()


def test_a_map_is_cut_at_the_lower_threshold_if_enough_pixels_exceed_the_upper():
    # 255 x 0.5 = 127.5 and 255 x 0.3 = 76.5: probabilities above them are at least 128 and 77.
    probabilities = np.array([[127, 128, 200], [77, 76, 0]], np.uint8)
    assert threshold_map(probabilities, 0.5, 2, 0.3).tolist() == [[True, True, True], [True, False, False]]
    assert threshold_map(probabilities, 0.5, 3, 0.3).tolist() == [[False] * 3] * 2
