"""Speed of the kit against bare loops: training, the loader, batched patches and batched lung segmentation."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lungs
import numpy as np
import patches
import torch
import training
import typer
from part import figures
from rich.console import Console
from rich.table import Table

from kitlib.device import autocast, memory_format, pick_device, precision
from kitlib.models.patch_classifier import CHUNKS, PatchClassifier
from kitlib.recipes.fields import DetectorRecipe, PatchRecipe, StudyRecipe
from kitlib.recipes.named import recipe
from kitlib.xrays.cache import XrayCache

GOAL_TRAINING, GOAL_PATCHES = 0.95, 20.0


def measure_training(small: bool) -> str:
    """Print the table of training speeds; return the kit's speed relative to a bare loop, as text."""
    epochs = {"epochs": 2, "patience": 2} if small else {"epochs": 3, "patience": 3}
    if small:
        cases, xrays, workers = {"study": recipe("small_study", StudyRecipe, **epochs)}, training.NoisyXrays(16, 128), 0
    else:
        cases = {
            "study": recipe("heidelberg_study_letterbox", StudyRecipe, frozen_backbone=False, ema_decay=0.998, **epochs),
            "Faster R-CNN": recipe("heidelberg_faster_rcnn", DetectorRecipe, inference_size=0, **epochs),
        }
        xrays, workers = training.NoisyXrays(300, 1024), min(12, (os.cpu_count() or 1) - 1)
    table = Table("training", title=f"images per second, {precision(pick_device())}, {workers} workers")
    for title in ("kit", "bare loop", "loader alone", "kit / bare", "GPU peak, MB", "MB after each epoch"):
        table.add_column(title, justify="right")
    shares = {name: training.measure(name, settings, xrays, workers, table) for name, settings in cases.items()}
    Console(width=125).print(table)
    texts = [f"{name} {share:.2f}" for name, share in shares.items()]
    return f"kit / bare loop {', '.join(texts)} (goal {GOAL_TRAINING})"


def measure_patches(small: bool) -> str:
    """Print the table of patches per second; return the speed of batches relative to the published loop, as text."""
    device = pick_device()
    sizes = [("small_patches", 2, 8)] if small else [("patched_densenet161", 4, 100), ("patched_vgg19_bn", 4, 100)]
    table = Table("patches per second", "loop", "batched", "bare forward", "batched / loop")
    ratios = []
    for name, images, count in sizes:
        settings = recipe(name, PatchRecipe)
        model = PatchClassifier(settings, patches.CLASSES).eval()
        model = model.to(device, memory_format=memory_format(device))
        canvases, mask = patches.chests(images, settings.canvas)
        where = patches.join_centres([patches.centres(mask, count, seed) for seed in range(images)])
        model.chunk = max(1, CHUNKS[device.type] // settings.image_size**2)
        few = where[:: max(1, len(where) // 40)]  # for the slow loop
        with torch.inference_mode(), autocast(device):
            single, batched = patches.one_by_one(model, canvases, few), patches.batched(model, canvases, few)
            apart = float(np.abs(single.astype(float) - batched.astype(float)).max())
            patches.batched(model, canvases, where)
            loop = len(few) / patches.seconds(patches.one_by_one, model, canvases, few)
            kit, bare = (
                len(where) / patches.seconds(way, model, canvases, where) for way in (patches.batched, patches.bare_forward)
            )
        table.add_row(f"{name}, differ by {apart:.0e}", *(f"{value:.1f}" for value in (loop, kit, bare, kit / loop)))
        ratios.append(f"{kit / loop:.1f}")
    Console(width=125).print(table)
    return f"patches batched / loop {', '.join(ratios)} (goal {GOAL_PATCHES:.0f})"


def measure_lungs(small: bool) -> str:
    """Return, as text, how many images per second the kit segments, also relative to a loop over images."""
    count, name = (16, "small_lungs") if small else (192, "unet_lungs")
    with tempfile.TemporaryDirectory() as folder:
        cache = XrayCache(Path(folder) / "xrays", lungs.SIDE)
        images = lungs.phantoms(cache, count)
        segmenter = lungs.bundle(Path(folder) / name, name)
        lungs.apply_lungs(images[:8], cache, segmenter, Path(folder) / "warm", progress=False)
        few = images[: max(8, count // 4)]  # for the slow loop
        loop = len(few) / patches.seconds(lungs.one_by_one, few, cache, segmenter, Path(folder) / "loop")
        kit = count / patches.seconds(lungs.apply_lungs, images, cache, segmenter, Path(folder) / "kit")
    print(f"segmented images per second, {name}: {kit:.0f}, by a loop {loop:.0f}")
    return f"lungs {kit:.0f}/s, {kit / loop:.1f} times the loop"


def main(small: bool = False) -> None:
    results = []
    # The longest measurement comes last, so that the others are reported if the time runs out.
    for measure in (measure_patches, measure_lungs, measure_training):
        results.append(measure(small))
        figures("; ".join(results))


if __name__ == "__main__":
    typer.run(main)
