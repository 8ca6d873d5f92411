"""The cases V1 to V10 were computed by hand and by an independent program in exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.competitions.contract import BoxTruth
from kitlib.competitions.merged import MergedPredictions
from kitlib.competitions.vinbigdata import (
    CLASSES,
    FINDINGS,
    VINBIGDATA,
    VinBigDataFusion,
    decide,
    fill,
    metric,
    read_submission,
    read_truth,
    truth_of,
)
from kitlib.errors import ScoringError, SettingsError, SubmissionError
from kitlib.tables import BOX
from tests.voc_reference import slow_average_precision

HEADER = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
NO_FINDING = "14 1 0 0 1 1"


def write_truth(path, rows):
    """Write rows such as "a 3 0 0 100 100", or "a 14" for an image without a finding, as train.csv."""
    lines = [HEADER]
    for number, row in enumerate(rows):
        image, code, *corners = row.split()
        lines.append(",".join([image, CLASSES[int(code)], code, f"R{number % 17 + 1}", *(corners or [""] * 4)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_rows(path, rows):
    path.write_text("image_id,PredictionString\n" + "".join(f"{name},{text}\n" for name, text in rows.items()))
    return path


def score(folder, truth, predictions):
    truth, submission = write_truth(folder / "train.csv", truth), write_rows(folder / "submission.csv", predictions)
    return VINBIGDATA.score_files(truth, submission)


PNEUMOTHORAX = ["a 3 0 0 100 100"]
V1 = ["a 3 0 0 100 100", "b 14", "c 14"]
V8 = [*(f"{image} 3 0 0 10 10" for image in "abc"), "d 14"]
V8_ROWS = {
    "a": "3 .8 0 0 10 10",
    "b": "3 .7 0 0 10 10",
    "c": "3 .6 50 50 60 60 3 .5 0 0 10 10",
    "d": f"3 .9 0 0 10 10 {NO_FINDING}",
}
BY_HAND = {
    "V1": (V1, dict.fromkeys("abc", NO_FINDING), 1 / 3),
    "V2": (V1, {"a": "14 0.1 0 0 1 1", "b": "14 0.9 0 0 1 1", "c": "14 0.8 0 0 1 1"}, 1 / 2),
    "V3, an IoU of exactly 2/5": (PNEUMOTHORAX, {"a": "3 0.9 0 0 100 40"}, 0),
    "V4": (PNEUMOTHORAX, {"a": "3 0.9 0 0 100 41"}, 1),
    "V5": (
        ["a 0 0 0 10 10", "a 0 20 0 30 10", "b 0 0 0 10 10", "c 14"],
        {"a": "0 .9 0 0 10 10 0 .8 1 0 11 10 0 .6 20 0 30 10", "b": "0 .7 50 50 60 60", "c": "14 .5 0 0 1 1"},
        3 / 4,
    ),
    "V6, the nearest truth is claimed": (
        ["a 8 0 0 10 10", "a 8 0 4 10 14"],
        {"a": "8 .9 0 0 10 10 8 .8 0 1 10 11"},
        1 / 2,
    ),
    "V7, class 7 is not in the truth": (
        ["a 1 0 0 10 10", "b 2 0 0 10 10"],
        {"a": "1 .5 0 0 10 10 7 .9 0 0 5 5", "b": "1 .9 0 0 10 10"},
        1 / 4,
    ),
    "V8": (V8, V8_ROWS, 37 / 45),
    "V8, with one more box": (V8, V8_ROWS | {"a": "3 .8 0 0 10 10 3 .01 80 80 90 90"}, 37 / 45),
    "V9": (["a 3 1000 1000 1100 1100"], {"a": "3 .9 1200 1000 1300 1100"}, 0),
    "V10": (PNEUMOTHORAX, {"a": "3 .9 200 200 300 300 " * 100 + "3 .5 0 0 100 100"}, 1 / 101),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_scores_computed_by_hand(tmp_path, case):
    truth, rows, expected = BY_HAND[case]
    assert score(tmp_path, truth, rows)["score"] == pytest.approx(expected)
    reverse = dict(reversed(rows.items()))
    assert score(tmp_path, truth[::-1], reverse)["score"] == pytest.approx(expected)


def test_parts_are_named_and_absent_classes_are_undefined(tmp_path, caplog):
    scores = score(tmp_path, *BY_HAND["V5"][:2])
    assert list(scores) == ["score", *CLASSES] and scores["Aortic enlargement"] == 1 / 2 and scores["No finding"] == 1
    assert sum(map(math.isnan, scores.values())) == 13 and "lacks the classes Atelectasis, Calcification" in caplog.text


def test_rows_of_several_readers_are_not_merged(tmp_path):
    """Three readers, one box: a detection matches one of their boxes, as none is merged."""
    truth = ["a 3 0 0 100 100", "a 3 0 0 100 100", "a 3 0 0 100 100", *["b 14"] * 3]
    scores = score(tmp_path, truth, {"a": "3 .9 0 0 100 100 14 .1 0 0 1 1", "b": NO_FINDING})
    assert scores["Cardiomegaly"] == pytest.approx(1 / 3) and scores["No finding"] == pytest.approx(1 / 3)


side = st.integers(1, 8)
box = st.tuples(st.integers(0, 8), st.integers(0, 8), side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
finding = st.sampled_from([FINDINGS[3], FINDINGS[8], "No finding"])
confidence = st.sampled_from([0.1, 0.5, 0.9])
true_rows = st.lists(st.tuples(st.sampled_from("ab"), finding, box), min_size=1, max_size=8, unique=True)
found_rows = st.lists(st.tuples(st.sampled_from("abc"), finding, confidence, box), max_size=12)


def as_tables(truth, found):
    boxes = pd.DataFrame([(image, name, *corners) for image, name, corners in truth], columns=["image_id", "finding", *BOX])
    columns = ["image_id", "finding", "score", *BOX]
    return BoxTruth(("a", "b", "c"), boxes), pd.DataFrame([(*row[:3], *row[3]) for row in found], columns=columns)


def fast_score(truth, found):
    return metric(*as_tables(truth, found))["score"]


def slow_score(truth, found):
    """Mean of the average precision of each class in the truth, in exact fractions."""
    return np.mean(
        [
            slow_average_precision(
                [(image, confidence, box) for image, name, confidence, box in found if name == label],
                [(image, box) for image, name, box in truth if name == label],
                Fraction(2, 5),
            )
            for label in sorted({name for _, name, _ in truth})
        ]
    )


@settings(max_examples=50)
@given(true_rows, found_rows, st.randoms())
def test_the_score_equals_a_slow_reference_in_any_order(truth, found, random):
    expected = slow_score(truth, found)
    assert fast_score(truth, found) == pytest.approx(expected)
    random.shuffle(truth)
    random.shuffle(found)
    assert fast_score(truth, found) == pytest.approx(expected)


@settings(max_examples=40)
@given(true_rows, found_rows, st.data())
def test_a_better_box_and_a_less_confident_one_never_cost(truth, found, data):
    before = fast_score(truth, found)
    image, name, corners = data.draw(st.sampled_from(truth))
    # A box that hits nothing, at any confidence, replaced by a true box.
    misses = [
        place
        for place, (row_image, row_name, _, row_box) in enumerate(found)
        if slow_average_precision([(row_image, 1, row_box)], [(i, b) for i, n, b in truth if n == row_name], Fraction(2, 5))
        in (0, math.nan)
    ]
    if misses:
        place = data.draw(st.sampled_from(misses))
        better = [*found[:place], (image, name, found[place][2], corners), *found[place + 1 :]]
        assert fast_score(truth, better) >= before - 1e-12
    assert fast_score(truth, [*found, (image, name, 0.01, data.draw(box))]) >= before - 1e-12


GOOD = {"a": "3 0.5 10 10 20.5 20 14 0.3 0 0 1 1", "b": NO_FINDING}


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        ("", ["empty prediction string; an image without a finding has 14 1 0 0 1 1"]),
        ("nan", ["empty prediction string; an image without a finding has 14 1 0 0 1 1"]),
        ("3 0.5 10 10 20", ["5 words are not groups of six"]),
        ("15 0.5 0 0 9 9", ["group 1: label '15' is not one of 0, 1,"]),
        ("Cardiomegaly 0.5 0 0 9 9", ["group 1: label 'Cardiomegaly' is not one of"]),
        ("3 1.1 0 0 9 9", ["group 1: confidence 1.1 is not in 0..1"]),
        ("3 -0.1 0 0 9 9", ["group 1: confidence -0.1 is not in 0..1"]),
        ("3 nan 0 0 9 9", ["group 1: confidence nan is not in 0..1"]),
        ("3 0.5 0 0 9 nan", ["group 1: box 0 0 9 nan is not finite"]),
        ("3 0.5 0 0 9 x", ["group 1: '0.5 0 0 9 x' is not five numbers"]),
        ("3 0.5 5 5 5 9", ["group 1: box 5 5 5 9 is inverted or has no area"]),
        ("3 0.5 9 5 5 9", ["group 1: box 9 5 5 9 is inverted or has no area"]),
        ("14 1 0 0 9 9", ["group 1: 14 must have the box 0 0 1 1"]),
        ("14 1 0 0 1 1,", ["the row has 3 cells, but must have 2"]),
        ("3 2 5 5 1 9 14 1 0 0 2 2", ["group 1: confidence 2", "group 1: box 5 5 1 9", "group 2: 14 must have"]),
    ],
)
def test_every_fault_of_a_row_is_named(tmp_path, bad, problems):
    sample, truth = write_rows(tmp_path / "sample.csv", dict.fromkeys("ab", NO_FINDING)), tmp_path / "train.csv"
    submission = write_rows(tmp_path / "submission.csv", GOOD | {"b": bad})
    faults = VINBIGDATA.validate_file(submission, sample)
    assert {(fault.row, fault.id) for fault in faults} == {(3, "b")} and len(faults) == len(problems)
    assert all(fault.problem.startswith(problem) for fault, problem in zip(faults, problems, strict=True))
    with pytest.raises(SubmissionError, match=f"has {len(problems)} faults?; the first: row 3, b: "):
        VINBIGDATA.score_files(write_truth(truth, ["a 3 0 0 9 9", "b 14"]), submission)


def test_a_valid_file_has_no_fault(tmp_path):
    write_truth(tmp_path / "train.csv", ["a 3 0 0 9 9", "b 14"])
    submission = write_rows(tmp_path / "submission.csv", dict(reversed(GOOD.items())))
    assert VINBIGDATA.validate_file(submission, submission) == []
    assert VINBIGDATA.validate_file(submission, truth=tmp_path) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a,Nodule,15,R1,0,0,9,9", "class_id must be a whole number from 0 to 14"),
        ("a,Nodule,8,R1,0,0,0,9", "a finding must have a box"),
        ("a,Nodule,8,R1,0,9,9,9", "a finding must have a box"),
        ("a,Nodule,8,R1,,,,", "a finding must have a box"),
        ("a,No finding,14,R1,0,0,9,9", "No finding must have no box"),
        ("a,Nodule,8,R1,0,0,x,9", "x_max is 'x', but must be a number or empty"),
        (",Nodule,8,R1,0,0,9,9", "image_id is empty"),
    ],
)
def test_a_bad_row_of_the_truth_is_an_error_that_names_it(tmp_path, row, problem):
    path = tmp_path / "train.csv"
    path.write_text(f"{HEADER}\nb,No finding,14,R1,,,,\n{row}\n")
    with pytest.raises(ScoringError, match=rf"train.csv, row 3 \(a?\): {problem}"):
        read_truth(path)


@pytest.mark.parametrize(("column", "value"), [("image_id", "z"), ("finding", "flu")])
def test_a_box_on_an_unknown_image_or_of_an_unknown_class_is_an_error(column, value):
    truth, found = as_tables([("a", "ILD", (0, 0, 9, 9))], [("a", "ILD", 0.5, (0, 0, 9, 9))])
    with pytest.raises(ScoringError, match=f"1 boxes have an unknown {column}, such as '{value}'; expected"):
        metric(truth, found.assign(**{column: value}))


def test_boxes_are_read_with_the_names_of_their_findings(tmp_path):
    truth = read_truth(write_truth(tmp_path / "train.csv", ["b 14", "a 3 10 20 30 40", "c 14 0 0 1 1"]))
    assert truth.image_ids == ("b", "a", "c") and list(truth.boxes) == ["image_id", "finding", *BOX]
    nothing = ["No finding", 0, 0, 1, 1]
    assert truth.boxes.to_numpy().tolist() == [["b", *nothing], ["a", "Cardiomegaly", 10, 20, 30, 40], ["c", *nothing]]
    found = read_submission(write_rows(tmp_path / "rows.csv", {"a": "3 .5 10 20 30 40"}), ["a"])
    assert list(found) == ["image_id", "finding", "score", *BOX]
    assert found.to_numpy().tolist() == [["a", "Cardiomegaly", 0.5, 10, 20, 30, 40]]


def merged_boxes():
    """Predictions for a to e; no model has seen c, and the classifier only a."""
    images = pd.DataFrame({"image_id": list("abcde"), "study_id": list("abcde")})
    found = [(0, FINDINGS[3], 0.8, 10, 20, 30, 40), (0, FINDINGS[5], 0.1, 1, 2, 3, 4)]
    found += [(1, FINDINGS[8], 0.5, 10, 20, 30, 40), (4, FINDINGS[8], 0.4, 10, 20, 30, 40)]
    boxes = pd.DataFrame(found, columns=["row", "finding", "score", *BOX])
    scores = pd.DataFrame({"image_id": ["a"], "No finding": [0.4]})
    return MergedPredictions(images, None, scores, boxes, np.array([True, True, False, True, True]), None)


def test_no_finding_lowers_the_scores_of_boxes_and_drops_those_of_normal_images():
    settings = VinBigDataFusion(classifier_weight=1.0, no_box_weight=3.0, box_power=2.0, least_abnormal=0.5)
    decided = decide(merged_boxes(), settings)
    assert list(decided) == ["image_id", "finding", "score", *BOX] and decided.index.is_unique
    # No finding is (0.4 + 3 * 0.2) / 4 for a, 1 - 0.5 for b, 1 for d, which has no box, and 1 - 0.4 for e.
    rows = [
        ["e", "14 0.6 0 0 1 1"],
        ["d", "14 1 0 0 1 1"],
        ["c", "14 0.7070667 0 0 1 1"],
        ["b", "14 0.5 0 0 1 1 8 0.125 10.0 20.0 30.0 40.0"],
        ["a", "3 0.45 10.0 20.0 30.0 40.0 14 0.25 0 0 1 1 5 0.05625 1.0 2.0 3.0 4.0"],
    ]
    assert fill(list("edcba"), decided) == (rows, ["c"])


def test_by_default_the_classifier_decides_and_scores_of_boxes_do_not_change():
    decided = decide(merged_boxes(), VinBigDataFusion()).set_index(["image_id", "finding"])["score"]
    assert decided["a"].to_dict() == pytest.approx({FINDINGS[3]: 0.8, FINDINGS[5]: 0.1, "No finding": 0.4})
    assert decided["e"].to_dict() == pytest.approx({FINDINGS[8]: 0.4, "No finding": 0.6})


def test_the_truth_of_prepared_images_has_no_finding_where_there_is_no_box():
    boxes = pd.DataFrame([("z", "ILD", 1, 2, 3, 4), ("b", "ILD", 5, 6, 7, 8)], columns=["image_id", "finding", *BOX])
    truth = truth_of(pd.DataFrame({"image_id": ["a", "b"]}), None, boxes, None)
    assert truth.image_ids == ("a", "b") and truth.boxes.index.is_unique
    assert truth.boxes.to_numpy().tolist() == [["b", "ILD", 5, 6, 7, 8], ["a", "No finding", 0, 0, 1, 1]]


def test_without_any_true_box_the_score_is_undefined():
    truth, found = as_tables([], [("a", "ILD", 0.5, (0, 0, 9, 9))])
    assert math.isnan(metric(truth, found)["score"])


def read_real(real_data):
    parts = [pd.read_csv(real_data / "competitions" / f"vinbig_train_part{part}.csv", dtype=str) for part in range(5)]
    return pd.concat(parts)


@pytest.mark.real_data
def test_the_baseline_on_the_real_training_labels(real_data, tmp_path):
    """10,606 of 15,000 images have no finding; every one of them has three rows, and there are 15 classes."""
    table = read_real(real_data)
    table.to_csv(tmp_path / "train.csv", index=False)
    truth = read_truth(tmp_path)
    assert len(truth.image_ids) == 15000 and len(truth.boxes) == 67914
    pd.DataFrame({"image_id": truth.image_ids}).to_csv(tmp_path / "sample.csv", index=False)
    assert VINBIGDATA.write_baseline(tmp_path / "sample.csv", tmp_path / "baseline.csv") == 15000
    share = 10606 / 15000
    assert VINBIGDATA.score_files(tmp_path, tmp_path / "baseline.csv")["score"] == pytest.approx(share / 3 / 15)
    # With one row for each image without a finding, as in the test set: 0.047.
    is_repeated = (table.class_id == "14") & table.duplicated(["image_id", "class_id"])
    table[~is_repeated].to_csv(tmp_path / "train.csv", index=False)
    assert VINBIGDATA.score_files(tmp_path, tmp_path / "baseline.csv")["score"] == pytest.approx(share / 15)


def test_the_weights_to_try_for_no_finding_add_up_to_1_and_include_each_part_alone():
    _, mixtures = VinBigDataFusion.GRIDS["no finding: classifier, no box"]
    assert [sum(mixture) for mixture in mixtures] == pytest.approx([1] * len(mixtures))
    assert {(1, 0), (0, 1)} <= set(mixtures)


def test_the_probability_of_no_finding_needs_a_part_with_a_weight():
    with pytest.raises(SettingsError, match="classifier_weight or no_box_weight"):
        VinBigDataFusion(classifier_weight=0.0, no_box_weight=0.0)
    assert VinBigDataFusion(classifier_weight=0.0, no_box_weight=0.5).no_box_weight == 0.5
    assert VinBigDataFusion(classifier_weight=0.5, no_box_weight=0.0).classifier_weight == 0.5
