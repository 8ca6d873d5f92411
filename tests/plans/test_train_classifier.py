"""A classifier trained with one call: which notebooks run, with which parameters, and what is refused."""

import pytest

from kitlib import train_classifier
from kitlib.errors import RunError
from kitlib.parameters import check_parameters
from tests.small_runs import prepare, tables_of
from tests.small_xrays import SmallXrays

CLASS_FOLDERS = {"class_folders": True}


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The notebooks that ran, with their parameters; notebook 10 is replaced by a prepared run with the folds 0 and 1."""
    calls = []

    def run_notebook(notebook, output, parameters, result):
        check_parameters(notebook, parameters)
        calls.append((notebook.stem, parameters))
        assert output.parent == result.parent
        if notebook.stem == "10_prepare":
            prepare(result.parent, tables_of(SmallXrays()))

    monkeypatch.setattr("kitlib.plans.train_classifier.run_notebook", run_notebook)
    return calls


def test_a_prepared_run_is_trained_in_all_its_folds_or_in_the_chosen_ones(tmp_path, called):
    data = prepare(tmp_path / "data", tables_of(SmallXrays()))
    assert train_classifier(data, tmp_path / "all") == tmp_path / "all"
    train_classifier(data, tmp_path / "one", recipe="small_backbone", folds=(1,), epochs=3, seed=7)
    assert [notebook for notebook, _ in called] == ["25_train_classifier"] * 2
    first, second = (parameters for _, parameters in called)
    common = {"prepare_run": str(data.resolve())}
    default = {"recipe": "small_learner", "folds": [0, 1], "epochs": 0, "model_name": "all"}
    assert first == {**common, **default, "run_folder": str(tmp_path / "all")}
    chosen = {"recipe": "small_backbone", "folds": [1], "epochs": 3, "model_name": "one", "seed": 7}
    assert second == {**common, **chosen, "run_folder": str(tmp_path / "one")}


def test_own_images_are_first_prepared_in_a_run_beside_the_training(tmp_path, called):
    (tmp_path / "images").mkdir()
    train_classifier(tmp_path / "images", tmp_path / "run", prepare=CLASS_FOLDERS)
    (_, first), (_, second) = called
    assert [notebook for notebook, _ in called] == ["10_prepare", "25_train_classifier"]
    assert first == {
        **CLASS_FOLDERS,
        "dataset": "table",
        "competition": str(tmp_path / "images"),
        "run_folder": str(tmp_path / "run_prepared"),
    }
    assert second["prepare_run"] == str(tmp_path / "run_prepared") and second["folds"] == [0, 1]


def test_a_prepared_run_is_not_prepared_again(tmp_path, called):
    data = prepare(tmp_path / "data", tables_of(SmallXrays()))
    with pytest.raises(RunError, match="is already a prepared run"):
        train_classifier(data, tmp_path / "run", prepare=CLASS_FOLDERS)
    assert not called


def test_own_images_need_to_be_described(tmp_path, called):
    (tmp_path / "images").mkdir()
    with pytest.raises(RunError, match=r"is not a prepared run.*also give `prepare`"):
        train_classifier(tmp_path / "images", tmp_path / "run")
    assert not called
