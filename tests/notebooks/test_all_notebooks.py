"""Every notebook at the smallest size that has all of its parts: DICOM files to a rehearsed and reported submission."""

import io
import math

import nbformat
import pandas as pd
import pytest
import yaml
from rich.console import Console

from kitlib.paths import project_root
from kitlib.phantoms.siim import COMPETITION
from kitlib.plans.demo import run_demo
from kitlib.plans.plan import Plan, read_plan
from kitlib.scoring.validate import validate
from tests.executed_notebook import check_shown

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Of classes that exclude one another: in a demo of their own, whose plan is read here; each has a test of its own.
EXCLUSIVE = {"25_train_classifier", "65_ensemble", "85_classification_report"}
FURTHER = {"82_competition_report"}  # of the other competitions, carried out in tests/plans/test_demo_competitions.py
QUICK = {"parameters": {"epochs": 1, "overrides": {"image_size": 64}}}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, quick_processes) -> tuple[Plan, dict[str, float]]:
    folder = tmp_path_factory.mktemp("demo")
    spec = (ROOT / "submissions" / "demo_whole.yaml").read_text().replace("runs/demo", str(folder / "runs"))
    (folder / "submission.yaml").write_text(spec)
    plan = {
        "extends": str(ROOT / "submissions" / "plans" / "demo_whole.yaml"),
        "runs": str(folder / "runs"),
        "variables": {
            **{"inputs": str(folder / "inputs"), "truth": str(folder / "truth")},
            **{"submission": str(folder / "submission.yaml")},
            **{"train_studies": 24, "test_studies": 8, "pretraining_images": 24, "lung_images": 16, "side": 96},
        },
        "steps": {
            **dict.fromkeys(("backbone", "rsna_yolo", "study", "yolo", "faster_rcnn", "student"), QUICK),
            "segment_lungs": {"parameters": {"epochs": 6}},
        },
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(plan))
    small = read_plan(folder / "small.yaml")
    return small, run_demo(small, Console(file=io.StringIO()), times_the_floor=0.0)


def test_the_demo_runs_every_notebook_and_leaves_a_valid_submission(ended):
    plan, scores = ended
    sample = plan.runs.parent / "inputs" / COMPETITION / "sample_submission.csv"
    assert all(math.isfinite(scores[name]) for name in ("score", "negative", "none", "opacity"))
    assert validate(sample, plan.runs / "submission.csv") == []
    executed = {run.notebook.stem for run in plan.planned.values() if run.notebook}
    apart = read_plan(ROOT / "submissions" / "plans" / "demo_flannel.yaml").planned.values()
    assert {run.notebook.stem for run in apart if run.notebook} >= EXCLUSIVE
    assert {*executed, "70_submit", *EXCLUSIVE, *FURTHER} == {path.stem for path in NOTEBOOKS}
    assert set(plan.states().values()) == {"done"}


def test_the_rehearsed_kernel_used_every_model(ended):
    plan, _ = ended
    ledger = pd.read_csv(plan.runs / "kernel" / "working" / "ledger.csv").set_index("stage")
    readable = len(list((plan.runs.parent / "inputs" / COMPETITION / "test").glob("*/*/*.dcm"))) - 3
    models = ("study-fold0", "study-fold1", "yolo-fold0", "yolo-fold1", "faster_rcnn-fold0", "faster_rcnn-fold1")
    assert {model: ledger.files[model] for model in models} == dict.fromkeys(models, readable)


def test_every_stage_shows_pictures(ended):
    plan, _ = ended
    pictures = {path.relative_to(plan.runs).as_posix() for path in plan.runs.glob("*/figures/*.png")}
    assert pictures == {
        *(f"{run}/figures/{name}.png" for run in ("prepare", "lung_masks", "nih", "rsna") for name in ("examples", "folds")),
        *(f"{run}/figures/data_sheet.png" for run in ("prepare", "lung_masks", "rsna")),  # NIH's findings exclude none
        *(f"segment_lungs/figures/{name}.png" for name in ("examples", "overlap")),
        *(f"lungs/figures/{name}.png" for name in ("doubtful", "found")),
        *(f"backbone/figures/{name}.png" for name in ("examples", "intervals", "roc", "test_roc")),
        *(f"{run}/figures/examples.png" for run in ("study", "yolo", "faster_rcnn", "rsna_yolo", "pseudo", "student")),
        *(f"{run}/figures/precision_recall.png" for run in ("yolo", "faster_rcnn", "rsna_yolo", "report")),
        "fuse/figures/steps.png",
        "leaderboard/figures/rankings.png",
        "report/figures/boxes.png",
        "report/figures/confusion.png",
        "report/figures/out_of_fold.png",
        "report/figures/reliability.png",
        "report/figures/side_by_side.png",
        "report/figures/submission.png",
        "report/figures/submission_confusion.png",
    }
    assert len(list(plan.runs.glob("*/fold?/figures/curves.png"))) == 6 + 4
    for run in plan.planned.values():
        if run.notebook:
            # The executed copy shows all of them.
            check_shown(run.folder / "notebook.ipynb", len(list(run.folder.rglob("figures/*.png"))))
    check_shown(plan.runs / "kernel" / "rehearsal.ipynb", pictures=0)
    epochs = [line for line in (plan.runs / "study" / "notebook.log").read_text().splitlines() if "epoch 1 of 1, " in line]
    assert len(epochs) == 2 and epochs[0].startswith("study fold 0: epoch 1 of 1, loss ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_house_rules(path):
    book = nbformat.read(path, as_version=4)
    assert book.cells[0].source.startswith("# ")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    parameters = [cell.source for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert all("  # " in line for line in parameters[0].splitlines())
    # A form is as long as it must be.
    code = [cell.source for cell in book.cells if cell.cell_type == "code" and cell.source not in parameters]
    assert max(len(source.splitlines()) for source in code) <= 15
    assert not any("def " in source for source in code)
