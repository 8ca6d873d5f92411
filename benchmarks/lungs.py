"""Speed of lung segmentation: the kit's batches, which read, segment and clean up in parallel, against a loop over images.

Part of `make bench`. With a GPU: `python benchmarks/lungs.py --full`, the published networks at 512 pixels.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from kitlib.bundle import save_bundle
from kitlib.device import pick_device
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.models.segmenter import Segmenter
from kitlib.phantoms.drawing import render
from kitlib.phantoms.patients import draw_exposure, draw_patient
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.recipes.named import recipe
from kitlib.training.apply_lungs import apply_lungs
from kitlib.xrays.cache import CachedXray, XrayCache

SIDE = 512  # of the decoded copies, pixels
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"count": 2}


def phantoms(cache: XrayCache, count: int) -> pd.DataFrame:
    """Put `count` copies of eight phantoms into `cache` and return the `images` table; only the number of images matters."""
    drawn = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        grey, _ = render(draw_patient(rng), dataclasses.replace(draw_exposure(rng, SIDE), rows=SIDE, columns=SIDE))
        drawn.append(np.rint(grey * 255).astype(np.uint8))
    ids = [f"phantom{number:05d}" for number in range(count)]
    for number, image_id in enumerate(ids):
        cache.put(CachedXray(image_id, drawn[number % len(drawn)], SIDE, SIDE))
    return pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids})


def bundle(folder: Path, name: str) -> Path:
    """Save a segmenter with random weights, which is as fast as a trained one, and return its folder."""
    torch.manual_seed(0)
    model = Segmenter(recipe(name, SegmenterRecipe))
    record = {
        **{"family": "segmenter", "model": name, "classes": ["lungs"], "recipe": dataclasses.asdict(model.recipe)},
        **{"architecture": {}, "longest_side": SIDE, "image_size": model.recipe.image_size, "placement": "letterbox"},
        **{
            "mean": model.mean,
            "std": model.std,
            "fold": 0,
            "data_fingerprint": "",
            "precision": "float32",
            "validation": {},
        },
    }
    save_bundle(folder, model.state_dict(), record)
    return folder


def one_by_one(images: pd.DataFrame, cache: XrayCache, segmenter: Path, run: Path) -> None:
    """Read, letterbox, segment, clean up and write one image after another, as a loop in a notebook does."""
    run.mkdir()
    finder = load_segmenter(segmenter, batch_size=1)
    for image_id in images.image_id:
        (lungs,) = finder.find([cache.read(image_id)])
        mask = np.zeros((SIDE, SIDE), bool) if lungs.mask is None else lungs.mask
        cv2.imwrite(str(run / f"{image_id}.png"), mask.astype(np.uint8))


def main(count: int = 256, full: bool = False) -> None:
    device = pick_device()
    table = Table("network", "loop, images per second", "kit, images per second", "kit / loop")
    with tempfile.TemporaryDirectory() as folder:
        cache = XrayCache(Path(folder) / "xrays", SIDE)
        images = phantoms(cache, count)
        for name in ("unet_lungs", "resunet_lungs", "fc_densenet103_lungs") if full else ("small_lungs",):
            segmenter = bundle(Path(folder) / name, name)
            apply_lungs(images[: min(16, count)], cache, segmenter, Path(folder) / f"{name}_warm", progress=False)
            speeds = []
            for way in (one_by_one, apply_lungs):
                start = time.perf_counter()
                way(images, cache, segmenter, Path(folder) / f"{name}_{way.__name__}")
                speeds.append(count / (time.perf_counter() - start))
            table.add_row(name, *(f"{speed:.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.1f}")
    console = Console()
    console.print(table)
    console.print(f"{count} images of {SIDE} x {SIDE} pixels on {device}, {torch.get_num_threads()} threads, masks written")


if __name__ == "__main__":
    typer.run(main)
