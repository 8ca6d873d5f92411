import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from kitlib.competitions.fusion_settings import CONFIDENCES, METHODS
from kitlib.fusion.box_fusion import calibrate_scores, fit_calibration, merge_boxes, suppress_overlaps

# Two lists: a box that both have (IoU 0.9), one that only the first has, and one that only the second has.
LISTS = (
    np.array([[0.1, 0.1, 0.3, 0.3], [0.5, 0.1, 0.7, 0.3]]),
    np.array([[0.1, 0.1, 0.3, 0.28], [0.5, 0.6, 0.7, 0.9]]),
)
SCORES = (np.array([0.9, 0.4]), np.array([0.6, 0.8]))


@pytest.mark.parametrize(
    ("method", "weights", "expected"),
    [
        # nms: score * weight / the largest weight; the box with the highest such score is kept.
        ("nms", (2, 5), [0.8, 0.6, 0.4 * 2 / 5]),
        ("nms", (0.5, 0.25), [0.9, 0.4, 0.8 / 2]),
        # soft_nms: the other box of the pair decays by its IoU, to a tenth.
        ("soft_nms", (2, 5), [0.8, 0.6, 0.4 * 2 / 5, 0.9 * 2 / 5 / 10]),
        # wbf: the sum of score * weight over the boxes of a cluster / the sum of all weights
        ("wbf", (2, 5), [(0.9 * 2 + 0.6 * 5) / 7, 0.8 * 5 / 7, 0.4 * 2 / 7]),
        ("wbf", (0.5, 0.25), [(0.9 * 0.5 + 0.6 * 0.25) / 0.75, 0.4 * 0.5 / 0.75, 0.8 * 0.25 / 0.75]),
    ],
)
def test_scores_of_weighted_lists_in_closed_form(method, weights, expected):
    _, score = merge_boxes(list(LISTS), list(SCORES), weights, method)
    assert sorted(score, reverse=True) == pytest.approx(sorted(expected, reverse=True), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        *([-0.1, 0.1, 0.3, 0.3], [0.1, -0.1, 0.3, 0.3], [0.1, 0.1, 1.1, 0.3], [0.1, 0.1, 0.3, 1.1]),
        *([0.3, 0.1, 0.3, 0.3], [0.1, 0.4, 0.3, 0.3], [0.1, 0.1, np.nan, 0.3]),
    ],
)
def test_the_first_invalid_box_is_named(wrong):
    boxes = [LISTS[0], np.array([LISTS[1][0], wrong, [0.5, 0.5, 0.4, 0.4]])]
    with pytest.raises(ValueError, match=re.escape(f"got {wrong}")):
        merge_boxes(boxes, [SCORES[0], np.array([0.9, 0.8, 0.7])], (1, 1))


@pytest.mark.parametrize("wrong", [0.0, 1.1, np.nan])
def test_the_first_invalid_score_is_named(wrong):
    with pytest.raises(ValueError, match=rf"scores must be above 0 and at most 1; got {wrong}"):
        merge_boxes(list(LISTS), [np.array([0.9, wrong]), np.array([0.6, -1.0])], (1, 1))


WAYS = [("wbf", name) for name in (*CONFIDENCES, "agreed")] + [(method, "avg") for method in METHODS]


@pytest.mark.parametrize(
    ("scores", "lists", "expected"),
    [
        ([0.5], 1, 0.5),  # a single list stays as it is
        ([0.5], 2, 0.5 / 2 / 0.6),
        ([0.5], 5, 0.5 / 5 / 0.6),
        ([0.6, 0.5, 0.4], 5, 0.5),  # three of five is a share of 0.6
        ([0.6, 0.5, 0.4, 0.3, 0.2], 5, 0.4 / 0.6),
        ([0.9, 0.8], 2, 1),
    ],
)
def test_a_box_that_six_tenths_of_the_lists_find_keeps_its_mean_score(scores, lists, expected):
    boxes = [np.array([[0.1, 0.1, 0.5, 0.5]])] * len(scores)
    _, score = merge_boxes(boxes, [np.array([each]) for each in scores], np.ones(lists), confidence="agreed")
    assert score == pytest.approx([expected])


@pytest.mark.parametrize(("method", "confidence"), WAYS)
@given(st.tuples(*[st.floats(0.1, 10)] * 3), st.floats(0.05, 20))
def test_only_the_ratios_of_the_weights_matter(method, confidence, weights, factor):
    """`weights` has an entry for a third, empty list."""
    one = merge_boxes(list(LISTS), list(SCORES), np.array(weights), method, confidence=confidence)
    other = merge_boxes(list(LISTS), list(SCORES), np.array(weights) * factor, method, confidence=confidence)
    # Sorted by corners, because rounding decides the order of boxes with equal scores.
    left, right = (np.column_stack(result)[np.lexsort(result[0].round(3).T)] for result in (one, other))
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["wbf", "nms", "nmw"])
def test_boxes_are_merged_if_their_iou_exceeds_the_limit(method):
    # The IoU of the two lists' first boxes is 0.18 / 0.2 = 0.9; no other boxes overlap.
    counts = [len(merge_boxes(list(LISTS), list(SCORES), (1, 1), method, iou)[1]) for iou in (0.85, 0.95)]
    assert counts == [3, 4]


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


def test_overlapping_boxes_are_suppressed_best_first_and_none_stay_none():
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.1, 0.0, 0.6, 0.5], [0.6, 0.6, 0.9, 0.9]])
    # The first two share 0.4 of 0.6 in width: IoU 2/3.
    for iou, expected in ((0.6, [0.9, 0.7]), (0.7, [0.9, 0.8, 0.7])):
        kept, scores = suppress_overlaps(boxes, np.array([0.8, 0.9, 0.7]), iou)
        assert scores.tolist() == pytest.approx(expected) and kept[0].tolist() == pytest.approx(boxes[1].tolist())
    kept, scores = suppress_overlaps(boxes[:0], np.zeros(0), 0.5)
    assert kept.shape == (0, 4) and scores.shape == (0,)


def test_a_merged_box_that_float32_makes_flat_is_dropped():
    # Merged corners are float32: around 0.5 they are 2^-24 apart, and a box of 1e-9 becomes flat.
    thin = np.array([[0.1, 0.5, 0.3, 0.5 + 1e-9]])
    for lists, expected in (([thin, thin], 0), ([thin, thin[:0]], 1), ([LISTS[0], LISTS[0]], 2)):
        merged, score = merge_boxes(lists, [np.full(len(boxes), 0.5) for boxes in lists], np.ones(2))
        assert len(merged) == len(score) == expected


def test_scores_above_1_are_clipped():
    # avg: two boxes of a list of weight 3 in one cluster, (0.9 * 3 + 0.9 * 3) / 2 * 2 / 4 = 1.35.
    boxes = np.array([[0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.29]])
    _, score = merge_boxes([boxes, boxes[:0]], [np.array([0.9, 0.9]), np.empty(0)], np.array([3.0, 1.0]))
    assert score.tolist() == [1.0]
