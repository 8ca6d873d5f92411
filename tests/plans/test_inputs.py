"""What a plan tells before its first run: inputs that are missing, and how many networks it trains."""

import re

import pytest
import yaml
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.errors import PlanError
from kitlib.paths import project_root
from kitlib.plans.inputs import check_inputs, missing_inputs
from kitlib.plans.plan import read_plan
from kitlib.plans.trainings import count_trainings, describe_trainings, starts_from_scratch


def write_plan(folder, steps, **more):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"runs": str(folder / "runs"), "steps": steps} | more, sort_keys=False))
    return path


def prepare(data):
    return {"notebook": "10_prepare", "parameters": {"competition": data}}


def study(weights="", prepared="{prepare}"):
    overrides = {"starting_weights": weights} if weights else {}
    return {
        "notebook": "30_train_study",
        "parameters": {"prepare_run": prepared, "recipe": "small_study", "overrides": overrides},
    }


def test_missing_data_weights_and_runs_are_listed_before_anything_starts(tmp_path):
    (tmp_path / "data").mkdir()
    steps = {
        "good": prepare(str(tmp_path / "data")),
        "first": study(prepared="{good}"),
        "second": study("{first}/fold0/bundle", "{good}"),  # made by the plan itself
        "absent": prepare("no-such-data"),
        "also_absent": prepare("no-such-data"),
        "weights": study(str(tmp_path / "none.safetensors"), "{good}"),
        "stranger": study(prepared="no-such-run"),
        "phantoms": {"command": ["make", "--folder", str(tmp_path / "made")], "result": "{run}/done"},
        "of_phantoms": {**prepare(str(tmp_path / "made" / "nih")), "needs": ["phantoms"]},
        "too_early": prepare(str(tmp_path / "made" / "nih")),  # does not wait for the phantoms
    }
    path = write_plan(tmp_path, steps)
    done = CliRunner().invoke(app, ["run", str(path)])
    assert done.exit_code == 1 and not list((tmp_path / "runs").glob("[!.]*"))
    lines = [line.strip() for line in done.output.splitlines()]
    for step, text in {
        "absent, also_absent": "no input 'no-such-data' below",
        "weights": "none.safetensors' does not exist",
        "stranger": "no run 'no-such-run'",
        "too_early": "no input",
    }.items():
        assert any(line.startswith(f"{step}: ") and text in line for line in lines), (step, done.output)
    assert len([line for line in lines if ": " in line]) == 1 + 4  # the headline and four problems
    # A dry run lists the plan and the same problems; a plan whose selected steps lack nothing has none.
    assert "no-such-run" in CliRunner().invoke(app, ["run", str(path), "--dry-run"]).output
    listed = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--only", "second"])
    assert (
        listed.exit_code == 0 and "10 trainings in 2 of 3 runs\nfrom scratch, with random weights: first\n" in listed.output
    )


def test_inputs_of_runs_that_are_done_may_be_gone(tmp_path):
    plan = read_plan(write_plan(tmp_path, {"prepare": prepare("no-such-data")}))
    with pytest.raises(PlanError, match="no input 'no-such-data'"):
        check_inputs(plan, plan.planned)
    run = plan.planned["prepare"]
    run.folder.mkdir(parents=True)
    run.done_file.write_text("{}")
    check_inputs(plan, plan.planned)


def test_inputs_are_found_by_name_or_by_path_in_the_project_from_any_folder(tmp_path, monkeypatch):
    """A notebook runs in the project's folder, whichever folder the plan was started in."""
    for folder in ("elsewhere", "inputs/data", "inputs/weights", "mine/data", "runs/old", "folder"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("inputs/weights/a.safetensors", "mine/b.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "notebooks").symlink_to(project_root() / "notebooks")
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    data, weights = ("data", "mine/data"), ("weights/a.safetensors", "mine/b.safetensors")
    steps = {f"data_{number}": prepare(name) for number, name in enumerate(data)}
    steps |= {f"weights_{number}": study(name, "old") for number, name in enumerate(weights)}
    steps |= {"stored": study(prepared="runs/old"), "bare": prepare("folder"), "bare_run": study(prepared="folder")}
    plan = read_plan(write_plan(tmp_path, steps))
    # A name without "/" is not a folder of the project.
    missing = missing_inputs(plan, plan.planned)
    assert [line.partition(" 'folder'")[0] for line in missing] == ["bare: no input", "bare_run: no run"]


def test_only_what_a_notebook_reads_must_exist(tmp_path, monkeypatch):
    """The report reads the competition's files if it has a truth; pseudo-labelling, if it is given no `source_run`."""
    for folder in ("inputs/data", "runs/old"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notebooks").symlink_to(project_root() / "notebooks")
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    fused = {"prepare_run": "old", "fuse_run": "old"}
    notebooks = {
        "report": ("80_report", fused),
        "judged": ("80_report", {**fused, "truth": "truth"}),
        "own": ("50_pseudo_label", {"prepare_run": "old", "runs": ["old"], "source_run": "old"}),
        "pseudo": ("50_pseudo_label", {"prepare_run": "old", "runs": ["old"]}),
        "fuse": ("60_fuse", {"prepare_run": "old", "runs": ["old", "gone"], "competition": "rsna-pneumonia"}),
        "board": ("90_leaderboard", {"runs": ["folder"]}),
        "by_name": ("10_prepare", {"dataset": "rsna"}),
        "pools": ("10_prepare", {"competition": "data", "pool": {"nih": "no-pool"}, "beside": ["no-neighbour"]}),
    }
    steps = {name: {"notebook": notebook, "parameters": parameters} for name, (notebook, parameters) in notebooks.items()}
    plan = read_plan(write_plan(tmp_path, steps))
    missing = [re.match(r"(.*?) '(.*?)'", line).groups() for line in missing_inputs(plan, plan.planned)]
    assert missing == [
        ("judged, pseudo: no input", "siim-covid19-detection"),
        ("fuse: no run", "gone"),
        ("by_name: no input", "rsna-pneumonia-detection-challenge"),
        ("pools: no input", "no-pool"),
        ("pools: no input", "no-neighbour"),
    ]


def test_nested_folds_train_one_network_per_pair_of_folds(tmp_path):
    nested = {"notebook": "25_train_classifier", "parameters": {"folds": [0, 1, 2], "outer_folds": [0, 1]}}
    plan = read_plan(write_plan(tmp_path, {"nested": nested}, published_time="3 days on a V100"))
    assert count_trainings(plan.planned["nested"]) == 4  # (0; 1, 2) and (1; 0, 2)
    assert "4 trainings in 1 of 1 runs; published duration: 3 days on a V100" in describe_trainings(plan, plan.planned)


def test_trainings_that_are_done_are_counted_apart(tmp_path):
    several = study(prepared="elsewhere") | {"matrix": {"seed": [1, 2]}}
    plan = read_plan(write_plan(tmp_path, {"prepare": {"command": ["true"]}, "several": several}))
    for name in ("prepare", "several-2"):
        plan.planned[name].folder.mkdir(parents=True)
        plan.planned[name].done_file.write_text("{}")
    # 5 folds in each run; `prepare` trains nothing.
    assert describe_trainings(plan, plan.planned).startswith("10 trainings in 2 of 3 runs, 5 of them done\n")


@pytest.mark.parametrize(
    ("name", "trainings", "stated"),
    [
        # 2 kinds x 5 networks x 5 x 4 pairs of folds, 2 probes in 5 folds, 2 networks for heat maps and the segmenter.
        ("flannel", 213, "3 to 4 days on a Tesla V100"),
        ("siim_heidelberg", 5, "not stated"),
        # The segmenter, 3 widths, 3 baselines, whole images and 2 probes, in 10 folds.
        ("hrnet", 100, "not stated; on one RTX 2070 Super"),
        # 3 networks on each of 3 sets of data, 1 without masks and 2 segmenters.
        ("covid_ensembles", 12, "not stated; on one Tesla P100"),
    ],
)
def test_plans_of_the_documents_say_what_they_train_and_what_it_took(name, trainings, stated):
    path = project_root() / "submissions" / "plans" / f"{name}.yaml"
    shown = CliRunner().invoke(app, ["run", str(path), "--dry-run"]).output
    assert f"{trainings} trainings in " in shown and f"; published duration: {stated}" in " ".join(shown.split())


@pytest.mark.parametrize(("name", "trainings"), [("vinbigdata", 15), ("rsna", 15), ("ranzcr", 5), ("siim_acr", 10)])
def test_plans_of_the_further_competitions_lack_only_data_and_weights(name, trainings):
    path = project_root() / "submissions" / "plans" / f"{name}_lean.yaml"
    plan = read_plan(path, runs="runs/of-a-test")
    missing = missing_inputs(plan, plan.planned)
    assert all("no input " in line or "weights file " in line for line in missing), missing
    assert sum(map(count_trainings, plan.planned.values())) == trainings
    assert not any(map(starts_from_scratch, plan.planned.values()))


def test_the_demos_need_nothing_from_outside():
    for path in (project_root() / "submissions" / "plans").glob("demo*.yaml"):
        plan = read_plan(path, runs="runs/of-a-test")
        check_inputs(plan, plan.planned)
