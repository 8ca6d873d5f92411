"""Speed and memory of the kit's training, against a bare PyTorch loop with the same network and batch size.

The bare loop repeats one synthetic batch that is already on the device; the kit's `fit` reads, augments, transfers and logs
as in every training. Part of `make bench`. Full-size networks on a GPU: `python benchmarks/training.py --full --workers 8`.
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
from kitlib.training.loop import RecipeTraining, fit, make_optimizer
from kitlib.training.pyramid_detector import PyramidDetectorTraining
from kitlib.training.study import StudyTraining
from kitlib.training.xray_dataset import XrayDataset, batches
from kitlib.xrays.cache import CachedXray

BAR = 0.95  # least speed relative to the bare loop, on a GPU
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"images": 8, "epochs": 2, "only": "small study"}


@dataclass
class NoisyXrays:
    """`count` X-rays of noise in memory, one image per study and patient; every second image has two boxes."""

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
    """Return images per second of forward, backward and optimiser step on one batch, after three warm-up steps."""
    seed_everything(0)
    model = network(settings, device).train()
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == "16-mixed")
    batch = next(iter(batches(xrays.examples(settings, augment=False), settings.batch_size)))
    pixels = batch["pixels"].to(device)
    boxes, findings = ([tensor.to(device) for tensor in batch[name]] for name in ("boxes", "findings"))
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
                loss = sum(model.losses(pixels, boxes, findings).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    finish(device)
    return settings.batch_size * steps / (time.perf_counter() - start)


def watched(kind: type[RecipeTraining]) -> type[RecipeTraining]:
    """Return a subclass of `kind` that records the memory of all its processes, in MB, after each epoch."""

    class Watched(kind):
        def on_train_start(self) -> None:
            super().on_train_start()
            self.megabytes: list[float] = []

        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            self.megabytes.append(resident())

    return Watched


def resident() -> float:
    """Return the memory of this process and its workers in MB; shared memory counts once."""
    parent, total = psutil.Process(), 0
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a process that has just ended, or a zombie, uses no memory
            total += process.memory_full_info().pss
    return total / 1e6


def loader_rate(examples: XrayDataset, batch_size: int, workers: int) -> float:
    """Return images per second of the loader, after a first pass that caches the canvases and starts the workers."""
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
    """Add one row to the table; return the kit's speed relative to the bare loop."""
    device, steps = pick_device(), xrays.count // settings.batch_size
    before = bare_rate(settings, xrays, device, steps)
    train, validation = xrays.examples(settings, augment=True), xrays.examples(settings, augment=False)
    loader = loader_rate(train, settings.batch_size, workers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(0)
    if isinstance(settings, StudyRecipe):
        module = watched(StudyTraining)(network(settings, device), validation, np.array(xrays.ids))
    else:
        module = watched(PyramidDetectorTraining)(network(settings, device), lambda *_: 0.5)
    with tempfile.TemporaryDirectory() as scratch:
        loaders = batches(train, settings.batch_size, workers, shuffle=True), batches(validation, settings.batch_size)
        fitted = fit(module, settings, *loaders, scratch, device, seed=0)
    # The best speed counts, because other processes use the machine. The kit's first epoch includes starting the workers.
    kit = max(fitted.history.images_per_s[1:])
    bare = max(before, bare_rate(settings, xrays, device, steps))
    megabytes = [f"{value:,.0f}" for value in module.megabytes]
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f}" if device.type == "cuda" else "-"
    rates = (f"{rate:,.1f}" for rate in (kit, bare, loader))
    table.add_row(name, *rates, f"{kit / bare:.3f}", peak, " ".join(megabytes))
    return kit / bare


def main(
    full: Annotated[bool, typer.Option(help="train full-size networks at 512 pixels, for a GPU")] = False,
    workers: Annotated[int, typer.Option(help="processes that read and augment")] = 0,
    epochs: Annotated[int, typer.Option(min=2, help="epochs of each training; memory is shown after each")] = 4,
    images: Annotated[int, typer.Option(help="number of images; 0: 64, with --full 480")] = 0,
    only: Annotated[str, typer.Option(help="name of the only row to measure; empty: all")] = "",
) -> None:
    shortened = {"epochs": epochs, "patience": epochs}
    if full:
        cases = {
            "resnext101_32x8d study": recipe("heidelberg_study_letterbox", StudyRecipe, frozen_backbone=False, **shortened),
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
        torch.set_num_threads(1)  # for a stable speed while other processes use the machine
    device = pick_device()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table("training", title=f"images per second; {hardware}, {precision(device)}, {workers} workers")
    for title in ("kit", "bare loop", "loader alone", "kit / bare", "GPU peak, MB", f"MB after epochs 1 to {epochs}"):
        table.add_column(title, justify="right")
    ratios = [measure(name, settings, xrays, workers, table) for name, settings in cases.items() if only in ("", name)]
    Console(width=125).print(table)
    if device.type == "cuda" and full and min(ratios) < BAR:
        sys.exit(f"the slowest training has {min(ratios):.3f} of the bare loop's speed, expected at least {BAR}")


if __name__ == "__main__":
    typer.run(main)
