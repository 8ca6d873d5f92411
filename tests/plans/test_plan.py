"""Reading plans: which runs they have, what each run needs, and when it is done."""

import json
import shutil

import pytest
import yaml

from kitlib.errors import PlanError
from kitlib.lungs.crop import check_finder
from kitlib.parameters import read_parameters
from kitlib.paths import project_root
from kitlib.plans.plan import RECORD, WITHOUT_EFFECT, read_plan
from kitlib.recipes.fields import TrainingRecipe
from kitlib.recipes.named import recipe

PLANS = sorted((project_root() / "submissions" / "plans").glob("*.yaml"))
PREPARE = {"notebook": "10_prepare", "parameters": {"competition": "{data}"}}
STUDY = {
    "notebook": "30_train_study",
    "matrix": {"fold": [0, 1]},
    "parameters": {"prepare_run": "{prepare}", "folds": ["{fold}"]},
}
FUSE = {"notebook": "60_fuse", "parameters": {"prepare_run": "{prepare}", "runs": ["{study}", "other"]}}


def write_plan(folder, name="plan", **changes):
    steps = {"prepare": PREPARE, "study": STUDY, "fuse": FUSE} | changes.pop("steps", {})
    plan = {"runs": str(folder / "runs"), "variables": {"data": "siim"}, "steps": steps} | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def finish(run):
    """Write the files of a finished run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RECORD).write_text(json.dumps({"key": run.key}))
    run.done_file.write_text("{}")


def test_placeholders_name_values_and_the_folders_of_other_runs(tmp_path):
    planned = read_plan(write_plan(tmp_path)).planned
    runs = tmp_path / "runs"
    assert list(planned) == ["prepare", "study-0", "study-1", "fuse"]
    assert planned["study-1"].parameters == {
        "prepare_run": str(runs / "prepare"),
        "folds": [1],
        "run_folder": str(runs / "study-1"),
    }
    # Both runs of `study` are inserted into the list that contains the placeholder.
    assert planned["fuse"].parameters["runs"] == [str(runs / "study-0"), str(runs / "study-1"), "other"]
    assert planned["fuse"].needs == ("prepare", "study-0", "study-1")


def test_a_placeholder_selects_the_run_with_the_same_matrix_values(tmp_path):
    pseudo = {
        "notebook": "50_pseudo_label",
        "matrix": {"fold": [0, 1]},
        "parameters": {"runs": ["{study}"], "prepare_run": "{prepare}"},
    }
    both = {"command": ["echo", "{study}/fold{fold}", "{fold}"], "matrix": {"kind": ["a"], "fold": [1]}}
    planned = read_plan(write_plan(tmp_path, steps={"pseudo": pseudo, "both": both})).planned
    assert planned["pseudo-0"].needs == ("prepare", "study-0")
    assert planned["both-a-1"].command == ("echo", f"{tmp_path}/runs/study-1/fold1", "1")


def test_a_variable_is_the_list_of_a_matrix(tmp_path):
    steps = {"study": STUDY | {"matrix": {"fold": "{folds}"}}}
    path = write_plan(tmp_path, variables={"data": "siim", "folds": [0, 2]}, steps=steps)
    assert list(read_plan(path).planned) == ["prepare", "study-0", "study-2", "fuse"]
    assert list(read_plan(path, changes={"folds": [4]}).planned) == ["prepare", "study-4", "fuse"]
    with pytest.raises(PlanError, match="matrix key 'fold' needs a list of different numbers or words, got 4"):
        read_plan(path, changes={"folds": 4})


def test_a_plan_extends_another_and_variables_change(tmp_path):
    write_plan(tmp_path, "base")
    (tmp_path / "more.yaml").write_text(
        "extends: base.yaml\nsteps: {study: {parameters: {epochs: 3}, matrix: {fold: [4]}}}\n"
        "defaults: {30_train_study: {gpus: 2, parameters: {epochs: 9, workers: 5}}}\n"
    )
    plan = read_plan(tmp_path / "more.yaml", runs=tmp_path / "elsewhere", changes={"data": "other"})
    assert list(plan.planned) == ["prepare", "study-4", "fuse"]
    study = plan.planned["study-4"]
    assert (study.parameters["epochs"], study.parameters["workers"], study.gpus) == (3, 5, 2)
    assert study.parameters["prepare_run"] == str(tmp_path / "elsewhere" / "prepare")
    assert plan.planned["prepare"].parameters["competition"] == "other"


def test_a_changed_parameter_changes_its_run_and_all_that_need_it(tmp_path):
    for run in read_plan(write_plan(tmp_path)).planned.values():
        finish(run)
    assert set(read_plan(write_plan(tmp_path)).states().values()) == {"done"}
    changed = {**STUDY, "parameters": {**STUDY["parameters"], "seed": 7}}
    states = read_plan(write_plan(tmp_path, steps={"study": changed})).states()
    assert states == {"prepare": "done", "study-0": "changed", "study-1": "changed", "fuse": "changed"}


def test_settings_without_effect_on_results_change_no_key(tmp_path):
    first = read_plan(write_plan(tmp_path)).planned
    # Explicit defaults, resources and another runs folder do not make it another run.
    same = {"parameters": {**STUDY["parameters"], "seed": 0, "workers": 8}, "threads": 7, "minutes": 5}
    again = read_plan(write_plan(tmp_path, runs=str(tmp_path / "moved"), steps={"study": {**STUDY, **same}})).planned
    assert {name: run.key for name, run in first.items()} == {name: run.key for name, run in again.items()}


def test_a_key_is_that_of_earlier_versions(tmp_path):
    """If the same plan had another key, its runs would be repeated."""
    plan = read_plan(write_plan(tmp_path, steps={"true": {"command": ["true", 1]}}))
    assert plan.planned["true"].key == "09eacbcdadba"


def test_the_order_of_overrides_changes_no_key(tmp_path):
    keys = set()
    for changes in ({"epochs": 3, "dropout": 0.25}, {"dropout": 0.25, "epochs": 3}):
        study = {"notebook": "30_train_study", "parameters": {"prepare_run": "x", "overrides": changes}}
        keys.add(read_plan(write_plan(tmp_path, steps={"study": study})).planned["study"].key)
    assert len(keys) == 1


def test_a_started_run_resumes_and_so_does_one_whose_needs_are_not_done(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    for run in plan.planned.values():
        finish(run)
    plan.planned["study-0"].done_file.unlink()
    assert plan.states() == {"prepare": "done", "study-0": "resumes", "study-1": "done", "fuse": "resumes"}
    shutil.rmtree(plan.planned["prepare"].folder)
    assert plan.states()["prepare"] == "new"
    assert plan.states()["study-1"] == "resumes"


def test_a_folder_that_no_plan_has_made_is_not_touched(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    plan.planned["prepare"].folder.mkdir(parents=True)
    (plan.planned["prepare"].folder / "work.txt").write_text("days")
    with pytest.raises(PlanError, match="prepare has files that no plan has made"):
        plan.states()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {}}, "a plan has no field 'stages'; it has: extends, runs"),
        ({"runs": ""}, "the key `runs` is missing"),
        ({"published_time": 72}, "a plan.published_time is 72; expected a string"),
        ({"steps": {"x": {"notebook": "10_prepare", "gpu": 1}}}, "step x: Step has no field 'gpu'; it has: notebook"),
        ({"steps": {"x": {"notebook": "10_prepare", "gpus": "two"}}}, "Step.gpus is 'two'; expected a whole number"),
        ({"steps": {"x": {}}}, "step x: expected exactly one of 'notebook' and 'command'"),
        ({"steps": {"x": {"command": ["true"], "parameters": {"a": 1}}}}, "step x: a command has no parameters"),
        ({"steps": {"x": {"notebook": "11_prepare"}}}, "notebook '11_prepare' does not exist; available: 10_prepare, 1"),
        (
            {"steps": {"x": {"notebook": "10_prepare", "parameters": {"fold": 1}}}},
            "no parameter 'fold'; it has: n_folds, dataset",
        ),
        ({"steps": {"x": {"notebook": "10_prepare", "parameters": {"seed": "x"}}}}, "'seed' must be a whole number, got"),
        (
            {"steps": {"x": {"notebook": "30_train_study", "parameters": {"overrides": {"image_sise": 64}}}}},
            "StudyRecipe has no field 'image_sise'",
        ),
        (
            {"steps": {"x": {"command": ["{nothing}"]}}},
            "unknown placeholder {nothing}; valid: data, prepare, study",
        ),
        (
            {"steps": {"x": {"command": ["true"], "needs": ["y"]}}},
            "'needs' contains unknown steps ['y']; the steps are ['prepare', 'study', 'fuse', 'x']",
        ),
        ({"steps": {"x": {"command": ["{y}"]}, "y": {"command": ["{x}"]}}}, "steps need each other: "),
        ({"steps": {"x": {"command": ["true"], "matrix": {"fold": [0, 0]}}}}, "matrix key 'fold' needs a list of"),
        ({"steps": {"x": {"command": ["true"], "matrix": {"fold": ["a b"]}}}}, "matrix key 'fold' needs a list of"),
        (
            {"steps": {"x": {"command": ["true"], "matrix": {"fold": "{no}"}}}},
            "needs a list of different numbers or words",
        ),
        ({"steps": {"data": {"command": ["true"]}}}, "matrix keys and 'run' must have different names, but share ['data']"),
        ({"steps": {"X": {"command": ["true"]}}}, "invalid step name 'X'"),
        (
            {"steps": {"x": {"command": ["{study}"], "matrix": {"fold": [1, 2]}}}},
            "step x: 'x-2' needs a run of 'study' with the same matrix values; 'study' has ['study-0', 'study-1']",
        ),
        (
            {"steps": {"x": {"command": ["true"], "matrix": {"fold": [2]}, "needs": ["study"]}}},
            "step x: 'x-2' needs a run of 'study' with the same matrix values; 'study' has ['study-0', 'study-1']",
        ),
        ({"variables": {"data": "{data}"}}, "step prepare: a variable that the step uses refers to itself"),
        ({"steps": {"x": {"command": ["true"], "threads": 0}}}, "Step.threads is 0; expected a whole number of at least 1"),
        ({"steps": {"x": {"command": ["true"], "gpus": -1}}}, "Step.gpus is -1; expected a whole number of at least 0"),
        ({"steps": {"x": {"command": ["true"], "memory_gb": 0}}}, "Step.memory_gb is 0; expected a finite number above 0"),
        (
            {"steps": {"x": {"command": ["true"], "minutes": -1}}},
            "Step.minutes is -1; expected a finite number of at least 0",
        ),
        ({"steps": {"x": [1]}}, "step x: Step must be a mapping from field names to values, got [1]"),
        ({"defaults": {"10_prepare": [1]}}, "defaults of 10_prepare: expected a mapping of a step's fields, got [1]"),
        ({"steps": {"x": {"notebook": ["10_prepare"]}}}, "step x: Step.notebook is ['10_prepare']; expected a string"),
    ],
)
def test_a_faulty_plan_is_refused_with_what_is_valid(tmp_path, changes, message):
    with pytest.raises(PlanError) as refused:
        read_plan(write_plan(tmp_path, **changes))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("extends: a.yaml", "", "the plans extend each other: a.yaml -> a.yaml; remove the key"),
        ("extends: b.yaml", "extends: a.yaml", "the plans extend each other: a.yaml -> b.yaml -> a.yaml"),
        ("extends: ../there/a.yaml", "", "the plans extend each other: a.yaml -> a.yaml; remove the key"),
        ("extends: ../b.yaml", "", "b.yaml does not exist; plans in its folder: none"),
        ("steps: [x]", "", "a plan.steps is ['x']; expected a mapping"),
        ("extends: c.yaml", "", "c.yaml does not exist; plans in its folder: a.yaml, b.yaml"),
        ("extends: b.yaml\nsteps: {x: [1]}", "steps: {x: {command: ['true']}}\nruns: r", "step x: Step must be a mapping"),
        ("extends: b.yaml", "steps: {x: {command: ['true'], gpus: .nan}}", "b.yaml, line 1: .nan is not a finite number"),
    ],
)
def test_plans_that_extend_others_badly_are_refused(tmp_path, first, second, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.yaml").write_text(first)
    (tmp_path / "there" / "b.yaml").write_text(second)
    with pytest.raises(PlanError) as refused:
        read_plan(tmp_path / "there" / "a.yaml")
    assert message in str(refused.value)


def test_missing_files_variables_and_steps_are_errors(tmp_path):
    path = write_plan(tmp_path)
    with pytest.raises(PlanError, match=r"demo\.yaml does not exist; plans in its folder: plan\.yaml"):
        read_plan(tmp_path / "demo.yaml")
    with pytest.raises(PlanError, match=r"has no variables \['side'\]; its variables are \['data'\]"):
        read_plan(path, changes={"side": 3})
    with pytest.raises(PlanError, match=r"has no steps \['report'\]; its steps are \['fuse', 'prepare', 'study'\]"):
        read_plan(path).runs_of_steps(["report"])


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_shipped_plan_can_be_read(path):
    plan = read_plan(path, runs="runs/of-a-test")
    assert set(plan.states().values()) == {"new"}
    done = set()
    for name, run in plan.planned.items():
        assert set(run.needs) <= done
        done.add(name)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_shipped_plans_pass_masks_to_exactly_the_recipes_that_use_them(path):
    for name, run in read_plan(path).planned.items():
        # Segmenters produce masks and use none.
        if "recipe" in run.parameters and run.notebook.stem != "12_segment_lungs":
            settings = recipe(run.parameters["recipe"], TrainingRecipe, **run.parameters.get("overrides", {}))
            check_finder(settings, run.parameters.get("lungs_run") or None, name)


def test_the_plan_in_the_docs_can_be_read(tmp_path):
    page = (project_root() / "docs/plans.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    planned = read_plan(tmp_path / "mine.yaml").planned
    assert list(planned) == ["prepare", *(f"study-{fold}" for fold in range(5)), "fuse"]
    assert len(planned["fuse"].parameters["runs"]) == 5


def test_parameters_without_effect_exist_in_notebooks():
    names = {name for path in (project_root() / "notebooks").glob("*.ipynb") for name in read_parameters(path)}
    assert names >= WITHOUT_EFFECT
