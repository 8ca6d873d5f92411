"""Training of a YOLO by ultralytics' own trainer, fed from the kit's data set and judged by the kit's score.

ultralytics owns the network, losses, optimiser, schedule, moving average and augmentation. Four things are replaced: files
(canvases come from the cache, so that nothing is written or resized a second time), validation (the same score as
every other detector), checkpoints (tensors and not pickled modules) and the console.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from kitlib.atomic import replacing
from kitlib.deadline import Deadline, SessionOver, epoch_fits
from kitlib.device import derived_seed, precision, seed_everything
from kitlib.models.yolo import YoloDetector  # before ultralytics, whose import it makes silent and offline
from kitlib.recipes.fields import DetectorRecipe
from kitlib.training.detector import DetectorStrategy, canvas_precision
from kitlib.training.fold_folder import LEARNING_RATE_FLOOR, Fitted, is_over, kept_row
from kitlib.training.xray_dataset import XrayDataset

from ultralytics.data.dataset import YOLODataset  # isort: skip
from ultralytics.models.yolo.detect import DetectionTrainer  # isort: skip

logger = logging.getLogger(__name__)

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
DATA = {"names": {0: "opacity"}, "nc": 1, "channels": 3}
MOSAIC_OFF = 10  # last epochs see whole images only, as in ultralytics; a third of a shorter training


class Canvases(YOLODataset):
    """The canvases and boxes of an `XrayDataset` in the form that ultralytics augments: three equal channels.

    Where it augments, they are those of `epoch`, which the trainer sets: a recipe may show other parts of an image in each.
    """

    buffer: list[int]

    def __init__(self, examples: XrayDataset, augment: bool, settings: Any) -> None:
        self.examples, self.epoch = examples, 0
        self.latest: tuple[Any, dict[str, Any]] = (None, {})  # an example by its key: its boxes and its pixels are one
        super().__init__(
            img_path="", imgsz=examples.side, augment=augment, hyp=settings, data=DATA, batch_size=settings.batch
        )

    def get_img_files(self, img_path: str) -> list[str]:
        return list(self.examples.image_ids)

    def get_labels(self) -> list[dict[str, Any]]:
        return [self.label(index) for index in range(len(self.examples))]

    def label(self, index: int) -> dict[str, Any]:
        side = self.examples.side
        xmin, ymin, xmax, ymax = (self.example(index)["boxes"].numpy() / side).T
        return {
            "im_file": self.examples.image_ids[index],
            "shape": (side, side),
            "cls": np.zeros((len(xmin), 1), dtype=np.float32),
            "bboxes": np.stack([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin], axis=1),
            "segments": [],
            "keypoints": None,
            "normalized": True,
            "bbox_format": "xywh",
        }

    def example(self, index: int) -> dict[str, Any]:
        key = (self.epoch, index) if self.augment else index
        if self.latest[0] != key:
            self.latest = key, self.examples[key]
        return self.latest[1]

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        self.labels[index] = self.label(index)
        return super().get_image_and_label(index)

    def load_image(self, i: int, *_: Any, **__: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        canvas = self.example(i)["pixels"].numpy()
        if self.augment:  # mosaic draws its partners from here
            self.buffer = [*self.buffer, i][-max(1, self.max_buffer_length) :]
        return np.repeat(canvas[..., None], 3, axis=2), canvas.shape, canvas.shape


class Trainer(DetectionTrainer):
    """Everything that an epoch draws depends on the seed and its number, so that a resumed training repeats it exactly.

    Unlike Lightning, ultralytics goes on gathering batches for a step across an epoch's end: what is in hand then is kept.
    """

    # Batches since the last step, and by how many ultralytics miscounts them after a resume, until its first step.
    in_hand = miscounted = 0

    def __init__(
        self,
        detector: YoloDetector,
        examples: dict[str, XrayDataset],
        validation: DataLoader,
        judge: Callable[[list, list], float],
        run_folder: Path,
        device: torch.device,
        seed: int,
        workers: int,
        bar: tqdm,
        deadline: Deadline | None,
    ) -> None:
        self.detector, self.judged, self.judge, self.bar = detector, validation, judge, bar
        self.examples = examples
        self.folder, self.kit_seed = run_folder / "checkpoints", seed
        self.history: list[dict[str, float]] = []
        self.deadline = deadline
        self.session: list[float] = []  # seconds of this session's epochs
        self.kept_scaler: dict[str, Any] = {}
        self.gradients: dict[str, torch.Tensor] = {}  # of batches before a resume
        super().__init__(overrides=settings(detector.recipe, self.folder, device, seed, workers))
        self.model = detector.model
        for part in self.model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = detector.recipe.norm_momentum
        self.last = self.folder / "last.ckpt"
        self.add_callback("on_pretrain_routine_end", lambda _: self._half_precision(device))
        self.add_callback("on_train_start", lambda _: self._count_on())
        self.add_callback("on_train_epoch_start", lambda _: self._begin_epoch())
        self.add_callback("on_train_batch_start", lambda _: self._take_in_hand())
        self.add_callback("on_train_batch_end", lambda _: self.bar.update())
        self.add_callback("on_train_epoch_end", lambda _: self._end_of_batches())

    def get_dataset(self) -> dict[str, Any]:
        return {**DATA, "train": "", "val": ""}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Canvases:
        return Canvases(self.examples[mode], mode == "train", self.args)

    def validate(self) -> tuple[dict[str, float], float]:
        average = YoloDetector(self.detector.recipe, self.ema.ema)
        found, true = [], []
        for batch in self.judged:
            found += average.predict(batch["pixels"])
            true += [each.numpy() for each in batch["boxes"]]
        return {}, self.judge(found, true)

    def save_metrics(self, metrics: dict[str, float]) -> None:
        losses = {name.removeprefix("train/"): value for name, value in metrics.items() if name.startswith("train/")}
        self.session.append(time.perf_counter() - self.epoch_began)
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "seconds": self.session[-1],
                "images_per_s": len(self.train_loader.dataset) / max(1e-9, self.batches_ended - self.epoch_began),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "train_loss": sum(losses.values()),
                **losses,
                "score": self.fitness,
            }
        )
        self.stop |= is_over(self.history, self.detector.recipe) or not epoch_fits(self.deadline, self.session)
        logger.info("epoch %d of %d: score %.4f", self.epoch + 1, self.epochs, self.fitness)
        shown = {name: f"{self.history[-1][name]:.3f}" for name in ("train_loss", "score")}
        self.bar.set_postfix({"epoch": self.epoch + 1, **shown}, refresh=False)

    def save_model(self) -> bool:
        if kept_row(self.history, self.detector.recipe) == len(self.history) - 1:
            with replacing(self.folder / "best.safetensors") as beside:
                save_file({name: value.contiguous() for name, value in self.ema.ema.state_dict().items()}, beside)
        state = {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "in_hand": self.in_hand,
            "gradients": {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None},
        }
        with replacing(self.last) as beside:
            torch.save(state, beside)
        return True

    def resume_training(self, ckpt: None) -> None:
        if self.last.is_file():
            self.resume = True
            super().resume_training(torch.load(self.last, map_location=self.device, weights_only=True))
            self.bar.update(self.start_epoch * len(self.train_loader))

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        self.history = ckpt["history"]
        self.model.load_state_dict(ckpt["model"])
        self.ema.ema.load_state_dict(ckpt["ema"])
        self.ema.updates = ckpt["updates"]
        self.optimizer.load_state_dict(ckpt["optimizer"])
        self.kept_scaler, self.in_hand, self.gradients = ckpt["scaler"], ckpt["in_hand"], ckpt["gradients"]

    @property
    def accumulate(self) -> int:
        """Batches a step, as ultralytics counts them."""
        return self.gathered + self.miscounted

    @accumulate.setter
    def accumulate(self, batches: int) -> None:
        self.gathered = batches

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.in_hand = self.miscounted = 0

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if not torch.isfinite(self.loss) or not np.isfinite(self.fitness):
            raise ValueError(
                f"epoch {epoch + 1}: loss {self.loss.item()}, validation score {self.fitness}; lower recipe.learning_rate "
                f"({self.args.lr0}), or check that the validation fold has boxes"
            )
        return False

    def final_eval(self) -> None:
        """The caller predicts with the bundle."""

    def _half_precision(self, device: torch.device) -> None:
        # ultralytics' own switch for float16 first downloads a pickled model to try it out.
        if precision(device) == "16-mixed":
            self.amp, self.scaler = True, torch.amp.GradScaler("cuda")
            self.scaler.load_state_dict(self.kept_scaler or self.scaler.state_dict())

    def _count_on(self) -> None:
        # It counts batches from the training's start, and believes the last step to have been before that.
        if self.start_epoch:
            self.miscounted = self.start_epoch * len(self.train_loader) - self.in_hand

    def _take_in_hand(self) -> None:
        self.in_hand += 1

    def _begin_epoch(self) -> None:
        # Only here, because ultralytics discards all gradients before its first epoch.
        for name, gradient in self.gradients.items():
            self.model.get_parameter(name).grad = gradient
        self.gradients = {}
        self.epoch_began = time.perf_counter()
        self.train_loader.generator.manual_seed(derived_seed(self.kit_seed, self.epoch))
        self.train_loader.dataset.buffer, self.train_loader.dataset.epoch = [], self.epoch
        self.train_loader.reset()
        seed_everything(derived_seed(self.kit_seed, self.epoch))

    def _end_of_batches(self) -> None:
        self.batches_ended = time.perf_counter()


def settings(recipe: DetectorRecipe, folder: Path, device: torch.device, seed: int, workers: int) -> dict[str, Any]:
    """ultralytics' arguments for a recipe; what it does not name is ultralytics' own (translation)."""
    return {
        "task": "detect",
        "model": f"{recipe.backbone}.yaml",
        "data": "",
        "project": str(folder.resolve()),
        "name": "ultralytics",
        "exist_ok": True,
        "device": str(device.index or 0) if device.type == "cuda" else "cpu",
        "seed": seed,
        "deterministic": False,
        "workers": workers,
        "plots": False,
        "verbose": False,
        "amp": "bf16" if precision(device) == "bf16-mixed" else False,
        "imgsz": recipe.image_size,
        "epochs": recipe.epochs,
        "patience": 0,
        "batch": recipe.batch_size,
        "nbs": recipe.nominal_batch or recipe.batch_size,
        "optimizer": OPTIMIZERS[recipe.optimizer],
        "lr0": recipe.learning_rate,
        "lrf": LEARNING_RATE_FLOOR,
        "cos_lr": True,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else 0.9,  # of Adam, the first beta
        "weight_decay": recipe.weight_decay,
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_bias_lr": 0.1 if recipe.optimizer == "sgd" else 0.0,
        "hsv_h": 0.0,
        "hsv_s": 0.0,
        "hsv_v": recipe.brightness_contrast,
        "scale": recipe.zoom,
        "degrees": recipe.rotate_degrees,
        "fliplr": recipe.horizontal_flip,
        "flipud": recipe.vertical_flip,
        "box": recipe.box_gain,
        "cls": recipe.class_gain,
        "dfl": recipe.dfl_gain,
        "mosaic": recipe.mosaic,
        "mixup": recipe.mixup,
        "close_mosaic": min(MOSAIC_OFF, recipe.epochs // 3),
    }


class YoloStrategy(DetectorStrategy):
    """A YOLO, trained by ultralytics, which augments and takes the moving average by itself."""

    augments = False

    def module(self, model: YoloDetector) -> NoReturn:
        raise TypeError("ultralytics trains a YOLO, not Lightning")

    def fit(self, model: YoloDetector, device: torch.device) -> Fitted:
        task, recipe = self.task, self.recipe
        with tqdm(
            desc=self.title,
            total=-(-len(self.train) // recipe.batch_size) * recipe.epochs,
            unit="batch",
            # Each refresh is a line of its own in a log file.
            mininterval=0.5 if sys.stderr.isatty() else 10,
            maxinterval=60,
            disable=not task.progress,
        ) as bar:
            where = self.run_folder, device, task.seed, task.workers
            examples = {"train": self.train, "val": self.validation}
            trainer = Trainer(model, examples, self.validation_batches(), canvas_precision, *where, bar, task.deadline)
            trainer.history = history = _history(trainer.last)
            if not history or not is_over(history, recipe):
                if epoch_fits(task.deadline, [row["seconds"] for row in history]):
                    trainer.train()
                if not is_over(trainer.history, recipe):
                    raise SessionOver(self.run_folder, len(trainer.history), recipe.epochs)
        model.to("cpu")
        model.model.load_state_dict(load_file(trainer.folder / "best.safetensors"))
        return Fitted(pd.DataFrame(trainer.history), kept_row(trainer.history, recipe) + 1)


def _history(checkpoint: Path) -> list[dict[str, float]]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["history"] if checkpoint.is_file() else []
