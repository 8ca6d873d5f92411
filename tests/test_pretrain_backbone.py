"""Notebook 20 from a prepared run to a bundle, its tables and its pictures."""

import json

import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian
from test_train_findings import SmallFindings

from kitlib.atomic import write_json
from kitlib.bundle import read_bundle
from kitlib.cache import XrayCache
from kitlib.dicom_writing import write_xray
from kitlib.paths import project_root
from kitlib.run_notebook import run_notebook
from kitlib.tables import read_table, write_table

NOTEBOOK = project_root() / "notebooks" / "20_pretrain_backbone.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, small = tmp_path_factory.mktemp("pretrain"), SmallFindings(32)
    prepared, done = folder / "prepare", folder / "backbone"
    for image_id, pixels in small.pixels.items():
        write_xray(folder / f"{image_id}.dcm", pixels, transfer_syntax=ExplicitVRLittleEndian)
    images = small.images.assign(path=[str(folder / f"{image_id}.dcm") for image_id in small.image_ids], rows=40, columns=50)
    decoded = XrayCache(prepared / "xrays", 64).fill(images, workers=1)
    assert set(decoded.status) == {"decoded"}
    tables = {"images": images, "labels": small.labels, "boxes": small.boxes, "folds": small.fold_table}
    for name, table in tables.items():
        write_table(table, name, prepared / "tables" / f"{name}.parquet")
    write_json(prepared / "metrics.json", {"longest_side": 64})
    parameters = {
        "prepare_run": str(prepared),
        "run_folder": str(done),
        "recipe": "small_backbone",
        "overrides": {"image_size": 32, "epochs": 4, "rotate_degrees": 0.0, "blur_p": 0.0},
        "folds": [0, 1],
        "epochs": 1,
    }
    run_notebook(NOTEBOOK, folder / "executed.ipynb", parameters, done / "metrics.json", threads=1)
    return done


def test_the_notebook_leaves_what_later_stages_read(run):
    record, _ = read_bundle(run / "fold1" / "bundle")
    assert record["family"] == "findings" and record["recipe"]["epochs"] == 1
    scores = read_table("class_scores", run / "tables" / "class_scores.parquet")
    assert len(scores) == 28 and set(scores.fold) == {0, 1}
    # each fold's model scores the four test images
    assert len(read_table("class_scores", run / "tables" / "test_scores.parquet")) == 8
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["model"] == "backbone" and metrics["folds"] == [0, 1] and 0 <= metrics["score"] <= 1
    assert set(metrics["out_of_fold"]) == {"mean", "Mass", "No Finding"}


def test_the_notebook_shows_tables_and_pictures(run):
    assert {path.name for path in (run / "figures").iterdir()} >= {"intervals.png", "roc.png", "examples.png"}
    by_class = pd.read_csv(run / "findings.csv")
    assert by_class["class"].tolist() == ["Mass", "No Finding"] and by_class.of.tolist() == [28, 28]
