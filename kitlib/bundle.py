"""A trained model on disk: `weights.safetensors` and `model.json`. Nothing is unpickled, in or out."""

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kitlib
from kitlib.atomic import replacing, write_json
from kitlib.errors import BundleError
from kitlib.tables import OPEN, SCHEMAS

logger = logging.getLogger(__name__)

WEIGHTS, RECORD = "weights.safetensors", "model.json"

# Keys of a record and their types: what the caller states, and what `save_bundle` adds.
STATED: dict[str, type | tuple[type, ...]] = {
    "family": str,  # "study", "findings", "patches", "segmenter", "faster_rcnn" or "yolo": who rebuilds the model
    "model": str,  # the name that its rows carry in tables
    "classes": list,
    "recipe": dict,  # fields of the recipe's dataclass
    "architecture": dict,  # what the recipe does not say, {} if nothing
    "longest_side": int,  # of the decoded copies that it was trained on, pixels; see kitlib.xrays.cache
    "image_size": int,  # side of the square canvas, pixels
    "placement": str,  # "letterbox" or "stretch"
    "mean": list,  # a channel, of pixels scaled to 0..1
    "std": list,
    "fold": int,  # the fold it has not seen
    "data_fingerprint": str,  # see data_fingerprint
    "validation": dict,  # scores on that fold
}
ADDED: dict[str, type | tuple[type, ...]] = {"tied": dict, "weights_sha256": str, "versions": dict}


def save_bundle(folder: str | Path, state_dict: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write the weights, then the record with their SHA-256; a killed process leaves no bundle that reads.

    `record` holds exactly the keys of `STATED`, in JSON's own types (tuples pass for lists). Tensors may be on any device
    and may be tied: one that appears under several names is stored once, the other names go into `tied`.
    """
    folder = Path(folder)
    record = {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}
    _check_record(record, STATED, f"record for {folder}")
    stored, tied = _untied(state_dict)
    (folder / RECORD).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as beside:
        save_file(stored, beside)
        digest = file_digest(beside)
    write_json(folder / RECORD, {**record, "tied": tied, "weights_sha256": digest, "versions": versions()})


def read_bundle(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the weights (on the CPU). Raises BundleError: missing file, wrong hash, missing or unknown keys."""
    record = read_record(folder)
    record_path, weights_path = Path(folder) / RECORD, Path(folder) / WEIGHTS
    digest = file_digest(weights_path)
    if digest != record["weights_sha256"]:
        raise BundleError(
            f"{weights_path} has SHA-256 {digest}, but {record_path} promises {record['weights_sha256']}: "
            "the two are not of one run, or the copy is damaged; copy both again"
        )
    weights = read_weights(weights_path)
    for alias, name in record["tied"].items():
        if name not in weights:
            raise BundleError(f"{record_path} ties {alias!r} to {name!r}, which {weights_path} lacks; copy both again")
        weights[alias] = weights[name]
    return record, weights


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record alone, without looking at the weights. Raises BundleError: missing file, missing or unknown keys."""
    folder = Path(folder)
    for path in (folder / RECORD, folder / WEIGHTS):
        if not path.is_file():
            there = sorted(entry.name for entry in folder.glob("*")) if folder.is_dir() else "no such folder"
            raise BundleError(f"{path} is missing; in {folder}: {there}. Name the `bundle` folder of a finished run")
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is no JSON ({error}); copy the bundle again from its run") from error
    if not isinstance(record, dict):
        raise BundleError(f"{path} holds a {type(record).__name__} instead of an object; copy the bundle again")
    _check_record(record, STATED | ADDED, str(path))
    return record


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, on the CPU. Pickles (.pt, .pth, .bin, .ckpt) are refused with BundleError."""
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"no weights file {path}; give a local .safetensors file, nothing is downloaded")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BundleError(
            f"{path} is no safetensors file ({error}). Pickles are never loaded: convert it once, where it was made, with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        ) from error


def data_fingerprint(**tables: pd.DataFrame) -> str:
    """SHA-256 (hex) over what makes a training set: ids, labels, boxes and folds, whatever the order of rows or columns.

    Tables go by their name in `kitlib.tables`. Of `images` only ids count: paths, sizes and views may be re-read elsewhere.
    """
    digest = hashlib.sha256()
    for name in sorted(tables):
        columns = ["image_id", "study_id", "patient_id"] if name == "images" else sorted(SCHEMAS[name])
        if name in OPEN:
            columns = sorted(tables[name].columns)
        rows = tables[name][columns].sort_values(columns).to_csv(index=False, float_format="%.6f", lineterminator="\n")
        digest.update(f"{name}\n{rows}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a model's numbers depend on."""
    return {"kitlib": kitlib.__version__, **{name: version(name) for name in ("torch", "torchvision", "timm")}}


def _check_record(record: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], where: str) -> None:
    missing, unknown = [key for key in kinds if key not in record], [key for key in record if key not in kinds]
    if missing or unknown:
        raise BundleError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; read it with the kitlib that wrote it "
            f"({record.get('versions', 'version not stated')}; this is {kitlib.__version__})"
        )
    for key, kind in kinds.items():
        if type(record[key]) is not kind:
            raise BundleError(f"{where}: {key} is {record[key]!r}, wanted {getattr(kind, '__name__', kind)}")


def _untied(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share no memory, and alias -> name for those that are one tensor."""
    stored, tied = {}, {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            # A view would drag its whole storage along, and safetensors refuses storage shared between names.
            stored[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return stored, tied


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
