"""Speed of training two folds: one after the other, side by side, and each with two processes. Part of `make bench`.

On a machine with two GPUs: `python benchmarks/folds.py --full --workers 2`. On a CPU the threads are divided among the
processes, so that all three ways use the same cores: this measures the cost of processes, not the gain of a second GPU.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.training import NoisyXrays
from kitlib.recipes.fields import StudyRecipe
from kitlib.recipes.named import recipe
from kitlib.settings import override
from kitlib.training.task import Task
from kitlib.training.train_folds import train_folds

WAYS: dict[str, dict[str, int]] = {
    "one after the other": {"at_once": 1},
    "side by side": {"at_once": 2},
    "two processes per model": {"processes": 2},
}
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"images": 16, "epochs": 1, "ways": ["one after the other"]}


def task(xrays: NoisyXrays, settings: StudyRecipe, workers: int) -> Task:
    images = xrays.images.assign(path="", rows=xrays.longest_side, columns=xrays.longest_side, source="noise", view="")
    folds = pd.DataFrame({"id": xrays.ids, "fold": np.arange(xrays.count) // 4 % 2})
    tables = {"images": images, "labels": xrays.labels, "boxes": xrays.boxes, "folds": folds}
    return Task(tables, xrays, settings, "noise", workers=workers)


def main(
    images: int = 512,
    epochs: int = 4,
    full: bool = False,
    workers: int = 0,
    ways: Annotated[list[str], typer.Option(help="keys of WAYS to measure; speeds are relative to the first")] = [*WAYS],  # noqa: B006
) -> None:
    settings = override(recipe("small_study", StudyRecipe), epochs=epochs)
    if full:
        settings = override(recipe("strong_study", StudyRecipe), epochs=epochs, starting_weights="")
    xrays = NoisyXrays(images, settings.image_size)
    table = Table("two folds", "seconds", "of this, training", "images per second", "relative to the first way")
    speeds = {}
    for way in ways:
        with tempfile.TemporaryDirectory() as run:
            start = time.perf_counter()
            trained = train_folds(task(xrays, settings, workers), [0, 1], Path(run), **WAYS[way])
            seconds = time.perf_counter() - start
        training = max(fold.metrics["seconds"] for fold in trained) if way == "side by side" else None
        training = training or sum(fold.metrics["seconds"] for fold in trained)
        speeds[way] = images * epochs / training  # each fold trains on half of the images
        ratio = speeds[way] / speeds[ways[0]]
        table.add_row(way, f"{seconds:.1f}", f"{training:.1f}", f"{speeds[way]:.0f}", f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{images} images, {epochs} epochs, {torch.cuda.device_count()} GPUs; the other seconds are start-up time")


if __name__ == "__main__":
    typer.run(main)
