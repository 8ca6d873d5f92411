"""Time to predict a submission with one process and with two. Part of `make bench`.

On a machine with two GPUs, each process has its own; on a CPU, the processes share the cores, one thread each on two cores.
The submissions that both ways write are compared.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import typer
from rich.console import Console
from rich.table import Table

from kitlib.bundle import save_bundle
from kitlib.inference.submit import SubmissionRun, SubmitSettings
from kitlib.models.classifier import OUTPUTS, StudyClassifier
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.fields import StudyRecipe

# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"studies": 4, "models": 1, "side": 32, "ways": [1]}


def write_weights(folder: Path, models: int, backbone: str, side: int) -> None:
    """Write bundles of untrained study models, and weights.json, which lists them, as build_kernel.py does."""
    bundles, recipe = [], StudyRecipe(backbone=backbone, image_size=side, starting_weights="")
    for fold in range(models):
        torch.manual_seed(fold)
        model = StudyClassifier(recipe)
        record = {
            **{"family": "study", "model": "study", "classes": OUTPUTS, "recipe": asdict(recipe), "architecture": {}},
            **{
                "longest_side": side,
                "image_size": side,
                "placement": recipe.placement,
                "mean": model.mean,
                "std": model.std,
            },
            **{"fold": fold, "data_fingerprint": "", "precision": "float32", "validation": {}},
        }
        save_bundle(folder / f"study-fold{fold}", model.state_dict(), record)
        bundles.append({"folder": f"study-fold{fold}"})
    (folder / "weights.json").write_text(json.dumps({"bundles": bundles}), encoding="utf-8")


def main(
    studies: int = 100,
    models: int = 4,
    backbone: str = "resnet18",
    side: int = 224,
    ways: Annotated[list[int], typer.Option(help="numbers of processes; times are relative to the first")] = [1, 2],  # noqa: B006
) -> None:
    table = Table("processes", "seconds", "of this, models", "relative to the first")
    written, seconds_of = [], {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = {"train_studies": 4, "test_studies": studies, "side": 2 * side, "damaged_test_files": 0}
        competition = write_competition(root / "phantoms", root / "truth", seed=0, progress=False, **sizes)
        write_weights(root / "weights", models, backbone, side)
        for processes in ways:
            began = time.perf_counter()
            run = SubmissionRun(competition, root / f"{processes}.csv", SubmitSettings(processes=processes))
            run.predict(str(root / "weights"), root / "scratch")
            seconds_of[processes] = seconds = time.perf_counter() - began
            ledger = run.finish()
            of_models = ledger.seconds[ledger.stage.str.startswith("study-fold")].sum() / processes
            table.add_row(str(processes), f"{seconds:.1f}", f"{of_models:.1f}", f"{seconds / seconds_of[ways[0]]:.2f}")
            written.append(run.output.read_bytes())
    console = Console()
    console.print(table)
    same = "the same" if len(set(written)) == 1 else "DIFFERENT"
    gpus, threads = torch.cuda.device_count(), torch.get_num_threads()
    console.print(f"{studies} studies, {models} models, {gpus} GPUs, {threads} threads; the files written are {same}")


if __name__ == "__main__":
    typer.run(main)
