"""Models of several runs: put together, counted once, or told apart; and which images a bundle has not seen."""

import json

import numpy as np
import pandas as pd
import pytest
from test_classification_report import CLASSES, tables

from kitlib.classification_runs import read_class_scores, unseen_bundle
from kitlib.runs import RunError
from kitlib.tables import write_table


def write(folder, scores):
    write_table(scores, "class_scores", folder / "tables" / "class_scores.parquet")
    (folder / "metrics.json").write_text("{}")
    return folder


def test_folds_are_joined_repeated_rows_count_once_and_other_scores_are_other_models(tmp_path):
    scores = tables(20)[0]
    first, second = (write(tmp_path / f"learner{n}", scores[scores.fold == n]) for n in (0, 1))
    mean = scores.assign(model="mean")
    ensemble = write(tmp_path / "ensemble", pd.concat([scores, mean]))
    found = read_class_scores([first, second, ensemble])
    assert list(found) == ["m", "mean"] and len(found["m"]) == len(found["mean"]) == 20
    assert sorted(found["m"].image_id) == sorted(scores.image_id)
    other = mean.copy()
    other[CLASSES] = other[CLASSES].to_numpy()[:, ::-1]
    patched = write(tmp_path / "patched", other)
    found = read_class_scores([ensemble, patched])
    assert list(found) == ["m", "ensemble: mean", "patched: mean"]
    assert found["patched: mean"].model.unique().tolist() == ["patched: mean"]


def test_test_images_have_the_mean_of_the_folds_models_whatever_runs_repeat_them(tmp_path):
    rows = tables(8)[0].assign(fold=0)
    other = rows.assign(fold=1, **dict(zip(CLASSES, rows[CLASSES].to_numpy()[:, ::-1].T, strict=True)))
    mean = rows.assign(model="mean", fold=-1)
    for name, parts in (("first", [rows]), ("second", [other]), ("ensemble", [rows, other, mean])):
        write_table(pd.concat(parts), "class_scores", tmp_path / name / "tables" / "test_scores.parquet")
        (tmp_path / name / "metrics.json").write_text("{}")
    expected = (rows[CLASSES].to_numpy() + rows[CLASSES].to_numpy()[:, ::-1]) / 2
    for names in (["first", "second"], ["ensemble"], ["first", "ensemble"]):  # the last lacks none of the learner's models
        found = read_class_scores([tmp_path / name for name in names], "test")
        assert found["m"].fold.tolist() == [-1] * 8
        np.testing.assert_allclose(found["m"].set_index("image_id").loc[rows.image_id, CLASSES], expected)
    assert list(found) == ["m", "mean"]
    with pytest.raises(
        RunError, match=r"ensemble has no answers in tables/class_scores.parquet; it has test_scores.parquet"
    ):
        read_class_scores([tmp_path / "ensemble"])
    with pytest.raises(RunError, match="split is 'tests'; there are: folds, test"):
        read_class_scores([tmp_path / "ensemble"], "tests")


def test_a_run_without_scores_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"has no answers in tables/class_scores.parquet; name runs of notebooks 20, 25 and 65"
    ):
        read_class_scores([tmp_path])
    with pytest.raises(RunError, match=r"has no fold\*/bundle"):
        unseen_bundle(tmp_path, pd.DataFrame({"id": [], "fold": []}))


def test_a_nested_models_unseen_images_are_the_outer_folds(tmp_path, monkeypatch):
    folds = pd.DataFrame({"id": ["a", "b", "c"], "fold": [0, 1, 2]})
    monkeypatch.setattr(
        "kitlib.classification_runs.read_record", lambda folder: json.loads((folder / "model.json").read_text())
    )
    for place in ("plain/fold1", "nested/outer2/fold1"):
        (tmp_path / place / "bundle").mkdir(parents=True)
        (tmp_path / place / "bundle" / "model.json").write_text('{"fold": 1}')
    assert unseen_bundle(tmp_path / "plain", folds) == (tmp_path / "plain/fold1/bundle", ["b"])
    assert unseen_bundle(tmp_path / "nested", folds) == (tmp_path / "nested/outer2/fold1/bundle", ["c"])
