"""Every notebook at the smallest size that has all of its parts: DICOM files to a rehearsed and reported submission."""

import io
import json
import math

import nbformat
import pandas as pd
import pytest
import yaml
from rich.console import Console

from kitlib.demo import Demo, DemoSize, run_demo
from kitlib.paths import project_root
from kitlib.phantom_competition import COMPETITION
from kitlib.validate import validate

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
QUICK = {"epochs": 1, "image_size": 64}
SIZE = DemoSize(
    train_studies=24,
    test_studies=8,
    side=96,
    overrides={"study": QUICK, "yolo": QUICK, "faster_rcnn": QUICK, "backbone": QUICK},
    whole=True,
    pretraining_images=24,
    times_the_floor=0.0,
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Demo, dict[str, float]]:
    folder = tmp_path_factory.mktemp("demo")
    submission = folder / "submission.yaml"
    spec = yaml.safe_load((project_root() / "submissions" / "demo.yaml").read_text())
    moved = json.loads(json.dumps(spec).replace("runs/demo", str(folder / "runs")))
    submission.write_text(yaml.safe_dump(moved))
    demo = Demo(folder / "runs", folder / "inputs", folder / "truth", submission, SIZE)
    return demo, run_demo(demo, Console(file=io.StringIO()))


def test_the_demo_runs_every_notebook_and_leaves_a_valid_submission(ended):
    demo, scores = ended
    assert all(math.isfinite(scores[name]) for name in ("score", "negative", "none", "opacity"))
    assert validate(demo.inputs / COMPETITION / "sample_submission.csv", demo.runs / "submission.csv") == []
    executed = [notebook for stage in [*demo.stages(), demo.report()] for notebook, _, _ in stage]
    assert {*executed, "70_submit"} == {path.stem for path in NOTEBOOKS}


def test_the_rehearsed_kernel_used_every_model(ended):
    demo, _ = ended
    ledger = pd.read_csv(demo.runs / "kernel" / "working" / "ledger.csv").set_index("stage")
    readable = len(list((demo.inputs / COMPETITION / "test").glob("*/*/*.dcm"))) - 3
    models = ("study-fold0", "study-fold1", "yolo-fold0", "yolo-fold1", "faster_rcnn-fold0", "faster_rcnn-fold1")
    assert {model: ledger.files[model] for model in models} == dict.fromkeys(models, readable)


def test_every_stage_shows_pictures(ended):
    demo, _ = ended
    pictures = {path.relative_to(demo.runs).as_posix() for path in demo.runs.glob("*/figures/*.png")}
    assert pictures == {
        *(f"{run}/figures/{name}.png" for run in ("prepare", "nih", "rsna") for name in ("examples", "folds")),
        *(f"backbone/figures/{name}.png" for name in ("examples", "intervals", "roc", "test_roc")),
        *(f"{run}/figures/examples.png" for run in ("study", "yolo", "faster_rcnn", "rsna_yolo", "pseudo", "student")),
        "fuse/figures/steps.png",
        "report/figures/confusion.png",
        "report/figures/out_of_fold.png",
        "report/figures/precision_recall.png",
        "report/figures/reliability.png",
        "report/figures/submission.png",
        "report/figures/submission_confusion.png",
    }
    assert len(list(demo.runs.glob("*/fold?/figures/curves.png"))) == 6 + 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_house_rules(path):
    book = nbformat.read(path, as_version=4)
    assert book.cells[0].source.startswith("# ")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    parameters = [cell.source for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert all("  # " in line for line in parameters[0].splitlines())
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 15
    assert not any("def " in source for source in code)
