"""Models that stay loaded and predict one group of images after another, from files or on the page."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from kitlib.fusion.ensemble_bundle import Ensemble, apply_ensemble, read_ensemble
from kitlib.fusion.model_fusion import Fused
from kitlib.inference.answer import AnsweringModel, fused_answer
from kitlib.inference.cached_lungs import CachedLungs
from kitlib.inference.predict import Predictor, load_predictor
from kitlib.inference.systems import System
from kitlib.xrays.cache import CachedXray

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # SubmitSettings.batch_size
CACHED_LUNGS = 256  # number of images
Stream = Callable[[], Iterable[CachedXray]]  # begins another pass over the same X-rays


@dataclass(frozen=True)
class Answer:
    """What a system of study models and detectors predicts for the images of whole studies; boxes are in original pixels."""

    fused: Fused
    models: pd.DataFrame  # columns model, fold, seconds (without loading); a row for each model that has predicted
    remarks: tuple[str, ...]  # sentences about models that were left out, failed, or used images uncropped
    faults: tuple[str, ...] = ()  # those of the remarks that say what failed, so that the predictions are not the system's


@dataclass
class _Asked:
    """What the models of a system have predicted, model by model."""

    probabilities: list[pd.DataFrame] = field(default_factory=list)
    detections: list[pd.DataFrame] = field(default_factory=list)
    coverage: list[pd.DataFrame] = field(default_factory=list)
    rows: list[tuple[str, int, float]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # the remarks that say what failed

    def add_fault(self, fault: str) -> None:
        self.faults.append(fault)
        self.remarks.append(fault)


class LoadedModels:
    """Loads bundles on first use. Systems that share a model share its weights. Not safe for several threads at once."""

    def __init__(self) -> None:
        self._predictors: dict[tuple[Path, CachedLungs | None], Predictor] = {}
        self._lungs: dict[tuple[Path | None, int], CachedLungs] = {}
        self._ensembles: dict[Path, Ensemble] = {}

    def answer(self, system: System, models: Sequence[AnsweringModel], xrays: Stream, images: pd.DataFrame) -> Answer:
        """Predict the images as a submission with `models` of `system` would.

        `images` (image_id, study_id, rows, columns) are those of `xrays`, and of whole studies. A model that fails is left
        out, with a remark. If all models fail, the error of the last one is raised.
        """
        asked = self._ask(system, models, xrays)
        ensemble = self._ensemble(system, asked)
        tables = asked.probabilities, asked.detections, asked.coverage
        fused, stacked = fused_answer(*tables, images, system.fusion, ensemble)
        if stacked and stacked.note:
            asked.add_fault(f"The ensemble: {stacked.note}.")
        table = pd.DataFrame(asked.rows, columns=["model", "fold", "seconds"])
        return Answer(fused, table, tuple(asked.remarks), tuple(asked.faults))

    def classify(self, system: System, xrays: Stream) -> tuple[pd.DataFrame, tuple[str, ...], tuple[str, ...]]:
        """Return the class probabilities of a system of classifiers for each image, and remarks and faults as in Answer.

        The table has the columns image_id and the classes. Models of the same learner and fold are averaged first, then the
        folds, then the ensemble is applied: as notebooks 25 and 65 judge test images. Raises BundleError if the ensemble is
        damaged or has other classes, and as `answer` does.
        """
        asked = self._ask(system, system.models, xrays)
        classes = list(system.models[0].classes)
        scores = pd.concat(asked.probabilities, ignore_index=True).dropna(subset=classes)
        scores = scores.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
        if system.ensemble is None:
            mean = scores.groupby(["image_id", "model"], sort=False)[classes].mean()
            table = mean.groupby(level="image_id", sort=False).mean().reset_index()
            return table, tuple(asked.remarks), tuple(asked.faults)
        ensemble = read_ensemble(system.ensemble)
        table = apply_ensemble(ensemble, scores)
        incomplete = int((table["answered"] < len(ensemble.learners)).sum())
        if incomplete:
            asked.add_fault(f"{incomplete} images lack a learner; they get the plain mean of the other learners.")
        return table[["image_id", *classes]], tuple(asked.remarks), tuple(asked.faults)

    def predictor(self, system: System, model: AnsweringModel) -> Predictor:
        """Return the loaded model. Raises BundleError if its bundle is damaged."""
        lungs = self.segmenter(system) if model.wants_masks else None
        if (model.folder, lungs) not in self._predictors:
            loaded = load_predictor(model.folder, batch_size=BATCH_SIZE, lungs=lungs)
            self._predictors[model.folder, lungs] = loaded
        return self._predictors[model.folder, lungs]

    def segmenter(self, system: System) -> CachedLungs:
        """Return the system's segmenter, for decoded copies of the size that the system's models read."""
        key = system.lungs, system.longest_side
        return self._lungs.setdefault(key, CachedLungs(system.lungs, True, BATCH_SIZE, most=CACHED_LUNGS))

    def _ask(self, system: System, models: Sequence[AnsweringModel], xrays: Stream) -> _Asked:
        asked, failure = _Asked(remarks=list(system.left_out)), None
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
                asked.coverage.append(pd.DataFrame(rows))
            else:
                asked.probabilities += chunks
            if missed := predictor.lungs_missed:
                asked.remarks.append(f"{model.model} used {missed} images uncropped, because no lungs were found.")
        if failure and not asked.rows:
            raise failure
        if any(model.wants_masks for model in models) and self.segmenter(system).fault:
            asked.add_fault(f"The lung segmenter {self.segmenter(system).fault}.")
        return asked

    def _ensemble(self, system: System, asked: _Asked) -> Ensemble | None:
        if system.ensemble is None:
            return None
        try:
            if system.ensemble not in self._ensembles:
                self._ensembles[system.ensemble] = read_ensemble(system.ensemble)
            return self._ensembles[system.ensemble]
        except (OSError, ValueError) as error:
            asked.add_fault(f"The ensemble failed: {error}; the study models are combined without it.")
            return None
