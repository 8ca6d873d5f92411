import pandas as pd
import pytest

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.fusion import Fused
from kitlib.runs import RunError, judged_images, read_answer, read_fused, read_metrics, read_out_of_fold
from kitlib.tables import BOX, write_table

SCORES = pd.DataFrame({"image_id": ["a", "b"], "model": "study", "fold": [0, 1], "none": [0.25, 0.5]})


def make_run(folder, model, **tables):
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {"model": model})
    return folder


def test_predictions_of_several_runs_come_together(tmp_path):
    first = make_run(tmp_path / "1", "study", image_scores=SCORES)
    second = make_run(tmp_path / "2", "other", image_scores=SCORES.assign(model="other"))
    found = read_out_of_fold([first, second])
    assert found.image_scores[["image_id", "model"]].to_numpy().tolist() == [
        ["a", "study"],
        ["b", "study"],
        ["a", "other"],
        ["b", "other"],
    ]
    assert len(found.detections) == len(found.study_scores) == 0


def test_a_run_that_is_unfinished_or_of_another_kind_is_named(tmp_path):
    run = make_run(tmp_path / "run", "study", image_scores=SCORES)
    with pytest.raises(RunError, match=r"metrics\.json is missing: .*no such folder"):
        read_metrics(tmp_path / "nothing")
    with pytest.raises(RunError, match="has no tables of predictions"):
        read_out_of_fold([make_run(tmp_path / "prepare", None)])
    with pytest.raises(RunError, match="both call their model 'study'"):
        read_out_of_fold([run, make_run(tmp_path / "again", "study", image_scores=SCORES)])


def test_detections_come_with_the_images_that_were_looked_at(tmp_path):
    box = pd.DataFrame([("a", "yolo", 0, 0.5, 0, 0, 9, 9)], columns=["image_id", "model", "fold", "score", *BOX])
    coverage = SCORES.assign(model="yolo")[["image_id", "model", "fold"]]
    found = read_out_of_fold([make_run(tmp_path / "yolo", "yolo", detections=box, coverage=coverage)])
    assert found.detections["image_id"].tolist() == ["a"]
    assert found.coverage.to_numpy().tolist() == [["a", "yolo", 0], ["b", "yolo", 1]]
    with pytest.raises(RunError, match=r"older has detections but no tables/coverage\.parquet"):
        read_out_of_fold([make_run(tmp_path / "older", "yolo", detections=box)])


def test_judged_are_images_with_a_none_and_an_answered_study():
    images = pd.DataFrame({"image_id": list("abcd"), "study_id": ["s", "t", "u", "v"]})
    studies = pd.DataFrame(
        {"study_id": ["s", "t", "u"], **dict.fromkeys(STUDY_CLASSES, 0.25), "prior": [False, True, False]}
    )
    nones = pd.DataFrame({"image_id": list("abcd"), "none": 0.5, "prior": [False, False, True, False]})
    found = pd.DataFrame(columns=["image_id", "score", *BOX])
    # `b` has a study on priors, `c` a none on priors, and the study of `d` no answer at all.
    assert judged_images(images, Fused(studies, nones, found))["image_id"].tolist() == ["a"]
    with pytest.raises(RunError, match=r"\(3 have a `none`\); include a study run"):
        judged_images(images, Fused(studies.assign(prior=True), nones, found))


def test_a_run_answers_for_what_it_has_predicted(tmp_path):
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
    assert fused.studies["study_id"].tolist() == ["s"] and fused.nones["image_id"].tolist() == ["b"]
    tables["nones"].drop(columns="seen").to_parquet(tmp_path / "tables" / "nones.parquet")
    with pytest.raises(RunError, match=r"nones\.parquet lacks the column seen.*; fuse again"):
        read_fused(tmp_path)
