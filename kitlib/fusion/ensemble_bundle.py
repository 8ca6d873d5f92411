"""Writes, reads and applies trained ensembles, stored as folders ("bundles") with `weights.safetensors` and `ensemble.json`.

Reading and applying an ensemble does not import torch.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import kitlib
from kitlib.atomic import replacing, write_json
from kitlib.errors import BundleError
from kitlib.fusion.ensembles import IN_SAMPLE, Weights, combine, learn
from kitlib.scoring.temperature import scaled

if TYPE_CHECKING:
    from kitlib.fusion.flannel import EnsembleSettings
    from kitlib.fusion.stacking import LearnerScores

WEIGHTS, RECORD = "weights.safetensors", "ensemble.json"
KEYS = ("image_id", "study_id")

# Keys of ensemble.json and their types.
RECORD_FIELDS: dict[str, type] = {
    "name": str,  # value of the `model` column in the ensemble's predictions
    "method": str,  # a method of kitlib.fusion.ensembles.combine
    "learners": list,  # model names, in the order of the weights
    "classes": list,
    "key": str,  # "image_id" or "study_id": whether a prediction is for an image or a study
    "temperature": float,  # applied to the combined probabilities; 1.0 leaves them unchanged
    "settings": dict,  # the EnsembleSettings it was trained with
    "folds": list,  # the folds whose predictions it was trained on
    "protocol": str,  # nested, cross-fitted or in-sample
}
ADDED_FIELDS: dict[str, type] = {"weights_sha256": str, "kitlib": str}


@dataclass(frozen=True)
class Ensemble:
    """A trained ensemble, as stored in a bundle. `weights` has the trained arrays; RECORD_FIELDS describes other fields."""

    name: str
    method: str
    learners: tuple[str, ...]
    classes: tuple[str, ...]
    key: str
    temperature: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    folds: tuple[int, ...] = ()
    protocol: str = ""
    weights: Weights = field(default_factory=dict)


def write_ensemble(folder: str | Path, ensemble: Ensemble) -> None:
    """Write an ensemble into `folder`: weights.safetensors, then ensemble.json with the SHA-256 of the weights file.

    If the process is killed while it writes, `read_ensemble` raises BundleError for the unfinished folder. Raises
    BundleError if the ensemble is invalid.
    """
    _check(ensemble, str(folder))
    folder = Path(folder)
    (folder / RECORD).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as temporary_path:
        save_file({name: np.ascontiguousarray(array) for name, array in ensemble.weights.items()}, temporary_path)
        digest = hashlib.sha256(temporary_path.read_bytes()).hexdigest()
    record = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(ensemble).items()}
    record = {key: record[key] for key in RECORD_FIELDS}
    write_json(folder / RECORD, {**record, "weights_sha256": digest, "kitlib": kitlib.__version__})


def read_ensemble(folder: str | Path) -> Ensemble:
    """Return the ensemble that `write_ensemble` has written into `folder`.

    Raises BundleError for a missing file, a wrong hash, missing or unknown keys, values of the wrong type, or weights of
    the wrong shape.
    """
    folder = Path(folder)
    for path in (folder / RECORD, folder / WEIGHTS):
        if not path.is_file():
            names = sorted(entry.name for entry in folder.glob("*"))
            available = f"the folder contains: {names}" if folder.is_dir() else f"{folder} does not exist"
            raise BundleError(f"{path} is missing; {available}. Give the `ensemble` folder of a run of notebook 65")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{folder / RECORD} is not valid JSON ({error}); copy the bundle again from its run") from error
    expected = RECORD_FIELDS | ADDED_FIELDS
    if not isinstance(record, dict) or record.keys() != expected.keys():
        raise BundleError(
            f"{folder / RECORD} must have exactly the keys {', '.join(expected)}; use the version of kitlib that wrote it"
        )
    for key, kind in expected.items():
        if type(record[key]) is not kind:
            raise BundleError(f"{folder / RECORD}: {key} is {record[key]!r}, expected {kind.__name__}")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest != record["weights_sha256"]:
        raise BundleError(
            f"{folder / WEIGHTS} has SHA-256 {digest}, but {RECORD} has {record['weights_sha256']}; copy both files again"
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is not a safetensors file ({error}); copy the bundle again") from error
    fields: dict[str, Any] = {
        key: tuple(record[key]) if kind is list else record[key] for key, kind in RECORD_FIELDS.items()
    }
    ensemble = Ensemble(**fields, weights=weights)
    _check(ensemble, str(folder))
    return ensemble


def learnt_ensemble(
    learner_scores: "LearnerScores", name: str, settings: "EnsembleSettings", temperature: float = 1.0
) -> Ensemble:
    """Return the final ensemble called `name`, trained on the learners' predictions for all folds.

    The predictions are out-of-fold or, if `settings.stack_on` is "in_sample", those for the learners' own training images.
    Means and votes are not trained. `temperature` is stored in the ensemble.
    """
    stack = learner_scores.full_stack(settings.stack_on if settings.learns else "out_of_fold")
    weights = learn(stack, settings) if settings.learns else {}
    protocol = IN_SAMPLE if settings.learns and settings.stack_on == "in_sample" else learner_scores.protocol
    folds = tuple(np.unique(stack.fold).tolist())
    learners, classes, key = learner_scores.learners, learner_scores.classes, learner_scores.key
    return Ensemble(
        name, settings.method, learners, classes, key, temperature, asdict(settings), folds, protocol, weights=weights
    )


def apply_ensemble(ensemble: Ensemble, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the ensemble's prediction for each image or study: a table with the id, the classes and `answered`.

    `answered` is the number of learners that have a score for the id. `scores` is a `study_scores` or `class_scores` table.
    Rows of models that are not learners and rows with a NaN are ignored. Each learner's folds are averaged first. If all
    learners have a score for an id, the ensemble's method combines the scores, and temperature scaling follows. Otherwise,
    the prediction is the plain mean of the available scores, because weights and temperature are valid only for all learners
    together. Raises BundleError if `scores` lacks the column `model`, the column named by `ensemble.key`, or a class.
    """
    classes = list(ensemble.classes)
    missing = [name for name in (ensemble.key, "model", *classes) if name not in scores.columns]
    if missing:
        raise BundleError(f"the scores lack columns that the ensemble {ensemble.name!r} needs: {', '.join(missing)}")
    rows = scores[scores["model"].isin(ensemble.learners)].dropna(subset=classes)
    mean = rows.groupby([ensemble.key, "model"])[classes].mean()
    ids = mean.index.get_level_values(0).unique()
    pairs = pd.MultiIndex.from_product([ids, ensemble.learners])
    probabilities = mean.reindex(pairs).to_numpy(dtype=float).reshape(len(ids), len(ensemble.learners), len(classes))
    is_available = ~np.isnan(probabilities[:, :, 0])
    answered = is_available.sum(axis=1)
    prediction = np.nan_to_num(probabilities).sum(axis=1) / np.maximum(answered, 1)[:, None]
    complete = is_available.all(axis=1)
    if complete.any():
        combined = combine(ensemble.method, ensemble.weights, probabilities[complete])
        prediction[complete] = combined if ensemble.temperature == 1 else scaled(combined, ensemble.temperature)
    table = pd.DataFrame({ensemble.key: ids.to_numpy(dtype=object)})
    return table.join(pd.DataFrame(prediction, columns=classes)).assign(answered=answered)


def _check(ensemble: Ensemble, where: str) -> None:
    count, classes = len(ensemble.learners), len(ensemble.classes)
    shapes = {
        "mean": {},
        "vote": {},
        "weighted": {"learners": (count,)},
        "flannel": {"weight": (count, (count * classes) ** 2), "bias": (count,)},
    }
    if ensemble.method not in shapes:
        raise BundleError(f"{where}: method is {ensemble.method!r}; valid methods are: {', '.join(shapes)}")
    if ensemble.key not in KEYS:
        raise BundleError(f"{where}: key is {ensemble.key!r}; valid keys are: {', '.join(KEYS)}")
    if not count or len(set(ensemble.learners)) < count or len(set(ensemble.classes)) < classes or classes < 2:
        names = f"learners {list(ensemble.learners)} and the classes {list(ensemble.classes)}"
        raise BundleError(f"{where} has the {names}; expected at least one learner and two classes, without duplicates")
    if not (np.isfinite(ensemble.temperature) and ensemble.temperature > 0):
        raise BundleError(f"{where}: temperature is {ensemble.temperature}, expected a finite number above 0")
    actual_shapes = {name: array.shape for name, array in ensemble.weights.items()}
    if actual_shapes != shapes[ensemble.method]:
        raise BundleError(
            f"{where}: {ensemble.method!r} with {count} learners and {classes} classes needs weights of the shapes "
            f"{shapes[ensemble.method]}, but the shapes are {actual_shapes}; train the ensemble again"
        )
    if not all(np.isfinite(array).all() for array in ensemble.weights.values()):
        raise BundleError(f"{where}: a weight is not finite; train the ensemble again")
