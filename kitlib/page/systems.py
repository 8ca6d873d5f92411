"""Finds the systems (models that predict together) that the page offers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kitlib.classes import SPARSE_STRUCTURES
from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.errors import RunError
from kitlib.inference.systems import System, build_system, find_segmenters, read_system
from kitlib.leaderboard.listing import ListedRun

logger = logging.getLogger(__name__)

TRAINED = ("study", "detector")  # kinds of runs whose models predict rows of a submission
# Kinds of runs that are offered as systems of their own.
OTHERS = ("ensemble", "findings", "masks", "lungs", "applied lungs")
# The recipe's `judged_by` -> the metric's name on the page.
SCORES = {"auc": "mean ROC AUC", "accuracy": "accuracy", "macro_f1": "macro F1"}


def find_systems(listed: Sequence[ListedRun]) -> list[System]:
    """Return the systems (models that predict together) of the finished runs in `listed`, in the order of the page.

    Fusions come first, each followed by its variants with a single detector; then ensembles, classifiers and segmenters. If
    there is no usable fusion, all study models and detectors form one system with equal weights. A probe (a classifier that
    sees only a part of each image) is not offered; its score is in the notes of the classifiers trained on the same prepared
    run. Raises RunError if there are no models.
    """
    segmenters = find_segmenters((run.kind, run.folder) for run in listed)
    finished = [run for run in listed if run.state == "finished"]
    fused = _read_runs([run for run in finished if run.kind == "fusion"], segmenters)
    others = [run for kind in OTHERS for run in finished if run.kind == kind and not _probe(run)]
    others = [run for run in others if "lungs" not in run.kind or not _draws_lungs(run) or _holds_one_of(run, segmenters)]
    other_systems = [_with_probes(system, finished) for system in _read_runs(others, segmenters)]
    trained = [run.folder for run in finished if run.kind in TRAINED]
    if not fused and (trained or not other_systems):
        try:
            fused = [build_system("all models, equal weights", trained, SiimFusion(), None, segmenters)]
        except RunError as error:
            if not other_systems:
                raise
            logger.warning("%s", error)
    systems = []
    for system in fused:
        systems.append(system)
        if len(system.detectors) > 1:
            alone = [system.with_detector(name) for name in system.detectors]
            suffix = f", with {system.name}'s other models" if len(fused) > 1 else ""
            systems += [replace(variant, name=f"{variant.name}{suffix}") for variant in alone]
    names = {system.name for system in systems}
    kinds = [replace(system, name=f"{system.name} (alone)") if system.name in names else system for system in other_systems]
    return [*systems, *kinds]


def _read_runs(runs: Sequence[ListedRun], segmenters: Mapping[str, Path]) -> list[System]:
    """Return one system per run, named after the run. Logs and leaves out runs that cannot be read."""
    systems = []
    for run in runs:
        try:
            system = read_system(run.folder, run.kind, run.parameters, segmenters)
            systems.append(replace(system, name=run.name + system.name.removeprefix(run.folder.name)))
        except (OSError, ValueError) as error:
            logger.warning("the page does not offer the %s run %s: %s", run.kind, run.name, error)
    return systems


def _draws_lungs(run: ListedRun) -> bool:
    """Return False if the run segments only structures that are absent from most images, such as a pneumothorax."""
    structures = {name for fold in run.folds.values() for name in fold.get("recipe", {}).get("structures", ())}
    return not structures or not structures <= set(SPARSE_STRUCTURES)


def _holds_one_of(run: ListedRun, segmenters: Mapping[str, Path]) -> bool:
    """Return whether `segmenters`, which has one bundle for each lung segmenter, has a bundle of this run."""
    return any(bundle.is_relative_to(run.folder) for bundle in segmenters.values())


def _probe(run: ListedRun) -> str:
    """Return the part of each image that the run's models see: "border", "outside_lungs", or "" for the whole image."""
    return next((str(fold.get("recipe", {}).get("probe", "")) for fold in run.folds.values()), "")


def _with_probes(system: System, finished: Sequence[ListedRun]) -> System:
    """Return `system` with a note on each probe that was trained on the same prepared run as a classifier of `system`.

    A probe is a classifier that sees only a part of each image. A note has the mean validation score over the folds.
    """
    trained_on = {model.data_fingerprint for model in system.models if "classes" in model.answers}
    notes = []
    for run in finished:
        folds = [fold for fold in run.folds.values() if fold.get("data_fingerprint") in trained_on - {""}]
        scores = [score for fold in folds if isinstance(score := fold.get("best", {}).get("score"), float)]
        if scores and (probe := _probe(run)):
            seen = "the border of each image" if probe == "border" else "what lies outside the lungs"
            metric = SCORES.get(folds[0]["recipe"].get("judged_by", ""), "score")
            notes.append(
                f"A probe ({run.name}) that sees only {seen} reaches a validation {metric} of {np.mean(scores):.3f}: to "
                "that extent, these classes can be told apart without looking at the lungs."
            )
    return replace(system, notes=(*system.notes, *notes))
