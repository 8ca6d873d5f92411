"""Speed of patch predictions: the kit's batches of many images, the published loop over patches, a bare forward pass.

Part of `make bench`. With a GPU: `python benchmarks/patches.py --full`, the five published networks, 100 patches per image.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kitlib.device import autocast, memory_format, pick_device
from kitlib.models.patch_classifier import CHUNKS, PatchClassifier
from kitlib.models.patches import centres, join_centres
from kitlib.recipes.fields import PatchRecipe
from kitlib.recipes.named import recipe

CLASSES = ("COVID-19", "viral", "bacterial", "normal")
# Recipes of Patched FLANNEL's five networks, number of images, patches per image.
PUBLISHED = [
    (PatchRecipe(backbone=name, image_size=299 if name == "inception_v3" else 224), 8, 100)
    for name in ("densenet161", "inception_v3", "resnet152", "resnext101_32x8d", "vgg19_bn")
]
# Recipes, number of images and patches per image for two CPU cores: takes about a minute.
SHORT = [
    (recipe("small_patches", PatchRecipe), 4, 50),
    (PatchRecipe(backbone="mobilenetv3_small_050"), 2, 25),
    (PatchRecipe(backbone="densenet161"), 1, 8),
]
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"networks": 1, "rounds": 1}


def chests(count: int, side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return `count` canvases of noise, black outside two ellipses, and the mask; only the number of pixels matters."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    mask = ((np.abs(x) - 0.22) / 0.16) ** 2 + (y / 0.38) ** 2 < 1
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side)).astype(np.uint8)
    return torch.from_numpy(noise * mask), mask


def one_by_one(model: PatchClassifier, canvases: torch.Tensor, where: torch.Tensor) -> np.ndarray:
    """Return probabilities by the published loop: cut one patch, move it to the device, predict, fetch; then the next."""
    side = model.recipe.image_size
    before, after = side // 2, side - 1 - side // 2
    padded = np.pad(canvases.numpy(), ((0, 0), (before, after), (before, after)))
    device, probabilities = next(model.parameters()).device, []
    for image, row, column in where.tolist():
        patch = torch.from_numpy(padded[image, row : row + side, column : column + side].copy())[None].to(device)
        probabilities.append(model.probabilities(model(model.normalise(patch))).cpu().numpy())
    return np.concatenate(probabilities)


def batched(model: PatchClassifier, canvases: torch.Tensor, where: torch.Tensor) -> np.ndarray:
    return model.probabilities(model.patch_logits(canvases, where)).cpu().numpy()


def bare_forward(model: PatchClassifier, canvases: torch.Tensor, where: torch.Tensor) -> None:
    """Run as many patches, already on the device in full batches, through the network: the upper limit of speed."""
    chunk = min(len(where), model.chunk)
    ready = model.normalise(canvases.new_zeros(chunk, *[model.recipe.image_size] * 2).to(next(model.parameters()).device))
    for start in range(0, len(where), chunk):
        last = model(ready[: len(where) - start])
    last.cpu()


def seconds(way: Callable, *arguments: object) -> float:
    """Return the seconds that `way` takes: wall time with a GPU, else CPU time per thread, as other processes may run."""
    clock, threads = (time.perf_counter, 1) if torch.cuda.is_available() else (time.process_time, torch.get_num_threads())
    start = clock()
    way(*arguments)
    return (clock() - start) / threads


def main(
    full: bool = False,
    rounds: int = 2,
    threads: int = 0,
    networks: Annotated[int, typer.Option(help="measure only this many networks, the first ones; 0: all")] = 0,
) -> None:
    device = pick_device()
    if threads:
        torch.set_num_threads(threads)
    table = Table("network", "pixels", "loop", "batched", "bare forward", "batched / loop", "bare / loop")
    apart = 0.0
    for settings, images, patches in (PUBLISHED if full else SHORT)[: networks or None]:
        model = PatchClassifier(settings, CLASSES).eval().to(device, memory_format=memory_format(device))
        side = settings.image_size
        canvases, mask = chests(images, settings.canvas)
        where = join_centres([centres(mask, patches, seed) for seed in range(images)])
        model.chunk = max(1, CHUNKS[device.type] // side**2)
        with torch.inference_mode(), autocast(device):
            few = where[:: max(1, len(where) // 4)]
            apart = max(apart, float(np.abs(one_by_one(model, canvases, few) - batched(model, canvases, few)).max()))
            batched(model, canvases, where)
            # Alternate, so that a busy moment of the machine affects all three ways; the best time of each counts.
            ways = (one_by_one, batched, bare_forward)
            durations = [[seconds(way, model, canvases, where) for way in ways] for _ in range(rounds)]
        loop, kit, bare = (len(where) / min(times) for times in zip(*durations, strict=True))
        speeds = f"{loop:.1f}", f"{kit:.1f}", f"{bare:.1f}", f"{kit / loop:.1f}", f"{bare / loop:.1f}"
        table.add_row(settings.backbone, str(side), *speeds)
    console = Console()
    console.print(table)
    console.print("patches per second" + (" of CPU time" if device.type == "cpu" else ""))
    console.print(
        f"{device}, {torch.get_num_threads()} threads; loop and batches differ by at most {apart:.1e} in a probability"
    )


if __name__ == "__main__":
    typer.run(main)
