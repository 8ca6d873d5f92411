"""Predictions of several runs: merged, counted once or kept apart, and the images that a bundle was not trained on."""

import json

import numpy as np
import pandas as pd
import pytest

from kitlib.bundle import data_fingerprint
from kitlib.errors import RunError
from kitlib.reports.classification_runs import choose_models, kept_models, protocol_of, read_class_scores, unseen_bundle
from kitlib.tables import empty_table, write_table
from tests.reports.test_classification_report import CLASSES, tables

NO_FOLDS = empty_table("folds")


def folds_of(scores):
    return scores.rename(columns={"image_id": "id"})[["id", "fold"]]


def write(folder, scores):
    write_table(scores, "class_scores", folder / "tables" / "class_scores.parquet")
    (folder / "metrics.json").write_text("{}")
    return folder


def test_folds_are_merged_repeated_rows_count_once_and_different_scores_become_separate_models(tmp_path):
    scores = tables(20)[0]
    first, second = (write(tmp_path / f"learner{n}", scores[scores.fold == n]) for n in (0, 1))
    mean = scores.assign(model="mean")
    ensemble = write(tmp_path / "ensemble", pd.concat([scores, mean]))
    tables_by_model = read_class_scores([first, second, ensemble], folds_of(scores))
    assert list(tables_by_model) == ["m", "mean"] and len(tables_by_model["m"]) == len(tables_by_model["mean"]) == 20
    assert sorted(tables_by_model["m"].image_id) == sorted(scores.image_id)
    other = mean.copy()
    other[CLASSES] = other[CLASSES].to_numpy()[:, ::-1]
    patched = write(tmp_path / "patched", other)
    tables_by_model = read_class_scores([ensemble, patched], folds_of(scores))
    assert list(tables_by_model) == ["m", "ensemble: mean", "patched: mean"]
    assert tables_by_model["patched: mean"].model.unique().tolist() == ["patched: mean"]
    write(tmp_path / "ensemble", pd.concat([mean, scores]))
    assert list(read_class_scores([ensemble], folds_of(scores))) == ["mean", "m"]
    fewer = write(tmp_path / "fewer", mean.drop(columns=CLASSES[2]))
    assert list(read_class_scores([ensemble, fewer], folds_of(scores))) == ["ensemble: mean", "fewer: mean", "m"]
    namesake = write(tmp_path / "other" / "patched", mean)
    with pytest.raises(RunError, match="two runs called patched have different scores for model mean; rename one"):
        read_class_scores([patched, namesake], folds_of(scores))


def test_test_images_get_the_mean_over_the_folds_models_even_if_runs_repeat_rows(tmp_path):
    rows = tables(8)[0].assign(fold=0)
    other = rows.assign(fold=1, **dict(zip(CLASSES, rows[CLASSES].to_numpy()[:, ::-1].T, strict=True)))
    mean = rows.assign(model="mean", fold=-1)
    for name, parts in (("first", [rows]), ("second", [other]), ("ensemble", [rows, other, mean])):
        write_table(pd.concat(parts), "class_scores", tmp_path / name / "tables" / "test_scores.parquet")
        (tmp_path / name / "metrics.json").write_text("{}")
    expected = (rows[CLASSES].to_numpy() + rows[CLASSES].to_numpy()[:, ::-1]) / 2
    for names in (["first", "second"], ["ensemble"], ["first", "ensemble"]):  # the ensemble repeats all learners' rows
        tables_by_model = read_class_scores([tmp_path / name for name in names], folds_of(rows.head(0)), "test")
        assert tables_by_model["m"].fold.tolist() == [-1] * 8
        np.testing.assert_allclose(tables_by_model["m"].set_index("image_id").loc[rows.image_id, CLASSES], expected)
    assert list(tables_by_model) == ["m", "mean"]
    with pytest.raises(
        RunError, match=r"ensemble has no predictions in tables/class_scores.parquet; it has test_scores.parquet"
    ):
        read_class_scores([tmp_path / "ensemble"], folds_of(rows))
    with pytest.raises(RunError, match="split is 'tests'; valid splits: folds, test"):
        read_class_scores([tmp_path / "ensemble"], folds_of(rows), "tests")
    with pytest.raises(
        RunError, match=r"ensemble: 1 test predictions are for images in the folds, such as that of model 'mean' for"
    ):
        write_table(pd.concat([rows[1:], mean]), "class_scores", tmp_path / "ensemble" / "tables" / "test_scores.parquet")
        read_class_scores([tmp_path / "ensemble"], folds_of(rows.head(1)), "test")


def test_a_run_without_scores_is_named(tmp_path):
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        read_class_scores([tmp_path], NO_FOLDS)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"has no predictions in tables/class_scores.parquet; use runs of notebooks 20, 25 or 65"
    ):
        read_class_scores([tmp_path], NO_FOLDS)
    with pytest.raises(RunError, match=r"has no fold\*/bundle"):
        unseen_bundle(tmp_path, {"folds": NO_FOLDS})


def test_scores_of_images_that_a_model_was_trained_on_are_refused(tmp_path):
    scores = tables(8)[0]
    run = write(tmp_path / "learner", scores)
    other = folds_of(scores)
    other.loc[[2, 5], "fold"] += 1
    first, fold = scores.image_id[2], scores.fold[2]
    with pytest.raises(
        RunError,
        match=rf"learner: 2 .* not out of fold; the first is for '{first}' by model 'm' of fold {fold}\. Either",
    ):
        read_class_scores([run], other)
    with pytest.raises(RunError, match="1 predictions are not out of fold"):  # an image that is in no fold
        read_class_scores([run], folds_of(scores)[1:])


def test_a_nested_models_unseen_images_are_the_outer_folds(tmp_path, monkeypatch):
    folds = pd.DataFrame({"id": ["a", "b", "c"], "fold": [0, 1, 2]})
    labels = pd.DataFrame({"id": ["a", "b", "c"], "x": [1.0, 0.0, 1.0]})
    prepared = {"labels": labels, "folds": folds}
    monkeypatch.setattr(
        "kitlib.reports.classification_runs.read_record", lambda folder: json.loads((folder / "model.json").read_text())
    )
    for parent, trained_folds in (("plain/fold1", folds), ("nested/outer2/fold1", folds[:2])):
        (tmp_path / parent / "bundle").mkdir(parents=True)
        record = {"fold": 1, "data_fingerprint": data_fingerprint(labels=labels, folds=trained_folds)}
        (tmp_path / parent / "bundle" / "model.json").write_text(json.dumps(record))
    assert unseen_bundle(tmp_path / "plain", prepared) == (tmp_path / "plain/fold1/bundle", ["b"])
    assert unseen_bundle(tmp_path / "nested", prepared) == (tmp_path / "nested/outer2/fold1/bundle", ["c"])
    for changed in ({"labels": labels.assign(x=0.0)}, {"folds": folds.assign(fold=[1, 0, 2])}):
        for run in ("plain", "nested"):
            with pytest.raises(RunError, match="was trained on another prepared run"):
                unseen_bundle(tmp_path / run, prepared | changed)


def test_what_runs_keep_is_pictured_and_the_mean_is_the_default_reference(tmp_path):
    for run, model in (("whole", "flannel"), ("patched", "flannel"), ("alone", "vgg19")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.json").write_text(json.dumps({"model": model}))
    models = ["vgg19", "whole: mean", "whole: flannel", "patched: mean", "patched: flannel", "patched_vgg19"]
    runs = [tmp_path / name for name in ("whole", "patched", "alone")]
    kept = ["whole: flannel", "patched: flannel", "vgg19"]
    assert kept_models(runs, models) == kept and kept_models(runs[:1], ["flannel"]) == ["flannel"]
    assert choose_models(models, "", [], kept) == ("whole: mean", kept)
    models = ["resnet152", "ensemble: mean", "flannel"]
    assert choose_models(models[::2], "", [], []) == ("resnet152", ["resnet152"])
    assert choose_models(models, "flannel", ["resnet152"], ["flannel"]) == ("flannel", ["resnet152"])
    with pytest.raises(
        ValueError, match="reference: model 'mean' does not exist; available models: resnet152, ensemble: mean, fl"
    ):
        choose_models(models, "mean", [], [])
    with pytest.raises(ValueError, match="pictured: model 'flanel' does not exist; available models: resnet152"):
        choose_models(models, "", ["flannel", "flanel"], [])


def test_the_protocol_says_how_folds_were_made():
    folds = pd.DataFrame({"id": ["a", "b", "c"], "fold": [0, 1, 2]})
    assert protocol_of(folds, "patient").startswith("3 folds by patient and near-duplicate; each image is predicted")
    by_source = "3 folds, one per source; each image is predicted by models not trained on its source"
    assert protocol_of(folds, "source") == by_source
    with pytest.raises(RunError, match="folds by 'hospital'"):
        protocol_of(folds, "hospital")
