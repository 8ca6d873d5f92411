import json

import pytest

from kitlib.atomic import write_json
from kitlib.leaderboard.listing import describe, list_runs
from kitlib.recipes.named import RECIPES
from kitlib.settings import override
from tests.small_runs import coverage, false_boxes, prepare, study_scores, tables_of, train
from tests.small_xrays import RECIPE, SmallXrays

TABLES = tables_of(SmallXrays())
# A seed of 0 and no limit are the defaults.
PLANNED_PARAMETERS = {"recipe": "r", "overrides": {"epochs": 2}, "seed": 0, "limit_train": 0, "limit_validation": 5}


def planned(folder, plan, name, state, **details):
    """Write the files that `python -m kitlib run` leaves for an unfinished run; the plan's folder is next to the run's."""
    write_json(
        folder / "plan.json", {"key": "1", "run": {"name": name, "notebook": "n.ipynb", "parameters": PLANNED_PARAMETERS}}
    )
    (folder.parent / plan).mkdir(exist_ok=True)
    (folder.parent / plan / "runs.json").write_text("{}")
    write_json(folder.parent / plan / "states" / f"{name}.json", {"state": state, **details})


def test_every_run_is_listed_with_its_state(tmp_path):
    prepare(tmp_path / "prepare", TABLES)
    train(tmp_path / "siim" / "study", TABLES, study_scores=study_scores(TABLES, 1.0))
    train(tmp_path / "siim" / "stopped", TABLES, folds=[0], parameters={"folds": [0, 1], "recipe": "r"}, finished=False)
    planned(tmp_path / "siim" / "failed", ".siim", "failed", "failed", problem="cell 4 raised ValueError: no\n  log: x")
    write_json(tmp_path / "siim" / "failed" / "done-1.json", {"state": "done"})  # only commands have no other result
    for plan, started in ((".first", 1), (".zero", 2)):
        planned(tmp_path / "siim" / "going", plan, "going", "failed", problem="an earlier plan's", started=started)
    planned(tmp_path / "siim" / "going", ".siim", "going", "running", cell=4, cells=9, host="node1", started=3)
    (train(tmp_path / "damaged", TABLES) / "metrics.json").write_text('{"model": "st')
    (train(tmp_path / "fold_damaged", TABLES) / "fold1" / "metrics.json").write_text("[]")
    write_json(tmp_path / "phantoms" / "plan.json", {"key": "2", "run": {"name": "phantoms", "command": ["python"]}})
    write_json(tmp_path / "phantoms" / "done-2.json", {"state": "done"})
    # None of these is a run: a hidden folder, images, and a run inside a run.
    write_json(tmp_path / ".hidden" / "metrics.json", {"model": "hidden"})
    (tmp_path / "xrays").mkdir()
    write_json(tmp_path / "prepare" / "inner" / "metrics.json", {"model": "inner"})
    runs = {run.name: run for run in list_runs([tmp_path])}
    assert {name: (run.kind, run.state) for name, run in runs.items()} == {
        "damaged": ("other", "damaged"),
        "fold_damaged": ("other", "damaged"),
        "phantoms": ("command", "finished"),
        "prepare": ("prepared", "finished"),
        "siim/failed": ("other", "failed"),
        "siim/going": ("other", "unfinished"),
        "siim/stopped": ("other", "unfinished"),
        "siim/study": ("study", "finished"),
    }
    assert runs["siim/failed"].remark == "cell 4 raised ValueError: no"
    assert runs["siim/going"].remark == "at cell 4 of 9 on node1, running or killed"
    assert runs["damaged"].remark.startswith("damaged/metrics.json cannot be read (Unterminated string")
    assert runs["fold_damaged"].remark == "fold1/metrics.json is not a JSON object with values"
    assert runs["prepare"].remark == "no record.json: the run was written by an older kitlib"
    assert runs["siim/study"].remark == ""
    assert describe([runs["siim/stopped"]])["folds"] == "0 of 2"
    going = describe([runs["siim/going"]])
    assert (going["recipe"], going["changes"], going["folds"]) == ("r", "epochs=2, limit_validation=5", "")
    # A run that failed and was then completed is finished, even if an older plan recorded the failure.
    write_json(tmp_path / "siim" / "failed" / "metrics.json", {"model": "m"})
    assert {run.name: run.state for run in list_runs([tmp_path])}["siim/failed"] == "finished"


def test_runs_below_several_folders_have_their_full_path_and_appear_once(tmp_path):
    for name in ("a/study", "b/study"):
        train(tmp_path / name, TABLES)
    names = [run.name for run in list_runs([tmp_path / "a", tmp_path / "b" / "study", tmp_path / "b"])]
    assert names == [str(tmp_path / "a" / "study"), str(tmp_path / "b" / "study")]
    assert [run.name for run in list_runs([tmp_path / "b" / "study"])] == ["study"]
    assert [run.name for run in list_runs([tmp_path], skip=[tmp_path / "a" / "study"])] == ["b/study"]
    assert [run.name for run in list_runs([tmp_path / "a", tmp_path / "b"])] == names
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        list_runs([tmp_path / "nowhere"])


def test_a_model_is_described_over_all_runs_of_its_folds(tmp_path):
    recipe = override(RECIPES["small_study"], epochs=3)
    common = {"recipe": recipe, "coverage": coverage(TABLES)}
    parameters = {"recipe": "small_study", "overrides": {"epochs": 3}, "seed": 2, "extra_run": "pseudo"}
    record = {"wall_s": 20.5, "peak_memory_mb": 800, "peak_child_memory_mb": 1200, "host": "n1"}
    record["git_commit"] = f"{'c' * 40}+changes"
    train(tmp_path / "s-0", TABLES, folds=[0], parameters=parameters, record={**record, "started": "2026-11-02"}, **common)
    on_gpu = {"gpu": "Tesla T4", "peak_gpu_memory_mb": 3000}
    other = {**record, "started": "2026-11-01", "host": "n2", "git_commit": None, "kitlib_digest": "d" * 64}
    train(tmp_path / "s-1", TABLES, folds=[1], parameters=parameters, record=other, of_fold=on_gpu, **common)
    description = describe(list_runs([tmp_path]))
    assert description == {
        "kind": "detector",
        "model": "study",
        "state": "finished",
        "recipe": "small_study",
        "changes": "epochs=3, seed=2, extra_run=pseudo",
        "folds": "0, 1",
        "cross_fitted": None,
        "kaggle_public": None,
        "kaggle_private": None,
        "started": "2026-11-01",
        "wall_s": 41.0,
        "training_s": 20.0,
        "memory_mb": 1200,
        "gpu": "Tesla T4",
        "gpu_memory_mb": 3000,
        "host": "n1, n2",
        "commit": "cccccccc+changes, kitlib dddddddd",
    }


def test_a_run_of_an_older_kitlib_has_a_recipe_name_only_if_the_fields_are_equal(tmp_path):
    for name, recipe in {"named": RECIPES["small_yolo"], "other": RECIPE}.items():
        folder = train(
            tmp_path / name, TABLES, recipe=recipe, detections=false_boxes(TABLES, 0.5), coverage=coverage(TABLES)
        )
        (folder / "record.json").unlink()
    descriptions = [describe([run]) for run in list_runs([tmp_path])]
    assert [(run["recipe"], run["changes"]) for run in descriptions] == [("small_yolo", ""), ("not stated", "")]
    assert descriptions[0]["wall_s"] is None and descriptions[0]["training_s"] == 20 and descriptions[0]["commit"] == ""
    assert json.loads((tmp_path / "named" / "fold0" / "metrics.json").read_text())["recipe"]["views"] == ["full"]
