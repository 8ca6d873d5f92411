"""Renames the tensors of published weights to the names of a timm network, and resizes position embeddings."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

# What training scripts put before the names: DataParallel, Lightning, hub models, CheXNet's class and others.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.", "base_model.", "densenet121.")
# The functions of timm's modules that convert published names and shapes to those of its networks.
TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "pretrained_filter_fn")


def timm_names(tensors: Mapping[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """Return `tensors` with the names, and as far as timm converts them the shapes, of the timm network `network`.

    Prefixes (PREFIXES) are removed in any combination, and timm's own conversion for the network is applied if it gives more
    names of the network: it also resizes position embeddings to the network's image size. Of all variants, the one with
    most names of the network is returned; names that belong to no part of it are kept.
    """
    variants = [variant for names in without_prefixes(tensors) for variant in _converted(names, network)]
    return max(variants, key=partial(count_fitting, target=network.state_dict()))


def count_fitting(tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return how many of `tensors` have a name in `target`, and how many of these also have its shape."""
    known = [name for name in tensors if name in target]
    return len(known), sum(tensors[name].shape == target[name].shape for name in known)


def without_prefixes(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors as they are, and then again each time after one of PREFIXES has been removed from their names."""
    names = dict(tensors)
    yield names
    while prefix := next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), ""):
        shorter = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
        if len(shorter) < len(names):  # two tensors would get one name
            return
        names = shorter
        yield names


def _converted(names: dict[str, torch.Tensor], network: Any) -> Iterator[dict[str, torch.Tensor]]:
    yield names
    module = sys.modules[type(network).__module__]
    convert: Callable[..., Any] | None = next(
        (getattr(module, name) for name in TIMM_FILTERS if hasattr(module, name)), None
    )
    if convert:
        try:
            takes_network = len(inspect.signature(convert).parameters) > 1
            converted = convert(dict(names), *([network] if takes_network else []))
        except (KeyError, ValueError, RuntimeError, AttributeError, IndexError):
            return  # the tensors are of another network
        yield {name: tensor for name, tensor in converted.items() if isinstance(tensor, torch.Tensor)}
