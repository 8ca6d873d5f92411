"""Notebook 85 from made-up scores, so that its figures are known, and from small networks that have learnt nothing."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.bundle import data_fingerprint, save_bundle
from kitlib.models.classifier import FindingsClassifier
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.recipes.fields import FindingsRecipe
from kitlib.tables import write_table
from kitlib.xrays.cache import XrayCache
from tests.executed_notebook import check_shown
from tests.small_lungs import lungs_run
from tests.small_runs import prepare, tables_of
from tests.small_xrays import SmallXrays

NOTEBOOK = project_root() / "notebooks" / "85_classification_report.ipynb"
CLASSES = ["COVID-19", "viral", "bacterial", "normal"]
RECIPE = FindingsRecipe(
    backbone="test_resnet",
    image_size=64,
    hidden=0,
    channels=1,
    multi_label=False,
    placement="letterbox",
    judged_by="macro_f1",
)


def exclusive(small):
    """Each image a study of one of four classes, two images a patient; COVID-19 is the one class of its source."""
    numbers = np.arange(small.count)
    labels = pd.DataFrame(np.eye(4)[numbers // 2 % 4], columns=CLASSES).assign(id=small.image_ids)
    images = small.images.assign(
        study_id=small.image_ids,
        patient_id=[f"p{n // 2}" for n in numbers],
        source=np.where(labels["COVID-19"] == 1, "covid_chestxray", "kermany"),
    )
    folds = pd.DataFrame({"id": small.image_ids, "fold": numbers // 2 // 4 % 2})
    return {**tables_of(small), "images": images, "labels": labels, "folds": folds}


def scores_of(tables, model, sure, wrong=()):
    """The true class has `sure`, the others share the rest; of images `wrong`, the next class has it."""
    truth = tables["labels"][CLASSES].to_numpy().argmax(axis=1)
    truth = np.where(tables["labels"].id.isin(wrong), (truth + 1) % 4, truth)
    found = np.where(np.arange(4) == truth[:, None], sure, (1 - sure) / 3)
    known = {"image_id": tables["labels"].id, "model": model, "fold": tables["folds"].fold}
    return pd.DataFrame(found, columns=CLASSES).assign(**known)


def learner(folder, tables, scores):
    """A run with scores and, for each fold, the bundle of a network that has learnt nothing."""
    write_table(pd.concat(scores), "class_scores", folder / "tables" / "class_scores.parquet")
    (folder / "metrics.json").write_text(json.dumps({"model": str(scores[-1].model.iloc[0])}))
    network = FindingsClassifier(RECIPE, CLASSES)
    for fold in (0, 1):
        stated = {"family": "findings", "model": folder.name, "classes": CLASSES, "recipe": dataclasses.asdict(RECIPE)}
        stated |= {"architecture": {}, "longest_side": 50, "image_size": 64, "placement": "letterbox", "fold": fold}
        stated |= {"mean": list(network.mean), "std": list(network.std), "data_fingerprint": data_fingerprint(**tables)}
        stated |= {"precision": "float32", "validation": {}}
        save_bundle(folder / f"fold{fold}" / "bundle", network.state_dict(), stated)
    return str(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory, quick_processes):
    folder, small = tmp_path_factory.mktemp("classification"), SmallXrays(32)
    tables = exclusive(small)
    torch.manual_seed(0)
    prepared = prepare(folder / "prepare", tables)
    cache = XrayCache(prepared / "xrays", 50)
    for name in small.image_ids:
        cache.put(small.read(name))
    wrong = [small.image_ids[n] for n in (0, 8, 1, 9)]  # of either fold, so that one can teach the other a temperature
    first = learner(folder / "whole", tables, [scores_of(tables, "resnet152", 0.7, wrong)])
    second = learner(
        folder / "masked", tables, [scores_of(tables, "mean", 0.4, wrong[:2]), scores_of(tables, "FLANNEL", 0.9)]
    )
    probe = learner(folder / "probe", tables, [scores_of(tables, "border", 0.3, small.image_ids)])
    lungs = lungs_run(folder / "lungs", small, missed=small.image_ids[:1])
    done = folder / "report"
    parameters = {
        "prepare_run": str(prepared),
        "runs": [first, second],
        "run_folder": str(done),
        "published": ["flannel", "patched_flannel"],
        "probes": [probe],
        "lungs_run": str(lungs),
        "heat_runs": [first, second],
        "heat_images": 4,
        "samples": 20,
    }
    run_notebook(NOTEBOOK, folder / "executed.ipynb", parameters, done / "metrics.json", threads=1)
    return done


def test_the_figures_are_those_of_the_scores(report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["reference"] == "mean" and metrics["images"] == 32
    assert "2 folds by patient and near-duplicate" in (report.parent / "executed.ipynb").read_text()
    accuracy = {name: each["accuracy"] for name, each in metrics["models"].items()}
    assert accuracy == {"resnet152": 28 / 32, "mean": 30 / 32, "FLANNEL": 1.0}
    published = pd.read_csv(report / "published.csv").set_index(["table", "from", "model"])["f1 macro"]
    # Both halves of Patched FLANNEL's Table 3.
    assert published["flannel", "published", "FLANNEL"] == "0.8385 (sd 0.01)"
    assert published["patched_flannel", "published", "FLANNEL"] == "0.8180 (sd 0.01)"
    assert published["flannel", "here", "FLANNEL"] == "1.0000 [1.000, 1.000]"
    assert published["patched_flannel", "here, mean of folds", "FLANNEL"] == "1.0000 (sd 0.00)"
    # What the two runs keep, by their metrics.json.
    assert metrics["pictured"] == ["resnet152", "FLANNEL"]
    differences = pd.read_csv(report / "differences.csv").set_index(["model", "name"])
    assert differences.loc[("resnet152", "accuracy")].value == pytest.approx(-2 / 32)


def test_calibration_sources_probes_failures_and_heat_are_reported(report):
    calibration = pd.read_csv(report / "calibration.csv").set_index("model")
    assert calibration.loc["mean", "ece before"] == pytest.approx(30 / 32 - 0.4)
    assert calibration.loc["mean", "log_loss after"] < calibration.loc["mean", "log_loss before"]
    sources = pd.read_csv(report / "sources.csv").set_index(["model", "source", "class"])
    assert np.isnan(sources.loc[("resnet152", "covid_chestxray", "COVID-19")].roc_auc)
    assert sources.loc[("FLANNEL", "pooled", "COVID-19")].roc_auc == 1
    probes = pd.read_csv(report / "probes.csv").set_index(["model", "name"])
    assert probes.loc[("border", "accuracy")].value == 0
    failures = pd.read_csv(report / "failures.csv").set_index("class")
    assert failures.lungs_not_found.tolist() == [1, 0, 0, 0] and failures.answered.tolist() == [8, 8, 8, 8]
    heat = pd.read_csv(report / "heat.csv")
    assert len(heat) == 8 and heat.heat_inside.dropna().between(0, 1).all()
    pictures = {path.stem for path in (report / "figures").glob("*.png")}
    curves = {"class_curves", "model_curves", "confusion", "reliability"}
    assert pictures == {*curves, "extreme_folds", "intervals", "differences", "examples", "heat_maps"}
    check_shown(report.parent / "executed.ipynb", pictures=9)


def test_images_put_aside_are_judged_where_the_split_says_so(tmp_path, quick_processes):
    small = SmallXrays(32)
    tables = exclusive(small)
    whole, put_aside = tables["folds"], tables["folds"].fold == 1
    tables["images"] = tables["images"].assign(split=np.where(put_aside, "test", "train"))
    tables["folds"] = whole[~put_aside]
    prepared = prepare(tmp_path / "prepare", tables)
    cache = XrayCache(prepared / "xrays", 50)
    for name in small.image_ids:
        cache.put(small.read(name))
    wrong = whole.id[put_aside].head(4).tolist()
    both = [
        scores_of({**tables, "folds": whole}, "resnet152", 0.7, wrong),
        scores_of({**tables, "folds": whole}, "mean", 0.9),
    ]
    both = pd.concat(both)[np.tile(put_aside, 2)].assign(fold=0)
    write_table(both, "class_scores", tmp_path / "ensemble" / "tables" / "test_scores.parquet")
    (tmp_path / "ensemble" / "metrics.json").write_text("{}")
    done = tmp_path / "report"
    parameters = {"prepare_run": str(prepared), "runs": [str(tmp_path / "ensemble")], "run_folder": str(done)}
    parameters |= {"split": "test", "published": ["flannel"], "samples": 5}
    run_notebook(NOTEBOOK, tmp_path / "executed.ipynb", parameters, done / "metrics.json", threads=1)
    metrics = json.loads((done / "metrics.json").read_text())
    assert (metrics["images"], metrics["split"], metrics["models"]["resnet152"]["accuracy"]) == (16, "test", 12 / 16)
    failures = pd.read_csv(done / "failures.csv").set_index("class")
    assert failures.answered.tolist() == [4, 4, 4, 4] and failures.unanswered.tolist() == [0, 0, 0, 0]
    assert "16 test images, split off by patient" in (tmp_path / "executed.ipynb").read_text()
