"""Two processes that train one model by gloo, on one GPU where there is but one: the weights are those of one process."""

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

TOLERANCE = 1e-5  # they add the same numbers in another order
# In full precision: half of a batch is rounded otherwise in any other, TensorFloat-32 among them.
ENVIRONMENT = {"KIT_PRECISION": "32-true", "KIT_BACKEND": "gloo", "NVIDIA_TF32_OVERRIDE": "0"}


def main(small: bool = False) -> None:
    os.environ.update(ENVIRONMENT)  # before CUDA is first used, and for the processes
    xrays = SmallXrays(16)
    # Without batch norm and dropout an image's gradient is the same whatever images are beside it.
    recipe = override(
        RECIPE, backbone="test_convnext", image_size=64, dropout=0.0, optimizer="sgd", batch_size=8, blur_p=0.0
    )
    recipe = override(recipe, epochs=1 if small else 3)
    task = small_task(xrays, recipe)
    with tempfile.TemporaryDirectory() as folder:
        alone = train_fold(task, 1, Path(folder) / "alone")
        (together,) = train_folds(task, [1], Path(folder) / "together", processes=2)
        expected, found = (read_bundle(run.run_folder / "bundle")[1] for run in (alone, together))
        apart = max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())
        where = f"{alone.metrics['device']}, {alone.metrics['precision']}, {torch.cuda.device_count()} GPUs"
        figures(f"weights differ by {apart:.1e} at most, wanted {TOLERANCE:.0e} ({where})")
        print(f"an epoch took {min(alone.history.seconds):.2f} s alone and {min(together.history.seconds):.2f} s together")
    if not apart <= TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
