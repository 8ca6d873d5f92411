"""Checks that two processes that train a model together (by gloo, also on one GPU) get the same weights as one process."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import typer
from part import figures

from kitlib.bundle import read_bundle
from kitlib.settings import override
from kitlib.training.driver import train_fold
from kitlib.training.train_folds import train_folds
from tests.small_tasks import small_task
from tests.small_xrays import RECIPE, SmallXrays

TOLERANCE = 1e-5  # because the same numbers are added in another order
# Full precision: in any other, also TensorFloat-32, half a batch is rounded differently from a whole one.
ENVIRONMENT = {"KIT_PRECISION": "32-true", "KIT_BACKEND": "gloo", "NVIDIA_TF32_OVERRIDE": "0"}


def main(small: bool = False) -> None:
    os.environ.update(ENVIRONMENT)  # before CUDA is first used; child processes inherit it
    xrays = SmallXrays(16)
    # Without batch norm and dropout, an image's gradient does not depend on the other images in its batch.
    recipe = override(
        RECIPE, backbone="test_convnext", image_size=64, dropout=0.0, optimizer="sgd", batch_size=8, blur_p=0.0
    )
    recipe = override(recipe, epochs=1 if small else 3)
    task = small_task(xrays, recipe)
    with tempfile.TemporaryDirectory() as folder:
        single = train_fold(task, 1, Path(folder) / "alone")
        (joint,) = train_folds(task, [1], Path(folder) / "together", processes=2)
        expected, weights = (read_bundle(run.run_folder / "bundle")[1] for run in (single, joint))
        apart = max(float((weights[name].double() - value.double()).abs().max()) for name, value in expected.items())
        hardware = f"{single.metrics['device']}, {single.metrics['precision']}, {torch.cuda.device_count()} GPUs"
        figures(f"weights differ by at most {apart:.1e}, allowed {TOLERANCE:.0e} ({hardware})")
        print(f"one epoch: {min(single.history.seconds):.2f} s by one process, {min(joint.history.seconds):.2f} s by two")
    if not apart <= TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
