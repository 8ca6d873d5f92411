"""Notebook 65 from made-up scores of nested folds: what it keeps is what it judged, and the bundle applies."""

import json

import numpy as np
import pandas as pd
import pytest
from small_runs import prepare

from kitlib.ensemble_bundle import apply_ensemble, read_ensemble
from kitlib.paths import project_root
from kitlib.run_notebook import run_notebook
from kitlib.tables import class_columns, empty_table, read_table, write_table

NOTEBOOK = project_root() / "notebooks" / "65_ensemble.ipynb"
CLASSES = ["COVID-19", "viral", "normal"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two learners of 60 images in 3 folds, with training images: one knows the truth a little, one nothing but these."""
    folder, rng, n = tmp_path_factory.mktemp("ensemble"), np.random.default_rng(0), 60
    ids, truth, fold = [f"i{k:02}" for k in range(n)], np.arange(n) % 3, np.arange(n) // 3 % 3
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "path": "", "rows": 1, "columns": 1})
    labels = pd.DataFrame(np.eye(3)[truth], columns=CLASSES).assign(id=ids)
    folds = pd.DataFrame({"id": ids, "fold": fold})
    prepared = {"images": images.assign(source="", view=""), "labels": labels, "folds": folds, "boxes": empty_table("boxes")}
    runs = []
    for model, knows in (("sound", 0.5), ("by heart", 0.0)):
        rows = []
        for outer in range(3):
            for inner in sorted({0, 1, 2} - {outer}):
                found = rng.dirichlet(np.ones(3), n)
                share = np.where((fold != outer) & (fold != inner), 0.95, knows)[:, None]
                found = share * np.eye(3)[truth] + (1 - share) * found
                rows.append(pd.DataFrame(found, columns=CLASSES).assign(image_id=ids, model=model, outer=outer, fold=inner))
        runs.append(folder / model)
        write_table(pd.concat(rows), "nested_scores", folder / model / "tables" / "nested_scores.parquet")
        (folder / model / "metrics.json").write_text(json.dumps({"model": model}))
    parameters = {"prepare_run": str(prepare(folder / "prepare", prepared)), "runs": list(map(str, runs))}
    parameters |= {"run_folder": str(folder / "run"), "epochs": 2, "model_name": "both"}
    run_notebook(NOTEBOOK, folder / "run" / "executed.ipynb", parameters, folder / "run" / "metrics.json")
    return folder / "run", labels


def test_every_learner_and_ensemble_is_judged_and_one_is_kept(made):
    run, _ = made
    compared = ["mean", "vote", "weighted", "flannel", "flannel_in_sample", "flannel_published"]
    table = pd.read_csv(run / "comparison.csv").set_index("model")
    assert set(table.index) == {"sound", "by heart", "both", *compared} and (table["rows"] == 60).all()
    assert table.learns.to_dict() == dict.fromkeys(table.index, "nested") | dict.fromkeys(compared[-2:], "in-sample")
    scores = read_table("class_scores", run / "tables" / "class_scores.parquet")
    assert class_columns(scores, "class_scores") == CLASSES
    assert set(scores.model) == {*table.index, "both scaled"} and (scores.groupby("model").size() == 60).all()
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["model"], metrics["score"]) == ("both", pytest.approx(table.macro_f1["both"]))
    # the settings are those of "flannel" under another name
    one, other = (scores[scores.model == name].set_index("image_id")[CLASSES] for name in ("both", "flannel"))
    pd.testing.assert_frame_equal(one, other)
    assert (run / "figures" / "weights.png").stat().st_size > 10_000


def test_the_bundle_applies_to_the_learners_scores(made):
    run, labels = made
    ensemble = read_ensemble(run / "ensemble")
    assert (ensemble.name, ensemble.method, ensemble.learners) == ("both", "flannel", ("sound", "by heart"))
    assert (ensemble.protocol, ensemble.folds, ensemble.settings["epochs"]) == ("nested", (0, 1, 2), 2)
    scores = read_table("class_scores", run / "tables" / "class_scores.parquet")
    applied = apply_ensemble(ensemble, scores).set_index("image_id")
    assert (applied.answered == 2).all() and len(applied) == len(labels)
    # calibrated: as sure as it is right, while FLANNEL's own probabilities hardly leave a third
    sure = scores[scores.model == "both"][CLASSES].max(axis=1).mean()
    assert sure < 0.6 < applied[CLASSES].max(axis=1).mean()
