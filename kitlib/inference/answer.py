"""Reads which outputs each trained model has, and fuses the predictions of all models, for submissions and the web page."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import read_record
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.contract import Competition
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.errors import BundleError
from kitlib.fusion.ensemble_bundle import Ensemble, apply_ensemble
from kitlib.fusion.model_fusion import ModelPredictions, fuse
from kitlib.inference.predict import study_and_image_scores
from kitlib.lungs.crop import needs_masks
from kitlib.models.classifier import OUTPUTS
from kitlib.models.families import BOXES, CLASSES, LUNGS, MASKS, STUDIES, recorded_family
from kitlib.settings import from_dict
from kitlib.tables import concatenate

logger = logging.getLogger(__name__)

MAX_SIDE = 65_535  # pixels; DICOM's rows and columns have 16 bits


@dataclass(frozen=True)
class AnsweringModel:
    """Description of a trained model, read from model.json in its bundle (the model's folder), without the weights."""

    folder: Path
    model: str
    fold: int
    # What the model predicts: a subset of "study", "none" and "boxes"; or "classes", "masks", or "lungs", which no
    # submission contains.
    answers: frozenset[str]
    longest_side: int  # longest side, in pixels, of the decoded training images
    wants_masks: bool  # whether a segmenter must find the lungs
    masked: bool  # whether the lung masks are also needed, not only the frames
    segmenter: str  # digest of the segmenter that found the lungs in training, "" if none
    data_fingerprint: str  # fingerprint of the training data (a run of notebook 10)
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stacked:
    """Report on applying an ensemble, which combines several models (its learners), to the studies of a submission.

    `studies` is the number of studies that all learners have predicted, and `seconds` the time that the ensemble took.
    `note` says how many studies lack a learner's prediction, or why the ensemble was not applied; otherwise it is "".
    """

    studies: int
    seconds: float
    note: str


def read_answering_model(folder: Path, record_sha256: str = "", competition: Competition = SIIM_COVID19) -> AnsweringModel:
    """Read the description of the model in the bundle `folder`, and check that a submission can use its predictions.

    `record_sha256` is the expected digest of model.json; "" accepts any digest. Raises BundleError if model.json cannot be
    read or has another digest, SettingsError for an invalid recipe, and ValueError if a submission to `competition` cannot
    use the model's predictions.
    """
    record = read_record(folder)
    if record_sha256 not in ("", record["record_sha256"]):
        raise BundleError(f"{folder} is not the bundle that weights.json lists; build the kernel's weights again")
    if problem := unwanted(record, competition):
        raise ValueError(f"{record['model']} {problem}")
    return _describe_model(folder, record)


def unwanted(record: Mapping[str, Any], competition: Competition) -> str:
    """Return why a submission to `competition` cannot use a model's predictions, or "" if it can.

    `record` is the content of the model's model.json. The text continues a sentence that begins with the model's name.
    """
    answers, classes = recorded_family(record).answers, set(record["classes"])
    helping = set(competition.helping_classes)
    wanted = {
        STUDIES: classes if competition.study_classes else set(),  # all study models predict SIIM's classes
        CLASSES: {*competition.image_classes, *(helping if helping <= classes else ())},
        BOXES: set(competition.box_classes),
        LUNGS: set(),
        MASKS: set(competition.mask_classes),
    }[answers]
    if not classes & wanted:
        named = ", ".join([*map(str, record["classes"][:3]), *(["..."] if len(record["classes"]) > 3 else [])])
        advice = "give its run in the kernel's key `lungs`" if answers == LUNGS else "leave out its run"
        return f"predicts {answers} ({named}), of which a submission to {competition.name} contains none; {advice}"
    return ""


def read_any_model(folder: Path) -> AnsweringModel:
    """Read the description of the model in the bundle `folder`; the model may be of any family.

    Raises BundleError if model.json cannot be read, and SettingsError for an invalid recipe.
    """
    return _describe_model(folder, read_record(folder))


def _describe_model(folder: Path, record: dict[str, Any]) -> AnsweringModel:
    if not 1 <= record["longest_side"] <= MAX_SIDE:
        raise BundleError(f"{folder}: 'longest_side' is {record['longest_side']}; expected 1 to {MAX_SIDE} pixels")
    recipe = record["recipe"]
    return AnsweringModel(
        folder,
        record["model"],
        record["fold"],
        _predicted_outputs(record),
        record["longest_side"],
        needs_masks(recipe),
        recipe.get("masked", False),
        record["architecture"].get("segmenter", ""),
        record["data_fingerprint"],
        tuple(record["classes"]),
    )


def fused_answer(
    probabilities: Sequence[pd.DataFrame],
    detections: Sequence[pd.DataFrame],
    coverage: Iterable[pd.DataFrame],
    images: pd.DataFrame,
    fusion: FusionSettings,
    ensemble: Ensemble | None = None,
    competition: Competition = SIIM_COVID19,
    mask_maps: Sequence[pd.DataFrame] = (),
) -> tuple[Any, Stacked | None]:
    """Fuse the predictions of all models; return the competition's answers and a report on the ensemble.

    `probabilities`, `detections` and `mask_maps` are the tables that the Predictors of classifiers, detectors and segmenters
    yield. Each table in `coverage` (image_id, model, fold) lists the images that one detector has predicted. `images` has
    image_id, study_id, rows and columns. The answers are the result of `competition.decide`, for SIIM a `Fused`.

    The ensemble's prediction replaces those of its learners, the models that it combines. A study that lacks a learner's
    prediction gets the unweighted mean of the other learners. If the ensemble fails, its learners are fused like other
    models. The report notes the gap or the failure. It is None without an ensemble, or if no study model has predicted.
    """
    of_studies = [table for table in probabilities if set(STUDY_CLASSES) <= set(table.columns)]
    of_images = [table for table in probabilities if not set(STUDY_CLASSES) <= set(table.columns)]
    study_scores, image_scores = study_and_image_scores(of_studies, images)
    study_scores, stacked = _apply_ensemble(study_scores, ensemble)
    coverage = list(coverage)
    predictions = ModelPredictions.of(
        study_scores=study_scores,
        image_scores=concatenate([image_scores, *of_images], "class_scores") if of_images else image_scores,
        detections=concatenate(detections, "detections"),
        mask_maps=concatenate(mask_maps, "mask_maps"),
        coverage=pd.concat(coverage) if coverage else None,
    )
    return fuse(predictions, images, fusion, competition), stacked


def _apply_ensemble(study_scores: pd.DataFrame, ensemble: Ensemble | None) -> tuple[pd.DataFrame, Stacked | None]:
    if ensemble is None or study_scores.empty:
        return study_scores, None
    began = time.monotonic()
    try:
        prediction = apply_ensemble(ensemble, study_scores).assign(model=ensemble.name, fold=0)
        others = study_scores[~study_scores["model"].isin(ensemble.learners)]
        stacked = concatenate([prediction.drop(columns="answered"), others], "study_scores")
    except Exception as error:
        logger.error("the ensemble failed", exc_info=error)
        note = f"failed: {type(error).__name__}: {error}; the study models are fused without it"
        return study_scores, Stacked(0, time.monotonic() - began, note)
    is_incomplete, note = prediction["answered"] < len(ensemble.learners), ""
    if prediction.empty:
        note = f"none of its learners ({', '.join(ensemble.learners)}) has predicted; the study models are fused without it"
    if is_incomplete.any():
        available = set(study_scores["model"])
        missing = ", ".join(name for name in ensemble.learners if name not in available) or "a learner that was stopped"
        count = int(is_incomplete.sum())
        note = f"{count} of {len(prediction)} studies lack {missing}; they get the plain mean of the other learners"
    return stacked, Stacked(int((~is_incomplete).sum()), time.monotonic() - began, note)


def _predicted_outputs(record: dict[str, Any]) -> frozenset[str]:
    family = recorded_family(record)
    from_dict(family.recipe, record["recipe"])
    if family.answers == STUDIES and record["classes"] != list(OUTPUTS):
        raise BundleError(
            f"the model's classes are {record['classes']}; expected {list(OUTPUTS)}. Train {record['model']!r} again, or "
            "remove this model"
        )
    if family.answers != STUDIES:
        return frozenset({family.answers})
    outputs = record["recipe"].get("outputs", "both")
    return frozenset({"study", "none"} if outputs == "both" else {outputs})
