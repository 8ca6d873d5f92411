"""Training of a Faster R-CNN by pytorch-lightning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kitlib.deadline import Deadline
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.training import data_parallel
from kitlib.training.fold_folder import Fitted
from kitlib.training.loop import RecipeTraining, fit, gathered_batches
from kitlib.training.xray_dataset import XrayDataset, batches


class FasterRCNNTraining(RecipeTraining):
    """Losses and validation over batches of `XrayDataset`; the score is `judge` of the found and the true boxes."""

    def __init__(self, model: FasterRCNNDetector, judge: Callable[[list, list], float]) -> None:
        super().__init__(model, model.recipe)
        self.judge = judge
        self.found: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        losses = self.model.losses(batch["pixels"], batch["boxes"])
        loss = sum(losses.values())
        self.log_dict({"train_loss": loss.detach(), **losses}, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.found, self.true = [], []

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.found += self.judged.predict(batch["pixels"])
        self.true += [each.cpu().numpy() for each in batch["boxes"]]

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.judge(data_parallel.gather_list(self.found), data_parallel.gather_list(self.true)))


def fit_faster_rcnn(
    detector: FasterRCNNDetector,
    train: XrayDataset,
    validation: DataLoader,
    judge: Callable[[list, list], float],
    run_folder: Path,
    device: torch.device,
    seed: int,
    workers: int,
    progress: bool,
    title: str,
    deadline: Deadline | None,
) -> Fitted:
    """Train until the recipe or the session ends it, and leave the kept epoch's weights in `detector`, on the CPU."""
    return fit(
        FasterRCNNTraining(detector.to(memory_format=torch.channels_last), judge),
        batches(train, detector.recipe.batch_size, workers, shuffle=True, seed=seed),
        validation,
        run_folder,
        device,
        seed,
        progress,
        title,
        gathered_batches(detector.recipe),
        deadline,
    )
