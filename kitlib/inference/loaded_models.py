"""Keeps models loaded, so that they can predict many groups of images, for the predict command and the web page."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.competitions.siim_covid19 import Fused
from kitlib.fusion.ensemble_bundle import Ensemble, apply_ensemble, read_ensemble
from kitlib.fusion.model_fusion import ModelPredictions, fuse_scores, merge
from kitlib.inference.answer import AnsweringModel, fused_answer
from kitlib.inference.cached_lungs import CachedLungs
from kitlib.inference.predict import AnyPredictor, load_predictor
from kitlib.inference.systems import FUSED, System
from kitlib.tables import FINDINGS_SEPARATOR, concatenate
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import decode_grey
from kitlib.xrays.run_lengths import draw_runs

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # SubmitSettings.batch_size
CACHED_LUNGS = 256  # number of images
MASK_LEVEL = 0.5  # probability from which a pixel is in a mask, unless a competition's settings decide
Stream = Callable[[], Iterable[CachedXray]]  # each call returns a new iterator over the same X-rays


@dataclass(frozen=True)
class Answer:
    """The predictions of a system (models whose predictions are combined) for some images.

    `fused` has the predictions of study models and detectors; its boxes are in original pixels. `classes`, from
    classifiers, is a table with `image_id` and a column of probabilities 0..1 for each class. `masks`, from segmenters, is a
    table of fused probability maps (kitlib.fusion.mask_maps). `runs` has the masks that a tuned fusion would submit: a dict
    from image_id to the mask's runs (n, 2), see kitlib.xrays.run_lengths. What a system does not predict is None. The masks
    of a lung segmenter are not in an Answer; `LoadedModels.segmenter` has them.
    """

    models: pd.DataFrame  # one row per model that has predicted: model, fold, seconds (without loading)
    remarks: tuple[str, ...]  # sentences about models that were left out, failed, or used images uncropped
    faults: tuple[str, ...] = ()  # the remarks about failures, because of which the predictions are incomplete
    fused: Fused | None = None
    classes: pd.DataFrame | None = None
    masks: pd.DataFrame | None = None
    runs: Mapping[str, np.ndarray] | None = None

    def maps(self, image_id: str) -> dict[str, np.ndarray]:
        """Return a dict of an image's probability maps by structure, float (rows, columns) of any size, 0..1; {} if none."""
        if self.masks is None:
            return {}
        of_image = self.masks[self.masks["image_id"] == image_id]
        return {name: decode_grey(png) / 255 for name, png in zip(of_image["finding"], of_image["map"], strict=True)}

    def mask(self, image_id: str) -> np.ndarray | None:
        """Return an image's mask of all structures together, bool (rows, columns) of any size; None if it has no mask.

        With a tuned fusion, the mask is the one in `runs`. Otherwise, it is True at pixels where the probability of any
        structure is at least 0.5 (MASK_LEVEL).
        """
        if self.runs is not None:
            return draw_runs(self.runs[image_id]) if image_id in self.runs else None
        maps = self.maps(image_id)
        return np.any([each >= MASK_LEVEL for each in maps.values()], axis=0) if maps else None


@dataclass
class _Asked:
    """Collects the predictions, remarks and faults of a system's models, before the predictions are fused."""

    probabilities: list[pd.DataFrame] = field(default_factory=list)
    classes: list[pd.DataFrame] = field(default_factory=list)  # probabilities of image classes other than `none`
    detections: list[pd.DataFrame] = field(default_factory=list)
    coverage: list[pd.DataFrame] = field(default_factory=list)
    mask_maps: list[pd.DataFrame] = field(default_factory=list)
    rows: list[tuple[str, int, float]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # the remarks about failures

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["model", "fold", "seconds"])

    def add_fault(self, fault: str) -> None:
        self.faults.append(fault)
        self.remarks.append(fault)


class LoadedModels:
    """Predicts with systems of models; loads each model at its first use and keeps it. Not safe for several threads."""

    def __init__(self) -> None:
        self._predictors: dict[tuple[Path, CachedLungs | None], AnyPredictor] = {}
        self._lungs: dict[tuple[Path | None, int], CachedLungs] = {}
        self._ensembles: dict[Path, Ensemble] = {}

    def answer(self, system: System, models: Sequence[AnsweringModel], xrays: Stream, images: pd.DataFrame) -> Answer:
        """Predict `images` with `models`, some or all models of `system`; return the combined predictions.

        `images` is a table with the columns image_id, study_id, rows and columns, and must contain all images of each study.
        Each call of `xrays` returns an iterator over the decoded images. If a model fails, the answer lacks its predictions,
        and `faults` has its error. If all models fail, the error of the last model is raised. Raises BundleError if an
        ensemble of classifiers is damaged, or if its classes are not those of the models.
        """
        if "lungs" in system.answers:
            return self._segment(system, xrays)
        asked = self._ask(system, models, xrays)
        classes = self._classify(system, asked) if asked.classes else None
        masks, runs = self._draw(system, asked, images) if asked.mask_maps else (None, None)
        if not system.answers & FUSED:
            return Answer(asked.table(), tuple(asked.remarks), tuple(asked.faults), None, classes, masks, runs)
        ensemble = self._ensemble(system, asked)
        tables = asked.probabilities, asked.detections, asked.coverage
        fused, stacked = fused_answer(*tables, images, system.fusion, ensemble)
        if stacked and stacked.note:
            asked.add_fault(f"The ensemble: {stacked.note}.")
        return Answer(asked.table(), tuple(asked.remarks), tuple(asked.faults), fused, classes, masks, runs)

    def _classify(self, system: System, asked: _Asked) -> pd.DataFrame:
        """Return a table of class probabilities, with the columns image_id and the classes.

        First, an image's predictions by models with the same name and fold are averaged, as in notebooks 25 and 65. Then
        the system's ensemble combines them. Without an ensemble, they are averaged over folds, then over models (weighted).
        """
        classes = system.classes()
        scores = pd.concat([table.dropna() for table in asked.classes], ignore_index=True)
        scores = scores.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
        if system.ensemble is None or system.answers != {"classes"}:
            return fuse_scores(scores, "image_id", system.fusion)
        ensemble = self._read_ensemble(system.ensemble)
        table = apply_ensemble(ensemble, scores)
        incomplete = int((table["answered"] < len(ensemble.learners)).sum())
        if incomplete:
            asked.add_fault(f"{incomplete} images lack a learner; they get the plain mean of the other learners.")
        return table[["image_id", *classes]]

    def _draw(
        self, system: System, asked: _Asked, images: pd.DataFrame
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray] | None]:
        """Return a table of fused probability maps, and a dict from image_id to the runs (n, 2) of the mask to submit.

        The second result is None if the system has no competition, or if its competition has no masks.
        """
        predictions = ModelPredictions.of(mask_maps=concatenate(asked.mask_maps, "mask_maps"))
        merged, competition = merge(predictions, images, system.fusion), system.competition
        wants_masks = competition is not None and competition.mask_classes
        return merged.masks, competition.decide(merged, system.settings) if competition and wants_masks else None

    def _segment(self, system: System, xrays: Stream) -> Answer:
        """Find each image's lungs; the caller reads them from the cache of `segmenter`. The Answer has no predictions."""
        asked, segmenter, model = _Asked(remarks=list(system.notes)), self.segmenter(system), system.models[0]
        began = time.perf_counter()
        for xray in xrays():
            segmenter.find([xray])
        asked.rows.append((model.model, model.fold, time.perf_counter() - began))
        if segmenter.fault:
            asked.add_fault(f"The lung segmenter {segmenter.fault}.")
        return Answer(asked.table(), tuple(asked.remarks), tuple(asked.faults))

    def predictor(self, system: System, model: AnsweringModel) -> AnyPredictor:
        """Return a Predictor for `model`; the first call loads the model. Raises BundleError if its bundle is damaged."""
        lungs = self.segmenter(system) if model.wants_masks else None
        if (model.folder, lungs) not in self._predictors:
            loaded = load_predictor(model.folder, batch_size=BATCH_SIZE, lungs=lungs)
            self._predictors[model.folder, lungs] = loaded
        return self._predictors[model.folder, lungs]

    def segmenter(self, system: System) -> CachedLungs:
        """Return the system's lung segmenter; its cache is for images that were decoded to the system's `longest_side`."""
        key = system.lungs, system.longest_side
        return self._lungs.setdefault(key, CachedLungs(system.lungs, True, BATCH_SIZE, most=CACHED_LUNGS))

    def _ask(self, system: System, models: Sequence[AnsweringModel], xrays: Stream) -> _Asked:
        asked, failure = _Asked(remarks=list(system.notes)), None
        for model in models:
            try:
                predictor = self.predictor(system, model)
                began = time.perf_counter()
                chunks = list(predictor.predict(xrays()))
            except Exception as error:
                logger.error("%s failed", model.folder, exc_info=error)
                reason = f"{type(error).__name__}: {error}"
                asked.add_fault(f"{model.model} (fold {model.fold}) failed and is left out: {reason}.")
                failure = error
                continue
            asked.rows.append((model.model, model.fold, time.perf_counter() - began))
            if "boxes" in model.answers:
                asked.detections += chunks
                rows = {"image_id": predictor.seen, "model": predictor.model, "fold": predictor.fold}
                findings = FINDINGS_SEPARATOR.join(model.classes)
                asked.coverage.append(pd.DataFrame({**rows, "findings": findings}))
            else:
                tables = {"classes": asked.classes, "masks": asked.mask_maps}
                tables.get("".join(model.answers), asked.probabilities).extend(chunks)
            if missed := predictor.lungs_missed:
                asked.remarks.append(f"{model.model} used {missed} images uncropped, because no lungs were found.")
        if failure and not asked.rows:
            raise failure
        if any(model.wants_masks for model in models) and self.segmenter(system).fault:
            asked.add_fault(f"The lung segmenter {self.segmenter(system).fault}.")
        return asked

    def _read_ensemble(self, folder: Path) -> Ensemble:
        if folder not in self._ensembles:
            self._ensembles[folder] = read_ensemble(folder)
        return self._ensembles[folder]

    def _ensemble(self, system: System, asked: _Asked) -> Ensemble | None:
        if system.ensemble is None:
            return None
        try:
            return self._read_ensemble(system.ensemble)
        except (OSError, ValueError) as error:
            asked.add_fault(f"The ensemble failed: {error}; the study models are combined without it.")
            return None
