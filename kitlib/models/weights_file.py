"""Reads published weights: .safetensors, .npz and PyTorch files. Only tensors and plain containers are unpickled."""

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
            f"{path} has NaN or infinite values in {len(broken)} tensors, such as {broken[0]!r}. The training diverged, or "
            "the file is damaged. Fetch the file again, or use other weights"
        )
    return tensors


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise any error
        raise BundleError(
            f"{path} cannot be read as weights ({type(error).__name__}). The file is damaged, or contains pickled objects, "
            "which are never loaded, because they may run code. Where the model was made, save its state dictionary with "
            "`safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`. For ultralytics' files, see "
            "`python -m kitlib convert-weights --help`"
        ) from error


def _find_state(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the dictionary of tensors in a checkpoint. If there is none, raises BundleError with the checkpoint's keys.

    Tensors next to one of STATE_KEYS, such as a loss, are returned only if no mapping under STATE_KEYS has tensors.
    """
    waiting, seen = [content], set()
    beside: dict[str, torch.Tensor] = {}
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
    found = f"the keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise BundleError(
        f"{path} has no dictionary of tensors in a known place, only {found}; expected the tensors at the top level, or "
        f"under one of the keys {', '.join(map(repr, STATE_KEYS))}"
    )


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path} cannot be read as .npz ({error}). Save plain numeric arrays; pickled objects are never loaded"
        ) from error
