"""Training code that all classifiers share: loading starting weights, mixing batches, unfreezing stages, validation."""

import logging
from abc import abstractmethod
from functools import reduce
from typing import Any

import numpy as np
import torch

from kitlib.models.classifier import Classifier, FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import check_random, input_differences, load_starting_weights
from kitlib.recipes.fields import ClassifierRecipe
from kitlib.training import data_parallel
from kitlib.training.batch_mixing import mix_batch
from kitlib.training.loop import RecipeTraining

logger = logging.getLogger(__name__)


def check_frozen(recipe: ClassifierRecipe, model_name: str) -> None:
    """Raise ValueError if the recipe freezes its backbone but has no starting weights: the backbone would stay random."""
    if recipe.frozen_backbone and not recipe.starting_weights:
        raise ValueError(
            f"{model_name}: frozen_backbone is true, but starting_weights is empty, so {recipe.backbone} would stay random; "
            'set overrides {"starting_weights": "..."} (a .safetensors file of the NIH or ImageNet backbone) or '
            '{"frozen_backbone": false}'
        )


def start_from_weights(model: Classifier) -> str:
    """Load the starting weights of the model's recipe, and return a text that says how many tensors were loaded.

    Returns "from scratch" if the recipe has no starting weights. If a frozen backbone was trained with another image size,
    placement or normalisation than the recipe has, logs a warning, and the text says so. Raises ValueError if a part of a
    frozen backbone would stay random. Raises BundleError if a part of a backbone that is not frozen would stay random,
    unless the recipe's `random_parts` lists the part.
    """
    recipe = model.recipe
    if not recipe.starting_weights:
        return "from scratch"
    report = load_starting_weights(model, recipe.starting_weights)
    random_names = [name for name in report["random"] if name.startswith("backbone.")]
    if random_names and recipe.frozen_backbone:
        raise ValueError(
            f"{recipe.starting_weights} lacks {len(random_names)} tensors of the frozen {recipe.backbone}; the first is "
            f'{random_names[0]}. Use weights of this backbone, or set overrides {{"frozen_backbone": false}}'
        )
    check_random(random_names, model, recipe)
    text = f"{recipe.starting_weights}: {len(report['loaded'])} tensors, {len(report['random'])} left random"
    if recipe.frozen_backbone and (differences := input_differences(model)):
        text += f"; the frozen backbone was trained on another input: {', '.join(differences)}"
        logger.warning("%s. Use the backbone's values (mean, std: see normalisation), or set frozen_backbone to false", text)
    return text


class ClassifierTraining(RecipeTraining):
    """Lightning module that trains a classifier with its recipe on batches from an `XrayDataset`.

    A subclass implements `loss` and `scores`, and may override `targets` and `training_loss`. The attribute
    `validation_probabilities`, float64 (images, outputs), holds the latest predictions of `evaluated_model` for the
    validation images, in the order of the data set.
    """

    model: StudyClassifier | FindingsClassifier
    evaluated_model: StudyClassifier | FindingsClassifier
    recipe: ClassifierRecipe

    def __init__(self, model: StudyClassifier | FindingsClassifier, validation_images: int) -> None:
        super().__init__(model, model.recipe)
        self.validation_probabilities = np.full((validation_images, model.answers), np.nan)

    @abstractmethod
    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Return the scalar loss of a batch; `logits` is the model's output for it, (n, outputs).

        `smoothing` is the share of each target that is spread evenly over the classes; it is 0 in validation.
        """

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """Compute metrics from `validation_probabilities` and return them in a dict from their names to their values.

        The dict must contain `score`, because the best epoch is the epoch with the highest `score`.
        """

    def targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch with the additional targets that a subclass needs, such as `mask`.

        This class returns the batch unchanged. Called before the batch is mixed by MixUp or CutMix.
        """
        return batch

    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Run the model on a training batch and return the scalar loss. A subclass may add auxiliary losses."""
        return self.loss(batch, self.model(self.model.normalise(batch["pixels"])), self.recipe.label_smoothing)

    def on_train_epoch_start(self) -> None:
        # Depends on the epoch number alone, so that resumed training unfreezes the same stages as uninterrupted training.
        self.model.unfreeze(self.current_epoch)

    def penalty(self) -> torch.Tensor:
        """Return the L1 penalty (Oh et al. 2020), a scalar that is added to the training loss.

        It is the recipe's `l1` times the sum of the absolute values of all trainable parameters.
        """
        sums = [parameter.abs().sum() for parameter in self.model.parameters() if parameter.requires_grad]
        return self.recipe.l1 * reduce(torch.add, sums)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        loss = self.training_loss(mix_batch(self.targets(batch), self.recipe.mixup, self.recipe.cutmix))
        # Logged without the penalty, so that it is comparable with the validation loss.
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]), sync_dist=True)
        return loss + self.penalty() if self.recipe.l1 else loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits = self.evaluated_model(self.evaluated_model.normalise(batch["pixels"]))
        size = len(batch["pixels"])
        self.log("validation_loss", self.loss(batch, logits, smoothing=0.0), batch_size=size, sync_dist=True)
        probabilities = self.evaluated_model.probabilities(logits).double().cpu().numpy()
        self.validation_probabilities[batch["index"].cpu().numpy()] = probabilities

    def on_validation_epoch_end(self) -> None:
        self.validation_probabilities = data_parallel.gather_rows(self.validation_probabilities)
        self.log_dict(self.scores())
