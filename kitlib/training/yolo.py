"""Trains a YOLO with ultralytics' trainer, on the kit's data set and with the kit's validation score.

Network, losses, optimiser, schedule, moving average and augmentation are those of ultralytics. Four parts are the kit's:
images (canvases from the cache instead of image files), validation (the same score as for other detectors), checkpoints
(tensors instead of pickled modules) and console output.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from kitlib.atomic import replacing
from kitlib.deadline import Deadline, SessionOver, epoch_fits
from kitlib.device import derived_seed, precision, seed_everything
from kitlib.models.yolo import YoloDetector  # before ultralytics, whose import it makes silent and offline
from kitlib.recipes.fields import DetectorRecipe
from kitlib.training.curves import open_curves
from kitlib.training.detector import DetectorStrategy, canvas_precision, true_rows
from kitlib.training.fold_folder import LEARNING_RATE_FLOOR, FitResult, find_kept_epoch, is_over
from kitlib.training.progress import Progress
from kitlib.training.shared_memory import BATCH_TIMEOUT_S
from kitlib.training.xray_dataset import XrayDataset

from ultralytics.data.dataset import YOLODataset  # isort: skip
from ultralytics.models.yolo.detect import DetectionTrainer  # isort: skip

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
MOSAIC_OFF = 10  # number of last epochs without mosaic, as in ultralytics; at most a third of all epochs


class Canvases(YOLODataset):
    """Adapts an `XrayDataset` to ultralytics' trainer.

    An image is the canvas, repeated in three equal channels. The trainer sets the attribute `epoch` before each epoch. With
    `augment`, an example depends on the epoch, because a recipe may crop an image differently in each epoch.
    """

    buffer: list[int]

    def __init__(self, examples: XrayDataset, augment: bool, settings: Any) -> None:
        self.examples, self.epoch = examples, 0
        self.latest: tuple[Any, dict[str, Any]] = (
            None,
            {},
        )  # last key and example, so that it is read once for boxes and pixels
        super().__init__(img_path="", imgsz=examples.side, augment=augment, hyp=settings, data={}, batch_size=settings.batch)

    def get_img_files(self, img_path: str) -> list[str]:
        """Return the image_ids, which ultralytics uses as file names."""
        return list(self.examples.image_ids)

    def get_labels(self) -> list[dict[str, Any]]:
        """Return the boxes of all examples in ultralytics' format: a list with one dict per example (see `label`)."""
        return [self.label(index) for index in range(len(self.examples))]

    def label(self, index: int) -> dict[str, Any]:
        """Return an example's boxes in ultralytics' format, a dict.

        Its `bboxes` is an array (k, 4): x centre, y centre, width and height of each box, as shares of the canvas's side.
        """
        side, example = self.examples.side, self.example(index)
        xmin, ymin, xmax, ymax = (example["boxes"].numpy() / side).T
        return {
            "im_file": self.examples.image_ids[index],
            "shape": (side, side),
            "cls": example["findings"].numpy()[:, None].astype(np.float32),
            "bboxes": np.stack([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin], axis=1),
            "segments": [],
            "keypoints": None,
            "normalized": True,
            "bbox_format": "xywh",
        }

    def example(self, index: int) -> dict[str, Any]:
        """Return example `index` of the `XrayDataset`; with `augment`, its version for the current epoch."""
        key = (self.epoch, index) if self.augment else index
        if self.latest[0] != key:
            self.latest = key, self.examples[key]
        return self.latest[1]

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """Return the image and the boxes of an example in ultralytics' format, for the current epoch."""
        self.labels[index] = self.label(index)
        return super().get_image_and_label(index)

    def load_image(self, i: int, *_: Any, **__: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Return the canvas (side, side, 3) of example `i`, its size, and its size again.

        ultralytics expects the sizes before and after resizing; here they are equal.
        """
        canvas = self.example(i)["pixels"].numpy()
        if self.augment:  # mosaic draws its other images from this buffer
            self.buffer = [*self.buffer, i][-max(1, self.max_buffer_length) :]
        return np.repeat(canvas[..., None], 3, axis=2), canvas.shape, canvas.shape


class Trainer(DetectionTrainer):
    """Subclass of ultralytics' trainer that resumes interrupted training with the same result as uninterrupted training.

    Random numbers of an epoch depend on the seed and the epoch number alone. Unlike Lightning, ultralytics accumulates
    gradients across the end of an epoch, so the checkpoint contains gradients.
    """

    # Batches since the last optimiser step, and the error in ultralytics' count of these from a resume to the next step.
    pending_batches = count_offset = 0

    def __init__(
        self,
        detector: YoloDetector,
        examples: dict[str, XrayDataset],
        validation: DataLoader,
        score: Callable[[list, list], dict[str, float]],
        run_folder: Path,
        device: torch.device,
        seed: int,
        workers: int,
        progress: Progress,
        deadline: Deadline | None,
    ) -> None:
        self.detector, self.validation_batches, self.score_function, self.progress = detector, validation, score, progress
        self.examples = examples
        self.folder, self.kit_seed = run_folder / "checkpoints", seed
        self.history: list[dict[str, float]] = []
        self.deadline = deadline
        self.session_seconds: list[float] = []  # seconds of this session's epochs
        self.resumed_scaler: dict[str, Any] = {}
        self.gradients: dict[str, torch.Tensor] = {}  # accumulated before a resume
        super().__init__(overrides=settings(detector.recipe, self.folder, device, seed, workers))
        self.model = detector.model
        for part in self.model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = detector.recipe.norm_momentum
        self.last = self.folder / "last.ckpt"
        self.add_callback("on_pretrain_routine_end", lambda _: self._enable_float16(device))
        self.add_callback("on_train_start", lambda _: self._correct_batch_count())
        self.add_callback("on_train_epoch_start", lambda _: self._begin_epoch())
        self.add_callback("on_train_batch_start", lambda _: self._count_batch())
        self.add_callback("on_train_batch_end", lambda _: self._log_batch())
        self.add_callback("on_train_epoch_end", lambda _: self._note_batches_end())

    @property
    def _oom_retries(self) -> int:
        return 0

    @_oom_retries.setter
    def _oom_retries(self, retries: int) -> None:
        # Re-raises the out-of-memory error: ultralytics would retry with half the batch size, which is not the recipe's.
        if retries:
            raise

    def get_dataset(self) -> dict[str, Any]:
        """Return the description of the data that ultralytics expects: class names and channels, without image files."""
        names = dict(enumerate(self.detector.classes))
        return {"names": names, "nc": len(names), "channels": 3, "train": "", "val": ""}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Canvases:
        """Return the training data set if `mode` is "train", the validation data set if it is "val"."""
        return Canvases(self.examples[mode], mode == "train", self.args)

    def get_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        """Return ultralytics' data loader, with a time limit of 10 minutes (BATCH_TIMEOUT_S) for each batch."""
        loader = super().get_dataloader(*arguments, **options)
        loader.timeout = BATCH_TIMEOUT_S if loader.num_workers else 0
        return loader

    def validate(self) -> tuple[dict[str, float], float]:
        """Validate the moving average of the network; return a dict with the AP of each class, and the score.

        If there is one class, the dict is empty. The score, which ultralytics calls fitness, decides the best epoch.
        """
        average = YoloDetector(self.detector.recipe, self.detector.classes, self.ema.ema)
        predictions, ground_truth = [], []
        for batch in self.validation_batches:
            predictions += average.predict(batch["pixels"])
            ground_truth += true_rows(batch)
        scores = self.score_function(predictions, ground_truth)
        return scores, scores.pop("score")

    def save_metrics(self, metrics: dict[str, float]) -> None:
        """Add the current epoch to the history, and decide whether to stop the training.

        The training stops if `is_over` returns True, or if another epoch would not end before the deadline.
        """
        losses = {name.removeprefix("train/"): value for name, value in metrics.items() if name.startswith("train/")}
        self.session_seconds.append(time.perf_counter() - self.epoch_start)
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "seconds": self.session_seconds[-1],
                "images_per_s": len(self.train_loader.dataset) / max(1e-9, self.batches_end - self.epoch_start),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "train_loss": sum(losses.values()),
                **losses,
                "score": self.fitness,
                **self.metrics,
            }
        )
        self.stop |= is_over(self.history, self.detector.recipe) or not epoch_fits(self.deadline, self.session_seconds)
        self.progress.log_epoch(self.history, self.session_seconds)

    def save_model(self) -> bool:
        """Write last.ckpt, from which a later run resumes, and best.safetensors if the current epoch is to be kept.

        Always returns True, which tells ultralytics that the model was saved.
        """
        if find_kept_epoch(self.history, self.detector.recipe) == len(self.history) - 1:
            with replacing(self.folder / "best.safetensors") as temporary_path:
                save_file({name: value.contiguous() for name, value in self.ema.ema.state_dict().items()}, temporary_path)
        state = {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "in_hand": self.pending_batches,
            "gradients": {
                name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None
            },
        }
        with replacing(self.last) as temporary_path:
            torch.save(state, temporary_path)
        return True

    def resume_training(self, ckpt: None) -> None:
        """Resume training from last.ckpt if the file exists; the argument `ckpt` is ignored."""
        if self.last.is_file():
            self.resume = True
            super().resume_training(torch.load(self.last, map_location=self.device, weights_only=True))

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        self.history = ckpt["history"]
        self.model.load_state_dict(ckpt["model"])
        self.ema.ema.load_state_dict(ckpt["ema"])
        self.ema.updates = ckpt["updates"]
        self.optimizer.load_state_dict(ckpt["optimizer"])
        self.resumed_scaler, self.pending_batches, self.gradients = ckpt["scaler"], ckpt["in_hand"], ckpt["gradients"]

    @property
    def accumulate(self) -> int:
        """Number of batches per optimiser step, corrected for the error in ultralytics' count of batches after a resume."""
        return self.batches_per_step + self.count_offset

    @accumulate.setter
    def accumulate(self, batches: int) -> None:
        self.batches_per_step = batches

    def optimizer_step(self) -> None:
        """Step the optimiser, and set the number of batches since the last step to 0."""
        super().optimizer_step()
        self.pending_batches = self.count_offset = 0

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if not torch.isfinite(self.loss) or not np.isfinite(self.fitness):
            raise ValueError(
                f"epoch {epoch + 1}: the loss is {self.loss.item()} and the validation score {self.fitness}; both must be "
                f"finite. Lower `learning_rate` ({self.args.lr0}), and check that the validation fold has boxes"
            )
        return False

    def final_eval(self) -> None:
        """Do nothing: ultralytics would evaluate the model here, but the strategy predicts with the bundle afterwards."""

    def _enable_float16(self, device: torch.device) -> None:
        # Not with ultralytics' own switch for float16, which would first download a pickled model for a test.
        if precision(device) == "16-mixed":
            self.amp, self.scaler = True, torch.amp.GradScaler("cuda")
            self.scaler.load_state_dict(self.resumed_scaler or self.scaler.state_dict())

    def _correct_batch_count(self) -> None:
        # ultralytics counts batches from the start of training but does not restore the batch of the last step.
        if self.start_epoch:
            self.count_offset = self.start_epoch * len(self.train_loader) - self.pending_batches

    def _count_batch(self) -> None:
        self.pending_batches += 1
        self.epoch_batches += 1

    def _log_batch(self) -> None:
        self.progress.log_batch(self.epoch + 1, self.epoch_batches, len(self.train_loader))

    def _begin_epoch(self) -> None:
        # Gradients are restored here, because ultralytics zeroes them before the first epoch.
        for name, gradient in self.gradients.items():
            self.model.get_parameter(name).grad = gradient
        self.gradients = {}
        self.epoch_start, self.epoch_batches = time.perf_counter(), 0
        self.train_loader.generator.manual_seed(derived_seed(self.kit_seed, self.epoch))
        self.train_loader.dataset.buffer, self.train_loader.dataset.epoch = [], self.epoch
        self.train_loader.reset()
        seed_everything(derived_seed(self.kit_seed, self.epoch))

    def _note_batches_end(self) -> None:
        self.batches_end = time.perf_counter()


def settings(recipe: DetectorRecipe, folder: Path, device: torch.device, seed: int, workers: int) -> dict[str, Any]:
    """Return a dict with the arguments of ultralytics' trainer for a recipe.

    Arguments that are not in the dict, such as `translate`, keep ultralytics' defaults. ultralytics writes to `folder`.
    """
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
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else 0.9,  # for Adam and AdamW, the first beta
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
    """Strategy that trains a YOLO on one fold with ultralytics, which does the augmentation and the moving average."""

    augments = False
    prefetched = 4 * 3  # ultralytics prefetches four batches, of three channels

    def module(self, model: YoloDetector) -> NoReturn:
        raise TypeError("a YOLO is trained by ultralytics, so it has no Lightning module")

    def fit(self, model: YoloDetector, device: torch.device) -> FitResult:
        task, recipe = self.task, self.recipe
        with open_curves(recipe.curves, self.run_folder / "curves", self.title) as curves:
            progress = Progress(self.title, recipe.epochs, curves)
            environment = self.run_folder, device, task.seed, self.workers
            examples = {"train": self.train, "val": self.validation}
            score = partial(canvas_precision, classes=self.classes)
            trainer = Trainer(model, examples, self.validation_batches(), score, *environment, progress, task.deadline)
            trainer.history = history = _read_history(trainer.last)
            if not history or not is_over(history, recipe):
                if epoch_fits(task.deadline, [row["seconds"] for row in history]):
                    trainer.train()
                    # Ends the loader's workers. If the garbage collector deleted the loader, together with the trainer, its
                    # workers would take 5 s to end.
                    del trainer.validation_batches
                if not is_over(trainer.history, recipe):
                    raise SessionOver(self.run_folder, len(trainer.history), recipe.epochs)
        model.to("cpu")
        model.model.load_state_dict(load_file(trainer.folder / "best.safetensors"))
        return FitResult(pd.DataFrame(trainer.history), find_kept_epoch(trainer.history, recipe) + 1)


def _read_history(checkpoint: Path) -> list[dict[str, float]]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["history"] if checkpoint.is_file() else []
