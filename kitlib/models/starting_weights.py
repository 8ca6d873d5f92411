"""Where a network starts: weights of a finished run, a .safetensors or a .npz file, copied in as far as they fit."""

import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kitlib.bundle import RECORD, file_digest, read_bundle, read_weights
from kitlib.errors import BundleError, InputNotFound
from kitlib.paths import find_run

logger = logging.getLogger(__name__)

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def find_starting_weights(path: str | Path) -> Path:
    """The bundle folder or the file that `path` names: an existing path, else a run or its bundle, found by `find_run`.

    Of a run folder it is the bundle inside. Raises BundleError.
    """
    found = Path(path)
    if not found.exists():
        if found.suffix in (".safetensors", ".npz", *PICKLES):
            raise BundleError(f"no weights file {found}; give a local .safetensors or .npz file, nothing is downloaded")
        try:
            found = find_run(path)
        except InputNotFound as error:
            raise BundleError(f"starting weights {str(path)!r} are no file, folder or finished run: {error}") from error
    return found / "bundle" if (found / "bundle").is_dir() else found


def read_starting_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, of what `find_starting_weights` finds: a bundle (its hash is checked) or a file.

    Raises BundleError; nothing is ever unpickled.
    """
    found = find_starting_weights(path)
    if found.is_dir():
        return read_bundle(found)[1]
    return _read_arrays(found) if found.suffix == ".npz" else read_weights(found)


def starting_weights_digest(path: str | Path) -> str:
    """SHA-256 (hex) of the weights that `find_starting_weights` finds; of a bundle the one that its record promises."""
    found = find_starting_weights(path)
    if not found.is_dir():
        return file_digest(found)
    return json.loads((found / RECORD).read_text(encoding="utf-8"))["weights_sha256"]


def load_starting_weights(model: nn.Module, path: str | Path, prefix: str = "backbone.") -> dict[str, list[str]]:
    """Copy into `model` what fits of `read_starting_weights(path)`; the rest of the model keeps its random weights.

    The names there are those of the whole model or those of its part `prefix` (a plain timm checkpoint), whichever fits more
    tensors. A `head` is taken whole or not at all: half of one that was made for other classes is no start. A first
    convolution for 3 colours is summed for a grey model (timm's rule) and a grey one is spread evenly over 3, which is right
    when the grey input is normalised like the colours. Returns and logs the names: `loaded`, `random` (of the model),
    `unused` (of the file). Raises BundleError if nothing fits.
    """
    found, target = read_starting_weights(path), model.state_dict()
    prefix = max(("", prefix), key=lambda start: sum(start + name in target for name in found))
    loaded = {}
    for name, tensor in found.items():
        wanted = target.get(prefix + name)
        if wanted is None:
            continue
        if tensor.ndim == 4 and wanted.ndim == 4 and (tensor.shape[1], wanted.shape[1]) in ((3, 1), (1, 3)):
            colours = wanted.shape[1]
            tensor = tensor.sum(dim=1, keepdim=True).expand(-1, colours, -1, -1) / colours
        if tensor.shape == wanted.shape:
            loaded[prefix + name] = tensor
    if any(name.startswith("head.") and name not in loaded for name in target):
        loaded = {name: tensor for name, tensor in loaded.items() if not name.startswith("head.")}
    if not loaded:
        raise BundleError(
            f"{path} fits nowhere: it begins with {sorted(found)[:3]}, the model with {sorted(target)[:3]}; "
            "choose the backbone that these weights belong to"
        )
    model.load_state_dict(loaded, strict=False)
    report = {
        "loaded": sorted(loaded),
        "random": sorted(set(target) - set(loaded)),
        "unused": sorted(name for name in found if prefix + name not in loaded),
    }
    logger.info(
        "starting weights %s: %d of the model's %d tensors loaded; left random: %s; unused: %s",
        path,
        len(loaded),
        len(target),
        _shortened(report["random"]),
        _shortened(report["unused"]),
    )
    return report


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path} cannot be read as .npz ({error}); it has to hold plain numeric arrays, and pickles are never loaded"
        ) from error


def _shortened(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + rest) if names else "nothing"
