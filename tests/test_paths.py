import pytest

from kitlib import paths
from kitlib.errors import InputNotFound
from kitlib.paths import find_input, find_run


@pytest.mark.parametrize(
    "layout",
    [
        "weights",
        "competitions/weights",
        "datasets/somebody/weights",
        "datasets/somebody/saved/weights",
        "kernel/weights",
        "notebooks/somebody/kernel/weights",
    ],
)
def test_an_input_is_found_in_all_of_kaggles_mount_layouts(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True)
    assert find_input("weights", tmp_path) == tmp_path / layout


@pytest.mark.parametrize("layout", ["", "notebooks/somebody/"])
def test_a_kernels_name_selects_between_runs_of_the_same_name(tmp_path, layout):
    for kernel in ("first", "second"):
        (tmp_path / layout / kernel / "study").mkdir(parents=True)
    assert find_input("second/study", tmp_path) == tmp_path / layout / "second" / "study"


def test_a_missing_input_is_an_error_that_lists_the_available_ones(tmp_path):
    (tmp_path / "competitions" / "other").mkdir(parents=True)
    with pytest.raises(InputNotFound, match=r"no input 'weights'.*\n.*competitions\n.*competitions/other"):
        find_input("weights", tmp_path)


def test_a_run_is_read_from_the_runs_folder_or_else_from_an_input(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    (tmp_path / "inputs" / "study").mkdir(parents=True)
    assert find_run("study") == tmp_path / "inputs" / "study"
    (tmp_path / "runs" / "study").mkdir(parents=True)
    assert find_run("study") == tmp_path / "runs" / "study"
    assert find_run(tmp_path / "inputs" / "study") == tmp_path / "inputs" / "study"


def test_a_missing_run_is_named_with_the_runs_that_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (tmp_path / "runs" / "prepare").mkdir(parents=True)
    with pytest.raises(
        InputNotFound, match=r"no run 'prepair' below .*runs or among the inputs in .*Folders in runs: prepare"
    ):
        find_run("prepair")
