"""A publication of finished runs: bundles by fold, a card with their figures, and what cannot be published."""

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.bundle import read_bundle, save_bundle
from kitlib.errors import BundleError, KernelError, RunError
from kitlib.kernels.publish import publish, write_publication
from kitlib.paths import find_starting_weights
from kitlib.recipes.fields import StudyRecipe
from tests.small_bundles import edit_record
from tests.test_bundle import RECORD, WEIGHTS


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "nih"
    for fold in (0, 1):
        recipe = asdict(StudyRecipe(starting_weights="imagenet.safetensors"))
        record = RECORD | {"fold": fold, "recipe": recipe, "data_fingerprint": "0123456789abcdef"}
        save_bundle(folder / f"fold{fold}" / "bundle", WEIGHTS, record)
    (folder / "metrics.json").write_text(
        json.dumps({"score": 0.81234, "folds": [0, 1], "auc": {"mean": 0.9}, "test": {"mean": 0.7}})
    )
    parameters = {"prepare_run": "/data/runs/prepared_nih", "recipe": "nih_heidelberg", "overrides": {"epochs": 3}}
    (folder / "record.json").write_text(json.dumps({"parameters": parameters}))
    return folder


def test_a_publication_has_each_folds_bundle_and_a_card_of_what_was_measured(tmp_path, run, monkeypatch):
    folder = write_publication([run], tmp_path / "new" / "er" / "out", "My NIH backbones", "me", "CC-BY-NC-4.0")
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert json.loads((folder / "dataset-metadata.json").read_text()) == {
        "title": "My NIH backbones",
        "id": "me/my-nih-backbones",
        "licenses": [{"name": "CC-BY-NC-4.0"}],
    }
    card = (folder / "README.md").read_text()
    for line in (
        "# My NIH backbones",
        "| score (out of fold) | 0.8123 |",
        "| auc mean (out of fold) | 0.9000 |",
        "| test mean (test set) | 0.7000 |",
        "| folds | fold0, fold1 |",
        "| starting weights | imagenet.safetensors |",
        "| input | 512 x 512 pixels, letterbox |",
        '| recipe | nih_heidelberg, overrides {"epochs": 3} |',
    ):
        assert line in card.splitlines()
    assert "| trained on | the prepared run `prepared_nih`, fingerprint 0123456789ab |" in card.splitlines()
    assert "Licence: CC-BY-NC-4.0" in card and "`starting_weights: my-nih-backbones/RUN/FOLD`" in card
    # Attached on Kaggle, a fold starts a training by its name.
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    folder.rename(tmp_path / "my-nih-backbones")
    bundle = find_starting_weights("my-nih-backbones/nih/fold1")
    assert read_bundle(bundle)[0]["fold"] == 1


def test_a_run_of_one_model_is_published_with_what_is_known_of_it(tmp_path):
    run = tmp_path / "runs" / "single"
    save_bundle(run / "bundle", WEIGHTS, RECORD | {"recipe": asdict(StudyRecipe(starting_weights=""))})
    (run / "metrics.json").write_text("{}")
    write_publication([run], tmp_path / "short", "A" * 6, "me", "other")  # Kaggle's shortest title and its longest one
    folder = write_publication([run], tmp_path / "out", "A" * 50, "me", "other", "Trained last night.")
    assert read_bundle(folder / "single")[0]["fold"] == RECORD["fold"]
    assert {path.name for path in folder.iterdir()} == {"single", "README.md", "dataset-metadata.json"}
    card = (folder / "README.md").read_text()
    lines = card.splitlines()
    assert lines[:3] == [f"# {'A' * 50}", "", "Trained last night."]
    assert "Licence: see the data sets and starting weights below." in card
    for line in ("| folds | one model |", "| starting weights | none |", "| recipe | unknown, overrides {} |"):
        assert line in lines
    assert "the prepared run `unknown`" in card


def test_what_cannot_be_published_leaves_no_folder(tmp_path, run):
    def refused(error, message, runs=(run,), title="My NIH backbones", licence="other", owner="me"):
        with pytest.raises(error, match=message):
            write_publication(runs, tmp_path / "out", title, owner, licence)
        assert not (tmp_path / "out").exists()

    refused(KernelError, "licence is 'mine'; valid: CC0-1.0", licence="mine")
    for title in ("A" * 5, "A" * 51):
        refused(KernelError, "the title must have 6 to 50 characters", title=title)
    refused(KernelError, "the owner must be a Kaggle user name", owner="")
    refused(KernelError, "no run was given", runs=[])
    refused(KernelError, "two runs are called nih", runs=[run, run])
    (tmp_path / "empty").mkdir()
    refused(RunError, "metrics.json is missing", runs=[tmp_path / "empty"])
    (tmp_path / "empty" / "metrics.json").write_text("{}")
    refused(KernelError, "empty has no bundle", runs=[run, tmp_path / "empty"])
    edit_record(run / "fold1" / "bundle", weights_sha256="0" * 64)
    refused(BundleError, "SHA-256")


def test_a_folder_that_exists_is_not_replaced(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(KernelError, match="out exists; give a new folder"):
        write_publication([run], tmp_path / "out", "My NIH backbones", "me", "other")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_folder_is_uploaded_by_the_name_in_its_metadata(tmp_path, run, monkeypatch):
    uploads = []
    monkeypatch.setattr("kitlib.kernels.publish.push_dataset", lambda *given: uploads.append(given))
    folder = write_publication([run], tmp_path / "out", "My NIH backbones", "me", "other")
    assert publish(folder) == "me/my-nih-backbones" and uploads == [("me/my-nih-backbones", folder)]


def test_the_command_prints_the_new_folder_and_fails_if_it_exists(tmp_path, run):
    command = ["publish", str(run), "--out", str(tmp_path / "out"), "--title", "My NIH backbones", "--owner", "me"]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == 0 and first.stdout.startswith(f"{tmp_path / 'out'} has 1 runs")
    assert (tmp_path / "out" / "README.md").is_file()
    assert second.exit_code == 1 and "out exists" in second.stderr and second.stdout == ""
