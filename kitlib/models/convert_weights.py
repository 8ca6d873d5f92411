"""Takes the tensors out of a pickled PyTorch model, such as ultralytics' .pt, without running any code of the file."""

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
# Parts of Python's library that checkpoints contain; weights have no use for any other.
HARMLESS = ("argparse", "builtins", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "types", "typing")
MODEL_KEYS = ("ema", "model_ema", "model")  # of a checkpoint; the moving average comes first, as in ultralytics


class _Shell:
    """Dummy used in place of every class or function named in a file; it accepts any arguments and ignores them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def convert_weights(source: str | Path, target: str | Path) -> list[str]:
    """Write the tensors of the pickled model in `source` to the .safetensors file `target`; return the classes it names.

    PyTorch's restricted unpickler reads the file, and every class or function that it names is replaced by an empty shell,
    so that nothing of the file, nor of ultralytics, is run. The names of the tensors are those of `model.state_dict()`;
    half precision becomes float32. Raises BundleError if the file cannot be read so, names a part of Python's library that
    weights have no use for, or contains no model.
    """
    source = Path(source)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception as error:  # whatever a damaged or hostile pickle leads to
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
            f"{source} contains no pickled model, alone or under {', '.join(MODEL_KEYS)}; a state dictionary needs no "
            "conversion: give the file itself as starting weights"
        )
    with replacing(target) as temporary_path:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, temporary_path)
    logger.info("%s: %d tensors written to %s", source, len(tensors), target)
    return names


def _reason(error: Exception) -> str:
    """Return the type of an error and the beginning of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _tensors(module: _Shell, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a module and of its parts, as `state_dict` names them."""
    state = module.state if isinstance(module.state, dict) else {}
    for name, tensor in {**(state.get("_parameters") or {}), **(state.get("_buffers") or {})}.items():
        if isinstance(tensor, torch.Tensor):
            yield prefix + name, tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    for name, part in (state.get("_modules") or {}).items():
        if isinstance(part, _Shell):
            yield from _tensors(part, f"{prefix}{name}.")
