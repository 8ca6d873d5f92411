"""Bundles: a trained model on disk as `weights.safetensors` and `model.json`. Nothing is pickled or unpickled."""

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
from kitlib.classes import ONE_FINDING
from kitlib.device import RECORDED
from kitlib.errors import BundleError
from kitlib.tables import OPEN, SCHEMAS

logger = logging.getLogger(__name__)

WEIGHTS, RECORD = "weights.safetensors", "model.json"

# Keys of a record and their types: those that the caller passes, and those that `save_bundle` adds.
STATED: dict[str, type | tuple[type, ...]] = {
    "family": str,  # "study", "findings", "patches", "segmenter" or a detector's; decides how the model is rebuilt
    "model": str,  # the model's name in tables of predictions
    "classes": list,
    "recipe": dict,  # fields of the recipe's dataclass
    "architecture": dict,  # what the recipe does not determine; may be empty
    "longest_side": int,  # longest side in pixels of the decoded images used in training; see kitlib.xrays.cache
    "image_size": int,  # side of the square canvas, pixels
    "placement": str,  # "letterbox" or "stretch"
    "mean": list,  # per channel, of pixels scaled to 0..1
    "std": list,
    "fold": int,  # the fold that was left out of training
    "precision": str,  # number format used in training: "float32", "bfloat16" or "float16"
    "data_fingerprint": str,  # see data_fingerprint
    "validation": dict,  # scores on that fold
}
ADDED: dict[str, type | tuple[type, ...]] = {"tied": dict, "weights_sha256": str, "versions": dict, "record_sha256": str}


def save_bundle(folder: str | Path, state_dict: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write a trained model to `folder` as a bundle: first weights.safetensors, then the record, model.json.

    `record` must have exactly the keys of STATED, such as "model", "classes" and "recipe", with values of JSON types. Tuples
    are written as lists. The SHA-256 of the weights is added to the record. The tensors may be on any device. A tensor with
    several names is stored once, under the first name; the record lists the other names under the key `tied`. After an
    interrupted write, the folder has no readable bundle.
    """
    folder = Path(folder)
    record = {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}
    _check_record(record, STATED, f"record for {folder}")
    stored, tied = _untied(state_dict)
    (folder / RECORD).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as temporary_path:
        save_file(stored, temporary_path)
        digest = file_digest(temporary_path)
    record = {**record, "tied": tied, "weights_sha256": digest, "versions": versions()}
    write_json(folder / RECORD, {**record, "record_sha256": record_digest(record)})


def read_bundle(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a bundle's record (the content of model.json) and its weights (on the CPU, keyed by tensor name).

    Raises BundleError if a file is missing, a hash is wrong, keys are missing or unknown, or weights are NaN or infinite.
    """
    record = read_record(folder)
    record_path, weights_path = Path(folder) / RECORD, Path(folder) / WEIGHTS
    digest = file_digest(weights_path)
    if digest != record["weights_sha256"]:
        raise BundleError(
            f"{weights_path} has SHA-256 {digest}, but {record_path} requires {record['weights_sha256']}. One of the two "
            "files is damaged or from another run; copy both again"
        )
    weights = read_weights(weights_path)
    for alias, name in record["tied"].items():
        if name not in weights:
            raise BundleError(
                f"{record_path} says that the tensor {alias!r} is the same as {name!r}, but {weights_path} has no tensor "
                f"{name!r}; copy both files again"
            )
        weights[alias] = weights[name]
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BundleError(
                f"{weights_path}: the tensor {name!r} has NaN or infinite values; train the model {record['model']!r} again"
            )
    return record, weights


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return a bundle's record (the content of model.json) without reading its weights.

    Raises BundleError if a file is missing, keys are missing or unknown, or the record was changed after it was written.
    """
    folder = Path(folder)
    for path in (folder / RECORD, folder / WEIGHTS):
        if not path.is_file():
            available = sorted(entry.name for entry in folder.glob("*")) if folder.is_dir() else "nothing (no such folder)"
            raise BundleError(
                f"{path} is missing; {folder} contains: {available}. Give the `bundle` folder of a finished run"
            )
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); copy the bundle again") from error
    if not isinstance(record, dict):
        raise BundleError(f"{path} holds a {type(record).__name__} instead of an object; copy the bundle again")
    if "record_sha256" not in record and "weights_sha256" in record:
        raise BundleError(f"{path} has no key 'record_sha256', because an older kitlib wrote it; train the model again")
    _check_record(record, STATED | ADDED, str(path))
    if record["record_sha256"] != record_digest(record):
        raise BundleError(
            f"{path} was changed after it was written, so its classes, sizes or recipe may not belong to the weights; "
            "copy the bundle again"
        )
    return record


def record_digest(record: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of a bundle's record without `record_sha256`. The order of the keys does not matter."""
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "record_sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file, on the CPU. Raises BundleError for any other file, such as a pickle."""
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"the weights file {path} does not exist; give a local .safetensors file, nothing is downloaded")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BundleError(
            f"{path} is not a safetensors file ({error}). Pickles are never loaded; on the computer that wrote the pickle, "
            "call safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        ) from error


def data_fingerprint(**tables: pd.DataFrame) -> str:
    """Return the SHA-256 (hex) of tables of training data. The order of rows and columns does not matter.

    Pass each table as a keyword argument with the table's name in `kitlib.tables`, such as `labels`. Of the table `images`,
    only image_id, study_id and patient_id are used, because other columns, such as `path`, may differ between machines.
    """
    digest = hashlib.sha256()
    for name in sorted(tables):
        columns = ["image_id", "study_id", "patient_id"] if name == "images" else sorted(SCHEMAS[name])
        if name in OPEN:
            columns = sorted(tables[name].columns)
        if "finding" in columns and set(tables[name].get("finding", ())) <= {ONE_FINDING}:
            columns.remove("finding")  # so that fingerprints of older models, whose boxes had no finding, still match
        rows = tables[name][columns].sort_values(columns).to_csv(index=False, float_format="%.6f", lineterminator="\n")
        digest.update(f"{name}\n{rows}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that a model's predictions depend on, keyed by package."""
    return {"kitlib": kitlib.__version__, **{name: version(name) for name in ("torch", "torchvision", "timm")}}


def _check_record(record: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], where: str) -> None:
    missing, unknown = [key for key in kinds if key not in record], [key for key in record if key not in kinds]
    if missing == ["precision"] and not unknown:
        raise BundleError(f"{where} has no key 'precision', because an older kitlib wrote it; train the model again")
    if missing or unknown:
        raise BundleError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; use the kitlib version that wrote this record "
            f"(versions: {record.get('versions', 'not stated')}) instead of {kitlib.__version__}"
        )
    for key, kind in kinds.items():
        if type(record[key]) is not kind:
            expected = getattr(kind, "__name__", kind)
            raise BundleError(f"{where}: the value of {key!r} is {record[key]!r}; its type must be {expected}")
    if record["precision"] not in RECORDED.values():
        valid = ", ".join(RECORDED.values())
        raise BundleError(f"{where}: the value of 'precision' is {record['precision']!r}; valid: {valid}")


def _untied(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor once, under its first name, and a dict from every other name to the tensor's first name."""
    stored, tied = {}, {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
            # Cloned, because a view would save its whole storage, and safetensors refuses storage shared between names.
            stored[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    return stored, tied


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
