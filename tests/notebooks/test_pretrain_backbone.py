"""Notebook 20 from a prepared run to a bundle, its tables and its pictures, in two sessions."""

import json

import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.atomic import write_json
from kitlib.bundle import data_fingerprint, read_bundle
from kitlib.errors import NotebookError
from kitlib.lungs.finders import StoredLungs
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.recipes.fields import FindingsRecipe
from kitlib.recipes.named import recipe as find_recipe
from kitlib.tables import read_table, write_table
from kitlib.training.driver import train_fold
from kitlib.training.task import Task
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.writing import write_xray
from tests.executed_notebook import check_shown
from tests.small_lungs import lungs_run
from tests.training.test_findings import SmallFindings

NOTEBOOK = project_root() / "notebooks" / "20_pretrain_backbone.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_processes):
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
    lungs = StoredLungs(lungs_run(folder / "lungs", small, frame=(5.0, 3.0, 35.0, 33.0)))
    changes = {"image_size": 32, "rotate_degrees": 0.0, "blur_p": 0.0}
    changes |= {"lungs": "masks", "trained_on": "either", "views": ["full", "lungs"]}
    parameters = {
        "prepare_run": str(prepared),
        "recipe": "small_backbone",
        "overrides": {**changes, "epochs": 4},
        "epochs": 1,
        "folds": [0, 1],
        "lungs_run": str(folder / "lungs"),
    }
    begun = find_recipe("small_backbone", FindingsRecipe, **changes, epochs=1)
    task = Task(tables, XrayCache(prepared / "xrays", 64), begun, "backbone", lungs=lungs)
    train_fold(task, 0, folder / "first" / "fold0")

    def session(name, **more):
        executed = folder / f"{name}.ipynb"
        values = {**parameters, "run_folder": str(folder / name), **more}
        run_notebook(NOTEBOOK, executed, values, folder / name / "metrics.json", threads=1)

    # No time is left, not even for fold 1 to begin; what run_notebook misses is the mark of a finished run, no cell failed.
    with pytest.raises(NotebookError, match=r"20_pretrain_backbone\.ipynb: it ended without writing .*metrics\.json"):
        session("second", session_hours=1e-6, resume_from=str(folder / "first"))
    session("backbone", resume_from=str(folder / "second"), at_once=2)
    return done


def printed(executed):
    cells = json.loads(executed.read_text())["cells"]
    return "".join("".join(out.get("text", [])) for cell in cells for out in cell.get("outputs", []))


def test_a_session_that_ends_says_how_to_go_on_and_the_next_one_does(run):
    first, second = run.parent / "first", run.parent / "second"
    said = printed(run.parent / "second.ipynb")
    assert f"fold0: resumes from {first / 'fold0'}" in said
    assert "fold 1 stopped after 0 of 1 epochs, because the session ends" in said and "set resume_from to 'second'" in said
    # The fold that was finished is shown, and nothing takes the run for a whole one.
    assert (second / "figures" / "examples.png").is_file() and not (second / "metrics.json").exists()
    weights = [(each / "fold0" / "bundle" / "weights.safetensors").read_bytes() for each in (first, second, run)]
    assert weights[0] == weights[1] == weights[2]
    assert f"fold1: resumes from {second / 'fold1'}" in printed(run.parent / "backbone.ipynb")
    assert (run / "fold1" / "train.log").is_file()
    record = json.loads((run / "record.json").read_text())
    assert record["parameters"]["resume_from"] == str(second) and record["wall_s"] > 0


def test_the_notebook_leaves_what_later_stages_read(run):
    record, _ = read_bundle(run / "fold1" / "bundle")
    assert record["family"] == "findings" and record["recipe"]["epochs"] == 1
    of_fold = json.loads((run / "fold1" / "metrics.json").read_text())
    assert of_fold["lungs_fingerprint"] and of_fold["lungs_missed"] == {"training": 0, "predicted": 0}
    scores = read_table("class_scores", run / "tables" / "class_scores.parquet")
    assert len(scores) == 28 and set(scores.fold) == {0, 1}
    # each fold's model scores the four test images
    assert len(read_table("class_scores", run / "tables" / "test_scores.parquet")) == 8
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["model"] == "backbone" and metrics["folds"] == [0, 1] and 0 <= metrics["score"] <= 1
    assert set(metrics["out_of_fold"]) == {"mean", "Mass", "No Finding"}
    assert metrics["folds_fingerprint"] == data_fingerprint(folds=SmallFindings(32).fold_table)


def test_the_notebook_shows_tables_and_pictures(run):
    assert {path.name for path in (run / "figures").iterdir()} >= {"intervals.png", "roc.png", "examples.png"}
    by_class = pd.read_csv(run / "findings.csv")
    check_shown(run.parent / "backbone.ipynb", pictures=6)
    assert by_class["class"].tolist() == ["Mass", "No Finding"] and by_class.of.tolist() == [28, 28]
