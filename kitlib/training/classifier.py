"""Training of a classifier, whatever its classes: mixed batches, unfreezing, and the validation's probabilities."""

from abc import abstractmethod
from functools import reduce
from typing import Any

import numpy as np
import torch

from kitlib.errors import BundleError
from kitlib.models.classifier import Classifier, FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import load_starting_weights
from kitlib.recipes.fields import ClassifierRecipe
from kitlib.training import data_parallel
from kitlib.training.batch_mixing import mix_batch
from kitlib.training.loop import RecipeTraining

# Of the backbone's parameters that starting weights may leave random: a first convolution for other channels, not a
# backbone of another kind with a few names in common.
MOST_RANDOM = 0.1


def check_frozen(recipe: ClassifierRecipe, model_name: str) -> None:
    """Raise ValueError for a recipe that freezes a backbone of random weights, from which nothing is learnt."""
    if recipe.frozen_backbone and not recipe.starting_weights:
        raise ValueError(
            f"{model_name}: the recipe freezes {recipe.backbone} at random weights, from which nothing is learnt; "
            'give overrides {"starting_weights": "..."} (a .safetensors file of the NIH or ImageNet backbone) or '
            '{"frozen_backbone": false}'
        )


def start_from_weights(model: Classifier) -> str:
    """Load the starting weights that the model's recipe names; what was loaded and what was left random, in words.

    Raises ValueError where they leave anything of a frozen backbone random, and BundleError where more than a tenth of the
    parameters of one that learns.
    """
    recipe = model.recipe
    if not recipe.starting_weights:
        return "from scratch"
    report = load_starting_weights(model, recipe.starting_weights)
    sizes = {name: each.numel() for name, each in model.backbone.named_parameters(prefix="backbone")}
    random = [name for name in report["random"] if name in sizes]
    if random and recipe.frozen_backbone:
        raise ValueError(
            f"{recipe.starting_weights} leaves {len(random)} tensors of the frozen {recipe.backbone} random, first "
            f'{random[0]}; give weights of this backbone or overrides {{"frozen_backbone": false}}'
        )
    share = sum(sizes[name] for name in random) / sum(sizes.values())
    if share > MOST_RANDOM:
        raise BundleError(
            f"{recipe.starting_weights} leaves {share:.0%} of {recipe.backbone} random, such as {random[0]}; "
            "name weights of this very backbone"
        )
    return f"{recipe.starting_weights}: {len(report['loaded'])} tensors, {len(report['random'])} left random"


class ClassifierTraining(RecipeTraining):
    """Trains `model` under its recipe, over batches of `XrayDataset`; a subclass says what is lost and how it is judged.

    It gives `loss` and `scores`, and may give `targets` and `training_loss`. After each validation
    `found` (validation images, outputs) float64 holds the probabilities of `self.judged`, in the data set's order.
    """

    model: StudyClassifier | FindingsClassifier
    judged: StudyClassifier | FindingsClassifier
    recipe: ClassifierRecipe

    def __init__(self, model: StudyClassifier | FindingsClassifier, validation_images: int) -> None:
        super().__init__(model, model.recipe)
        self.found = np.full((validation_images, model.answers), np.nan)

    @abstractmethod
    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        """The scalar loss of logits (n, outputs); `smoothing`: share of the truth to spread evenly, 0 in validation."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """What is logged after a validation, out of `self.found`; `score` chooses the epoch, greater is better."""

    def targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A training batch with the targets that a subclass adds, such as `mask`; its images are not mixed yet."""
        return batch

    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch whose images are mixed already; a subclass adds its auxiliary losses here."""
        return self.loss(batch, self.model(self.model.normalise(batch["pixels"])), self.recipe.label_smoothing)

    def on_train_epoch_start(self) -> None:
        # By the epoch's number, so that in a resumed training as much learns as in an uninterrupted one.
        self.model.unfreeze(self.current_epoch)

    def penalty(self) -> torch.Tensor:
        """The recipe's l1 times the sum of the absolute values of all that learns; Oh et al. 2020 add it to their loss."""
        learning = [each.abs().sum() for each in self.model.parameters() if each.requires_grad]
        return self.recipe.l1 * reduce(torch.add, learning)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        loss = self.training_loss(mix_batch(self.targets(batch), self.recipe.mixup, self.recipe.cutmix))
        # Without the penalty, so that it is beside the validation's in the curves.
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]), sync_dist=True)
        return loss + self.penalty() if self.recipe.l1 else loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits = self.judged(self.judged.normalise(batch["pixels"]))
        size = len(batch["pixels"])
        self.log("validation_loss", self.loss(batch, logits, smoothing=0.0), batch_size=size, sync_dist=True)
        self.found[batch["index"].cpu().numpy()] = self.judged.probabilities(logits).double().cpu().numpy()

    def on_validation_epoch_end(self) -> None:
        self.found = data_parallel.gather_rows(self.found)
        self.log_dict(self.scores())
