"""What a family of models adds to the training that all share: checks, examples, how it is fitted, what it predicts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from kitlib.inference.predict import Predictor, load_predictor
from kitlib.lungs.crop import check_finder
from kitlib.recipes.fields import WithBackbone
from kitlib.tables import write_table
from kitlib.training.fold_folder import Fitted
from kitlib.training.loop import RecipeTraining, fit
from kitlib.training.split import split
from kitlib.training.task import Task
from kitlib.training.xray_dataset import Examples, batches

# What a task may bring and only some families can use.
OPTIONAL = ("extra", "lungs", "masks", "in_sample")


class Strategy(ABC):
    """How one fold of a task is trained by one family. kitlib.training.driver calls these methods in their order.

    Making one checks the task, before any folder is touched: it raises ValueError for what cannot be trained.
    """

    uses: ClassVar[tuple[str, ...]]  # of OPTIONAL
    # What makes a batch of training and of validation examples; None: kitlib.training.xray_dataset.collate.
    joined: ClassVar[tuple[Callable[[list[dict[str, Any]]], dict[str, Any]] | None, ...]] = (None, None)
    # Images of a validation batch as a share of a training one's: without gradients twice as many fit the memory.
    validated: float = 2.0
    train: Examples
    validation: Examples

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        unused = [name for name in OPTIONAL if getattr(task, name) not in (None, False) and name not in self.uses]
        if unused:
            raise ValueError(
                f"{task.model_name}: a {type(task.recipe).__name__} cannot use {', '.join(unused)}; leave it out"
            )
        if isinstance(task.recipe, WithBackbone):
            check_finder(task.recipe, task.lungs, task.model_name)
        self.task, self.recipe, self.fold, self.run_folder = task, task.recipe, fold, run_folder
        self.images, self.labels, self.boxes, self.folds = (
            task.tables[name] for name in ("images", "labels", "boxes", "folds")
        )
        self.check()
        limits = task.limit_train, task.limit_validation
        self.train_images, self.validation_images = split(self.images, self.folds, fold, task.seed, *limits)

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError where the tables and the recipe do not go together; may change the tables that are trained on."""

    @property
    @abstractmethod
    def classes(self) -> Sequence[str]:
        """What the model tells apart, in the order of its outputs."""

    @abstractmethod
    def start(self, model: Any) -> str:
        """Load the starting weights that the recipe names into `model`; what was loaded, in words."""

    @abstractmethod
    def make_examples(self) -> None:
        """Make the data sets `self.train` and `self.validation`."""

    @abstractmethod
    def module(self, model: Any) -> RecipeTraining:
        """The losses and the validation of `model`, for Lightning."""

    def fit(self, model: Any, device: torch.device) -> Fitted:
        """Train until the recipe or the session ends it, and leave the kept epoch's weights in `model`, on the CPU."""
        task, train, validation = self.task, self.training_batches(), self.validation_batches()
        options = self.run_folder, device, task.seed, task.progress, self.title, task.deadline
        return fit(self.module(model), self.recipe, train, validation, *options)

    def training_batches(self) -> DataLoader:
        """Shuffled batches of the training examples."""
        task, size = self.task, self.recipe.batch_size
        return batches(self.train, size, task.workers, shuffle=True, seed=task.seed, joined=type(self).joined[0])

    def validation_batches(self) -> DataLoader:
        """Batches of the validation examples, in their order."""
        return batches(self.validation, self.validation_batch, self.task.workers, joined=type(self).joined[1])

    @property
    def validation_batch(self) -> int:
        """Images of a validation batch."""
        return max(1, int(self.validated * self.recipe.batch_size))

    @abstractmethod
    def predict(self, device: torch.device) -> dict[str, Any]:
        """Write the tables of what the trained bundle predicts; counts for metrics.json."""

    def complete(self, device: torch.device) -> int:
        """Add to a finished run the predictions that are asked for now and were not when it was trained.

        Returns the number of images whose lungs were not found.
        """
        return 0

    def predictor(self, device: torch.device) -> Predictor:
        """The run's bundle, to predict with."""
        return load_predictor(self.run_folder / "bundle", device, self.validation_batch, lungs=self.task.lungs)

    def write(self, name: str, table: Any, kind: str = "") -> None:
        """Write one of the run's tables, of the same kind as its name unless said."""
        write_table(table, kind or name, self.run_folder / "tables" / f"{name}.parquet")

    @property
    def title(self) -> str:
        """What a progress bar calls this training."""
        return f"{self.task.model_name} fold {self.fold}"


def without_images(label: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Classes (columns of `label`, NaN where unknown) that no image is known to have."""
    present = (np.nan_to_num(label) >= 0.5).any(axis=0)
    return [name for name, there in zip(classes, present, strict=True) if not there]
