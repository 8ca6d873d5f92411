"""Renames the tensors of published weights to the names of a timm network, and resizes position embeddings."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

# Prefixes that training code adds to the names of tensors: DataParallel, Lightning, hub models, CheXNet's class and others.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.", "base_model.", "densenet121.")
# Names of the functions with which timm's modules convert the tensors of published weights to those of timm's networks.
TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "pretrained_filter_fn")


def timm_names(tensors: Mapping[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """Return published weights with their tensors renamed, and if necessary reshaped, to fit the timm network `network`.

    Tries the names without the prefixes that training code adds (PREFIXES), and timm's own conversion for this network,
    which also resizes position embeddings to the network's image size. Of all these variants, returns the one with the
    largest number of tensors that the network has, too. Tensors that fit no part of the network are included.
    """
    variants = [variant for names in without_prefixes(tensors) for variant in _converted(names, network)]
    return max(variants, key=partial(count_fitting, target=network.state_dict()))


def count_fitting(tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the number of names in both `tensors` and `target`, and how many of them have tensors of equal shape."""
    known = [name for name in tensors if name in target]
    return len(known), sum(tensors[name].shape == target[name].shape for name in known)


def without_prefixes(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `tensors` unchanged, then with one prefix of PREFIXES removed from all names, then with two removed, and so on.

    Stops when no prefix remains, or when two tensors would get the same name.
    """
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
    module = sys.modules.get(type(network).__module__)
    convert: Callable[..., Any] | None = next(
        (getattr(module, name) for name in TIMM_FILTERS if hasattr(module, name)), None
    )
    if convert:
        try:
            takes_network = len(inspect.signature(convert).parameters) > 1
            converted = convert(dict(names), *([network] if takes_network else []))
        except (KeyError, ValueError, RuntimeError, AttributeError, IndexError):
            return  # the tensors belong to another network
        yield {name: tensor for name, tensor in converted.items() if isinstance(tensor, torch.Tensor)}
