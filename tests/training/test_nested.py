"""Nested folds: what each model is trained on, and which predictions are evaluated for an image."""

import pandas as pd
import pytest

from kitlib.deadline import SessionOver
from kitlib.paths import find_input
from kitlib.tables import check_table, empty_table
from kitlib.training.nested import NOT_NESTED, gather_scores, hold_out, is_complete, train_nested
from kitlib.training.task import Task, TrainedFold
from kitlib.training.train_folds import begin_session
from tests.small_xrays import RECIPE

FOLDS = pd.DataFrame({"id": [f"image{n}" for n in range(12)], "fold": [n % 3 for n in range(12)]})


def tables(split=None):
    ids = [*FOLDS["id"], "official"]
    images = dict.fromkeys(("image_id", "study_id", "patient_id"), ids)
    images |= {"path": "", "rows": 1, "columns": 1, "source": "", "view": ""}
    if split is not None:
        images["split"] = split
    return {"images": pd.DataFrame(images), "folds": FOLDS}


def answers(ids, fold, score):
    return check_table(
        pd.DataFrame({"image_id": list(ids), "model": "a", "fold": fold, "yes": score, "no": 1 - score}), "class_scores"
    )


def trained_on(task, fold, run_folder):
    """Replace training by fixed scores: fold / 10 for validation images, fold / 10 + 0.5 for test images."""
    images, folds = task.tables["images"], task.tables["folds"]
    seen = folds.id[folds.fold != fold]
    test = images.image_id[images.split == "test"]
    assert not set(test) & set(folds.id)
    predicted = {
        "class_scores": answers(folds.id[folds.fold == fold], fold, fold / 10),
        "test_scores": answers(test, fold, fold / 10 + 0.5),
        "training_scores": answers(seen, fold, 0.9),
    }
    return TrainedFold(run_folder, {}, pd.DataFrame(), predicted)


def task(tables):
    return Task(tables, cache=None, recipe=RECIPE, model_name="a")


def train_all(tmp_path, outer_folds, split):
    return train_nested(task(tables(split)), [0, 1, 2], outer_folds, tmp_path, train=trained_on)


@pytest.fixture
def split():
    return [*["train"] * 12, "test"]


def test_an_outer_fold_becomes_test_images_and_leaves_the_folds():
    remaining = hold_out(tables(), 1)
    images = remaining["images"].set_index("image_id")
    assert set(remaining["folds"].fold) == {0, 2} and len(remaining["folds"]) == 8
    assert set(images.index[images.split == "test"]) == {"image1", "image4", "image7", "image10"}
    assert "split" not in tables()["images"]


@pytest.mark.parametrize("outer", [3, -1])
def test_an_unknown_outer_fold_is_an_error_that_lists_the_folds(outer):
    with pytest.raises(ValueError, match=rf"fold {outer} cannot be held out of the folds \[0, 1, 2\]"):
        hold_out(tables(), outer)


@pytest.mark.parametrize(
    ("folds", "outer_folds", "message"),
    [
        ([0, 1, 2, 3], [], r"`outer_folds` has \[3\]; the prepared run has only the folds \[0, 1, 2\]"),
        ([0, 1, 2], [0, 5], r"`outer_folds` has \[5\]; the prepared run"),
        ([1], [0, 1], r"if outer fold 1 is held out, none of the folds \[1\] is left to validate on"),
    ],
)
def test_unknown_folds_are_refused_before_any_training(tmp_path, folds, outer_folds, message):
    with pytest.raises(ValueError, match=message):
        train_nested(task(tables(["train"] * 13)), folds, outer_folds, tmp_path, train=lambda *_: pytest.fail("trained"))


def test_a_stopped_nested_run_is_resumed_by_its_name(tmp_path, capsys, monkeypatch):
    def stopped(task, fold, run_folder):
        (run_folder / "checkpoints").mkdir(parents=True)
        (run_folder / "checkpoints" / "run.json").write_text("{}")
        raise SessionOver(run_folder, 1, 2)

    inputs, run = tmp_path / "inputs", tmp_path / "inputs" / "kernel" / "learner"
    train_nested(task(tables(["train"] * 13)), [0, 1, 2], [1], run, train=stopped)
    assert "set resume_from to 'learner'" in capsys.readouterr().out
    monkeypatch.setattr("kitlib.training.train_folds.find_input", lambda name: find_input(name, inputs))
    begin_session(tmp_path / "next", resume_from="learner")
    assert [str(path.parents[1].relative_to(tmp_path / "next")) for path in (tmp_path / "next").rglob("run.json")] == [
        "outer1/fold0"
    ]


def test_each_row_has_the_fold_and_the_outer_fold_of_its_model(tmp_path, split):
    trained = train_all(tmp_path, [0, 1, 2], split)
    assert {outer: [run.run_folder for run in runs] for outer, runs in trained.items()} == {
        outer: [tmp_path / f"outer{outer}" / f"fold{fold}" for fold in range(3) if fold != outer] for outer in range(3)
    }
    assert is_complete(trained, range(3), range(3))
    found = gather_scores(trained, FOLDS)
    own = found.nested.image_id.map(FOLDS.set_index("id").fold)
    # 6 models predict 12 images each: 4 out of fold, 4 of the outer fold, 4 that the model was trained on.
    assert len(found.nested) == 6 * 12
    for rows, count, score in (
        (found.nested.fold == own, 24, found.nested.fold / 10),
        (found.nested.outer == own, 24, found.nested.fold / 10 + 0.5),
        ((found.nested.fold != own) & (found.nested.outer != own), 24, found.nested.fold * 0 + 0.9),
    ):
        assert rows.sum() == count
        assert found.nested.yes[rows].to_numpy() == pytest.approx(score[rows].to_numpy())


def test_the_evaluated_prediction_is_the_mean_of_the_models_without_the_images_fold(tmp_path, split):
    found = gather_scores(train_all(tmp_path, [0, 1, 2], split), FOLDS)
    judged = found.judged.set_index("image_id")
    assert len(judged) == 12 and judged.fold.to_dict() == FOLDS.set_index("id").fold.to_dict()
    # image0 is in fold 0: the models of the inner folds 1 and 2 score it 0.6 and 0.7.
    assert judged.yes["image0"] == pytest.approx(0.65)
    assert judged.yes["image1"] == pytest.approx(0.60) and judged.yes["image2"] == pytest.approx(0.55)
    # The official test image is in no fold; it has a mean over two models for each fold.
    assert set(found.test.image_id) == {"official"} and sorted(found.test.yes) == pytest.approx([0.5, 0.6, 0.7])


def test_without_outer_folds_the_out_of_fold_prediction_is_evaluated(tmp_path, split):
    trained = train_all(tmp_path, [], split)
    assert is_complete(trained, [0, 1, 2], []) and not is_complete(trained, [0, 1], [])
    found = gather_scores(trained, FOLDS)
    assert set(found.nested.outer) == {NOT_NESTED} == {-1}  # in stored tables
    assert found.judged.set_index("image_id").yes["image2"] == pytest.approx(0.2)
    assert len(found.judged) == 12 and len(found.test) == 3


def test_a_session_that_ends_begins_no_further_outer_fold(tmp_path, split, monkeypatch):
    begun = []

    def ended(task, folds, run, *_):
        begun.append(run.name)
        return []

    monkeypatch.setattr("kitlib.training.nested.train_folds", ended)
    trained = train_all(tmp_path, [0, 1, 2], split)
    assert begun == ["outer0"] and not is_complete(trained, [0, 1, 2], [0, 1, 2])
    assert len(gather_scores(trained, FOLDS).judged) == 0 and gather_scores(trained, FOLDS).nested.equals(
        empty_table("nested_scores")
    )
