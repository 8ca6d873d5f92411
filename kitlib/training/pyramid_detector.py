"""Trains a Faster R-CNN or a RetinaNet with Lightning."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from kitlib.models.pyramid import PyramidDetector
from kitlib.training import data_parallel
from kitlib.training.detector import DetectorStrategy, canvas_precision, true_rows
from kitlib.training.loop import RecipeTraining


class PyramidDetectorTraining(RecipeTraining):
    """Lightning module that trains and validates a Faster R-CNN or RetinaNet on batches from an `XrayDataset`.

    `score(predictions, ground_truth)` returns the validation scores, keyed by name. `predictions` has one array (k, 6) per
    image: boxes, scores and classes. `ground_truth` has one array (m, 5) per image: boxes and classes.
    """

    model: PyramidDetector
    evaluated_model: PyramidDetector

    def __init__(self, model: PyramidDetector, score: Callable[[list, list], dict[str, float]]) -> None:
        super().__init__(model, model.recipe)
        self.score = score
        self.predictions: list[np.ndarray] = []
        self.ground_truth: list[np.ndarray] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        losses = self.model.losses(batch["pixels"], batch["boxes"], batch["findings"])
        loss = reduce(torch.add, losses.values())
        self.log_dict({"train_loss": loss.detach(), **losses}, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.predictions, self.ground_truth = [], []

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.predictions += self.evaluated_model.predict(batch["pixels"])
        self.ground_truth += true_rows(batch)

    def on_validation_epoch_end(self) -> None:
        predictions, ground_truth = (data_parallel.gather_list(boxes) for boxes in (self.predictions, self.ground_truth))
        self.log_dict(self.score(predictions, ground_truth))


class PyramidDetectorStrategy(DetectorStrategy):
    """Strategy that trains a Faster R-CNN or RetinaNet on one fold with Lightning."""

    def module(self, model: PyramidDetector) -> PyramidDetectorTraining:
        return PyramidDetectorTraining(model, partial(canvas_precision, classes=self.classes))
