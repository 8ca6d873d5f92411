"""Parameters of notebooks: what is refused, with which advice, and how a running notebook checks its own."""

import logging

import pandas as pd
import pytest

from kitlib.errors import NotebookError, SettingsError
from kitlib.parameters import begin_notebook, check_parameters, read_parameters
from kitlib.paths import project_root
from kitlib.recipes.named import check_recipe

NOTEBOOKS = project_root() / "notebooks"
STUDY = NOTEBOOKS / "30_train_study.ipynb"


def test_defaults_of_every_notebook_are_literals():
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        parameters = read_parameters(notebook)
        assert parameters and None not in parameters.values(), notebook
    assert read_parameters(STUDY)["folds"] == [0, 1, 2, 3, 4]


# The values are those that papermill's option -p passes: true, numbers and texts, but no lists, and false as a text.
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epoch": 1}, "has no parameter 'epoch'; it has: epochs, prepare_run, run_folder"),
        ({"folds": 0}, r"'folds' must be a list, each item a whole number, got 0; give -y '{folds: \[0\]}'"),
        ({"folds": "[0]"}, r"got '\[0\]'; give -y '{folds: \[0\]}'"),
        ({"folds": ["0"]}, r"give -y '{folds: \[0, 1, 2, 3, 4\]}'"),
        ({"folds": True}, r"'folds' must be a list, .* whole number, got True; give -y '{folds: \[0, 1, 2, 3, 4\]}'"),
        ({"overrides": "{image_size: 64}"}, """'overrides' must be a map.* give -y '{overrides: {"image_size": 64}}'"""),
        ({"run_folder": 20261128}, """'run_folder' must be a string, got 20261128; give -y '{run_folder: "20261128"}'"""),
        ({"epochs": "ten"}, "'epochs' must be a whole number, got 'ten'; give -y '{epochs: 0}'"),
        ({"epochs": True}, "'epochs' must be a whole number, got True"),
        ({"session_hours": "9.5"}, "'session_hours' must be a finite number, got '9.5'; give -y '{session_hours: 9.5}'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_a_right_one(parameters, message):
    with pytest.raises(SettingsError, match=r"30_train_study\.ipynb.*" + message):
        check_parameters(STUDY, parameters, as_option=True)


def test_a_false_that_papermill_passed_as_text_is_refused():
    with pytest.raises(SettingsError, match=r"'packed' must be true or false, got 'false'; write \{packed: false\}"):
        check_parameters(NOTEBOOKS / "10_prepare.ipynb", {"packed": "false"})


def test_right_parameters_pass():
    check_parameters(STUDY, {"folds": [], "overrides": {"views": ["full"]}, "session_hours": 9, "epochs": 3})
    check_parameters(NOTEBOOKS / "80_report.ipynb", {"runs": ["study"]})  # the default is an empty list


def test_what_is_no_notebook_is_an_error(tmp_path):
    (tmp_path / "n.ipynb").write_text("[]")
    with pytest.raises(NotebookError, match="is not a notebook"):
        read_parameters(tmp_path / "n.ipynb")
    with pytest.raises(NotebookError, match="does not exist"):
        read_parameters(tmp_path / "other.ipynb")


def test_a_running_notebook_checks_what_was_injected_or_edited(monkeypatch):
    monkeypatch.setattr(logging.getLogger("kitlib"), "propagate", True)  # restored, with the other two, after the test
    monkeypatch.setattr(logging.getLogger("kitlib"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("kitlib"), "level", logging.NOTSET)
    defaults = read_parameters(STUDY)
    # A name of the notebook's own that is no parameter, as after running its later cells.
    values = {**defaults, "summary": 1, "In": ["", "prepare_run = 'prepare'", "# Parameters\nepochs = 3\n"]}
    with pd.option_context("display.max_colwidth", 50, "display.max_columns", 20):
        begin_notebook("30_train_study", values)
        assert pd.get_option("display.max_colwidth") is None
        with pytest.raises(SettingsError, match="no parameter 'epoch'; it has: epochs"):
            begin_notebook("30_train_study", values | {"epoch": 3, "In": ["# Parameters\nepoch = 3\n"]})
        with pytest.raises(SettingsError, match="'epochs' must be a whole number, got 'ten'; give -y"):
            begin_notebook("30_train_study", values | {"epochs": "ten"})


def test_a_recipe_is_checked_with_its_overrides():
    defaults = read_parameters(STUDY)
    check_recipe(defaults, {"recipe": "small_study", "overrides": {"image_size": 64, "epochs": 2}, "epochs": 1})
    for wrong, message in (
        ({"recipe": "small_yolo"}, "is a DetectorRecipe; expected a StudyRecipe"),
        ({"recipe": "small"}, "no recipe is called 'small'"),
        ({"overrides": {"image_sise": 64}}, "has no field 'image_sise'"),
        ({"overrides": {"name": "x"}}, "has no field 'name'"),
        ({"overrides": {"image_size": "64"}}, "StudyRecipe.image_size is '64'"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_recipe(defaults, wrong)
