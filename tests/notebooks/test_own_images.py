"""From thirty PNG files and a table to a classifier, by the two commands of docs/own_images.md."""

import json
import shlex

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.runs.finished_run import read_metrics, read_prepared

ROOT = project_root()
# At the smallest size: the commands' parameters, and these.
SMALL = {
    "10_prepare": {"longest_side": 32, "workers": 1, "n_folds": 2},
    "25_train_classifier": {"folds": [0], "epochs": 1, "overrides": {"image_size": 32}},
}


def documented(notebook: str) -> dict:
    """Return the parameters of the page's first command that runs the notebook."""
    page = (ROOT / "docs" / "own_images.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if f"notebooks/{notebook}.ipynb" in line and "papermill" in line)
    return yaml.safe_load(shlex.split(command)[-1])


def run(notebook: str, folder, **parameters) -> None:
    parameters = documented(notebook) | SMALL[notebook] | parameters
    parameters["run_folder"] = str(folder / parameters["run_folder"])
    result = folder / parameters["run_folder"] / "metrics.json"
    run_notebook(ROOT / "notebooks" / f"{notebook}.ipynb", folder / f"{notebook}.ipynb", parameters, result, threads=1)


@pytest.fixture(scope="module")
def chest(tmp_path_factory):
    """The page's example: images/000.png to 029.png, two of each patient, and labels.csv with a row of a missing file."""
    folder = tmp_path_factory.mktemp("inputs") / "chest"
    (folder / "images").mkdir(parents=True)
    rows = ["Image,Class,Patient"]
    for number in range(30):
        noise = np.random.default_rng(number).integers(0, 200, (48, 48)).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number:03d}.png"), noise)
        rows.append(f"{number:03d}.png,{('normal', 'opacity')[number % 2]},P{number // 2}")
    (folder / "labels.csv").write_text("\n".join([*rows, "030.png,normal,P15"]))
    return folder


def test_thirty_images_and_a_table_become_a_classifier(tmp_path, chest, quick_processes):
    run("10_prepare", tmp_path, competition=str(chest))
    prepared = tmp_path / "chest"
    tables, metrics = read_prepared(prepared), read_metrics(prepared)
    assert (metrics["images"], metrics["patients"], metrics["normal"], metrics["opacity"]) == (30, 15, 15, 15)
    assert (
        tables["images"].merge(tables["folds"], left_on="image_id", right_on="id").groupby("patient_id").fold.nunique().max()
        == 1
    )
    faults = pd.read_csv(prepared / "faults.csv")
    assert faults[["row", "problem"]].to_numpy().tolist() == [["030.png", "and 0 other rows have no file; left out"]]
    run("25_train_classifier", tmp_path, prepare_run=str(prepared))
    trained = json.loads((tmp_path / "chest_classifier" / "fold0" / "metrics.json").read_text())
    assert trained["classes"] == ["normal", "opacity"] and trained["train_images"] + trained["validation_images"] == 30
    assert 0 <= read_metrics(tmp_path / "chest_classifier")["score"] <= 1


def test_images_without_labels_are_prepared(tmp_path, chest, quick_processes):
    run("10_prepare", tmp_path, competition=str(chest), table="", columns={})
    tables = read_prepared(tmp_path / "chest")
    assert len(tables["images"]) == len(tables["folds"]) == 30 and list(tables["labels"]) == ["id"]
