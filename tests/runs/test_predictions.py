"""Predictions of finished runs are gathered; unfinished runs and predictions that are not out of fold are refused."""

import numpy as np
import pandas as pd
import pytest

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused
from kitlib.errors import RunError
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.runs.predictions import (
    check_out_of_fold,
    judged_images,
    read_answer,
    read_answers,
    read_fused,
    read_learners,
    read_out_of_fold,
    read_study_ensemble,
    read_test_split,
)
from kitlib.tables import BOX, write_table
from tests.fusion import test_test_split as test_split

SCORES = pd.DataFrame({"image_id": ["a", "b"], "model": "study", "fold": [0, 1], "none": [0.25, 0.5]})


def make_run(folder, model, **tables):
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {"model": model})
    return folder


def test_predictions_of_several_runs_come_together(tmp_path):
    first = make_run(tmp_path / "1", "study", image_scores=SCORES)
    second = make_run(tmp_path / "2", "other", image_scores=SCORES.assign(model="other"))
    predictions = read_out_of_fold([first, second])
    assert predictions.image_scores[["image_id", "model"]].to_numpy().tolist() == [
        ["a", "study"],
        ["b", "study"],
        ["a", "other"],
        ["b", "other"],
    ]
    assert len(predictions.detections) == len(predictions.study_scores) == 0
    # Scores of an image classifier's own classes are in the same table.
    classes = pd.DataFrame({"image_id": ["a"], "model": "nih", "fold": 2, "Mass": 0.75})
    third = make_run(tmp_path / "3", "nih", class_scores=classes)
    scores = read_out_of_fold([first, third]).image_scores.set_index(["image_id", "model"])
    assert scores["Mass"].dropna().to_dict() == {("a", "nih"): 0.75}
    assert scores["none"].dropna().to_dict() == {("a", "study"): 0.25, ("b", "study"): 0.5}


def test_the_folds_of_a_model_may_come_from_several_runs(tmp_path):
    both = [make_run(tmp_path / f"study-{fold}", "study", image_scores=SCORES[SCORES.fold == fold]) for fold in (0, 1)]
    pd.testing.assert_frame_equal(read_out_of_fold(both).image_scores, SCORES)
    other = make_run(tmp_path / "other", "other", image_scores=SCORES.assign(model="other", none=1.0))
    images = pd.DataFrame({"image_id": ["a", "b"], "study_id": "s", "rows": 9, "columns": 9})
    answers = read_answers([*both, other], images)
    assert {model: answer.nones.set_index("image_id").none.to_dict() for model, answer in answers.items()} == {
        "study": {"a": 0.25, "b": 0.5},
        "other": {"a": 1.0, "b": 1.0},
    }


def test_a_run_without_predictions_or_with_a_fold_that_another_has_is_named(tmp_path):
    run = make_run(tmp_path / "run", "study", image_scores=SCORES)
    with pytest.raises(RunError, match="has no tables of predictions"):
        read_out_of_fold([make_run(tmp_path / "prepare", None)])
    with pytest.raises(RunError, match="both have fold 0 of a model 'study'"):
        read_out_of_fold([run, make_run(tmp_path / "again", "study", image_scores=SCORES)])


def test_detections_come_with_the_images_that_were_looked_at(tmp_path):
    box = pd.DataFrame([("a", "yolo", 0, 0.5, 0, 0, 9, 9)], columns=["image_id", "model", "fold", "score", *BOX])
    coverage = SCORES.assign(model="yolo")[["image_id", "model", "fold"]]
    predictions = read_out_of_fold([make_run(tmp_path / "yolo", "yolo", detections=box, coverage=coverage)])
    assert predictions.detections["image_id"].tolist() == ["a"]
    assert predictions.coverage.to_numpy().tolist() == [["a", "yolo", 0], ["b", "yolo", 1]]
    with pytest.raises(RunError, match=r"older has detections but no tables/coverage\.parquet"):
        read_out_of_fold([make_run(tmp_path / "older", "yolo", detections=box)])


def test_judged_images_have_predictions_of_none_and_of_the_study_classes():
    images = pd.DataFrame({"image_id": list("bacd"), "study_id": ["t", "s", "u", "v"]})
    studies = pd.DataFrame(
        {"study_id": ["s", "t", "u"], **dict.fromkeys(STUDY_CLASSES, 0.25), "prior": [False, True, False]}
    )
    nones = pd.DataFrame({"image_id": list("abcd"), "none": 0.5, "prior": [False, False, True, False]})
    detections = pd.DataFrame(columns=["image_id", "score", *BOX])
    # `b` has placeholder study classes, `c` a placeholder none, and the study of `d` no row at all.
    judged = judged_images(images, Fused(studies, nones, detections))
    pd.testing.assert_frame_equal(judged, images.iloc[[1]].reset_index(drop=True))
    with pytest.raises(RunError, match=r"\(3 images have only `none`\); also fuse a run of study models"):
        judged_images(images, Fused(studies.assign(prior=True), nones, detections))


def test_images_without_predictions_of_a_run_get_placeholders(tmp_path):
    images = pd.DataFrame({"image_id": list("ab"), "study_id": ["s", "t"], "rows": 100, "columns": 100})
    box = pd.DataFrame(
        [(name, "yolo", 0, 0.5, 0, 0, 9, 9) for name in "ac"], columns=["image_id", "model", "fold", "score", *BOX]
    )
    coverage = box[["image_id", "model", "fold"]]
    answer = read_answer(make_run(tmp_path / "yolo", "yolo", detections=box, coverage=coverage), images)
    assert answer.detections["image_id"].tolist() == ["a"] and answer.nones["seen"].tolist() == [True, False]
    assert answer.studies["prior"].all()


def test_a_fused_answer_comes_back_without_priors(tmp_path):
    tables = {
        "studies": pd.DataFrame({"study_id": ["s", "t"], **dict.fromkeys(STUDY_CLASSES, 0.25), "prior": [False, True]}),
        "nones": pd.DataFrame({"image_id": ["a", "b"], "none": 0.5, "prior": [True, False], "seen": [False, True]}),
        "detections": pd.DataFrame([("b", 0.5, 0, 0, 9, 9)], columns=["image_id", "score", *BOX]),
    }
    (tmp_path / "tables").mkdir()
    write_json(tmp_path / "metrics.json", {})
    for name, table in tables.items():
        table.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    fused = read_fused(tmp_path)
    pd.testing.assert_frame_equal(fused.studies, tables["studies"].iloc[[0]])
    pd.testing.assert_frame_equal(fused.nones, tables["nones"].iloc[[1]].reset_index(drop=True))
    pd.testing.assert_frame_equal(fused.detections, tables["detections"])
    tables["nones"].drop(columns="seen").to_parquet(tmp_path / "tables" / "nones.parquet")
    with pytest.raises(RunError, match=r"nones\.parquet, .* lacks the column `seen`; run notebook 60 again"):
        read_fused(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        read_fused(tmp_path)


def test_learners_are_read_from_the_fullest_table_of_each_run_and_an_ensemble_stands_for_them(tmp_path):
    studies = ["s0", "s1", "s2"]
    images = pd.DataFrame({"image_id": studies, "study_id": studies, "patient_id": studies})
    labels = pd.DataFrame(np.eye(4)[:3], columns=list(STUDY_CLASSES)).assign(id=studies)
    prepared = {"images": images, "labels": labels, "folds": pd.DataFrame({"id": studies, "fold": [0, 1, 2]})}
    scores = pd.DataFrame({"study_id": studies, "fold": [0, 1, 2]}).assign(**dict.fromkeys(STUDY_CLASSES, 0.25))
    one, two = scores.assign(model="one"), scores.assign(model="two")
    runs = [make_run(tmp_path / name, name, study_scores=table) for name, table in (("one", one), ("two", two))]
    learners = read_learners(runs, prepared)
    assert learners.learners == ("one", "two") and learners.key == "study_id"
    assert read_test_split(runs, prepared, learners) is None
    of_images = scores.rename(columns={"study_id": "image_id"})
    nested = of_images.assign(model="net", outer=[0, 1, 2], fold=[1, 2, 0])
    both = make_run(tmp_path / "net", "net", nested_scores=nested, class_scores=of_images.assign(model="net"))
    assert read_learners([both], prepared).folds == [0, 1, 2] and read_learners([both], prepared).protocol == "nested"
    with pytest.raises(RunError, match="none has none of the tables nested_scores, class_scores, study_scores"):
        read_learners([make_run(tmp_path / "none", "none")], prepared)
    ensemble = make_run(tmp_path / "ensemble", "mean", study_scores=scores.assign(model="mean"))
    write_ensemble(ensemble / "ensemble", Ensemble("mean", "mean", ("one", "two"), STUDY_CLASSES, "study_id"))
    assert read_study_ensemble(ensemble, pd.concat([one, two])).model.unique().tolist() == ["mean"]
    with pytest.raises(RunError, match=r"\(difference: two\)\. Give the runs of exactly these models: one, two"):
        read_study_ensemble(ensemble, one)
    (ensemble / "tables" / "study_scores.parquet").unlink()
    with pytest.raises(RunError, match=r"ensemble has no tables/study_scores\.parquet; give a run of notebook 65"):
        read_study_ensemble(ensemble, pd.concat([one, two]))
    (runs[0] / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"one/metrics\.json is missing"):
        read_learners(runs, prepared)


def test_scores_of_test_images_are_gathered_from_the_runs_of_all_folds(tmp_path):
    prepared = {"images": test_split.IMAGES, "labels": test_split.LABELS, "folds": test_split.FOLDS}
    runs = []
    for fold in (0, 1):
        runs.append(make_run(tmp_path / f"{fold}", "one", class_scores=test_split.learner("one", fold)))
        write_table(test_split.ONE.assign(fold=fold), "class_scores", runs[-1] / "tables" / "test_scores.parquet")
    test = read_test_split(runs, prepared, read_learners(runs, prepared))
    assert list(zip(test.rows["image_id"], test.rows["fold"], strict=True)) == [(i, k) for k in (0, 1) for i in "tuv"]


def test_the_first_prediction_that_is_not_out_of_fold_is_named():
    fold_of = pd.Series({"a": 0, "b": 1, "c": 1})
    table = pd.DataFrame({"image_id": list("abca"), "model": list("mmno"), "fold": [0, 1, 0, 2]})
    check_out_of_fold(table.head(2), "image_id", fold_of)
    with pytest.raises(RunError, match="2 predictions are not out of fold; the first is for 'c' by model 'n' of fold 0"):
        check_out_of_fold(table, "image_id", fold_of)
