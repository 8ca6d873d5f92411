"""Notebook 65 from made-up scores, of nested folds and of one fold beside test images: what it keeps is what it judged."""

import json

import numpy as np
import pandas as pd
import pytest

from kitlib.fusion.ensemble_bundle import apply_ensemble, read_ensemble
from kitlib.fusion.ensembles import simplex_weights
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.scoring.temperature import fit_temperature
from kitlib.tables import class_columns, empty_table, read_table, write_table
from tests.executed_notebook import check_shown
from tests.small_runs import prepare

NOTEBOOK = project_root() / "notebooks" / "65_ensemble.ipynb"
CLASSES = ["COVID-19", "viral", "normal"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, quick_processes):
    """Two learners of 60 images in 3 folds, with training images: one knows the truth a little, one nothing but these.

    Three further images are put aside, of which every learner is sure, and of the last one wrongly.
    """
    folder, rng, n = tmp_path_factory.mktemp("ensemble"), np.random.default_rng(0), 60
    ids, truth, fold = [f"i{k:02}" for k in range(n)], np.arange(n) % 3, np.arange(n) // 3 % 3
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "path": "", "rows": 1, "columns": 1})
    three = ["t0", "t1", "t2"]
    aside = images[:3].assign(image_id=three, study_id=three, patient_id=three, split="test")
    images = pd.concat([images.assign(split="train"), aside], ignore_index=True).assign(source="", view="")
    labels = pd.DataFrame(np.eye(3)[[*truth, 0, 1, 2]], columns=CLASSES).assign(id=images.image_id)
    folds = pd.DataFrame({"id": ids, "fold": fold})
    prepared = {"images": images, "labels": labels, "folds": folds, "boxes": empty_table("boxes")}
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
        tested = pd.DataFrame(0.05 + 0.85 * np.eye(3)[[0, 1, 1]], columns=CLASSES).assign(
            image_id=aside.image_id, model=model
        )
        tested = pd.concat([tested.assign(fold=inner) for inner in range(3)])
        write_table(tested, "class_scores", folder / model / "tables" / "test_scores.parquet")
        (folder / model / "metrics.json").write_text(json.dumps({"model": model}))
    parameters = {"prepare_run": str(prepare(folder / "prepare", prepared)), "runs": list(map(str, runs))}
    parameters |= {"run_folder": str(folder / "run"), "epochs": 2, "model_name": "both"}
    run_notebook(NOTEBOOK, folder / "run" / "executed.ipynb", parameters, folder / "run" / "metrics.json")
    return folder / "run"


def test_every_learner_and_ensemble_is_judged_and_one_is_kept(made):
    run = made
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
    check_shown(run / "executed.ipynb")


def test_the_bundle_applies_to_the_learners_scores(made):
    run = made
    ensemble = read_ensemble(run / "ensemble")
    assert (ensemble.name, ensemble.method, ensemble.learners) == ("both", "flannel", ("sound", "by heart"))
    assert (ensemble.protocol, ensemble.folds, ensemble.settings["epochs"]) == ("nested", (0, 1, 2), 2)
    scores = read_table("class_scores", run / "tables" / "class_scores.parquet")
    applied = apply_ensemble(ensemble, scores).set_index("image_id")
    assert (applied.answered == 2).all() and len(applied) == 60
    # calibrated: as sure as it is right, while FLANNEL's own probabilities hardly leave a third
    sure = scores[scores.model == "both"][CLASSES].max(axis=1).mean()
    assert sure < 0.6 < applied[CLASSES].max(axis=1).mean()


def test_images_put_aside_are_judged_beside_the_folds(made):
    table = pd.read_csv(made / "test_comparison.csv").set_index("model")
    # Two of three right: F1 1, 2/3 and 0
    assert (table["rows"] == 3).all() and len(table) == 9 and table.macro_f1.to_numpy() == pytest.approx(5 / 9)
    assert table.learns["both"] == "out-of-fold" and table.learns["flannel_published"] == "in-sample"
    scores = read_table("class_scores", made / "tables" / "test_scores.parquet")
    sizes = {
        **dict.fromkeys(["sound", "by heart"], 9),
        **dict.fromkeys({*table.index, "both scaled"} - {"sound", "by heart"}, 3),
    }
    assert scores.groupby("model").size().to_dict() == sizes
    applied = apply_ensemble(read_ensemble(made / "ensemble"), scores)
    np.testing.assert_allclose(applied[CLASSES], scores[scores.model == "both scaled"][CLASSES])
    assert json.loads((made / "metrics.json").read_text())["test_score"] == pytest.approx(5 / 9)


@pytest.fixture(scope="module")
def of_one_fold(tmp_path_factory, quick_processes):
    """80/10/10: two learners that were validated on fold 0, 10 images, and have told 10 test images, 80 are trained on."""
    folder, rng = tmp_path_factory.mktemp("put_aside"), np.random.default_rng(1)
    ids, truth = [f"i{k:02}" for k in range(100)], np.arange(100) % 3
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "path": "", "rows": 1, "columns": 1})
    images = images.assign(source="", view="", split=["train"] * 90 + ["test"] * 10)
    labels = pd.DataFrame(np.eye(3)[truth], columns=CLASSES).assign(id=ids)
    folds = pd.DataFrame({"id": ids[:90], "fold": np.arange(90) // 10})
    prepared = {"images": images, "labels": labels, "folds": folds, "boxes": empty_table("boxes")}
    runs = []
    for model, knows in (("sound", 0.5), ("unsound", 0.1)):
        found = knows * np.eye(3)[truth] + (1 - knows) * rng.dirichlet(np.ones(3), 100)
        table = pd.DataFrame(found, columns=CLASSES).assign(image_id=ids, model=model, fold=0)
        runs.append(folder / model)
        for name, part in (("class_scores", table[:10]), ("test_scores", table[90:])):
            write_table(part, "class_scores", folder / model / "tables" / f"{name}.parquet")
        write_table(table[:10].assign(outer=-1), "nested_scores", folder / model / "tables" / "nested_scores.parquet")
        (folder / model / "metrics.json").write_text(json.dumps({"model": model}))
    parameters = {"prepare_run": str(prepare(folder / "prepare", prepared)), "runs": list(map(str, runs))}
    parameters |= {"run_folder": str(folder / "run"), "epochs": 2, "ensemble": "weighted", "compare": ["mean", "vote"]}
    run_notebook(NOTEBOOK, folder / "run" / "executed.ipynb", parameters, folder / "run" / "metrics.json")
    return folder / "run", runs


def test_with_one_fold_ensembles_are_judged_on_the_test_images_alone(of_one_fold):
    run, runs = of_one_fold
    assert not (run / "comparison.csv").exists() and not (run / "tables" / "class_scores.parquet").exists()
    table = pd.read_csv(run / "test_comparison.csv").set_index("model")
    assert set(table.index) == {"sound", "unsound", "mean", "vote", "weighted"} and (table["rows"] == 10).all()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["score"] == metrics["test_score"] == pytest.approx(table.macro_f1["weighted"])
    scores = read_table("class_scores", run / "tables" / "test_scores.parquet")
    assert set(scores.model) == {*table.index, "weighted scaled"} and (scores.groupby("model").size() == 10).all()
    # weights and temperature are those of the ten out-of-fold images, whatever the test images say
    ensemble, truth = read_ensemble(run / "ensemble"), np.arange(10) % 3
    out_of_fold = [read_table("class_scores", one / "tables" / "class_scores.parquet")[CLASSES] for one in runs]
    learnt = simplex_weights(np.stack(out_of_fold, axis=1), truth)
    np.testing.assert_allclose(ensemble.weights["learners"], learnt)
    assert ensemble.temperature == pytest.approx(
        fit_temperature(np.einsum("knc,k->nc", np.stack(out_of_fold), learnt), truth)
    )
    assert (ensemble.folds, ensemble.protocol) == ((0,), "cross-fitted")
    applied = apply_ensemble(ensemble, scores[scores.model.isin(["sound", "unsound"])])
    kept = scores[scores.model == "weighted scaled"]
    np.testing.assert_allclose(applied[CLASSES], kept[CLASSES])
