"""The kit's training beside a bare PyTorch loop of the same network and batch, its loader, and its memory: `make bench`.

The bare loop turns one synthetic batch that already lies on the device; the kit's `fit` reads, augments, sends and logs as
every training does. Full-size networks on a GPU: `python benchmarks/training.py --full --workers 8`.
"""

import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from kitlib.classes import STUDY_CLASSES
from kitlib.device import autocast, memory_format, pick_device, precision, seed_everything
from kitlib.models.classifier import StudyClassifier
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.recipes.fields import DetectorRecipe, StudyRecipe, TrainingRecipe
from kitlib.recipes.named import recipe
from kitlib.settings import override
from kitlib.tables import BOX
from kitlib.training.faster_rcnn import FasterRCNNTraining
from kitlib.training.loop import RecipeTraining, fit, make_optimizer
from kitlib.training.study import StudyTraining
from kitlib.training.xray_dataset import XrayDataset, batches
from kitlib.xrays.cache import CachedXray

BAR = 0.95  # of the bare loop's speed, on a GPU
# Arguments of `main` with which it takes about a second: the tests run it so.
SMALLEST = {"images": 8, "epochs": 2, "only": "small study"}


@dataclass
class NoisyXrays:
    """`count` X-rays of noise in memory, an image a study and a patient; every other one has two boxes."""

    count: int
    longest_side: int
    images: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [f"image{number:04d}" for number in range(self.count)]
        self.images = pd.DataFrame({name: self.ids for name in ("image_id", "study_id", "patient_id")})
        self.labels = pd.DataFrame(np.eye(4)[np.arange(self.count) % 4], columns=list(STUDY_CLASSES))
        self.labels.insert(0, "id", self.ids)
        rng = np.random.default_rng(0)
        corner = rng.uniform(0, 0.5, (self.count, 2))
        corners = self.longest_side * np.hstack([corner, corner + rng.uniform(0.1, 0.4, corner.shape)])
        self.boxes = pd.DataFrame(corners, columns=list(BOX))
        self.boxes.insert(0, "image_id", np.repeat(self.ids[::2], 2)[: self.count])
        self.pixels = rng.integers(0, 256, (self.longest_side, self.longest_side), dtype=np.uint8)

    def read(self, image_id: str) -> CachedXray:
        return CachedXray(image_id, self.pixels, self.longest_side, self.longest_side)

    def examples(self, settings: TrainingRecipe, augment: bool) -> XrayDataset:
        return XrayDataset(self.images, self.labels, self.boxes, self, settings, augment)


def network(settings: TrainingRecipe, device: torch.device) -> torch.nn.Module:
    built = StudyClassifier(settings) if isinstance(settings, StudyRecipe) else FasterRCNNDetector(settings)
    return built.to(device, memory_format=memory_format(device))


def bare_rate(settings: TrainingRecipe, xrays: NoisyXrays, device: torch.device, steps: int) -> float:
    """Images a second of forward, backward and step alone, on one batch, after three steps to warm up."""
    seed_everything(0)
    model = network(settings, device).train()
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == "16-mixed")
    batch = next(iter(batches(xrays.examples(settings, augment=False), settings.batch_size)))
    pixels, boxes = batch["pixels"].to(device), [each.to(device) for each in batch["boxes"]]
    if isinstance(settings, StudyRecipe):
        x, truth = model.normalise(pixels), batch["label"].argmax(dim=1).to(device)
    for step in range(3 + steps):
        if step == 3:
            finish(device)
            start = time.perf_counter()
        optimizer.zero_grad()
        with autocast(device):
            if isinstance(settings, StudyRecipe):
                loss = functional.cross_entropy(model(x)[:, :4].float(), truth)
            else:
                loss = sum(model.losses(pixels, boxes).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    finish(device)
    return settings.batch_size * steps / (time.perf_counter() - start)


def watched(kind: type[RecipeTraining]) -> type[RecipeTraining]:
    """This training, noting the memory of all its processes in MB after each epoch."""

    class Watched(kind):
        def on_train_start(self) -> None:
            super().on_train_start()
            self.megabytes: list[float] = []

        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            self.megabytes.append(resident())

    return Watched


def resident() -> float:
    """MB of this process and its workers; what they share counts once."""
    process, held = psutil.Process(), 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, or that nobody has waited for, holds none
            held += each.memory_full_info().pss
    return held / 1e6


def loader_rate(examples: XrayDataset, batch_size: int, workers: int) -> float:
    """Images a second that come out of the loader once its canvases are kept and its workers are up."""
    loader = batches(examples, batch_size, workers, shuffle=True)
    for _ in loader:
        pass
    start = time.perf_counter()
    count = sum(len(batch["pixels"]) for batch in loader)
    return count / (time.perf_counter() - start)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, settings: TrainingRecipe, xrays: NoisyXrays, workers: int, table: Table) -> float:
    """One row of the table; returns the kit's share of the bare loop's speed."""
    device, steps = pick_device(), xrays.count // settings.batch_size
    before = bare_rate(settings, xrays, device, steps)
    train, validation = xrays.examples(settings, augment=True), xrays.examples(settings, augment=False)
    eaten = loader_rate(train, settings.batch_size, workers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(0)
    if isinstance(settings, StudyRecipe):
        module = watched(StudyTraining)(network(settings, device), validation, np.array(xrays.ids))
    else:
        module = watched(FasterRCNNTraining)(network(settings, device), lambda *_: 0.5)
    with tempfile.TemporaryDirectory() as scratch:
        loaders = batches(train, settings.batch_size, workers, shuffle=True), batches(validation, settings.batch_size)
        fitted = fit(module, settings, *loaders, scratch, device, seed=0, progress=False)
    # The best epoch of either: machines are shared. The kit's first one starts the workers.
    kit = max(fitted.history.images_per_s[1:])
    bare = max(before, bare_rate(settings, xrays, device, steps))
    megabytes = [f"{each:,.0f}" for each in module.megabytes]
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f}" if device.type == "cuda" else "-"
    rates = (f"{rate:,.1f}" for rate in (kit, bare, eaten))
    table.add_row(name, *rates, f"{kit / bare:.3f}", peak, " ".join(megabytes))
    return kit / bare


def main(
    full: Annotated[bool, typer.Option(help="Full-size networks at 512 pixels, for a GPU.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that read and augment.")] = 0,
    epochs: Annotated[int, typer.Option(min=2, help="Of each training; the memory after each is shown.")] = 4,
    images: Annotated[int, typer.Option(help="In each set; 0: 64, and 480 of the full size.")] = 0,
    only: Annotated[str, typer.Option(help="One row of the table; empty: all.")] = "",
) -> None:
    shortened = {"epochs": epochs, "patience": epochs}
    if full:
        cases = {
            "resnext101_32x8d study": recipe("heidelberg_study", StudyRecipe, frozen_backbone=False, **shortened),
            "resnext101_32x8d, EMA": override(StudyRecipe(**shortened), ema_decay=0.998),
            "Faster R-CNN, its backbone": recipe("heidelberg_faster_rcnn", DetectorRecipe, inference_size=0, **shortened),
        }
        xrays = NoisyXrays(images or 480, 1024)
    else:
        cases = {
            "small study": recipe("small_study", StudyRecipe, **shortened),
            "small study, EMA": recipe("small_study", StudyRecipe, ema_decay=0.998, **shortened),
            "small Faster R-CNN": recipe("small_faster_rcnn", DetectorRecipe, **shortened),
        }
        xrays = NoisyXrays(images or 64, 256)
        torch.set_num_threads(1)  # of which others take none away
    device = pick_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table("training", title=f"images a second; {where}, {precision(device)}, {workers} workers")
    for title in ("kit", "bare loop", "loader alone", "kit / bare", "GPU peak, MB", f"MB after epochs 1 to {epochs}"):
        table.add_column(title, justify="right")
    ratios = [measure(name, settings, xrays, workers, table) for name, settings in cases.items() if only in ("", name)]
    Console(width=125).print(table)
    if device.type == "cuda" and full and min(ratios) < BAR:
        sys.exit(f"the slowest training has {min(ratios):.3f} of the bare loop's speed, wanted {BAR}")


if __name__ == "__main__":
    typer.run(main)
