"""Trains on phantoms and submits on the GPU, then submits with the same weights on the CPU, and compares the two.

The first study model is trained in float16, as on Kaggle's T4s, the second in bfloat16; both predict in float16.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
import torch
import typer
from part import figures

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.datasets.folds import make_folds
from kitlib.datasets.siim import read_train
from kitlib.device import PRECISION, pick_device, precision
from kitlib.fusion.model_fusion import write_settings
from kitlib.inference.submit import SubmissionRun, SubmitSettings
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.named import RECIPES
from kitlib.scoring.score import score_files
from kitlib.scoring.submission_csv import read_submission
from kitlib.settings import override
from kitlib.training.driver import train_fold
from kitlib.training.task import Task
from kitlib.xrays.cache import XrayCache

# Model, recipe, fold, precision on a GPU; the most valuable first, as in a submission.
MODELS = (
    ("study", "small_study", 0, "16-mixed"),
    ("yolo", "small_yolo", 0, "16-mixed"),
    ("faster_rcnn", "small_faster_rcnn", 0, "16-mixed"),
    ("study", "small_study", 1, "bf16-mixed"),
)
FULL = {"train_studies": 120, "test_studies": 40, "side": 256}
SMALL = {"train_studies": 12, "test_studies": 6, "side": 96}
APART = 0.05  # allowed difference of a probability and of the score: half precision changes the third digit


@contextmanager
def computing_in(name: str) -> Iterator[None]:
    before = os.environ.get(PRECISION)
    os.environ[PRECISION] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[PRECISION]
        else:
            os.environ[PRECISION] = before


def train_all(competition: Path, folder: Path, small: bool) -> Path:
    """Train all MODELS and return the folder of their bundles and the fusion, laid out as a kernel's weights."""
    data = read_train(competition, progress=False)
    cache = XrayCache(folder / "xrays", FULL["side"])
    cache.fill(data.images)
    tables = {"images": data.images, "labels": data.labels, "boxes": data.boxes}
    tables["folds"] = make_folds(data.images, data.labels, data.boxes, 2, 0)
    weights, bundles = folder / "weights", []
    for model, name, fold, trained_in in MODELS:
        recipe, run, start = RECIPES[name], folder / f"{model}{fold}", time.perf_counter()
        recipe = override(recipe, epochs=1) if small else recipe
        with computing_in(trained_in):
            trained = train_fold(Task(tables, cache, recipe, model), fold, run)
        best, seconds = trained.metrics["best"]["score"], time.perf_counter() - start
        print(f"{model}, fold {fold}, {trained.metrics['precision']}: score {best:.3f} after {seconds:.1f} s", flush=True)
        shutil.copytree(run / "bundle", weights / run.name)
        bundles.append({"folder": run.name, "model": model, "fold": fold})
    (weights / "weights.json").write_text(json.dumps({"bundles": bundles}), encoding="utf-8")
    write_settings(SiimFusion(), weights / "fusion.json")
    return weights


def submit(competition: Path, weights: Path, output: Path) -> None:
    run = SubmissionRun(competition, output, SubmitSettings(time_limit_s=600))
    run.predict(str(weights), output.parent / "scratch")
    ledger = run.finish()
    print(f"{output.name} on {pick_device()} in {precision(pick_device())}\n{ledger.to_string()}", flush=True)
    failures = ledger.note[ledger.note.str.contains("failed:")]
    if len(failures):
        raise RuntimeError(f"{output}: {failures.iloc[0]}")


def submit_on_cpu(competition: Path, weights: Path, output: Path) -> None:
    """Write the submission in a process that sees no GPU."""
    command = [sys.executable, __file__, "--submit", str(competition), str(weights), str(output)]
    subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between two submissions' probabilities of the study classes."""
    tables = [read_submission(path).studies.set_index(["study_id", "label"]).score for path in (first, second)]
    apart: pd.Series = (tables[0] - tables[1]).abs()
    return float(apart[apart.index.get_level_values("label").isin(STUDY_CLASSES)].max())


def main(
    small: bool = False,
    submit_only: Annotated[
        tuple[Path, Path, Path] | None, typer.Option("--submit", help="Competition, weights, output.")
    ] = None,
) -> None:
    logging.getLogger("kitlib").setLevel(logging.WARNING)
    if submit_only is not None:
        submit(*submit_only)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"seed": 2021, "damaged_test_files": 1, "progress": False} | (SMALL if small else FULL)
        competition = write_competition(folder / "inputs", folder / "truth", **sizes)
        start = time.perf_counter()
        weights = train_all(competition, folder, small)
        seconds = time.perf_counter() - start
        half, cpu = folder / "half.csv", folder / "cpu.csv"
        with computing_in("16-mixed"):
            submit(competition, weights, half)
        score = score_files(folder / "truth", half)["score"]
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
        summary = f"score {score:.3f} on {hardware} after {seconds:.0f} s of training"
        figures(summary)
        submit_on_cpu(competition, weights, cpu)
        cpu_score, apart = score_files(folder / "truth", cpu)["score"], largest_difference(half, cpu)
        figures(f"{summary}, {cpu_score:.3f} with the same weights on the CPU, probabilities differ by at most {apart:.0e}")
    if abs(score - cpu_score) > APART or apart > APART:
        sys.exit(f"the submissions of GPU and CPU differ by more than {APART}")


if __name__ == "__main__":
    typer.run(main)
