"""Training of a Faster R-CNN by pytorch-lightning."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.training import data_parallel
from kitlib.training.detector import DetectorStrategy, canvas_precision
from kitlib.training.loop import RecipeTraining


class FasterRCNNTraining(RecipeTraining):
    """Losses and validation over batches of `XrayDataset`; the score is `judge` of the found and the true boxes."""

    model: FasterRCNNDetector
    judged: FasterRCNNDetector

    def __init__(self, model: FasterRCNNDetector, judge: Callable[[list, list], float]) -> None:
        super().__init__(model, model.recipe)
        self.judge = judge
        self.found: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        losses = self.model.losses(batch["pixels"], batch["boxes"])
        loss = reduce(torch.add, losses.values())
        self.log_dict({"train_loss": loss.detach(), **losses}, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.found, self.true = [], []

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.found += self.judged.predict(batch["pixels"])
        self.true += [each.cpu().numpy() for each in batch["boxes"]]

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.judge(data_parallel.gather_list(self.found), data_parallel.gather_list(self.true)))


class FasterRCNNStrategy(DetectorStrategy):
    """A Faster R-CNN, trained by pytorch-lightning."""

    def module(self, model: FasterRCNNDetector) -> FasterRCNNTraining:
        return FasterRCNNTraining(model, canvas_precision)
