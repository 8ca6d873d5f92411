"""The cases A1 to A7 were computed by hand and by an independent program in exact fractions."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.competitions.ranzcr_clip import LABELS, RANZCR_CLIP, decide, metric, read_truth, truth_of
from kitlib.errors import ScoringError, SubmissionError

ID = "StudyInstanceUID"


def as_table(columns, key="image_id"):
    """A table of RANZCR's labels, of which the first have these columns, and the others repeat the last one."""
    columns = [*columns, *[columns[-1]] * (len(LABELS) - len(columns))]
    table = pd.DataFrame(dict(zip(LABELS, map(list, columns), strict=True)))
    table.insert(0, key, [f"i{row}" for row in range(len(table))])
    return table


def files_of(folder, truth, values):
    as_table(truth, ID).assign(PatientID="p").to_csv(folder / "train.csv", index=False)
    as_table(values, ID).to_csv(folder / "submission.csv", index=False)
    return folder, folder / "submission.csv"


def test_an_image_without_any_prediction_is_not_decided_and_a_missing_label_gets_its_share():
    """11 labels; PUBLISHED counts 79 abnormal ETTs in 30,083 images."""
    scores = as_table([(0.2, 0.4, float("nan"))]).assign(**{LABELS[0]: [float("nan"), 0.3, float("nan")]})
    merged = MergedPredictions(*[None] * 6)
    decided = decide(replace(merged, scores=scores), FusionSettings()).set_index("image_id")
    assert decided.index.tolist() == ["i0", "i1"]
    assert decided.loc["i0", LABELS[0]] == pytest.approx(79 / 30_083) and decided.loc["i1", LABELS[0]] == 0.3
    assert decided.loc["i0", LABELS[1]] == 0.2


def test_the_truth_of_prepared_images_has_those_whose_labels_are_all_known():
    images = pd.DataFrame({"image_id": list("abc"), "study_id": ["i2", "i1", "i0"]})
    truth = truth_of(images, as_table([(1, 0, 1), (0, float("nan"), 1)], "id"), None, None)
    assert list(truth) == ["image_id", *LABELS] and truth.index.tolist() == [0, 1]
    assert truth["image_id"].tolist() == ["a", "c"] and truth.iloc[:, 1:3].to_numpy().tolist() == [[1, 1], [1, 0]]


BY_HAND = {
    "A1": ((1, 1, 0, 0), (0.9, 0.4, 0.5, 0.1), 3 / 4),
    "A2, all equal": ((1, 0, 0), (0, 0, 0), 1 / 2),
    "A3, a tie counts half": ((1, 1, 0, 0), (0.5, 0.8, 0.5, 0.1), 7 / 8),
    "A4": ((1, 0, 0), (0.1, 0.2, 0.3), 0),
    "A5, no probabilities": ((1, 1, 0, 0), (3, -1, 0, -5), 3 / 4),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_scores_computed_by_hand(tmp_path, case):
    truth, values, expected = BY_HAND[case]
    scores = RANZCR_CLIP.score_files(*files_of(tmp_path, [truth], [values]))
    assert scores == pytest.approx(dict.fromkeys(("score", *LABELS), expected))


def test_the_score_is_the_mean_over_the_columns(tmp_path):
    """A6: columns of 3/4, 1/2 and 7/8, whose mean is 17/24; the eight columns that repeat the last one count, too."""
    truth = [(1, 1, 0, 0), (1, 0, 0, 0), (1, 0, 1, 0)]
    values = [(0.9, 0.4, 0.5, 0.1), (0, 0, 0, 0), (0.5, 0.5, 0.8, 0.1)]
    scores = list(RANZCR_CLIP.score_files(*files_of(tmp_path, truth, values)).values())
    assert scores[1:4] == pytest.approx([3 / 4, 1 / 2, 7 / 8]) and np.mean(scores[1:4]) == pytest.approx(17 / 24)
    assert scores[0] == pytest.approx((3 / 4 + 1 / 2 + 9 * 7 / 8) / 11)


def test_a_label_that_is_always_or_never_positive_is_undefined_with_a_warning(tmp_path, caplog):
    """A7: neither 0 nor 1/2; the mean is over the other labels."""
    scores = RANZCR_CLIP.score_files(*files_of(tmp_path, [(1, 1), (0, 1)], [(0, 1), (0, 1)]))
    assert math.isnan(scores["ETT - Abnormal"]) and scores["score"] == 1
    assert "the ROC AUC of ETT - Abnormal is undefined" in caplog.text
    assert math.isnan(RANZCR_CLIP.score_files(*files_of(tmp_path, [(1, 1)], [(0, 1)]))["score"])


rows = st.lists(st.tuples(st.booleans(), st.sampled_from([-2.0, 0.0, 0.25, 0.5, 7.0])), min_size=2, max_size=30)


@settings(max_examples=40)
@given(rows.filter(lambda rows: len({positive for positive, _ in rows}) == 2), st.randoms())
def test_roc_auc_equals_that_of_scikit_learn_in_any_order(rows, random):
    positive, values = (list(column) for column in zip(*rows, strict=True))
    truth, submission = as_table([[float(value) for value in positive]]), as_table([values])
    order = list(range(len(rows)))
    random.shuffle(order)
    scores = metric(truth, submission.iloc[order])
    assert scores["score"] == pytest.approx(roc_auc_score(positive, values))
    better = [value + 1 if is_positive else value for is_positive, value in rows]
    assert metric(truth, as_table([better]))["score"] >= scores["score"] - 1e-12


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("", "NGT - Normal is '', but must be a number"),
        ("x", "NGT - Normal is 'x', but must be a number"),
        ("1_0", "NGT - Normal is '1_0', but must be a number"),
        ("nan", "NGT - Normal is nan, but must be finite"),
        ("inf", "NGT - Normal is inf, but must be finite"),
        ("0.5,0.5", "the row has 13 cells, but must have 12"),
    ],
)
def test_a_cell_without_a_number_is_a_fault_of_its_row(tmp_path, cell, problem):
    sample = files_of(tmp_path, [(0, 1)], [(0, 0)])[1]
    lines = sample.read_text().splitlines()
    bad = ["i1", *["0.5"] * 6, cell, *["0.5"] * 4]
    (tmp_path / "bad.csv").write_text("\n".join([*lines[:2], ",".join(bad)]) + "\n")
    (fault,) = RANZCR_CLIP.validate_file(tmp_path / "bad.csv", sample)
    assert (fault.row, fault.id, fault.problem) == (3, "i1", problem)
    with pytest.raises(SubmissionError, match="row 3, i1"):
        RANZCR_CLIP.score_files(tmp_path, tmp_path / "bad.csv")


def test_too_few_cells_and_several_bad_cells_are_all_named(tmp_path):
    sample = files_of(tmp_path, [(0, 1, 1)], [(0, 0, 0)])[1]
    lines = sample.read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([lines[0], "i0,1", f"i1,{'x,' * 10}0.5", lines[3]]) + "\n")
    faults = RANZCR_CLIP.validate_file(tmp_path / "bad.csv", truth=tmp_path)
    assert [fault.row for fault in faults] == [2, *[3] * 10]


@pytest.mark.parametrize("bad", ["2", "", "-1", "0.5"])
def test_a_label_of_the_truth_that_is_not_0_or_1_is_an_error(tmp_path, bad):
    (tmp_path / "train.csv").write_text(f"{ID},{','.join(LABELS)}\na{',1' * 11}\nb,{bad}{',0' * 10}\n")
    with pytest.raises(ScoringError, match=r"row 3 \(b\): every label must be 0 or 1"):
        read_truth(tmp_path)


def test_an_image_with_two_rows_or_without_a_value_is_an_error(tmp_path):
    (tmp_path / "train.csv").write_text(f"{ID},{','.join(LABELS)}\na{',1' * 11}\na{',0' * 11}\n")
    with pytest.raises(ScoringError, match=r"row 3 \(a\): the image has several rows"):
        read_truth(tmp_path)
    with pytest.raises(ScoringError, match="1 images of the truth have no value in the submission, such as 'i2'"):
        metric(as_table([(0, 1, 1)]), as_table([(0, 1)]))


@pytest.mark.real_data
def test_the_real_tables(real_data, tmp_path):
    truth = read_truth(real_data / "competitions" / "ranzcr_train.csv")
    shares = RANZCR_CLIP.baseline_rows(["a"])[0][1:]
    assert truth[list(LABELS)].mean().to_list() == pytest.approx(list(map(float, shares)))
    sample = real_data / "competitions" / "ranzcr_sample_submission.csv"
    assert RANZCR_CLIP.write_baseline(sample, tmp_path / "baseline.csv") == 3582
    assert RANZCR_CLIP.validate_file(tmp_path / "baseline.csv", sample) == RANZCR_CLIP.validate_file(sample, sample) == []
    assert metric(truth, truth.assign(**dict.fromkeys(LABELS, 0.3)))["score"] == pytest.approx(0.5)
