"""Base class of the strategies that train a model family: checks, data sets, fitting and out-of-fold predictions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from kitlib.errors import DatasetError
from kitlib.inference.predict import AnyPredictor, load_predictor
from kitlib.lungs.crop import check_finder
from kitlib.recipes.fields import WithBackbone
from kitlib.tables import write_table
from kitlib.training.fold_folder import FitResult
from kitlib.training.loop import RecipeTraining, fit
from kitlib.training.shared_memory import PREFETCHED, suitable_workers, workers_that_fit
from kitlib.training.split import split
from kitlib.training.task import Task
from kitlib.training.xray_dataset import Examples, batches

# Inputs of a task that only some families can use.
OPTIONAL_INPUTS = ("extra", "lungs", "masks", "in_sample")


class Strategy(ABC):
    """Base class of strategies. A strategy trains a model of one family on one fold.

    kitlib.training.driver calls the methods in the order in which they are defined. The constructor raises ValueError if the
    task cannot be trained; nothing has been written then.
    """

    uses: ClassVar[tuple[str, ...]]  # the OPTIONAL_INPUTS that the family uses
    # Collate functions for training and validation batches; None: kitlib.training.xray_dataset.collate.
    collate_fns: ClassVar[tuple[Callable[[list[dict[str, Any]]], dict[str, Any]] | None, ...]] = (None, None)
    # Size of a validation batch relative to a training batch; without gradients, twice as many images fit into memory.
    validation_batch_ratio: float = 2.0
    # Number of training batches that each worker has ready, as batches of one-channel images.
    prefetched: ClassVar[int] = PREFETCHED
    train: Examples
    validation: Examples

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        unused = [name for name in OPTIONAL_INPUTS if getattr(task, name) not in (None, False) and name not in self.uses]
        if unused:
            raise ValueError(
                f"{task.model_name}: a {type(task.recipe).__name__} cannot use the task's {', '.join(map(repr, unused))}; "
                "remove these inputs"
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
        """Raise ValueError if the task's tables do not fit the recipe.

        May also replace `self.images`, `self.labels`, `self.boxes` or `self.folds`, for example by a selection of rows.
        """

    @property
    @abstractmethod
    def classes(self) -> Sequence[str]:
        """The model's classes, in the order of its outputs."""

    @abstractmethod
    def start(self, model: Any) -> str:
        """Load the recipe's starting weights into `model`, and return a text that says what was loaded."""

    @abstractmethod
    def make_examples(self) -> None:
        """Create the training and the validation data set, and store them in `self.train` and `self.validation`."""

    @abstractmethod
    def module(self, model: Any) -> RecipeTraining:
        """Return the Lightning module that trains and validates `model`."""

    def fit(self, model: Any, device: torch.device) -> FitResult:
        """Train `model`; return the training history and the number of the epoch whose weights are kept.

        Afterwards `model` is on the CPU and has the weights of this epoch. Raises SessionOver if the next epoch would not
        end before the task's deadline.
        """
        task, train, validation = self.task, self.training_batches(), self.validation_batches()
        options = self.run_folder, device, task.seed, self.title, task.deadline
        return fit(self.module(model), self.recipe, train, validation, *options)

    @cached_property
    def workers(self) -> int:
        """Number of processes that load batches: the task's `workers` or a default, or fewer if /dev/shm is too small."""
        training = self.train.example_bytes * min(self.recipe.batch_size, len(self.train))
        validation = self.validation.example_bytes * min(self.validation_batch, len(self.validation))
        workers = self.task.workers if self.task.workers >= 0 else suitable_workers()
        return workers_that_fit(workers, self.prefetched * training + PREFETCHED * validation)

    def training_batches(self) -> DataLoader:
        """Return a loader of shuffled training batches."""
        task, size = self.task, self.recipe.batch_size
        return batches(self.train, size, self.workers, shuffle=True, seed=task.seed, collate_fn=type(self).collate_fns[0])

    def validation_batches(self) -> DataLoader:
        """Return a loader of validation batches, in the order of the images."""
        return batches(self.validation, self.validation_batch, self.workers, collate_fn=type(self).collate_fns[1])

    @property
    def validation_batch(self) -> int:
        """Number of images per validation batch."""
        return max(1, int(self.validation_batch_ratio * self.recipe.batch_size))

    @abstractmethod
    def predict(self, device: torch.device) -> dict[str, Any]:
        """Predict the held-out images with the run's bundle, write the predictions, and return counts for metrics.json."""

    def complete(self, device: torch.device) -> int:
        """Write the predictions that the task requests but a finished run lacks; the base class writes nothing.

        Returns the number of predicted images without usable lungs; 0 if the model does not use lungs.
        """
        return 0

    def predictor(self, device: torch.device) -> AnyPredictor:
        """Return a predictor that uses the model in the run's bundle."""
        return load_predictor(self.run_folder / "bundle", device, self.validation_batch, lungs=self.task.lungs)

    def write(self, name: str, table: Any, kind: str = "") -> None:
        """Write `table` to tables/<name>.parquet in the run folder. `kind` is the name of its schema (default: `name`)."""
        write_table(table, kind or name, self.run_folder / "tables" / f"{name}.parquet")

    @property
    def title(self) -> str:
        """Title of the log lines: the name of the model, and the fold."""
        return f"{self.task.model_name} fold {self.fold}"


def check_classes_differ(task: Task, images: pd.DataFrame, labels: pd.DataFrame) -> None:
    """Raise DatasetError if all studies of the training `images` have the same known labels.

    A model that always predicts these labels would be right for every image, so there is nothing to learn. The message says
    which parameter to change.
    """
    label = labels.set_index("id").reindex(images.study_id)
    if (label.min() < label.max()).any():  # min and max ignore NaN
        return
    always = ", ".join(name for name in label if (label[name] > 0).any()) or "none of the classes"
    limit = f", or raise `limit_train`, which is {task.limit_train}" if task.limit_train is not None else ""
    raise DatasetError(
        f"{task.model_name}: all {len(images)} training images have the same labels ({always}), so there is nothing to "
        f"learn. Add images of another class with `pool` in notebook 10{limit}"
    )


def without_images(label: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Return the names of the classes for which no image has a label of at least 0.5.

    `label` is an array (images, classes), with columns in the order of `classes`; unknown labels are NaN.
    """
    present = (np.nan_to_num(label) >= 0.5).any(axis=0)
    return [name for name, is_present in zip(classes, present, strict=True) if not is_present]
