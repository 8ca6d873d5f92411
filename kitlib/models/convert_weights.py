"""Extracts the tensors of a pickled PyTorch model, such as ultralytics' .pt files, without running code from the file."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kitlib.atomic import replacing
from kitlib.errors import BundleError

logger = logging.getLogger(__name__)
# Parts of Python's standard library that checkpoints normally refer to; any other part is suspicious.
HARMLESS = ("argparse", "builtins", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "types", "typing")
# Keys of a checkpoint that may hold the model; the moving average comes first, as in ultralytics.
MODEL_KEYS = ("ema", "model_ema", "model")


class _Shell:
    """Dummy that replaces every class and function to which a pickle file refers; accepts and ignores all arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def convert_weights(source: str | Path, target: str | Path) -> list[str]:
    """Write the tensors of the pickled model in `source` to the .safetensors file `target`.

    Returns the names of the classes and functions to which the pickle refers. PyTorch's restricted unpickler reads the file,
    and each of these classes and functions is replaced by a dummy, so that no code from the file or from ultralytics is run.
    The tensors have the names that `model.state_dict()` would give them; half precision is converted to float32. Raises
    BundleError if the file cannot be read in this way, if it refers to a suspicious part of Python's standard library, or if
    it contains no model.
    """
    source = Path(source)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception as error:  # a damaged or hostile pickle may raise any error
        raise BundleError(f"{source} cannot be read as a PyTorch file ({_reason(error)})") from error
    top_levels = {name: name.partition(".")[0] for name in names}
    if suspicious := [n for n, top in top_levels.items() if top in sys.stdlib_module_names and top not in HARMLESS]:
        raise BundleError(f"{source} calls {', '.join(suspicious)}, which weights have no use for; do not trust this file")
    try:
        with torch.serialization.safe_globals([(_Shell, name) for name in names]):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BundleError(f"{source} cannot be read without running its code ({_reason(error)})") from error
    if isinstance(content, dict):
        content = next((content[key] for key in MODEL_KEYS if isinstance(content.get(key), _Shell)), None)
    tensors = dict(_tensors(content)) if isinstance(content, _Shell) else {}
    if not tensors:
        raise BundleError(
            f"{source} is not a pickled model and has none under the keys {MODEL_KEYS}; a state dictionary needs no "
            "conversion, so use the file itself as starting weights"
        )
    with replacing(target) as temporary_path:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, temporary_path)
    logger.info("%s: %d tensors written to %s", source, len(tensors), target)
    return names


def _reason(error: Exception) -> str:
    """Return short text for a message: the type of an error, and the beginning of the error's own message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _tensors(module: _Shell, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield pairs (name, tensor) for the parameters and buffers of a module that `state_dict` returns, with its names."""
    state = module.state if isinstance(module.state, dict) else {}
    left_out = state.get("_non_persistent_buffers_set")
    left_out = left_out if isinstance(left_out, set) else ()
    for name, tensor in {**(state.get("_parameters") or {}), **(state.get("_buffers") or {})}.items():
        if isinstance(tensor, torch.Tensor) and name not in left_out:
            yield prefix + name, tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    for name, part in (state.get("_modules") or {}).items():
        if isinstance(part, _Shell):
            yield from _tensors(part, f"{prefix}{name}.")
