"""The demo of the Heidelberg system: the steps of the full plan, on phantoms, told with its trainings before it starts."""

from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.plans.trainings import count_trainings, starts_from_scratch

PLANS = project_root() / "submissions" / "plans"
PHANTOMS = {"nih_phantoms", "rsna_phantoms", "siim_phantoms"}


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
