"""Classifiers: any timm backbone with a head, for a study's classes and `none`, or for an image's findings or its class."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kitlib.classes import STUDY_CLASSES
from kitlib.device import memory_format
from kitlib.models.backbones import check_backbone
from kitlib.models.box_mask import MaskDecoder, mask_decoder
from kitlib.recipes.fields import ClassifierRecipe, FindingsRecipe, StudyRecipe

OUTPUTS = (*STUDY_CLASSES, "none")
# What a study recipe's `outputs` lets a network learn, as places in OUTPUTS.
LEARNT = {"study": slice(0, 4), "none": slice(4, 5), "both": slice(0, 5)}


class Classifier(nn.Module):
    """Pooled features of a backbone, then a head (see `head`); weights are random until somebody loads them.

    `answers` is the number of its probabilities, by default one an output. A frozen backbone takes no gradients and, where
    the recipe freezes statistics too, stays in evaluation mode. `stages` are the names of its parameters, stage by stage
    from the input on, as timm groups them; `unfreeze` lets the last ones learn, whose batch norm stays in evaluation mode
    all the same where thawed statistics are kept.
    """

    backbone: Any  # timm's networks share no type that has what they share

    def __init__(self, recipe: ClassifierRecipe, outputs: int) -> None:
        super().__init__()
        self.recipe, self.answers = recipe, outputs
        self.backbone = _backbone(recipe, outputs)
        self.head = head(self.backbone.head_hidden_size, recipe.hidden, recipe.dropout, outputs)
        self.mean, self.std = _normalisation(self.backbone, recipe)
        self.stages = _stages(self.backbone)
        if recipe.frozen_backbone:
            self.backbone.requires_grad_(False)
            # Lightning trains a model in the mode it is given.
            self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised x (n, channels, side, side) to logits (n, outputs)."""
        return self.head(self.backbone(x))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Grey canvases (n, side, side), 0..255, uint8 or mixed to float, to the network's input, on their device."""
        shape = (1, self.recipe.channels, 1, 1)
        mean, std = (pixels.new_tensor(each, dtype=torch.float32).view(shape) for each in (self.mean, self.std))
        x = (pixels[:, None].float() / 255 - mean) / std
        return x.contiguous(memory_format=memory_format(x.device))

    def unfreeze(self, epoch: int) -> None:
        """Let those stages of a frozen backbone learn that the recipe gives free by this epoch (from 0), the last first."""
        if not (self.recipe.frozen_backbone and self.recipe.unfreeze_every):
            return
        free = min(epoch // self.recipe.unfreeze_every, len(self.stages))
        for stage in self.stages[len(self.stages) - free :]:
            for name in stage:
                self.backbone.get_parameter(name).requires_grad_(True)
        self.train(self.training)

    def rates(self) -> dict[str, float]:
        """Prefixes of parameters that do not learn at the recipe's rate, and their share of it; see `make_optimizer`."""
        thaws = self.recipe.frozen_backbone and self.recipe.unfreeze_every
        return {"backbone.": self.recipe.unfrozen_rate} if thaws else {}

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.recipe.frozen_backbone and self.recipe.frozen_statistics:
            free: dict[str, bool] = {}
            for name, module in self.backbone.named_modules():
                own = [each.requires_grad for each in module.parameters()]
                # What has no parameters, such as dropout, does as the block around it.
                free[name] = all(own) if own else free[name.rpartition(".")[0]]
                still = isinstance(module, _BatchNorm) and not self.recipe.thawed_statistics
                module.training = mode and free[name] and not still
        return self


class StudyClassifier(Classifier):
    """The four study classes, then the image-level `none`: five outputs in the order of OUTPUTS.

    With `recipe.segmentation` it also has a decoder of the boxes' mask, which only `with_mask` computes.
    """

    recipe: StudyRecipe
    mask_decoder: MaskDecoder

    def __init__(self, recipe: StudyRecipe) -> None:
        super().__init__(recipe, len(OUTPUTS))
        if recipe.segmentation:
            self.mask_decoder = mask_decoder(self.backbone)
            stride = self.mask_decoder.stride
            if recipe.image_size % stride:
                raise ValueError(
                    f"recipe.image_size is {recipe.image_size}; for segmentation with {recipe.backbone} it must be a "
                    f"multiple of {stride}, such as {recipe.image_size // stride * stride}"
                )
            self.mask_cells = recipe.image_size // stride

    def with_mask(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as of `forward`, and those of the mask (n, cells, cells); see `kitlib.models.box_mask.box_mask`."""
        last, maps = self.backbone.forward_intermediates(x, indices=self.mask_decoder.indices)
        return self.head(self.backbone.forward_head(last)), self.mask_decoder(maps, self.mask_cells)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, 5) to float32 probabilities: study classes sum to 1, none stands alone; NaN for what is not learnt."""
        found = torch.full_like(logits, torch.nan, dtype=torch.float32)
        learnt = LEARNT[self.recipe.outputs]
        found[:, learnt] = probabilities(logits)[:, learnt]
        return found


class FindingsClassifier(Classifier):
    """One output a class of `classes`, in their order; with `recipe.one_logit` one for the first of two classes.

    With `recipe.auxiliary` an inception_v3 has its auxiliary head too, which only `with_auxiliary` computes.
    """

    recipe: FindingsRecipe

    def __init__(self, recipe: FindingsRecipe, classes: Sequence[str]) -> None:
        check_classes(recipe, classes)
        super().__init__(recipe, 1 if recipe.one_logit else len(classes))
        self.classes, self.answers = tuple(classes), len(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised x (n, channels, side, side) to logits (n, outputs)."""
        if not self.recipe.auxiliary:
            return super().forward(x)
        return self.head(self.backbone.forward_head(self.backbone.forward_postaux(self.backbone.forward_preaux(x))))

    def with_auxiliary(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as of `forward`, and those of the auxiliary head, of the same shape."""
        features, auxiliary = self.backbone(x)
        return self.head(features), auxiliary

    def class_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Outputs to float32 logits (n, classes): a lone z becomes (z, 0), whose softmax is sigmoid(z) and the rest to 1."""
        logits = logits.float()
        return torch.cat([logits, torch.zeros_like(logits)], dim=1) if self.recipe.one_logit else logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Outputs to float32 probabilities (n, classes), each for itself, or with the sum 1 where exactly one is true."""
        logits = self.class_logits(logits)
        return logits.sigmoid() if self.recipe.multi_label else logits.softmax(dim=1)


def check_classes(recipe: FindingsRecipe, classes: Sequence[str]) -> None:
    """Raise ValueError where the recipe does not fit these classes, with what to change."""
    if recipe.one_logit and len(classes) != 2:
        raise ValueError(f"one_logit answers 2 classes, and there are {len(classes)}: {', '.join(classes)}; set it to False")


def head(features: int, hidden: int, dropout: float, outputs: int = len(OUTPUTS)) -> nn.Sequential:
    """Heidelberg's head, 2048-1024-ReLU-dropout-outputs, for a backbone of any width; Xavier's weights (section 3.4).

    Without hidden units dropout and one linear layer, as ImageNet's networks have it.
    """
    last = [nn.Dropout(dropout), nn.Linear(hidden or features, outputs)]
    layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), *last) if hidden else nn.Sequential(*last)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, 5) to float32 probabilities: the four study classes sum to 1, none stands alone."""
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
    """Cross entropy over the study classes + `none_weight` x binary cross entropy of none, each the mean over what is known.

    `study` (n, 4) are class probabilities, a row with a NaN is unknown; `none` (n,) is 0..1 or NaN. Of `outputs` "study" or
    "none" only that part counts, unweighted. `smoothing` is the share of the truth that is spread evenly, over the
    four classes and over none and its opposite.
    """
    logits, loss = logits.float(), logits.new_zeros((), dtype=torch.float32)
    if outputs != "none":
        each = functional.cross_entropy(logits[:, :4], study.nan_to_num(), label_smoothing=smoothing, reduction="none")
        loss = loss + mean_of_known(each, ~study.isnan().any(dim=1))
    if outputs != "study":
        truth = smoothed(none.nan_to_num(), smoothing, classes=2)
        each = functional.binary_cross_entropy_with_logits(logits[:, 4], truth, reduction="none")
        loss = loss + (1.0 if outputs == "none" else none_weight) * mean_of_known(each, ~none.isnan())
    return loss


def mean_of_known(losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The mean of those losses whose place in `known`, of their shape, is True; 0, with a gradient, where none is."""
    # Taking the known ones out would make the processor wait for the GPU at every step, to learn how many they are.
    return (losses * known).sum() / known.sum().clamp(min=1)


def smoothed(truth: torch.Tensor, share: float, classes: int) -> torch.Tensor:
    """Probabilities with `share` of them spread evenly over `classes` (Szegedy et al. 2016, section 7); 2 for yes or no."""
    return truth * (1 - share) + share / classes


def _backbone(recipe: ClassifierRecipe, outputs: int) -> Any:
    check_backbone(recipe.backbone)
    options: dict[str, Any] = {"pretrained": False, "in_chans": recipe.channels, "num_classes": 0}
    # Transformers with learnt positions are built for one side; the others take any.
    if getattr(timm.get_pretrained_cfg(recipe.backbone), "fixed_input_size", False):
        options["img_size"] = recipe.image_size
    if not getattr(recipe, "auxiliary", 0):
        return timm.create_model(recipe.backbone, **options)
    # Built for our classes, so that the auxiliary head answers them; the head after the backbone is the kit's.
    backbone: Any = timm.create_model(recipe.backbone, **options | {"num_classes": outputs, "aux_logits": True})
    backbone.reset_classifier(0)
    return backbone


def _stages(backbone: Any) -> list[list[str]]:
    """Names of the parameters by timm's coarse groups, input first; norms in a group of their own join the one before."""
    stages: list[list[str]] = []
    for names in group_parameters(backbone, backbone.group_matcher(coarse=True)).values():
        if stages and all(backbone.get_parameter(name).ndim < 2 for name in names):
            stages[-1] += names
        else:
            stages.append(list(names))
    return stages


def _normalisation(backbone: Any, recipe: ClassifierRecipe) -> tuple[list[float], list[float]]:
    """Mean and spread that are taken of pixels 0..1: a half, or what the backbone's weights expect.

    The latter are averaged over the colours for a grey input.
    """
    if recipe.normalisation == "half":
        return [0.5] * recipe.channels, [0.5] * recipe.channels
    mean, std = backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
    if recipe.channels == len(mean):
        return list(mean), list(std)
    return [sum(mean) / len(mean)] * recipe.channels, [sum(std) / len(std)] * recipe.channels
