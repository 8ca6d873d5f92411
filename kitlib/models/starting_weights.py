"""Reads starting weights from a finished run or a file, and copies into a network the tensors with its names and shapes."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitlib.bundle import RECORD, file_digest, read_bundle, read_record
from kitlib.errors import BundleError
from kitlib.models.published_names import count_fitting, timm_names, without_prefixes
from kitlib.models.weights_file import read_weights_file
from kitlib.paths import find_starting_weights
from kitlib.recipes.fields import WithBackbone

logger = logging.getLogger(__name__)
FIXED = ("num_batches_tracked", "gem_power")  # tensors that start with a fixed value, not a random one


def read_starting_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read starting weights; return their tensors by name, on the CPU. For `path` see `find_starting_weights`.

    Raises BundleError if the weights are missing, cannot be read (see `read_weights_file`), or do not match the hash in
    the record of their bundle.
    """
    source = find_starting_weights(path)
    return read_bundle(source)[1] if source.is_dir() else read_weights_file(source)


def starting_weights_digest(path: str | Path) -> str:
    """Return the SHA-256 (hex) of the weights file at `path`; for a bundle, return the hash in its record, unchecked."""
    source = find_starting_weights(path)
    if not source.is_dir():
        return file_digest(source)
    return json.loads((source / RECORD).read_text(encoding="utf-8"))["weights_sha256"]


def differ_in_classes(path: str | Path, classes: Sequence[str]) -> bool:
    """Return whether the starting weights at `path` are a bundle that has other classes, or has them in another order."""
    source = find_starting_weights(path)
    return source.is_dir() and tuple(read_record(source)["classes"]) != tuple(classes)


def load_starting_weights(
    model: nn.Module, path: str | Path, prefix: str = "backbone.", left_out: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Copy the starting weights at `path` into `model` as far as they fit; return a dict of three lists of tensor names.

    "loaded" lists the tensors that were copied, "random" the model's tensors that keep their random values (without counters
    of batch norm), and "unused" the file's tensors that were not copied. The file may contain the whole model or, like
    published weights, only the part of the model whose tensor names begin with `prefix`. Several variants of the file's
    names are tried: with `prefix` added, without the prefixes that training code adds and, for a timm backbone, as converted
    by timm (see kitlib.models.published_names). The variant with which most tensors fit is used. The model's head is loaded
    only if all its tensors fit, because part of a head for other classes is useless. Tensors whose names begin with one of
    `left_out` are never loaded.

    If the model has grey input and the file's first convolution has 3 colours, the convolution's weights are summed over the
    colours (timm's rule). In the reverse case each colour gets a third of the weights, which assumes that all colours have
    the same normalisation. Raises BundleError if no tensor fits.
    """
    published, target = read_starting_weights(path), model.state_dict()
    variants = [
        *without_prefixes(published),
        *({prefix + name: tensor for name, tensor in names.items()} for names in without_prefixes(published)),
    ]
    if prefix == "backbone.":
        named = timm_names(published, model.backbone)
        variants.append({prefix + name: tensor for name, tensor in named.items()})
    tensors = max(variants, key=partial(count_fitting, target=target))
    loaded = {}
    for name, tensor in tensors.items():
        model_tensor = target.get(name)
        if model_tensor is None or name.startswith(left_out):
            continue
        if tensor.ndim == 4 and model_tensor.ndim == 4 and (tensor.shape[1], model_tensor.shape[1]) in ((3, 1), (1, 3)):
            colours = model_tensor.shape[1]
            tensor = tensor.sum(dim=1, keepdim=True).expand(-1, colours, -1, -1) / colours
        if tensor.shape == model_tensor.shape:
            loaded[name] = tensor
    if any(name.startswith("head.") and name not in loaded for name in target):
        loaded = {name: tensor for name, tensor in loaded.items() if not name.startswith("head.")}
    if not loaded:
        raise BundleError(
            f"no tensor of {path} fits the model. The first tensors of the file are {sorted(published)[:3]}, those of the "
            f"model {sorted(target)[:3]}; choose the backbone that these weights belong to"
        )
    model.load_state_dict(loaded, strict=False)
    report = {
        "loaded": sorted(loaded),
        "random": sorted(name for name in set(target) - set(loaded) if not name.endswith(FIXED)),
        "unused": sorted(set(tensors) - set(loaded)),
    }
    logger.info(
        "starting weights %s: %d of the model's %d tensors loaded; left random: %s; unused: %s",
        path,
        len(loaded),
        len(target),
        _shorten(report["random"]),
        _shorten(report["unused"]),
    )
    return report


def check_random(random_names: Iterable[str], model: nn.Module, recipe: WithBackbone) -> None:
    """Raise BundleError if `model` has random tensors that the recipe does not allow.

    `random_names` are the names of tensors that should have been loaded but keep random values. The recipe allows names that
    begin with one of its `random_parts`. The message lists the parts of the model that have forbidden random tensors.
    """
    missing = [name for name in random_names if not name.startswith(recipe.random_parts or ("\0",))]
    if not missing:
        return
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    share = sum(sizes[name] for name in missing) / sum(sizes.values())
    parts = sorted({".".join(name.split(".")[:3]) for name in missing})
    raise BundleError(
        f"{recipe.starting_weights} lacks {len(missing)} tensors of {recipe.backbone}, {share:.0%} of the model's values. "
        f"These parts would stay random: {_shorten(parts)}. Use weights of exactly this network, or allow random parts with "
        f'overrides such as {{"random_parts": ["{parts[0]}"]}}'
    )


def input_differences(model: Any) -> list[str]:
    """Return a list of texts that say how a model's input differs from the training input of its starting weights.

    Each text is about one setting, such as "image_size 512 instead of 224". `model` has a `recipe`, and `mean` and `std`
    with one value per channel. If the starting weights are not a bundle but a single file, which does not state its input,
    the list is empty.
    """
    source = find_starting_weights(model.recipe.starting_weights)
    if not source.is_dir():
        return []
    record = read_record(source)

    def describe(recipe: Mapping[str, Any], mean: list[float], std: list[float]) -> dict[str, Any]:
        fields = {name: recipe.get(name, 0) for name in ("image_size", "canvas", "placement")}
        return {**fields, "channels": len(mean), "mean": list(mean), "std": list(std)}

    own = describe(asdict(model.recipe), model.mean, model.std)
    trained = describe(record["recipe"], record["mean"], record["std"])
    if own["channels"] != trained["channels"]:  # then mean and std differ as well
        del own["mean"], own["std"]
    return [f"{name} {value} instead of {trained[name]}" for name, value in own.items() if value != trained[name]]


def _shorten(names: list[str], limit: int = 6) -> str:
    suffix = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + suffix) if names else "nothing"
