"""The cases R1 to R11 were computed by hand and by an independent program in exact fractions."""

import gzip
import itertools
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import RSNA_CLASSES
from kitlib.competitions.contract import BoxTruth
from kitlib.competitions.merged import MergedPredictions
from kitlib.competitions.rsna_pneumonia import (
    RSNA_PNEUMONIA,
    RsnaPneumoniaFusion,
    decide,
    fill,
    metric,
    read_submission,
    read_truth,
    truth_of,
)
from kitlib.errors import ScoringError
from kitlib.tables import BOX
from tests.voc_reference import iou

ONE = "0 0 100 100"


def write_truth(path, images):
    """Write a dict from image to its boxes, each "x y width height", as stage_2_train_labels.csv."""
    lines = ["patientId,x,y,width,height,Target"]
    for name, boxes in images.items():
        lines += [f"{name},{box.replace(' ', ',')},1" for box in boxes] or [f"{name},,,,,0"]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_rows(path, rows):
    path.write_text("patientId,PredictionString\n" + "".join(f"{name},{text}\n" for name, text in rows.items()))
    return path


BY_HAND = {
    "R1": ({"a": [ONE]}, {"a": f".9 {ONE}"}, 1),
    "R2, an IoU of exactly 1/2": ({"a": [ONE]}, {"a": ".9 0 0 100 50"}, 2 / 8),
    "R3": ({"a": [ONE]}, {"a": ".9 0 0 100 51"}, 3 / 8),
    "R4, an IoU of exactly 2/5": ({"a": [ONE]}, {"a": ".9 0 0 100 40"}, 0),
    "R4, with two more pixels in a hundred": ({"a": [ONE]}, {"a": ".9 0 0 100 42"}, 1 / 8),
    "R5, an empty image is left out": ({"a": [ONE], "b": []}, {"a": f".9 {ONE}", "b": ""}, 1),
    "R6": ({"a": [ONE], "b": []}, {"a": f".9 {ONE}", "b": ".1 0 0 50 50"}, 1 / 2),
    "R7": ({"a": [ONE, "200 0 100 100"]}, {"a": f".9 {ONE} .2 500 500 10 10"}, 1 / 3),
    "R8": ({"a": [ONE], "b": [ONE]}, {"a": "", "b": ".9 0 0 100 80"}, 1 / 2),
    "R9": ({"a": [ONE]}, {"a": f".9 0 0 100 60 .5 {ONE}"}, 1 / 2),
    "R10": ({"a": ["0 0 800 800"]}, {"a": "1 50 50 700 700"}, 1),
    "R11": ({"a": [ONE], "b": []}, {"a": "", "b": ""}, 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_scores_computed_by_hand(tmp_path, case):
    truth, rows, expected = BY_HAND[case]
    write_truth(tmp_path / "stage_2_train_labels.csv", truth)
    scores = RSNA_PNEUMONIA.score_files(tmp_path, write_rows(tmp_path / "submission.csv", rows))
    assert list(scores) == ["score", *(f"iou_0.{percent}" for percent in range(40, 80, 5))]
    assert scores["score"] == pytest.approx(expected)


def test_the_parts_are_the_scores_at_each_threshold(tmp_path):
    truth = write_truth(tmp_path / "truth.csv", {"a": [ONE]})
    scores = RSNA_PNEUMONIA.score_files(truth, write_rows(tmp_path / "rows.csv", {"a": ".9 0 0 100 51"}))
    assert list(scores.values()) == [3 / 8, 1, 1, 1, 0, 0, 0, 0, 0]


def test_without_any_box_the_score_is_undefined(tmp_path):
    truth = write_truth(tmp_path / "truth.csv", {"a": []})
    assert np.isnan(list(RSNA_PNEUMONIA.score_files(truth, write_rows(tmp_path / "rows.csv", {"a": ""})).values())).all()
    empty, found = as_tables([], [])
    assert np.isnan(metric(BoxTruth((), empty.boxes), found)["score"])


side = st.integers(1, 8)
box = st.tuples(st.integers(0, 6), st.integers(0, 6), side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
true_rows = st.lists(st.tuples(st.sampled_from("ab"), box), max_size=5)
found_rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.1, 0.5, 0.9]), box), max_size=8)


def as_tables(truth, found):
    boxes = pd.DataFrame([(image, *corners) for image, corners in truth], columns=["image_id", *BOX])
    columns = ["image_id", "score", *BOX]
    return BoxTruth(("a", "b", "c"), boxes), pd.DataFrame([(*row[:2], *row[2]) for row in found], columns=columns)


def fast_score(truth, found):
    return metric(*as_tables(truth, found))["score"]


def slow_score(truth, found):
    """The mean by its definition, in exact fractions; NaN if no image counts."""
    scores = []
    for image in "abc":
        free_boxes = sorted(box for name, box in truth if name == image)
        boxes = sorted(((-confidence, box) for name, confidence, box in found if name == image))
        if not free_boxes and not boxes:
            continue
        for percent in range(40, 80, 5):
            free, hits = list(free_boxes), 0
            for _, candidate in boxes:
                reached = [true for true in free if iou(candidate, true) > Fraction(percent, 100)]
                if reached:
                    free.remove(max(reached, key=lambda true: iou(candidate, true)))
                    hits += 1
            scores.append(Fraction(hits, hits + len(boxes) - hits + len(free)))
    return float(sum(scores) / len(scores)) if scores else float("nan")


@settings(max_examples=50)
@given(true_rows, found_rows, st.randoms())
def test_the_score_equals_a_slow_reference_in_any_order(truth, found, random):
    expected = slow_score(truth, found)
    assert fast_score(truth, found) == pytest.approx(expected, nan_ok=True)
    random.shuffle(truth)
    random.shuffle(found)
    assert fast_score(truth, found) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=40)
@given(true_rows, found_rows, st.data())
def test_a_box_without_a_hit_costs_and_moving_it_onto_a_true_box_never_does(truth, found, data):
    before = fast_score(truth, found)
    image, confidence = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from([0.1, 0.9]))
    with_far = fast_score(truth, [*found, (image, confidence, (90, 90, 99, 99))])
    assert with_far <= before or np.isnan(before)
    if any(name == image for name, _ in truth):
        true_box = data.draw(st.sampled_from([box for name, box in truth if name == image]))
        assert fast_score(truth, [*found, (image, confidence, true_box)]) >= with_far - 1e-12


@settings(max_examples=20)
@given(st.integers(1, 100), st.integers(1, 100))
def test_a_larger_overlap_with_the_only_box_never_costs(first, second):
    low, high = sorted((first, second))
    truth = [("a", (0, 0, 100, 100))]
    assert fast_score(truth, [("a", 1, (0, 0, 100, low))]) <= fast_score(truth, [("a", 1, (0, 0, 100, high))])


def test_confidences_only_order_the_boxes():
    truth, found = [("a", (0, 0, 9, 9))], [("a", 0.9, (0, 0, 9, 5)), ("a", 0.5, (0, 0, 9, 9)), ("b", 0.2, (0, 0, 9, 9))]
    scores = {fast_score(truth, [(*row[:1], row[1] / scale, row[2]) for row in found]) for scale in (1, 2, 100)}
    assert len(scores) == 1


FIRST, SECOND = ("a", (0, 0, 10, 10)), ("a", (3, 0, 13, 10))


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize(
    ("near_score", "between_score", "expected"),
    [
        (0.9, 0.5, (6 * 2 / 3 + 2 * 1 / 4) / 8),
        (0.5, 0.5, (6 * 2 / 3 + 2 * 1 / 4) / 8),
        (0.5, 0.9, (2 * 2 / 3 + 6 * 1 / 4) / 8),
    ],
)
def test_boxes_are_matched_in_order_of_confidence_then_of_coordinates(order, near_score, between_score, expected):
    """`near` has IoUs of 0.83 and 0.47 with the true boxes, `between` has 0.82 and 0.67, and both prefer the first.

    If `near`, which lies further left, is matched first, both are hits up to 0.65; otherwise up to 0.45. Above, one is.
    """
    found = [("a", near_score, (0, 0, 10, 12)), ("a", between_score, (1, 0, 11, 10)), ("a", 0.4, (50, 50, 60, 60))]
    assert fast_score([FIRST, SECOND], [found[place] for place in order]) == pytest.approx(expected)


@pytest.mark.parametrize("step", [1, -1])
def test_true_boxes_of_equal_iou_are_taken_in_order_of_coordinates(step):
    """The first box has an IoU of 2/3 with both true boxes, and takes the one that alone could match the second box."""
    truth = [("a", (0, 0, 10, 10)), ("a", (4, 0, 14, 10))][::step]
    assert fast_score(truth, [("a", 0.9, (2, 0, 12, 10)), ("a", 0.5, (0, 0, 10, 12))]) == pytest.approx(1 / 3)


def test_an_iou_of_exactly_the_threshold_is_no_hit_where_the_better_true_box_is_taken():
    """The second box has an IoU of 9/10 with the true box that the first takes, and of 1/2 with the other."""
    truth, found = [("a", (0, 0, 10, 9)), ("a", (0, 0, 10, 5))], [("a", 0.9, (0, 0, 10, 9)), ("a", 0.5, (0, 0, 10, 10))]
    assert fast_score(truth, found) == pytest.approx((2 * 1 + 6 * 1 / 3) / 8)


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        (
            "nan",
            ["1 words are not groups of five (confidence x y width height); an image without a box has an empty string"],
        ),
        ("-1", ["1 words are not groups of five"]),
        ("0.5 0 0 100", ["4 words are not groups of five"]),
        ("14 0.5 0 0 100 100", ["6 words are not groups of five"]),
        ("0.5 0 0 100 x", ["group 1: '0.5 0 0 100 x' is not five numbers"]),
        ("0.5 0 0 1_0 10", ["group 1: '0.5 0 0 1_0 10' is not five numbers"]),
        ("1.5 0 0 100 100", ["group 1: confidence 1.5 is not in 0..1"]),
        ("nan 0 0 100 100", ["group 1: confidence nan is not in 0..1"]),
        ("0.5 0 0 inf 100", ["group 1: box 0 0 inf 100 is not finite"]),
        ("0.5 0 0 0 100", ["group 1: box 0 0 0 100 has no area"]),
        ("0.5 50 50 10 -10", ["group 1: box 50 50 10 -10 has no area"]),
        ("0.5 0 0 9 0", ["group 1: box 0 0 9 0 has no area"]),
        ("0.5 -1.5 0 10 10", ["group 1: box -1.5 0 10 10 reaches beyond the image of 1024 x 1024 pixels"]),
        ("0.5 0 -1.5 10 10", ["group 1: box 0 -1.5 10 10 reaches beyond the image"]),
        ("0.5 600 0 425.5 10", ["group 1: box 600 0 425.5 10 reaches beyond the image"]),
        ("0.5 0 600 10 425.5", ["group 1: box 0 600 10 425.5 reaches beyond the image"]),
        ("2 0 0 0 9 0.5 0 0 9 9 0.5 1 1 -1 1", ["group 1: confidence 2", "group 1: box 0 0 0 9", "group 3: box 1 1 -1 1"]),
        (",", ["the row has 3 cells, but must have 2"]),
    ],
)
def test_every_fault_of_a_row_is_named(tmp_path, bad, problems):
    sample = write_rows(tmp_path / "sample.csv", dict.fromkeys("abc", "0.5 0 0 100 100"))
    submission = write_rows(tmp_path / "submission.csv", {"a": "", "b": bad, "c": "0 -1 -1 1026 1026 1 924.5 0 99.5 7"})
    faults = RSNA_PNEUMONIA.validate_file(submission, sample)
    assert [(fault.row, fault.id) for fault in faults] == [(3, "b")] * len(problems)
    assert all(fault.problem.startswith(problem) for fault, problem in zip(faults, problems, strict=True))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("a,1,1,9,9,0", "Target is 0, but there is a box"),
        ("a,,,,,1", "Target is 1, but there is no box with an area"),
        ("a,,1,9,9,1", "Target is 1, but the box is incomplete"),
        ("a,1,1,9,0,1", "Target is 1, but there is no box with an area"),
        ("a,1,1,9,9,2", "Target must be 0 or 1"),
        ("a,1,1,9,9,1\na,,,,,0", "the image has rows with Target 0 and rows with Target 1"),
    ],
)
def test_a_contradictory_row_of_the_truth_is_an_error(tmp_path, rows, problem):
    path = tmp_path / "stage_2_train_labels.csv"
    path.write_text(f"patientId,x,y,width,height,Target\n{rows}\n")
    with pytest.raises(ScoringError, match=rf"row 2 \(a\): {problem}"):
        read_truth(path)


def test_boxes_are_read_as_corners(tmp_path):
    truth = read_truth(write_truth(tmp_path / "truth.csv", {"b": [], "a": ["10 20 30 50", "5 6 7 8"]}))
    assert truth.image_ids == ("b", "a") and list(truth.boxes) == ["image_id", "finding", *BOX]
    assert truth.boxes.to_numpy().tolist() == [["a", "opacity", 10, 20, 40, 70], ["a", "opacity", 5, 6, 12, 14]]
    found = read_submission(write_rows(tmp_path / "rows.csv", {"a": ".5 10 20 30 50", "b": ""}), ["b", "a"])
    assert list(found) == ["image_id", "finding", "score", *BOX]
    assert found.to_numpy().tolist() == [["a", "opacity", 0.5, 10, 20, 40, 70]]


def merged_boxes():
    """Predictions for a, with a copy of 512 x 256 pixels, b and c, with copies of full size, and d, seen by no detector."""
    images = pd.DataFrame({"image_id": list("dabc"), "study_id": list("dabc")})
    images = images.assign(rows=[9, 512, 1024, 1024], columns=[9, 256, 1024, 1024])
    places = [(1, 0.5, 10, 20, 30, 60), (1, 0.4, 0, 0, 9, 9), (2, 0.3, 900, 0, 1000, 100), (2, 0.6, 100, 200, 300, 400)]
    boxes = pd.DataFrame(places, columns=["row", "score", *BOX]).assign(finding="opacity")
    scores = pd.DataFrame([("a", 0.7, 0.05, 0.25), ("c", 0.1, 0.2, 0.7)], columns=["image_id", *RSNA_CLASSES])
    return MergedPredictions(images, None, scores, boxes, np.array([False, True, True, True]), None)


def test_boxes_are_weighted_by_the_classifier_selected_and_enlarged():
    settings = RsnaPneumoniaFusion(gate_power=0.5, least_score=0.25, box_size=1.5)
    decided = decide(merged_boxes(), settings)
    assert list(decided) == ["image_id", "finding", "score", *BOX] and set(decided["finding"]) == {"opacity"}
    # a: 0.5 * sqrt(0.25) = 0.25 is kept, 0.4 * sqrt(0.25) is not; published, the box is 40 40 120 120, and enlarged
    # 20 20 140 140. b has no probability of an opacity; its box 875 -25 1025 125 is cut at the image's edges.
    of_b = "0.6 50.0 150.0 300.0 300.0 0.3 875.0 0.0 149.0 125.0"
    rows = [["d", ""], ["c", ""], ["b", of_b], ["a", "0.25 20.0 20.0 120.0 120.0"]]
    assert fill(list("dcba"), decided) == (rows, ["d"])


def test_by_default_scores_and_sizes_of_boxes_do_not_change():
    decided = decide(merged_boxes(), RsnaPneumoniaFusion())
    assert decided["score"].tolist() == [0.5, 0.4, 0.3, 0.6]
    assert decided[list(BOX)].to_numpy().tolist()[::3] == [[40, 40, 120, 120], [100, 200, 300, 400]]


def test_the_truth_of_prepared_images_is_in_published_pixels():
    rows = [("z", "opacity", 1, 2, 3, 4), ("a", "opacity", 10, 20, 30, 60)]
    boxes = pd.DataFrame(rows, columns=["image_id", "finding", *BOX])
    truth = truth_of(merged_boxes().images, None, boxes, None)
    assert truth.image_ids == tuple("dabc")
    assert truth.boxes.to_numpy().tolist() == [["a", "opacity", 40, 40, 120, 120]]


def test_a_box_on_an_unknown_image_is_an_error():
    truth, found = as_tables([], [("z", 0.5, (0, 0, 9, 9))])
    with pytest.raises(ScoringError, match="such as 'z'"):
        metric(truth, found)


@pytest.mark.real_data
def test_floors_on_the_real_training_labels(real_data, tmp_path):
    """Two mean boxes on every image score 0.020, and 0.090 on the images that have boxes; no box scores 0."""
    table = gzip.decompress((real_data / "label_tables" / "rsna_stage_2_train_labels.csv.gz").read_bytes())
    (tmp_path / "stage_2_train_labels.csv").write_bytes(table)
    truth = read_truth(tmp_path)
    assert len(truth.image_ids) == 26684 and len(truth.boxes) == 9555
    mean_boxes = ((0.9, 214, 372, 427, 687), (0.8, 601, 361, 826, 707))
    for names, expected in ((truth.image_ids, 0.020), (truth.boxes.image_id.unique(), 0.090), ((), 0)):
        rows = [(name, *box) for name in names for box in mean_boxes]
        scores = metric(truth, pd.DataFrame(rows, columns=["image_id", "score", *BOX]))
        assert scores["score"] == pytest.approx(expected, abs=5e-4)
