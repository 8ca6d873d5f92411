"""Counts where the CPU waits for the GPU, by line of the kit: torch's synchronisation check on a training of each family."""

import logging
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import typer
from part import figures

from kitlib.recipes.named import RECIPES
from kitlib.settings import override
from tests.small_lungs import stored_lungs
from tests.small_masks import SmallMasks
from tests.small_tasks import train_small
from tests.small_xrays import SmallXrays

EPOCHS = 2
STEPS, VALIDATION, REST = "training steps", "validation", "the rest"


class Waits:
    """Context manager that counts how often the CPU waits for the GPU, keyed by (phase, line of the kit), in `counted`."""

    MESSAGE = "called a synchronizing CUDA operation"  # c10/cuda/CUDAFunctions.cpp

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> "Waits":
        self.before = warnings.catch_warnings()
        self.before.__enter__()
        warnings.filterwarnings("always", message=self.MESSAGE)
        self.shown, warnings.showwarning = warnings.showwarning, self._note
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self.before.__exit__()

    def _note(self, message: Warning, *others: Any) -> None:
        if self.MESSAGE not in str(message):
            self.shown(message, *others)
            return
        stack = traceback.extract_stack()
        frame = next((frame for frame in reversed(stack) if "/kitlib/" in frame.filename), None)
        line = "(libraries)"
        if frame:
            line = f"{frame.filename.split('/kitlib/')[-1]}:{frame.lineno} {(frame.line or '')[:80]}"
        self.counted[phase(stack), line] += 1


def phase(stack: list[traceback.FrameSummary]) -> str:
    """Return the phase of a training from its call stack: the names of Lightning's loops and ultralytics' methods."""
    if any("evaluation_loop" in frame.filename or frame.name == "validate" for frame in stack):
        return VALIDATION
    if any("training_epoch_loop" in frame.filename or frame.name == "_do_train" for frame in stack):
        return STEPS
    return REST


def trainings(scratch: Path) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """Return, for each model family, the name of its small recipe, its images, and further arguments of its training."""
    small, chests = SmallXrays(32), SmallMasks(scratch / "masks")
    return {
        "study": ("small_study", small, {}),
        "findings": ("small_learner", small, {}),
        "patches": ("small_patches", small, {"lungs": stored_lungs(scratch / "lungs", small)}),
        "lungs": ("small_lungs", chests, {"masks": chests.masks}),
        "Faster R-CNN": ("small_faster_rcnn", small, {}),
        "YOLO": ("small_yolo", small, {}),
    }


def main(small: bool = False) -> None:
    logging.getLogger("kitlib").setLevel(logging.WARNING)
    averages = []
    with tempfile.TemporaryDirectory() as folder:
        for family, (name, images, options) in trainings(Path(folder)).items():
            recipe = override(RECIPES[name], epochs=1 if small else EPOCHS)
            with Waits() as waits:
                run = train_small(Path(folder) / name, images, recipe, model_name=name, **options)
            steps = recipe.epochs * (run.metrics["train_images"] // recipe.batch_size)
            print(f"\n{family}: {steps} training steps, precision {run.metrics['precision']}")
            for (when, line), count in waits.counted.most_common():
                print(f"  {count:5d} x {when:15} {line}")
            waited = sum(count for (when, _), count in waits.counted.items() if when == STEPS)
            averages.append(f"{family} {waited / steps:.1f}")
            if torch.cuda.is_available():
                figures(f"waits per training step: {', '.join(averages)}")
            else:  # zeros would look like a result
                figures(f"{len(averages)} families, no GPU")


if __name__ == "__main__":
    typer.run(main)
