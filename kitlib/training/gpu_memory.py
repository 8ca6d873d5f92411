"""Estimates the GPU memory that training with a recipe needs, and explains out-of-memory errors."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from kitlib.device import autocast, computing_in, is_out_of_memory
from kitlib.errors import TrainingError
from kitlib.models.classifier import Classifier, FindingsClassifier, StudyClassifier
from kitlib.models.families import family_of
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.models.pyramid import PyramidDetector
from kitlib.models.segmenter import Segmenter, segmentation_loss
from kitlib.recipes.fields import TrainingRecipe
from kitlib.settings import override

GIB = 2**30
T4_GIB = 14.6  # GiB that torch can use on one of Kaggle's T4 GPUs
# Rule of thumb for what the estimate leaves out: cuDNN's workspaces, gaps between blocks, and gradients of activations.
SURCHARGE = 1.1
# Tensors of the size of the trainable weights that an optimiser keeps.
OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}
CPU = torch.device("cpu")


def training_memory_gib(recipe: TrainingRecipe) -> float:
    """Estimate the GPU memory in GiB that one process needs to train a model with this recipe in mixed float16.

    The estimate is the memory of the weights, gradients, optimiser states, moving average, and activations that a batch's
    forward pass keeps for the backward pass, plus 10 % (SURCHARGE). Stages that the recipe unfreezes later count as
    trainable. Only the shapes of tensors are computed, not their values, so the estimate takes a second or two and needs no
    GPU.
    """
    # Imported here, because training does not need this private class, which torch may move.
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = override(recipe, starting_weights="", **({"random_parts": ()} if hasattr(recipe, "random_parts") else {}))
    family = family_of(plain)
    is_yolo = family.name == "yolo"
    # ultralytics needs tensors with values to build a YOLO. The number of classes hardly changes the memory.
    with nullcontext() if is_yolo else torch.device("meta"):
        model = family.network(plain, ["class 1", "class 2"]).train()
    if isinstance(model, Classifier):
        model.unfreeze(plain.epochs - 1)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    kept: dict[int, torch.UntypedStorage] = {}  # keyed by address; references are kept, so that no address is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), computing_in("16-mixed"):
        weights = {
            f"model.{name}": torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        pixels = torch.zeros(recipe.batch_size, recipe.image_size, recipe.image_size, dtype=torch.uint8)
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(CPU):
            outputs = functional_call(_TrainingForward(model), weights, (pixels,))
        del outputs
        known = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        activations = sum(storage.nbytes() for address, storage in kept.items() if address not in known)
    copies = 1 + (recipe.ema_decay > 0 or is_yolo)  # ultralytics always uses a moving average
    states = 1 + OPTIMIZER_STATES[recipe.optimizer]
    return SURCHARGE * (copies * whole + states * trainable + activations) / GIB


class _TrainingForward(nn.Module):
    """Module that runs a network's forward pass as in training, without steps that depend on tensor values.

    Such steps, for example the choice of regions in a Faster R-CNN, need little memory.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> Any:
        model: Any = self.model
        recipe = model.recipe
        if isinstance(model, Segmenter):
            return segmentation_loss(model(model.normalise(pixels)), pixels, recipe)
        if isinstance(model, Classifier):
            x = model.normalise(pixels)
            if isinstance(model, StudyClassifier) and recipe.segmentation:
                return model.with_mask(x)
            return model.with_auxiliary(x) if isinstance(model, FindingsClassifier) and recipe.auxiliary else model(x)
        grey = pixels[:, None].float() / 255
        if not isinstance(model, PyramidDetector):
            return model.model(grey.expand(-1, 3, -1, -1))
        maps = list(model.model.backbone(grey.expand(-1, recipe.channels, -1, -1)).values())
        if not isinstance(model, FasterRCNNDetector):
            return model.model.head(maps)
        heads = model.model.roi_heads
        regions = torch.zeros(len(pixels) * recipe.box_samples, recipe.fpn_channels, 7, 7, requires_grad=True)
        return model.model.rpn.head(maps), heads.box_predictor(heads.box_head(regions))


@contextmanager
def explaining_memory(recipe: TrainingRecipe) -> Iterator[None]:
    """Context manager: if its block runs out of memory, raises a TrainingError that says what to change in the recipe."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size, step = recipe.batch_size, recipe.nominal_batch or recipe.batch_size
        advice = "Lower image_size, or choose a smaller backbone"
        if size > 1:
            changes = f'{{"batch_size": {size // 2}, "nominal_batch": {step}}}'
            advice = f"Set overrides {changes}: gradients are then accumulated, and a step still has {step} images"
        raise TrainingError(
            f"{'out' if 'memory' in str(error) else 'probably out'} of memory with batch_size {size} and nominal_batch "
            f"{recipe.nominal_batch} at image_size {recipe.image_size} ({str(error).splitlines()[0]}). {advice}. "
            "docs/training.md lists each recipe's memory"
        ) from error
