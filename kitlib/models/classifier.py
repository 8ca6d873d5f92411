"""Classifiers: a timm backbone with a head that predicts either the study classes and `none`, or any other classes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kitlib.classes import STUDY_CLASSES
from kitlib.device import memory_format
from kitlib.models.backbones import check_backbone, check_options
from kitlib.models.box_mask import MaskDecoder, make_mask_decoder
from kitlib.models.gem import with_gem
from kitlib.recipes.fields import ClassifierRecipe, FindingsRecipe, StudyRecipe

OUTPUTS = (*STUDY_CLASSES, "none")
BLANK = 1e-3  # smallest standard deviation, of grey levels 0..1, by which a batch is divided
# The slice of OUTPUTS that is trained, for each value of a study recipe's `outputs`.
TRAINED_OUTPUTS = {"study": slice(0, 4), "none": slice(4, 5), "both": slice(0, 5)}


class Classifier(nn.Module):
    """A timm backbone with pooled features and a head (see `make_head`), with random weights.

    `outputs` is the number of logits. `answers` is the number of predicted probabilities; a subclass may change it. `stages`
    lists the names of the backbone's parameters, one list per stage (as timm groups them), starting at the input.

    A frozen backbone (`recipe.frozen_backbone`) is not trained, until `unfreeze` makes its last stages trainable. If
    `recipe.frozen_statistics` is also set, frozen stages stay in evaluation mode. So does the batch norm of unfrozen stages,
    unless `recipe.thawed_statistics` is set.
    """

    backbone: Any  # timm's networks have no common type that declares their common attributes
    mean_of_channels: torch.Tensor  # `mean`, (channels, 1, 1)
    std_of_channels: torch.Tensor

    def __init__(self, recipe: ClassifierRecipe, outputs: int) -> None:
        super().__init__()
        self.recipe, self.answers = recipe, outputs
        self.backbone = _backbone(recipe, outputs)
        self.head = make_head(self.backbone.head_hidden_size, recipe.hidden, recipe.dropout, outputs)
        self.mean, self.std = _normalisation(self.backbone, recipe)
        # Copies on the model's device, for which no batch waits. Not in weights files, because they follow from the recipe.
        for name in ("mean", "std"):
            self.register_buffer(f"{name}_of_channels", torch.tensor(getattr(self, name))[:, None, None], persistent=False)
        self.stages = _stages(self.backbone)
        if recipe.frozen_backbone:
            self.backbone.requires_grad_(False)
            # Lightning does not change the mode of the model, so the frozen parts are set to evaluation mode here.
            self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs) for normalised images (n, channels, side, side)."""
        return self.head(self.backbone(x))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's input for grey canvases (n, side, side), 0..255, uint8 or (after mixup) float.

        The canvases are on the model's device, and so is the result (n, channels, side, side). If the recipe's normalisation
        is "batch", the result has mean 0 and standard deviation 1, unless the batch is blank.
        """
        x = pixels[:, None].float() / 255
        if self.recipe.normalisation == "batch":
            std, mean = torch.std_mean(x, correction=0)
            x = ((x - mean) / std.clamp(min=BLANK)).expand(-1, self.recipe.channels, -1, -1)
        else:
            x = (x - self.mean_of_channels) / self.std_of_channels
        return x.contiguous(memory_format=memory_format(x.device))

    def unfreeze(self, epoch: int) -> None:
        """Unfreeze a frozen backbone's last `epoch // unfreeze_every` stages (epochs from 0); none if the divisor is 0."""
        if not (self.recipe.frozen_backbone and self.recipe.unfreeze_every):
            return
        count = min(epoch // self.recipe.unfreeze_every, len(self.stages))
        for stage in self.stages[len(self.stages) - count :]:
            for name in stage:
                self.backbone.get_parameter(name).requires_grad_(True)
        self.train(self.training)

    def rates(self) -> dict[str, float]:
        """Return learning-rate factors for `make_optimizer`, keyed by prefix of parameter names; {} if all factors are 1."""
        recipe = self.recipe
        unfreezes = recipe.frozen_backbone and recipe.unfreeze_every
        rate = recipe.unfrozen_rate if unfreezes else 1.0
        if recipe.layer_decay == 1:
            return {"backbone.": rate} if unfreezes else {}
        return {
            f"backbone.{name}": rate * recipe.layer_decay ** (len(self.stages) - index)
            for index, names in enumerate(self.stages)
            for name in names
        }

    def train(self, mode: bool = True) -> "Classifier":
        """Set training or evaluation mode and return the model; parts with frozen statistics stay in evaluation mode."""
        super().train(mode)
        if self.recipe.frozen_backbone and self.recipe.frozen_statistics:
            is_trainable: dict[str, bool] = {}
            for name, module in self.backbone.named_modules():
                requires_grad = [parameter.requires_grad for parameter in module.parameters()]
                # A module without parameters, such as dropout, follows the block that contains it.
                is_trainable[name] = all(requires_grad) if requires_grad else is_trainable[name.rpartition(".")[0]]
                is_fixed_norm = isinstance(module, _BatchNorm) and not self.recipe.thawed_statistics
                module.training = mode and is_trainable[name] and not is_fixed_norm
        return self


class StudyClassifier(Classifier):
    """Classifier of the four study classes and the image-level `none`: five outputs in the order of OUTPUTS.

    If `recipe.segmentation` is above 0, `with_mask` also predicts a mask of the boxes, by a decoder. Raises ValueError if
    `recipe.image_size` is then not a multiple of the decoder's stride.
    """

    recipe: StudyRecipe
    mask_decoder: MaskDecoder

    def __init__(self, recipe: StudyRecipe) -> None:
        super().__init__(recipe, len(OUTPUTS))
        if recipe.segmentation:
            self.mask_decoder = make_mask_decoder(self.backbone)
            stride = self.mask_decoder.stride
            if recipe.image_size % stride:
                raise ValueError(
                    f"recipe.image_size is {recipe.image_size}; for segmentation with {recipe.backbone} it must be a "
                    f"multiple of {stride}, such as {recipe.image_size // stride * stride}"
                )
            self.mask_cells = recipe.image_size // stride

    def with_mask(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class logits (n, 5), as `forward` does, and the logits (n, cells, cells) of the mask of boxes.

        The mask is that of `kitlib.models.box_mask.box_mask`; `x` are normalised images (n, channels, side, side).
        """
        last, maps = self.backbone.forward_intermediates(x, indices=self.mask_decoder.indices)
        return self.head(self.backbone.forward_head(last)), self.mask_decoder(maps, self.mask_cells)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 probabilities (n, 5) for logits (n, 5), with NaN for outputs that the recipe does not train.

        The four study classes sum to 1; `none` is independent of them.
        """
        result = torch.full_like(logits, torch.nan, dtype=torch.float32)
        trained = TRAINED_OUTPUTS[self.recipe.outputs]
        result[:, trained] = probabilities(logits)[:, trained]
        return result


class FindingsClassifier(Classifier):
    """Classifier with one output for each of `classes`, in this order, or with a single output for two classes.

    If the recipe sets `one_logit`, the single output is the logit of the first class. If the recipe sets `auxiliary`, the
    backbone keeps the auxiliary head of inception_v3, for `with_auxiliary` only. Raises ValueError if the recipe sets
    `one_logit` and there are not exactly two classes.
    """

    recipe: FindingsRecipe

    def __init__(self, recipe: FindingsRecipe, classes: Sequence[str]) -> None:
        check_classes(recipe, classes)
        super().__init__(recipe, 1 if recipe.one_logit else len(classes))
        self.classes, self.answers = tuple(classes), len(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs) for normalised images (n, channels, side, side)."""
        if not self.recipe.auxiliary:
            return super().forward(x)
        return self.head(self.backbone.forward_head(self.backbone.forward_postaux(self.backbone.forward_preaux(x))))

    def with_auxiliary(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the main head, as `forward` does, and those of the auxiliary head, both (n, outputs)."""
        features, auxiliary = self.backbone(x)
        return self.head(features), auxiliary

    def class_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (n, classes), one per class, for the network's logits (n, outputs).

        The single output z of `one_logit` becomes (z, 0), whose softmax is (sigmoid(z), 1 - sigmoid(z)).
        """
        logits = logits.float()
        return torch.cat([logits, torch.zeros_like(logits)], dim=1) if self.recipe.one_logit else logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 probabilities (n, classes) for the network's logits (n, outputs).

        The probabilities are independent of each other if the recipe sets `multi_label`; otherwise each row sums to 1.
        """
        logits = self.class_logits(logits)
        return logits.sigmoid() if self.recipe.multi_label else logits.softmax(dim=1)


def check_classes(recipe: FindingsRecipe, classes: Sequence[str]) -> None:
    """Raise ValueError if the recipe sets `one_logit` and there are not exactly two classes."""
    if recipe.one_logit and len(classes) != 2:
        raise ValueError(
            f"one_logit needs 2 classes, but there are {len(classes)}: {', '.join(classes)}; set one_logit to False"
        )


def make_head(features: int, hidden: int | Sequence[int], dropout: float, outputs: int = len(OUTPUTS)) -> nn.Sequential:
    """Return the head of a classifier: linear-ReLU-dropout for each hidden layer, then linear, with Xavier weights.

    `hidden` lists the number of units of each hidden layer; an int means a single hidden layer. If `hidden` is 0, the head
    is dropout and one linear layer, as in ImageNet networks. The head of the Heidelberg report (section 3.4) has 2048
    `features` and 1024 `hidden` units.
    """
    units = [hidden] * bool(hidden) if isinstance(hidden, int) else list(hidden)
    layers: list[nn.Module] = [] if units else [nn.Dropout(dropout)]
    for before, after in pairwise([features, *units]):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
    layers.append(nn.Linear([features, *units][-1], outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return float32 probabilities (n, 5) for logits (n, 5): four study classes, which sum to 1, and `none`, independent."""
    logits = logits.float()
    return torch.cat([logits[:, :4].softmax(dim=1), logits[:, 4:].sigmoid()], dim=1)


def study_loss(
    logits: torch.Tensor,
    study: torch.Tensor,
    none: torch.Tensor,
    none_weight: float,
    outputs: str = "both",
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return study loss + `none_weight` x none loss for logits (n, 5).

    The study loss is the cross entropy of the four study classes, the none loss the binary cross entropy of `none`. Each
    loss is a mean over the rows with a known label. `study` (n, 4) holds true class probabilities; NaN makes a row unknown.
    `none` (n,) holds the true probability of `none`, or NaN. If `outputs` is "study" or "none", only this loss is returned,
    unweighted. `smoothing` is the share of the true probability that is spread evenly over the classes (two for `none`).
    """
    logits, loss = logits.float(), logits.new_zeros((), dtype=torch.float32)
    if outputs != "none":
        losses = functional.cross_entropy(logits[:, :4], study.nan_to_num(), label_smoothing=smoothing, reduction="none")
        loss = loss + mean_of_known(losses, ~study.isnan().any(dim=1))
    if outputs != "study":
        truth = smooth_labels(none.nan_to_num(), smoothing, classes=2)
        losses = functional.binary_cross_entropy_with_logits(logits[:, 4], truth, reduction="none")
        loss = loss + (1.0 if outputs == "none" else none_weight) * mean_of_known(losses, ~none.isnan())
    return loss


def mean_of_known(losses: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
    """Return the mean of the losses where `is_known` (same shape) is True; 0, with a gradient, if it is all False."""
    # Boolean indexing would make the CPU wait for the GPU at every step, because the result's size depends on the mask.
    return (losses * is_known).sum() / is_known.sum().clamp(min=1)


def smooth_labels(truth: torch.Tensor, share: float, classes: int) -> torch.Tensor:
    """Return smoothed labels: `share` of the true probability is spread evenly over `classes` classes (2 for binary labels).

    Szegedy et al. 2016, section 7.
    """
    return truth * (1 - share) + share / classes


def _backbone(recipe: ClassifierRecipe, outputs: int) -> Any:
    check_backbone(recipe.backbone)
    options: dict[str, Any] = {"pretrained": False, "in_chans": recipe.channels, "num_classes": 0}
    options |= check_options(recipe.backbone_options)
    # Transformers with learnt position embeddings are built for one image size; other networks accept any size.
    if getattr(timm.get_pretrained_cfg(recipe.backbone), "fixed_input_size", False):
        options["img_size"] = recipe.image_size
    auxiliary, uses_gem = bool(getattr(recipe, "auxiliary", 0)), recipe.pooling == "gem"
    if auxiliary and uses_gem:
        raise ValueError('pooling is "gem", but auxiliary is set, which needs the pooling of inception_v3; set only one')
    if auxiliary:  # the auxiliary head gets `outputs` classes
        options |= {"num_classes": outputs, "aux_logits": True}
    try:
        backbone: Any = timm.create_model(recipe.backbone, **options)
    except (TypeError, AssertionError, ValueError) as error:  # raised for arguments that this network does not have
        if not recipe.backbone_options:
            raise
        raise ValueError(f"change backbone_options {recipe.backbone_options}: {recipe.backbone} raises {error!r}") from error
    if auxiliary:
        backbone.reset_classifier(0)  # removes the main head, because the kit adds its own
    return with_gem(backbone) if uses_gem else backbone


def _stages(backbone: Any) -> list[list[str]]:
    """Return lists of parameter names, one list per stage (timm's coarse groups), starting at the network's input.

    A group without weight matrices, such as a final norm, joins the stage before it.
    """
    stages: list[list[str]] = []
    for names in group_parameters(backbone, backbone.group_matcher(coarse=True)).values():
        if stages and all(backbone.get_parameter(name).ndim < 2 for name in names):
            stages[-1] += names
        else:
            stages.append(list(names))
    return stages


def _normalisation(backbone: Any, recipe: ClassifierRecipe) -> tuple[list[float], list[float]]:
    """Return two lists, mean and standard deviation of each channel, by which pixels 0..1 are normalised.

    If `recipe.normalisation` is "half", all values are 0.5. If it is "batch", means are 0 and standard deviations 1, because
    `Classifier.normalise` normalises each batch. Otherwise the values are those that timm records for the backbone's
    weights, averaged over the colours for grey input.
    """
    if recipe.normalisation == "batch":
        return [0.0] * recipe.channels, [1.0] * recipe.channels
    if recipe.normalisation == "half":
        return [0.5] * recipe.channels, [0.5] * recipe.channels
    mean, std = backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
    if recipe.channels == len(mean):
        return list(mean), list(std)
    return [sum(mean) / len(mean)] * recipe.channels, [sum(std) / len(std)] * recipe.channels
