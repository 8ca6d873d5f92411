"""Starting weights: finds them in a finished run or a file, and copies the tensors that fit into a network."""

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kitlib.bundle import RECORD, file_digest, read_bundle, read_record, read_weights
from kitlib.errors import BundleError
from kitlib.paths import find_starting_weights

logger = logging.getLogger(__name__)


def read_starting_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read starting weights; return tensors on the CPU, keyed by name. For `path` see `find_starting_weights`.

    Raises BundleError if the weights are missing, cannot be read, or do not match the hash in their bundle's record. Pickles
    are never loaded.
    """
    source = find_starting_weights(path)
    if source.is_dir():
        return read_bundle(source)[1]
    return _read_arrays(source) if source.suffix == ".npz" else read_weights(source)


def starting_weights_digest(path: str | Path) -> str:
    """Return the SHA-256 (hex) of the weights file at `path`; for a bundle, return the hash in its record, unchecked."""
    source = find_starting_weights(path)
    if not source.is_dir():
        return file_digest(source)
    return json.loads((source / RECORD).read_text(encoding="utf-8"))["weights_sha256"]


def load_starting_weights(model: nn.Module, path: str | Path, prefix: str = "backbone.") -> dict[str, list[str]]:
    """Copy the tensors at `path` that fit into `model`; return lists of tensor names: `loaded`, `random` and `unused`.

    `random` lists the model's tensors that keep their random values, `unused` the file's tensors that do not fit. Names in
    the file are either those of the whole model or, as in a plain timm checkpoint, those of the model's part `prefix`;
    whichever fits more tensors is assumed. A `head` is loaded only if all of it fits, because part of a head for other
    classes is useless. If the model has grey input and the file's has 3 colours, the first convolution is summed over the
    colours (timm's rule); in the reverse case it is spread evenly over them, which assumes that grey input is normalised
    like the colours. Raises BundleError if no tensor fits.
    """
    tensors, target = read_starting_weights(path), model.state_dict()
    prefix = max(("", prefix), key=lambda start: sum(start + name in target for name in tensors))
    loaded = {}
    for name, tensor in tensors.items():
        model_tensor = target.get(prefix + name)
        if model_tensor is None:
            continue
        if tensor.ndim == 4 and model_tensor.ndim == 4 and (tensor.shape[1], model_tensor.shape[1]) in ((3, 1), (1, 3)):
            colours = model_tensor.shape[1]
            tensor = tensor.sum(dim=1, keepdim=True).expand(-1, colours, -1, -1) / colours
        if tensor.shape == model_tensor.shape:
            loaded[prefix + name] = tensor
    if any(name.startswith("head.") and name not in loaded for name in target):
        loaded = {name: tensor for name, tensor in loaded.items() if not name.startswith("head.")}
    if not loaded:
        raise BundleError(
            f"no tensor of {path} fits the model: the file's names begin with {sorted(tensors)[:3]}, the model's with "
            f"{sorted(target)[:3]}; choose the backbone that these weights belong to"
        )
    model.load_state_dict(loaded, strict=False)
    report = {
        "loaded": sorted(loaded),
        "random": sorted(set(target) - set(loaded)),
        "unused": sorted(name for name in tensors if prefix + name not in loaded),
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


def input_differences(model: Any) -> list[str]:
    """Return how a model's input differs from the one that its starting weights were trained on, one text per field.

    `model` has a `recipe`, and `mean` and `std` with a value per channel. The list is empty for a plain weights file, which
    does not say what its input was.
    """
    source = find_starting_weights(model.recipe.starting_weights)
    if not source.is_dir():
        return []
    record = read_record(source)

    def describe(recipe: Mapping[str, Any], mean: list[float], std: list[float]) -> dict[str, Any]:
        fields = {name: recipe.get(name, 0) for name in ("image_size", "canvas", "placement")}
        return {**fields, "channels": len(mean), "mean": list(mean), "std": list(std)}

    here = describe(asdict(model.recipe), model.mean, model.std)
    there = describe(record["recipe"], record["mean"], record["std"])
    if here["channels"] != there["channels"]:  # then mean and std differ as well
        del here["mean"], here["std"]
    return [f"{name} {value} instead of {there[name]}" for name, value in here.items() if value != there[name]]


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path} cannot be read as .npz ({error}); it must contain plain numeric arrays; pickles are never loaded"
        ) from error


def _shorten(names: list[str], limit: int = 6) -> str:
    suffix = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + suffix) if names else "nothing"
