"""The Heidelberg table: confidences chosen on other folds, metrics by hand and by scikit-learn, and the published rows."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused, SiimFusion
from kitlib.errors import RunError
from kitlib.reports.heidelberg_report import (
    COLUMNS,
    best_confidence,
    check_filled,
    confidence_note,
    document_tables,
    heidelberg_table,
    readable,
    seen_by_all,
)
from kitlib.reports.published_tables import find_published
from kitlib.scoring.score import score_tables, truth_of
from kitlib.tables import BOX
from tests.fused_tables import fuse

ONE, FAR = (100.0, 100.0, 500.0, 500.0), (600.0, 600.0, 900.0, 900.0)


def detected(*rows):
    return pd.DataFrame(rows, columns=["image_id", "score", *BOX])


def answer(detections, images, studies=None):
    """All images are predicted; studies have placeholder predictions unless `studies` is passed."""
    nones = images[["image_id"]].assign(none=0.5, prior=False, seen=True)
    if studies is None:
        studies = images[["study_id"]].assign(**dict.fromkeys(STUDY_CLASSES, 0.25), prior=True)
    return Fused(studies, nones, detections)


@pytest.fixture(scope="module")
def small():
    """Images a to d with c and d in fold 1; b has no box, d has two."""
    images = pd.DataFrame({"image_id": list("abcd"), "study_id": list("stuv"), "patient_id": list("pqrs")})
    labels = pd.DataFrame(np.eye(4)[[1, 0, 1, 2]], columns=list(STUDY_CLASSES)).assign(id=list("stuv"))
    boxes = pd.DataFrame([("a", *ONE), ("c", *ONE), ("d", *ONE), ("d", *FAR)], columns=["image_id", *BOX])
    folds = pd.DataFrame({"id": list("abcd"), "fold": [0, 0, 1, 1]})
    detections = detected(
        ("a", 0.9, *ONE), ("a", 0.6, *FAR), ("b", 0.8, *ONE), ("c", 0.7, *ONE), ("d", 0.4, *ONE), ("d", 0.3, 0, 0, 50, 50)
    )
    return images, labels, boxes, folds, detections


def test_the_operating_point_comes_from_the_other_fold(small):
    images, labels, boxes, folds, detections = small
    table = heidelberg_table({"mine": answer(detections, images)}, images, labels, boxes, folds)
    # Fold 1 has its best F1, 0.8, at 0.4: 2 of 2 predicted boxes hit, of 3 true ones. Fold 0 has F1 1 at 0.9: 1 of 1.
    # So fold 0 keeps boxes from 0.4: a hit and a miss on `a`, a false positive on healthy `b`. Fold 1 keeps no box.
    row = table.loc["mine"]
    assert row["confidence"] == pytest.approx((0.4 + 0.9) / 2)
    assert row[["recall", "precision", "precision_all"]].tolist() == pytest.approx([1 / 4, 1 / 2, 1 / 3])
    assert row["f1"] == pytest.approx(2 * (1 / 4) * (1 / 2) / (3 / 4))
    assert row[["images", "boxed_images"]].tolist() == [4, 3]


def test_ap_equals_that_of_the_score_on_all_images_and_on_images_with_a_box(small):
    images, labels, boxes, folds, detections = small
    row = heidelberg_table({"mine": answer(detections, images)}, images, labels, boxes, folds).loc["mine"]
    studies = images[["study_id"]].assign(**dict.fromkeys(STUDY_CLASSES, 0.25))
    expected = score_tables(truth_of(images, labels, boxes), studies, images[["image_id"]].assign(none=0.5), detections)
    assert row[["ap", "ap_boxed"]].tolist() == pytest.approx([expected["opacity"], expected["opacity_boxed"]])
    # By hand: hits at ranks 1, 3 and 5 of the boxes of all images, at 1, 2 and 4 without `b`; four true boxes.
    assert row["ap"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 4) and row["ap_boxed"] == pytest.approx((1 + 1 + 3 / 4) / 4)


def test_a_passed_confidence_is_used(small):
    images, labels, boxes, _, detections = small
    mine = answer(detections, images)
    confidence = best_confidence(mine, images, boxes)
    # 0.4: 3 hits of 4 shown on images with a box, F1 2 * 3 / (4 + 4); at 0.7: 2 of 2, F1 2 * 2 / (2 + 4).
    assert confidence == 0.4
    row = heidelberg_table({"mine": mine}, images, labels, boxes, confidences={"mine": 0.7}).loc["mine"]
    assert row[["confidence", "recall", "precision", "precision_all"]].tolist() == pytest.approx([0.7, 0.5, 1, 2 / 3])
    with pytest.raises(ValueError, match="'mine' is not in `confidences`"):
        heidelberg_table({"mine": mine}, images, labels, boxes)


def test_the_halves_of_a_single_folds_patients_choose_for_each_other(small):
    images, labels, boxes, folds, detections = small
    images, mine = images.assign(patient_id=list("ppqq")), answer(detections, images)
    crossed = heidelberg_table({"mine": mine}, images, labels, boxes, folds.assign(fold=3))
    # Both patients have a box, so each is a half: the same as with two folds.
    assert crossed.equals(heidelberg_table({"mine": mine}, images, labels, boxes, folds))
    check_filled(crossed)
    note = confidence_note({"mine": mine}, images, folds.assign(fold=3))
    assert "a single fold: mine. The fold's patients are divided" in note
    assert "alone" not in confidence_note({"mine": mine}, images, folds)
    # Images of one patient are in the same half, so that a single patient leaves none to choose on.
    table = heidelberg_table({"mine": mine}, images.head(2), labels, boxes, folds)
    with pytest.raises(
        RunError, match=r"lacks values \(mine: confidence, f1, recall, precision, precision_all\)\. The images"
    ):
        check_filled(table)


def test_study_metrics_equal_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    n, classes = 200, rng.integers(0, 4, 200)
    images = pd.DataFrame({"image_id": [f"i{k}" for k in range(n)], "study_id": [f"s{k}" for k in range(n)]})
    labels = pd.DataFrame(np.eye(4)[classes], columns=list(STUDY_CLASSES)).assign(id=images["study_id"])
    probability = rng.dirichlet(np.ones(4), n) * 0.6 + 0.4 * np.eye(4)[np.where(rng.random(n) < 0.6, classes, 3)]
    studies = pd.DataFrame(probability, columns=list(STUDY_CLASSES)).assign(study_id=images["study_id"], prior=False)
    boxes = pd.DataFrame([("i0", *ONE)], columns=["image_id", *BOX])
    mine = answer(detected(), images, studies.sample(frac=1, random_state=0))
    row = heidelberg_table({"mine": mine}, images, labels, boxes, confidences={"mine": 0.5}).loc["mine"]
    predicted = probability.argmax(axis=1)
    assert row["study_accuracy"] == pytest.approx(accuracy_score(classes, predicted))
    assert row["study_f1"] == pytest.approx(f1_score(classes, predicted, average="macro"))
    # scikit-learn's area has no envelope. For hard labels (two groups of equal scores) the areas are equal unless a class is
    # predicted worse than by chance.
    hard = [average_precision_score(classes == k, predicted == k) for k in range(4)]
    assert row["study_map_hard"] == pytest.approx(np.mean(hard))
    soft = np.mean([average_precision_score(classes == k, probability[:, k]) for k in range(4)])
    assert soft <= row["study_map"] < soft + 0.03 and row["study_map"] > row["study_map_hard"]
    assert row[["ap", "recall"]].tolist() == [0, 0] and row["studies"] == n


def test_runs_are_evaluated_on_the_rows_that_they_predict(small):
    images, labels, boxes, folds, _ = small
    images = images.assign(rows=1000, columns=1000)
    studies = images[["study_id"]].assign(model="c", fold=0, **dict.fromkeys(STUDY_CLASSES, 0.25)).head(2)
    coverage = pd.DataFrame({"image_id": ["a", "c"], "model": "d", "fold": 0})
    box = pd.DataFrame([("a", "d", 0, 0.5, *ONE)], columns=["image_id", "model", "fold", "score", *BOX])
    runs = {
        "study": fuse(studies, None, None, images, SiimFusion(), coverage.iloc[:0]),
        "detector": fuse(None, None, box, images, SiimFusion(), coverage),
    }
    table = heidelberg_table(runs, images, labels, boxes, folds)
    assert table.loc["study", ["images", "studies"]].tolist() == [0, 2] and np.isnan(table.loc["study", "ap"])
    assert table.loc["detector", ["images", "boxed_images", "studies"]].tolist() == [2, 2, 0]
    assert table.loc["detector", "ap"] == pytest.approx(1 / 2) and np.isnan(table.loc["detector", "study_map"])


def test_the_published_rows_are_the_reports_tables(small):
    images, labels, boxes, folds, detections = small
    table = heidelberg_table({"mine": answer(detections, images)}, images, labels, boxes, folds)
    names = [f"Heidelberg, published: {name}" for name in find_published("heidelberg").rows.index]
    assert list(table.index) == [*names, "mine"] and list(table.columns) == list(COLUMNS)
    ours = {name: answer(detections, images) for name in ("yolo", "fused, tuned", "fused as published")}
    under = list(heidelberg_table(ours, images, labels, boxes, folds).index)
    assert under == [names[0], "fused, tuned", "fused as published", *names[1:3], "yolo", names[3]]
    assert table.loc["Heidelberg, published: ensemble", ["ap_boxed", "f1", "recall", "precision"]].tolist() == [
        0.451,
        0.560,
        0.530,
        0.594,
    ]
    # The report's F1 equals the harmonic mean of its precision and recall to the printed digits, like the F1 here.
    for name in names[:3]:
        row = table.loc[name]
        assert row["f1"] == pytest.approx(
            2 * row["recall"] * row["precision"] / (row["recall"] + row["precision"]), abs=2e-3
        )


def test_an_image_outside_the_folds_or_a_study_without_a_label_is_named(small):
    images, labels, boxes, folds, detections = small
    with pytest.raises(ValueError, match="image 'd' is not in `folds`"):
        heidelberg_table({"mine": answer(detections, images)}, images, labels, boxes, folds.head(3))
    studies = images[["study_id"]].assign(**dict.fromkeys(STUDY_CLASSES, 0.25), prior=False)
    with pytest.raises(ValueError, match="study 'v' has a prediction but no label"):
        heidelberg_table({"mine": answer(detections, images, studies)}, images, labels.head(3), boxes, folds)


def test_counts_are_shown_without_decimals():
    table = pd.DataFrame({"images": [1189.0], "ap": [0.12345], "f1": [np.nan]}, index=["fused"])
    assert readable(table).loc["fused"].to_dict() == {"images": "1,189", "ap": "0.123", "f1": ""}


def test_the_documents_tables_are_of_boxes_and_of_studies_without_rows_that_have_only_counts():
    counts = dict.fromkeys(("images", "boxed_images", "studies"), 2.0) | {"confidence": 0.5}
    rows = {"boxes": counts | {"ap": 0.5}, "studies": counts | {"study_f1": 0.25}, "counts": counts}
    first, second = document_tables(pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)))
    assert list(first.index) == ["boxes"] and list(second.index) == ["studies"]
    boxes = ["images", "boxed_images", "ap", "ap_boxed", "confidence", "f1", "recall", "precision", "precision_all"]
    studies = ["studies", "study_accuracy", "study_recall", "study_precision", "study_f1", "study_map", "study_map_hard"]
    assert (list(first), list(second)) == (boxes, studies)


def test_images_that_all_detectors_have_seen(small):
    images, _, boxes, _, detections = small
    whole, part = answer(detections, images), answer(detections, images)
    part.nones["seen"] = [True, True, False, True]
    blind = answer(detections, images)
    blind.nones["seen"] = False
    assert seen_by_all({"whole": whole, "part": part, "a classifier": blind}, images, boxes) == ["a", "d"]
    assert seen_by_all({"whole": whole, "a classifier": blind}, images, boxes) == []


def test_without_a_predicted_or_an_annotated_box_there_is_no_best_confidence(small):
    images, _, boxes, _, detections = small
    assert np.isnan(best_confidence(answer(detected(), images), images, boxes))
    assert np.isnan(best_confidence(answer(detections, images), images, boxes[:0]))


def test_the_patients_of_a_single_fold_are_divided_into_two_equal_halves_which_are_always_the_same():
    """If all boxes are hits, the best confidence of one half is the lowest score of the other half.

    Of three of the six scores, the lowest is one of the first four.
    """
    scores = [0.11, 0.52, 0.63, 0.74, 0.86, 0.97]
    ids = [f"i{number}" for number in range(6)]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids})
    boxes = pd.DataFrame([(name, *ONE) for name in ids], columns=["image_id", *BOX])
    mine = answer(detected(*((name, score, *ONE) for name, score in zip(ids, scores, strict=True))), images)
    folds = pd.DataFrame({"id": ids, "fold": 0})
    labels = pd.DataFrame(columns=["id", *STUDY_CLASSES])
    confidences = {heidelberg_table({"m": mine}, images, labels, boxes, folds).loc["m", "confidence"] for _ in range(5)}
    (confidence,) = confidences
    assert any(confidence == pytest.approx((scores[0] + other) / 2) for other in scores[1:4])


def test_study_means_are_over_all_classes_and_average_precisions_over_those_that_occur(small):
    images, labels, boxes, _, detections = small
    studies = labels.rename(columns={"id": "study_id"}).assign(prior=False)
    row = heidelberg_table({"m": answer(detections, images, studies)}, images, labels, boxes, None, {"m": 0.5}).loc["m"]
    # Of the four classes, one does not occur; all studies are right.
    names = ["study_accuracy", "study_recall", "study_precision", "study_f1", "study_map", "study_map_hard"]
    assert row[names].tolist() == [1, 3 / 4, 3 / 4, 3 / 4, 1, 1]
