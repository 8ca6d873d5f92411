"""What a submission's models answer, and one answer from all that they predicted: the code of submission and page."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import read_record
from kitlib.fusion.ensemble_bundle import Ensemble, apply_ensemble
from kitlib.fusion.model_fusion import Fused, FusionSettings, fuse
from kitlib.inference.predict import study_and_image_scores
from kitlib.lungs.crop import wants_masks
from kitlib.models.families import BOXES, recorded_family
from kitlib.tables import concatenate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnsweringModel:
    """What a bundle says of its model before its weights are read."""

    folder: Path
    model: str
    fold: int
    answers: frozenset[str]  # of "study", "none" and "boxes"
    longest_side: int  # pixels of the decoded copy it was trained on
    wants_masks: bool  # whether it asks a segmenter where the lungs are
    masked: bool  # and for their masks
    segmenter: str  # digest of the one whose lungs it was trained on, "" without
    data_fingerprint: str  # of the prepared run it was trained on


@dataclass(frozen=True)
class Stacked:
    """How the study models were stacked: how many studies by all learners, in how many seconds; `note` says what was not."""

    studies: int
    seconds: float
    note: str


def read_answering_model(folder: Path) -> AnsweringModel:
    """Raises BundleError for a record that cannot be read, ValueError for a model that answers no row of a submission."""
    record = read_record(folder)
    recipe = record["recipe"]
    return AnsweringModel(
        folder,
        record["model"],
        record["fold"],
        _answers(record),
        record["longest_side"],
        wants_masks(recipe),
        recipe.get("masked", False),
        record["architecture"].get("segmenter", ""),
        record["data_fingerprint"],
    )


def fused_answer(
    probabilities: Sequence[pd.DataFrame],
    detections: Sequence[pd.DataFrame],
    coverage: Iterable[pd.DataFrame],
    images: pd.DataFrame,
    fusion: FusionSettings,
    ensemble: Ensemble | None = None,
) -> tuple[Fused, Stacked | None]:
    """One answer for `images` (image_id, study_id, rows, columns), as kitlib.fusion.model_fusion gives it.

    `probabilities` and `detections` are what Predictors have given, of classifiers and of detectors, `coverage` which
    detector has seen which image. The ensemble's answer takes the place of its learners'; where it fails they are fused as
    they are, and where a learner is missing, the others' plain mean stands: Stacked says so. It is None without an ensemble.
    """
    study_scores, image_scores = study_and_image_scores(probabilities, images)
    study_scores, stacked = _stacked(study_scores, ensemble)
    coverage = list(coverage)
    covered = pd.concat(coverage) if coverage else None
    return fuse(study_scores, image_scores, concatenate(detections, "detections"), images, fusion, covered), stacked


def _stacked(study_scores: pd.DataFrame, ensemble: Ensemble | None) -> tuple[pd.DataFrame, Stacked | None]:
    if ensemble is None or study_scores.empty:
        return study_scores, None
    began = time.monotonic()
    try:
        answer = apply_ensemble(ensemble, study_scores).assign(model=ensemble.name, fold=0)
        others = study_scores[~study_scores["model"].isin(ensemble.learners)]
        stacked = concatenate([answer.drop(columns="answered"), others], "study_scores")
    except Exception as error:
        logger.error("the ensemble failed", exc_info=error)
        note = f"failed: {type(error).__name__}: {error}; the study models are fused as they are"
        return study_scores, Stacked(0, time.monotonic() - began, note)
    absent, note = answer["answered"] < len(ensemble.learners), ""
    if answer.empty:
        note = f"none of its learners ({', '.join(ensemble.learners)}) has answered; the study models are fused as they are"
    if absent.any():
        there = set(study_scores["model"])
        lost = ", ".join(name for name in ensemble.learners if name not in there) or "a learner that was stopped"
        note = f"{int(absent.sum())} of {len(answer)} studies lack {lost}: they have the plain mean of the others"
    return stacked, Stacked(int((~absent).sum()), time.monotonic() - began, note)


def _answers(record: dict[str, Any]) -> frozenset[str]:
    family = recorded_family(record)
    if family.no_submission:
        classes = ", ".join(map(str, record["classes"][:3]))
        raise ValueError(f"{record['model']} {family.no_submission} (its classes: {classes}, ...)")
    if family.answers == BOXES:
        return frozenset({"boxes"})
    outputs = record["recipe"].get("outputs", "both")
    return frozenset({"study", "none"} if outputs == "both" else {outputs})
