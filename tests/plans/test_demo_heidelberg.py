"""The demo of the Heidelberg system: the steps of the full plan, on phantoms, and carried out at their smallest."""

import json

import pandas as pd
import pytest

from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.plans.trainings import count_trainings, starts_from_scratch
from tests.small_plans import carry_out

PLANS = project_root() / "submissions" / "plans"
PHANTOMS = {"nih_phantoms", "rsna_phantoms", "siim_phantoms"}
SMALLEST = {"images": 24, "studies": 16, "side": 64, "image_size": 32, "box_image_size": 64, "box_inference_size": 64}


def test_the_demo_has_every_step_of_the_full_plan_with_what_it_needs():
    full, demo = (read_plan(PLANS / f"{name}.yaml").planned for name in ("siim_heidelberg", "demo_heidelberg"))
    assert set(demo) - set(full) == PHANTOMS and not set(full) - set(demo)
    for name, run in full.items():
        assert demo[name].notebook == run.notebook and set(demo[name].needs) - PHANTOMS == set(run.needs)
        assert count_trainings(demo[name]) == count_trainings(run)
    # NIH, RSNA, study, Faster R-CNN and YOLO, all from other weights.
    assert sum(map(count_trainings, full.values())) == 5 and not any(map(starts_from_scratch, full.values()))
    assert {name for name in demo if starts_from_scratch(demo[name])} == {"backbone", "rsna_yolo"}


def test_variables_make_the_full_plan_small():
    plan = read_plan(PLANS / "siim_heidelberg.yaml", changes={"epochs": 1, "folds": [0, 1], "image_size": 64, "coco": ""})
    planned = plan.planned
    trained = [run.parameters for run in planned.values() if count_trainings(run)]
    assert [parameters["epochs"] for parameters in trained] == [1] * 5
    assert [planned[name].parameters["folds"] for name in ("study", "faster_rcnn", "yolo")] == [[0, 1]] * 3
    assert planned["study"].parameters["overrides"]["image_size"] == 64
    assert [name for name, run in planned.items() if starts_from_scratch(run)] == ["rsna_yolo"]


def test_the_published_fusion_is_not_tuned_and_shown_next_to_the_tuned_one():
    planned = read_plan(PLANS / "siim_heidelberg.yaml").planned
    assert planned["fuse_published"].parameters["fixed"] == {"box_iou": 0.55, "final_nms_iou": 0.1}  # report, section 3.3
    assert "fixed" not in planned["fuse"].parameters
    report = planned["report"].parameters
    assert report["published_fuse_run"].endswith("/fuse_published") and report["fuse_run"].endswith("/fuse")


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory, quick_processes):
    folder = tmp_path_factory.mktemp("heidelberg")
    smallest = {**SMALLEST, "inputs": str(folder / "inputs"), "epochs": 1}
    planned = read_plan(PLANS / "demo_heidelberg.yaml", folder / "runs", smallest).planned
    smaller = {"10_prepare": {"workers": 1}, "80_report": {"samples": 5, "shown": 2}}
    for run in planned.values():
        carry_out(run, **(smaller.get(run.notebook.stem, {}) if run.notebook else {}))
    return planned


def test_each_model_starts_from_the_one_before_it(carried_out):
    started = {
        name: json.loads((carried_out[name].folder / "fold0" / "metrics.json").read_text())["starting_weights"]
        for name in ("backbone", "study", "faster_rcnn", "rsna_yolo", "yolo")
    }
    assert started["backbone"] == started["rsna_yolo"] == "from scratch"
    for name, first in (("study", "backbone"), ("faster_rcnn", "backbone"), ("yolo", "rsna_yolo")):
        assert started[name].startswith(f"{carried_out[first].folder}/fold0/bundle: "), started[name]


def test_the_published_fusion_stands_beside_the_tuned_one_under_the_published_figures(carried_out):
    settings = json.loads((carried_out["fuse_published"].folder / "fusion.json").read_text())
    assert (settings["box_iou"], settings["final_nms_iou"], settings["model_weights"]) == (0.55, 0.1, {})
    table = pd.read_csv(carried_out["report"].folder / "comparison.csv").set_index("answer")
    rows = ["Heidelberg, published: ensemble", "fused as published", "fused, tuned", "Heidelberg, published: Faster R-CNN"]
    assert list(table.index[:5]) == [*rows, "faster_rcnn"]
    assert table.loc[rows[1:3], ["f1", "recall", "precision", "study_f1"]].notna().all(axis=None)


def test_the_figures_of_the_report_are_drawn(carried_out):
    drawn = {path.stem for path in (carried_out["report"].folder / "figures").glob("*.png")}
    assert drawn >= {"boxes", "confusion", "side_by_side"}  # figures 5 and 6, 18, 16
    for name in ("backbone", "study"):  # figures 8 and 13, 12 and 17
        assert (carried_out[name].folder / "fold0" / "figures" / "curves.png").is_file()
        history = pd.read_csv(carried_out[name].folder / "fold0" / "tables" / "history.csv")
        assert {"learning_rate", "train_loss", "validation_loss", "accuracy", "precision", "recall", "f1"} <= set(history)
