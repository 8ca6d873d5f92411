"""Classifiers: any timm backbone with the Heidelberg head, for a study's classes and `none`, or for an image's findings."""

import difflib
from collections.abc import Sequence

import timm
import torch
from torch import nn
from torch.nn import functional

from kitlib.classes import STUDY_CLASSES
from kitlib.recipes import ClassifierRecipe, FindingsRecipe, StudyRecipe, from_dict, override

OUTPUTS = (*STUDY_CLASSES, "none")


class Classifier(nn.Module):
    """Pooled features of a backbone, then Linear-ReLU-Dropout-Linear; weights are random until somebody loads them.

    A frozen backbone takes no gradients and, where the recipe freezes statistics too, stays in evaluation mode.
    """

    def __init__(self, recipe: ClassifierRecipe, outputs: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = _backbone(recipe)
        self.head = head(self.backbone.head_hidden_size, recipe.hidden, recipe.dropout, outputs)
        self.mean, self.std = _normalisation(self.backbone, recipe.channels)
        if recipe.frozen_backbone:
            self.backbone.requires_grad_(False)
            # Lightning trains a model in the mode it is given.
            self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised x (n, channels, side, side) to logits (n, outputs)."""
        return self.head(self.backbone(x))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Grey canvases uint8 (n, side, side) to the network's input, on the device where they lie."""
        shape = (1, self.recipe.channels, 1, 1)
        mean, std = (pixels.new_tensor(each, dtype=torch.float32).view(shape) for each in (self.mean, self.std))
        x = (pixels[:, None].float() / 255 - mean) / std
        return x.contiguous(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.recipe.frozen_backbone and self.recipe.frozen_statistics:
            self.backbone.eval()
        return self


class StudyClassifier(Classifier):
    """The four study classes, then the image-level `none`: five outputs in the order of OUTPUTS."""

    def __init__(self, recipe: StudyRecipe) -> None:
        super().__init__(recipe, len(OUTPUTS))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, 5) to float32 probabilities: the four study classes sum to 1, none stands alone."""
        return probabilities(logits)


class FindingsClassifier(Classifier):
    """One output a class of `classes`, in their order."""

    def __init__(self, recipe: FindingsRecipe, classes: Sequence[str]) -> None:
        super().__init__(recipe, len(classes))
        self.classes = tuple(classes)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) to float32 probabilities, each for itself, or summing to 1 where exactly one class is true."""
        logits = logits.float()
        return logits.sigmoid() if self.recipe.multi_label else logits.softmax(dim=1)


def head(features: int, hidden: int, dropout: float, outputs: int = len(OUTPUTS)) -> nn.Sequential:
    """Heidelberg's head, 2048-1024-ReLU-dropout-outputs in the report, for a backbone of any width."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, 5) to float32 probabilities: the four study classes sum to 1, none stands alone."""
    logits = logits.float()
    return torch.cat([logits[:, :4].softmax(dim=1), logits[:, 4:].sigmoid()], dim=1)


def study_loss(logits: torch.Tensor, study: torch.Tensor, none: torch.Tensor, none_weight: float) -> torch.Tensor:
    """Cross entropy over the study classes + `none_weight` x binary cross entropy of none, each the mean over what is known.

    `study` (n, 4) are class probabilities, a row with a NaN is unknown; `none` (n,) is 0..1 or NaN.
    """
    logits = logits.float()
    known, told = ~study.isnan().any(dim=1), ~none.isnan()
    loss = logits.sum() * 0  # keeps the graph where nothing is known
    if known.any():
        loss = loss + functional.cross_entropy(logits[known, :4], study[known])
    if told.any():
        loss = loss + none_weight * functional.binary_cross_entropy_with_logits(logits[told, 4], none[told])
    return loss


def load(record: dict, state_dict: dict[str, torch.Tensor], device: torch.device) -> Classifier:
    """A classifier from a bundle's record and weights, ready to predict on `device`. Raises where the weights do not fit."""
    if record["family"] == "study":
        model = StudyClassifier(override(from_dict(StudyRecipe, record["recipe"]), starting_weights=""))
    else:
        model = FindingsClassifier(
            override(from_dict(FindingsRecipe, record["recipe"]), starting_weights=""), record["classes"]
        )
    model.load_state_dict(state_dict, strict=True)
    return model.eval().to(device, memory_format=torch.channels_last)


def _backbone(recipe: ClassifierRecipe) -> nn.Module:
    if not timm.is_model(recipe.backbone):
        near = difflib.get_close_matches(recipe.backbone.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} has no backbone {recipe.backbone!r}; near: {', '.join(near) or 'nothing'}"
        )
    options = {"pretrained": False, "in_chans": recipe.channels, "num_classes": 0}
    # Transformers with learnt positions are built for one side; the others take any.
    if timm.get_pretrained_cfg(recipe.backbone).fixed_input_size:
        options["img_size"] = recipe.image_size
    return timm.create_model(recipe.backbone, **options)


def _normalisation(backbone: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """Mean and spread that the backbone's weights expect of pixels 0..1, averaged over the colours for a grey input."""
    mean, std = backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
    if channels == len(mean):
        return list(mean), list(std)
    return [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
