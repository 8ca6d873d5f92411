"""Reads published weights: .safetensors, .npz and PyTorch files, of which only tensors are unpickled, never objects."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kitlib.bundle import read_weights
from kitlib.errors import BundleError
from kitlib.paths import PICKLES

# Keys under which checkpoints of training scripts, timm and Lightning hold the weights; the moving average comes first.
STATE_KEYS = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "weights",
)


def read_weights_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a weights file, keyed by name, on the CPU.

    A .safetensors or .npz file contains only tensors. A PyTorch file (.pth, .pt, .bin, .ckpt or .pkl) is read with
    `weights_only`, which refuses everything but tensors and plain containers, so no code from the file is run. The weights
    are the dictionary in the file or, if the file is a checkpoint, an entry of this dictionary such as "state_dict" (see
    STATE_KEYS). Raises BundleError if the file cannot be read in this way, if it contains no tensor, or if a value is not
    finite.
    """
    path = Path(path)
    if path.suffix == ".npz":
        tensors = _read_arrays(path)
    elif path.suffix in PICKLES and path.is_file():
        tensors = _find_state(_read_checkpoint(path), path)
    else:
        tensors = read_weights(path)
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise BundleError(
            f"{path} has {len(broken)} tensors with values that are infinite or not a number, such as {broken[0]}: the "
            "training that wrote them diverged, or the file is damaged; fetch the file again, or use other weights"
        )
    return tensors


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise any error
        raise BundleError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or contains objects other than "
            "tensors. Such pickles are never loaded, because they may run code. Where the model was made, save its state "
            "dictionary: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'). For ultralytics' files, "
            "see `python -m kitlib convert-weights --help`"
        ) from error


def _find_state(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the dictionary of tensors in a checkpoint. Raises BundleError, which lists the keys, if there is none.

    Tensors beside an entry of STATE_KEYS, such as a loss, are returned only if no such entry contains tensors.
    """
    waiting, seen, beside = [content], set(), {}
    while waiting:
        mapping = waiting.pop(0)
        if not isinstance(mapping, Mapping) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        entries = [mapping[key] for key in STATE_KEYS if isinstance(mapping.get(key), Mapping)]
        tensors = {str(name): value.detach() for name, value in mapping.items() if isinstance(value, torch.Tensor)}
        if tensors and not entries:
            return tensors
        waiting += entries
        beside = beside or tensors
    if beside:
        return beside
    keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise BundleError(
        f"{path} contains no dictionary of tensors, only: {keys}; the file must be a dictionary of tensors, or have one "
        f"under one of the keys {', '.join(STATE_KEYS)}"
    )


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path} cannot be read as .npz ({error}); it must contain plain numeric arrays; pickles are never loaded"
        ) from error
