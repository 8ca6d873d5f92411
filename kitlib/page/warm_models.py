"""Models that are loaded once and answer for one study after another."""

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.fusion.ensemble_bundle import Ensemble, read_ensemble
from kitlib.fusion.model_fusion import Fused
from kitlib.inference.answer import AnsweringModel, fused_answer
from kitlib.inference.cached_lungs import CachedLungs
from kitlib.inference.predict import Predictor, load_predictor
from kitlib.page.opened_study import OpenedImage, OpenedStudy
from kitlib.page.systems import System

logger = logging.getLogger(__name__)

# Answers, and images whose lungs are known, that are kept.
KEPT = 200
KEPT_HEATS = 16  # of up to 4 MB
SUBMISSION_BATCH = 16  # SubmitSettings.batch_size


@dataclass(frozen=True)
class Answer:
    """What a system says of a study. Images go by their key in `fused`, whose boxes are in original pixels."""

    fused: Fused
    models: pd.DataFrame  # model, fold, seconds: who has answered, loading not counted
    remarks: tuple[str, ...]  # sentences: what these models have seen before, what was left out or failed
    failed: int = 0  # models that could not answer


class WarmModels:
    """Loads a bundle when it is first asked for. Any number of threads may ask; one is answered at a time."""

    def __init__(self) -> None:
        self._predictors: dict[tuple[Path, CachedLungs | None], Predictor] = {}
        self._lungs: dict[tuple[Path | None, int], CachedLungs] = {}
        self._ensembles: dict[Path, Ensemble] = {}
        self._answers: OrderedDict[tuple, Answer] = OrderedDict()
        self._heats: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._one_at_a_time = threading.RLock()

    def load(self, system: System) -> None:
        """Load all of its models now. One that cannot be loaded is told when it is asked."""
        with self._one_at_a_time:
            for model in system.models:
                try:
                    self._predictor(system, model)
                except Exception as error:
                    logger.error("%s cannot be loaded", model.folder, exc_info=error)

    def answer(self, system: System, study: OpenedStudy) -> Answer:
        """As a submission of `system` would answer; of a study that some of its models have learnt from by the others.

        A model that fails is left out, with a remark; where all do, the last one's error is raised. Raises UnreadableXray.
        """
        asked = (system.name, study.study_id, study.trained_on, tuple(image.key for image in study.images))
        with self._one_at_a_time:
            answer = self._answers.get(asked) or self._answered(system, study)
            if not answer.failed:  # what failed may do better another time
                _remember(self._answers, asked, answer, KEPT)
            return answer

    def lungs(self, system: System, study: OpenedStudy, image: OpenedImage) -> tuple[np.ndarray | None, str]:
        """The lungs' mask, bool, as large as the decoded copy; None and a sentence where there is none."""
        if system.lungs is None:
            return None, "These models have no segmenter."
        segmenter = self._segmenter(system)
        mask = segmenter.find([study.read(image, system.longest_side)])[0].mask
        return mask, "" if mask is not None else f"The segmenter {segmenter.fault or 'finds no lungs'}."

    def heat(self, system: System, study: OpenedStudy, image: OpenedImage, class_name: str) -> tuple[str, np.ndarray]:
        """Where a study model looks for a class: its name, and kitlib.reports.heat_maps' heat on the decoded copy.

        The model is the first of those that answer for the study. Raises ValueError where none knows the class, and
        ImportError without the package grad-cam.
        """
        from kitlib.reports.heat_maps import compute_heat

        models, _ = answering(system, study)
        wanted = "none" if class_name == "none" else "study"
        for model in models:
            if wanted in model.answers:
                asked = (model.folder, image.key, system.longest_side, class_name)
                heat = self._heats.get(asked)
                if heat is None:
                    with self._one_at_a_time:
                        xray = study.read(image, system.longest_side)
                        heat = compute_heat(self._predictor(system, model), [xray], [class_name])[0].heat
                        _remember(self._heats, asked, heat, KEPT_HEATS)
                return f"{model.model}, fold {model.fold}", heat
        raise ValueError(f"no model among {system.name} answers {class_name}")

    def _answered(self, system: System, study: OpenedStudy) -> Answer:
        models, remarks = answering(system, study)
        xrays = [study.read(image, system.longest_side) for image in study.images]
        remarks += system.left_out
        probabilities, detections, coverage, rows, failures = [], [], [], [], []
        for model in models:
            try:
                predictor = self._predictor(system, model)
                began = time.perf_counter()
                chunks = list(predictor.predict(xrays))
            except Exception as error:
                logger.error("%s failed", model.folder, exc_info=error)
                remarks.append(f"{model.model} (fold {model.fold}) failed and is left out: {type(error).__name__}: {error}.")
                failures.append(error)
                continue
            rows.append((model.model, model.fold, time.perf_counter() - began))
            if "boxes" in model.answers:
                detections += chunks
                seen = {"image_id": predictor.seen, "model": predictor.model, "fold": predictor.fold}
                coverage.append(pd.DataFrame(seen))
            else:
                probabilities += chunks
            if predictor.lungs_missed:
                remarks.append(f"{model.model} saw {predictor.lungs_missed} images whole: no lungs were found in them.")
        if not rows:
            raise failures[-1]
        ensemble = None
        try:
            ensemble = self._ensemble(system)
        except (OSError, ValueError) as error:
            remarks.append(f"The ensemble failed: {error}; the study models are fused as they are.")
        fused, stacked = fused_answer(probabilities, detections, coverage, study.table(), system.fusion, ensemble)
        if stacked and stacked.note:
            remarks.append(f"The ensemble: {stacked.note}.")
        if any(model.wants_masks for model in models) and self._segmenter(system).fault:
            remarks.append(f"The lungs' segmenter {self._segmenter(system).fault}.")
        table = pd.DataFrame(rows, columns=["model", "fold", "seconds"])
        return Answer(fused, table, tuple(remarks), failed=len(models) - len(rows))

    def _predictor(self, system: System, model: AnsweringModel) -> Predictor:
        lungs = self._segmenter(system) if model.wants_masks else None
        if (model.folder, lungs) not in self._predictors:
            loaded = load_predictor(model.folder, batch_size=SUBMISSION_BATCH, lungs=lungs)
            self._predictors[model.folder, lungs] = loaded
        return self._predictors[model.folder, lungs]

    def _segmenter(self, system: System) -> CachedLungs:
        """One for each size of decoded copies: a mask is as large as its image's copy."""
        wanted = system.lungs, system.longest_side
        return self._lungs.setdefault(wanted, CachedLungs(system.lungs, True, SUBMISSION_BATCH, most=KEPT))

    def _ensemble(self, system: System) -> Ensemble | None:
        if system.ensemble is None:
            return None
        if system.ensemble not in self._ensembles:
            self._ensembles[system.ensemble] = read_ensemble(system.ensemble)
        return self._ensembles[system.ensemble]


def answering(system: System, study: OpenedStudy) -> tuple[list[AnsweringModel], list[str]]:
    """Those models of `system` that answer for `study`, and sentences on what they have seen of it before.

    A model that has learnt from it answers only where all models of its prepared run have.
    """
    models, remarks = list(system.models), []
    own = [model for model in models if study.trained_on and model.data_fingerprint == study.trained_on]
    strange = dict.fromkeys(model.model for model in models if study.trained_on and model not in own)
    if strange:
        names = ", ".join(strange)
        remarks.append(f"Whether {names} learnt from this study is not known: the data of the training were others.")
    if study.fold is None or not own:
        return models, remarks
    if system.ensemble is not None:
        remarks.append("The weights of the ensemble were learnt from answers for all studies, this one among them.")
    if all(model.fold != study.fold for model in own):
        folds = ", ".join(map(str, sorted({model.fold for model in own})))
        return models, [*remarks, f"The models of folds {folds} have learnt from this study, which is in fold {study.fold}."]
    unseen = [model for model in models if model not in own or model.fold == study.fold]
    return unseen, [*remarks, f"Answered by the models of fold {study.fold}, which have not learnt from this study."]


def _remember(known: OrderedDict, asked: tuple, told: Any, most: int) -> None:
    """Keep what was told last."""
    known[asked] = told
    known.move_to_end(asked)
    if len(known) > most:
        known.popitem(last=False)
