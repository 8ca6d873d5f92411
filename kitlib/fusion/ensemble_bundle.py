"""An ensemble on disk: `weights.safetensors` and `ensemble.json`. Reading and applying it wants no torch."""

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
STATED: dict[str, type] = {
    "name": str,  # the model's name in the tables that it makes
    "method": str,  # of kitlib.fusion.ensembles.combine
    "learners": list,  # names of the models, in the order of the weights
    "classes": list,
    "key": str,  # "image_id" or "study_id": what a row is
    "temperature": float,  # of the combined probabilities; 1.0 leaves them as they are
    "settings": dict,  # that it was learnt with
    "folds": list,  # whose predictions it learnt from
    "protocol": str,  # how: nested, cross-fitted or in-sample
}
ADDED: dict[str, type] = {"weights_sha256": str, "kitlib": str}


@dataclass(frozen=True)
class Ensemble:
    """What a bundle holds; its fields are told at STATED."""

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
    """Write the weights, then the record with their SHA-256; a killed process leaves no bundle that reads."""
    _check(ensemble, str(folder))
    folder = Path(folder)
    (folder / RECORD).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as beside:
        save_file({name: np.ascontiguousarray(each) for name, each in ensemble.weights.items()}, beside)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    record = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(ensemble).items()}
    record = {key: record[key] for key in STATED}
    write_json(folder / RECORD, {**record, "weights_sha256": digest, "kitlib": kitlib.__version__})


def read_ensemble(folder: str | Path) -> Ensemble:
    """Raises BundleError: a missing file, a wrong hash, missing, unknown or ill-typed keys, weights of another shape."""
    folder = Path(folder)
    for path in (folder / RECORD, folder / WEIGHTS):
        if not path.is_file():
            there = sorted(entry.name for entry in folder.glob("*")) if folder.is_dir() else "no such folder"
            raise BundleError(f"{path} is missing; in {folder}: {there}. Name the `ensemble` folder of a run of notebook 65")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{folder / RECORD} is no JSON ({error}); copy the bundle again from its run") from error
    wanted = STATED | ADDED
    if not isinstance(record, dict) or record.keys() != wanted.keys():
        raise BundleError(f"{folder / RECORD} does not hold {', '.join(wanted)}; read it with the kitlib that wrote it")
    for key, kind in wanted.items():
        if type(record[key]) is not kind:
            raise BundleError(f"{folder / RECORD}: {key} is {record[key]!r}, wanted {kind.__name__}")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest != record["weights_sha256"]:
        raise BundleError(f"{folder / WEIGHTS} has SHA-256 {digest}, {RECORD} promises another; copy both again")
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is no safetensors file ({error}); copy both again") from error
    fields: dict[str, Any] = {key: tuple(record[key]) if kind is list else record[key] for key, kind in STATED.items()}
    ensemble = Ensemble(**fields, weights=weights)
    _check(ensemble, str(folder))
    return ensemble


def learnt_ensemble(found: "LearnerScores", name: str, settings: "EnsembleSettings", temperature: float = 1.0) -> Ensemble:
    """The ensemble to keep: learnt from every image, by models that have not seen it (or, in sample, that have)."""
    lesson = found.everything(settings.stack_on if settings.learns else "out_of_fold")
    weights = learn(lesson, settings) if settings.learns else {}
    protocol = IN_SAMPLE if settings.learns and settings.stack_on == "in_sample" else found.protocol
    folds = tuple(np.unique(lesson.fold).tolist())
    learners, classes, key = found.learners, found.classes, found.key
    return Ensemble(
        name, settings.method, learners, classes, key, temperature, asdict(settings), folds, protocol, weights=weights
    )


def apply_ensemble(ensemble: Ensemble, scores: pd.DataFrame) -> pd.DataFrame:
    """One row an id: key, the classes, and `answered`, how many of the ensemble's learners have a score of it.

    `scores` is a table study_scores or class_scores; a learner's folds are averaged first, rows of other models and rows
    with a NaN are not heeded. Where a learner is missing the row is the plain mean of those there, at no temperature:
    FLANNEL and weights were learnt for all together. Raises BundleError where the table lacks a class or the key.
    """
    classes = list(ensemble.classes)
    missing = [name for name in (ensemble.key, "model", *classes) if name not in scores.columns]
    if missing:
        raise BundleError(f"the scores lack {', '.join(missing)}, which the ensemble {ensemble.name} combines")
    own = scores[scores["model"].isin(ensemble.learners)].dropna(subset=classes)
    mean = own.groupby([ensemble.key, "model"])[classes].mean()
    ids = mean.index.get_level_values(0).unique()
    wanted = pd.MultiIndex.from_product([ids, ensemble.learners])
    found = mean.reindex(wanted).to_numpy(dtype=float).reshape(len(ids), len(ensemble.learners), len(classes))
    there = ~np.isnan(found[:, :, 0])
    answered = there.sum(axis=1)
    answer = np.nan_to_num(found).sum(axis=1) / np.maximum(answered, 1)[:, None]
    whole = there.all(axis=1)
    if whole.any():
        combined = combine(ensemble.method, ensemble.weights, found[whole])
        answer[whole] = combined if ensemble.temperature == 1 else scaled(combined, ensemble.temperature)
    table = pd.DataFrame({ensemble.key: ids.to_numpy(dtype=object)})
    return table.join(pd.DataFrame(answer, columns=classes)).assign(answered=answered)


def _check(ensemble: Ensemble, where: str) -> None:
    count, classes = len(ensemble.learners), len(ensemble.classes)
    shapes = {
        "mean": {},
        "vote": {},
        "weighted": {"learners": (count,)},
        "flannel": {"weight": (count, (count * classes) ** 2), "bias": (count,)},
    }
    if ensemble.method not in shapes:
        raise BundleError(f"{where}: method is {ensemble.method!r}; there are: {', '.join(shapes)}")
    if ensemble.key not in KEYS:
        raise BundleError(f"{where}: key is {ensemble.key!r}; there are: {', '.join(KEYS)}")
    if not count or len(set(ensemble.learners)) < count or len(set(ensemble.classes)) < classes or classes < 2:
        names = f"learners {list(ensemble.learners)}, classes {list(ensemble.classes)}"
        raise BundleError(f"{where}: {names}: none may be twice")
    if not (np.isfinite(ensemble.temperature) and ensemble.temperature > 0):
        raise BundleError(f"{where}: temperature is {ensemble.temperature}, wanted more than 0")
    found = {name: each.shape for name, each in ensemble.weights.items()}
    if found != shapes[ensemble.method]:
        raise BundleError(
            f"{where}: {ensemble.method} of {count} learners and {classes} classes has the weights "
            f"{shapes[ensemble.method]}, not {found}"
        )
    if not all(np.isfinite(each).all() for each in ensemble.weights.values()):
        raise BundleError(f"{where}: a weight is not finite; make the ensemble again")
