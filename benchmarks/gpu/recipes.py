"""Runs two training steps and one prediction batch of every named recipe, at its published size, in a T4's memory."""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import typer
from part import figures
from torch import nn

from kitlib.device import autocast, memory_format, pick_device, precision, seed_everything
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.models.patch_classifier import PatchClassifier
from kitlib.models.segmenter import Segmenter
from kitlib.models.yolo import YoloDetector
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, PatchRecipe, SegmenterRecipe, StudyRecipe, TrainingRecipe
from kitlib.recipes.named import RECIPES
from kitlib.training.findings import FindingsTraining
from kitlib.training.loop import RecipeTraining, make_optimizer, moving_average
from kitlib.training.lungs import LungsTraining
from kitlib.training.pyramid_detector import PyramidDetectorTraining
from kitlib.training.study import StudyTraining
from kitlib.training.yolo import settings as ultralytics_settings

from ultralytics.cfg import get_cfg  # isort: skip  (kitlib.models.yolo makes the import offline)

CAP = 14.6  # GiB of a T4's memory that torch can use
GIB = 2**30
STEPS = 2  # timed training steps, after one warm-up step
# The recipes of a submission come first.
ORDER = ("strong", "lean", "heidelberg", "unet", "resunet", "fc", "flannel", "patched", "hrnet", "ensemble")


def names(small: bool) -> list[str]:
    """Return the names of the published recipes, ordered by ORDER, or of the small recipes."""
    if small:
        return [name for name in RECIPES if name.startswith("small_")]
    published = [name for name in RECIPES if not name.startswith("small_")]
    last = len(ORDER)
    ranks = {name: next((rank for rank, kind in enumerate(ORDER) if name.startswith(kind)), last) for name in published}
    return sorted(published, key=ranks.__getitem__)


def network(settings: TrainingRecipe) -> nn.Module:
    if isinstance(settings, StudyRecipe):
        return StudyClassifier(settings)
    if isinstance(settings, SegmenterRecipe):
        return Segmenter(settings)
    if isinstance(settings, DetectorRecipe):
        return (YoloDetector if settings.family == "yolo" else FasterRCNNDetector)(settings)
    # As many classes as the published systems: NIH's 14 findings, COVID-19 or not, FLANNEL's 4.
    classes = [f"class {number}" for number in range(14 if settings.multi_label else 2 if settings.one_logit else 4)]
    return (PatchClassifier if isinstance(settings, PatchRecipe) else FindingsClassifier)(settings, classes)


class Images:
    """`count` images of noise with labels, boxes and masks, in the form in which the loaders return batches."""

    def __init__(self, model: nn.Module, count: int) -> None:
        settings = model.recipe
        self.count, side = count, settings.image_size
        outputs = len(model.classes) if isinstance(settings, FindingsRecipe) else 4
        self.label = np.eye(outputs, dtype=np.float32)[np.arange(count) % outputs]
        self.none = (np.arange(count) % 2).astype(np.float32)
        self.pixels = torch.randint(0, 256, (count, side, side), dtype=torch.uint8)
        self.boxes = torch.tensor([[0.1, 0.2, 0.4, 0.7], [0.6, 0.2, 0.9, 0.7]]) * side
        self.truth = torch.zeros(count, side, side, dtype=torch.uint8)
        self.truth[:, side // 4 : side // 2, side // 4 : side // 2] = 1

    def __len__(self) -> int:
        return self.count

    def batch(self, device: torch.device) -> dict[str, Any]:
        tensors = {"pixels": self.pixels, "label": torch.tensor(self.label), "none": torch.tensor(self.none)}
        tensors |= {"truth": self.truth, "index": torch.arange(self.count)}
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return tensors | {"boxes": [self.boxes.to(device) for _ in range(self.count)]}


def training(model: nn.Module, images: Images) -> RecipeTraining:
    settings = model.recipe
    if isinstance(settings, StudyRecipe):
        module = StudyTraining(model, images, np.arange(len(images)))
    elif isinstance(settings, SegmenterRecipe):
        module = LungsTraining(model, len(images))
    elif isinstance(settings, DetectorRecipe):
        module = PyramidDetectorTraining(model, lambda *_: 0.0)
    else:
        module = FindingsTraining(model, images)
    # There is no trainer to log to.
    module.log = module.log_dict = lambda *_, **__: None
    return module


def step_of(model: nn.Module, images: Images, device: torch.device, scratch: str) -> tuple[Callable[[], torch.Tensor], Any]:
    """Return a function that computes the loss of a batch on the device, and the moving average of the weights (or None)."""
    if isinstance(model, YoloDetector):
        inner = model.model
        inner.args = get_cfg(overrides=ultralytics_settings(model.recipe, Path(scratch), device, 0, 0))
        xyxy = images.boxes / model.recipe.image_size
        boxes = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], dim=1).repeat(len(images), 1)
        targets = {
            "bboxes": boxes,
            "cls": torch.zeros(len(boxes), 1),
            "batch_idx": torch.arange(len(images)).repeat_interleave(2),
        }
        targets = {name: tensor.to(device) for name, tensor in targets.items()}
        pixels = images.pixels.to(device)

        def loss() -> torch.Tensor:
            rgb = pixels[:, None].expand(-1, 3, -1, -1).float() / 255
            return inner(targets | {"img": rgb})[0].sum()

        return loss, moving_average(inner, 0.999)  # ultralytics always uses a moving average
    module = training(model, images).to(device)
    batch = images.batch(device)
    return lambda: module.training_step(batch, 0), module.average


def train(model: nn.Module, device: torch.device, scratch: str) -> float:
    """Train for `STEPS` steps (forward, backward, optimiser, moving average) and return images per second."""
    settings = model.recipe
    images = Images(model, settings.batch_size)
    loss, average = step_of(model, images, device, scratch)
    trained = model.model if isinstance(model, YoloDetector) else model
    optimizer = make_optimizer(trained, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == "16-mixed")
    model.train()
    for step in range(1 + STEPS):
        if step == 1:
            finish(device)
            start = time.perf_counter()
        optimizer.zero_grad()
        with autocast(device):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update(trained, step=step + 1)
    finish(device)
    rate = settings.batch_size * STEPS / (time.perf_counter() - start)
    if not torch.isfinite(value):
        raise ArithmeticError(
            f"the loss of {settings.backbone or settings.network} is {value.item()} in {precision(device)}"
        )
    return rate


def predict(model: nn.Module, device: torch.device) -> tuple[int, float]:
    """Return the batch size and the images per second of predictions, made as in validation."""
    settings, count = model.recipe, 2 * model.recipe.batch_size
    side = settings.image_size
    if isinstance(settings, PatchRecipe):
        count, side = max(1, settings.batch_size // 2), settings.canvas
    elif isinstance(settings, DetectorRecipe) and settings.inference_size:
        count, side = max(1, int(count * (side / settings.inference_size) ** 2)), settings.inference_size
    pixels = torch.randint(0, 256, (count, side, side), dtype=torch.uint8)
    model.eval()

    def predict_batch() -> None:
        with torch.inference_mode(), autocast(device):
            if isinstance(settings, PatchRecipe):
                image = torch.arange(count).repeat_interleave(settings.patches)
                where = torch.stack([image, *torch.randint(0, side, (2, len(image)))], dim=1)
                model.image_probabilities(pixels, where)
            elif isinstance(settings, DetectorRecipe):
                model.predict(pixels)
            else:
                model.probabilities(model(model.normalise(pixels.to(device)))).cpu()

    predict_batch()
    finish(device)
    start = time.perf_counter()
    predict_batch()
    finish(device)
    return count, count / (time.perf_counter() - start)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> float:
    """Return the peak GPU memory that torch has reserved since the last call, in GiB; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return reserved


def measure(name: str, device: torch.device, scratch: str) -> tuple[float, str]:
    """Return the peak memory of training in GiB, and the recipe's row of the table."""
    settings = RECIPES[name]
    seed_everything(0)
    with device:  # a GPU draws random weights much faster
        model = network(settings)
    model = model.to(memory_format=memory_format(device))
    rate = train(model, device, scratch)
    training_peak = peak(device)
    count, predicted = predict(model, device)
    row = (
        f"{settings.batch_size:5d} {settings.image_size:5d} {training_peak:8.2f} {rate:9.1f} {count:7d} {peak(device):8.2f}"
    )
    return training_peak, f"{name:30} {row} {predicted:9.1f}"


def main(small: bool = False) -> None:
    device = pick_device()
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * GIB / whole), device)
    print(f"{device}, {precision(device)}, at most {CAP} GiB")
    print(f"{'recipe':30} {'batch':>5} {'side':>5} {'GiB':>8} {'images/s':>9} {'predict':>7} {'GiB':>8} {'images/s':>9}")
    recipes, peaks, failed = names(small), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in recipes:
            try:
                peaks[name], row = measure(name, device, scratch)
            except (RuntimeError, ArithmeticError) as error:  # such as too little memory; go on with the next recipe
                failed.append(name)
                row = f"{name:30} {type(error).__name__}: {str(error).splitlines()[0]}"
            peak(device)
            print(row, flush=True)
            summary = f"{len(peaks)} of {len(recipes)} recipes fit into {CAP} GiB"
            if device.type != "cuda":
                summary = f"{len(peaks)} of {len(recipes)} recipes, no GPU"
            elif peaks:
                largest = max(peaks, key=peaks.__getitem__)
                summary += f", the largest is {largest} with {peaks[largest]:.1f}"
            figures(summary + (f"; failed: {', '.join(failed)}" if failed else ""))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
