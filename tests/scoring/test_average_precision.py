import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.scoring.average_precision import average_precision, box_hits, iou, match_boxes, precision_recall
from tests.voc_reference import slow_average_precision

corner = st.integers(0, 6)
side = st.integers(1, 6)
box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
# True boxes are distinct: if two are identical, a detection may match either.
truths = st.lists(st.tuples(st.integers(0, 2), box), max_size=6, unique=True)
detected = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.5, 0.9]), box), max_size=12)


def fast_average_precision(detections, truth):
    image, score_, found = ([row[k] for row in detections] for k in range(3))
    true_image, true_boxes = ([row[k] for row in truth] for k in range(2))
    return average_precision(score_, box_hits(image, score_, found, true_image, true_boxes), len(truth))


@settings(max_examples=120, deadline=None)
@given(detected, truths, st.randoms())
def test_average_precision_equals_the_slow_reference_in_any_order(detections, truth, random):
    expected = slow_average_precision(detections, truth)
    assert fast_average_precision(detections, truth) == pytest.approx(expected, nan_ok=True)
    random.shuffle(detections)
    random.shuffle(truth)
    assert fast_average_precision(detections, truth) == pytest.approx(expected, nan_ok=True)


@given(st.integers(1, 20), st.integers(0, 20))
def test_equal_scores_give_the_prevalence(positives, negatives):
    hit = np.arange(positives + negatives) < positives
    assert average_precision(np.full(len(hit), 0.3), hit, positives) == pytest.approx(positives / len(hit))


def test_average_precision_by_hand():
    # Hit, miss, hit, with 2 ground-truth boxes: recall 1/2 at precision 1, recall 1 at precision 2/3.
    assert average_precision([0.9, 0.8, 0.7], [True, False, True], 2) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    # If the miss ties with the second hit, the area is the same in either order.
    assert average_precision([0.9, 0.7, 0.7], [True, False, True], 2) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert math.isnan(average_precision([0.9], [False], 0))
    assert average_precision([], [], 3) == 0


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.6]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=15))
def test_a_weight_counts_as_that_many_copies(rows):
    scores, hit, weight = map(np.array, zip(*rows, strict=True))
    copies = average_precision(np.repeat(scores, weight), np.repeat(hit, weight), int(weight[hit].sum()))
    assert average_precision(scores, hit, weight[hit].sum(), weight) == pytest.approx(copies, nan_ok=True)


def test_iou_of_exactly_a_half_is_no_match():
    # 10 x 20 contains 10 x 10: IoU = 1/2, no match; a slightly larger box is a match.
    truth = [[0, 0, 10, 20]]
    assert match_boxes([0, 0], [[0, 0, 10, 10], [0, 0, 10, 10.001]], [0], truth).tolist() == [-1, 0]


def test_second_detection_of_a_box_is_a_false_positive_even_if_it_overlaps_a_free_box():
    # Both detections overlap the first ground-truth box most (VOC's development kit ignores the second best).
    truth = [[0, 0, 10, 10], [0, 0, 10, 13]]
    hits = box_hits([0, 0], [0.9, 0.8], [[0, 0, 10, 10], [0, 0, 10, 10.5]], [0, 0], truth)
    assert hits.tolist() == [True, False]


def test_precision_and_recall_by_hand():
    # Four boxes, of which two are found; the second and third detection tie.
    precision, recall = precision_recall([0.7, 0.8, 0.9, 0.8], [False, True, True, False], 4)
    assert precision.tolist() == pytest.approx([1, 2 / 3, 2 / 4]) and recall.tolist() == [1 / 4, 2 / 4, 2 / 4]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0, 0, 0.5, 0.5], [0, 0, 0.5, 0.25], 0.5),  # also of boxes smaller than a pixel, or in shares of the image
        ([0, 0, 4, 2], [2, 0, 6, 2], 4 / 12),
        ([0, 0, 1, 1], [2, 3, 4, 4], 0),
        ([1, 1, 1, 5], [1, 1, 1, 5], 0),
        ([5, 5, 0, 0], [5, 5, 0, 0], 0),
    ],
)
def test_iou_by_hand(one, other, expected):
    assert iou(np.array(one, float), np.array(other, float)) == pytest.approx(expected)
