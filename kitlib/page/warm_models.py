"""Keeps models loaded and caches their predictions, so that the page answers quickly."""

import logging
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np

from kitlib.classes import STUDY_CLASSES
from kitlib.inference.answer import AnsweringModel
from kitlib.inference.loaded_models import Answer, LoadedModels
from kitlib.inference.systems import System
from kitlib.page.opened_study import OpenedImage, OpenedStudy

logger = logging.getLogger(__name__)

# Number of studies with cached predictions.
CACHED_ANSWERS = 200
CACHED_HEATS = 16  # up to 4 MB each


class WarmModels:
    """Predicts studies; loads each model at its first use, keeps it loaded, and caches predictions.

    May be shared between threads; predictions run one at a time.
    """

    def __init__(self) -> None:
        self._models = LoadedModels()
        self._answers: OrderedDict[tuple, Answer] = OrderedDict()
        self._heats: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._one_at_a_time = threading.RLock()

    def load(self, system: System) -> None:
        """Load all models of the system now. A failure is logged now, and reported when the model has to predict."""
        with self._one_at_a_time:
            for model in system.models:
                try:
                    if "lungs" in model.answers:
                        self._models.segmenter(system).begin()
                    else:
                        self._models.predictor(system, model)
                except Exception as error:
                    logger.error("%s cannot be loaded", model.folder, exc_info=error)

    def answer(self, system: System, study: OpenedStudy) -> Answer:
        """Return the predictions of `system` for a study, as an Answer, like those of a submission by these models.

        Models that were trained on the study are not used if that can be avoided (see `choose_models`). If a model fails,
        the Answer is made without the model and has a remark. If all models fail, raises the last model's error. Raises
        UnreadableXray if an image cannot be decoded.
        """
        key = (system.name, study.study_id, study.trained_on, tuple(image.key for image in study.images))
        with self._one_at_a_time:
            answer = self._answers.get(key) or self._predict(system, study)
            if not answer.faults:  # a failure may be temporary, so it is not cached
                _remember(self._answers, key, answer, CACHED_ANSWERS)
            return answer

    def lungs(self, system: System, study: OpenedStudy, image: OpenedImage) -> tuple[np.ndarray | None, str]:
        """Return the lung mask of an image and "", or None and a sentence that says why there is no mask.

        The mask is a bool array of the same shape as the image's decoded copy.
        """
        if system.lungs is None:
            return None, "These models have no lung segmenter."
        segmenter = self._models.segmenter(system)
        mask = segmenter.find([study.read(image, system.longest_side)])[0].mask
        return mask, "" if mask is not None else f"The segmenter {segmenter.fault or 'finds no lungs'}."

    def heat(self, system: System, study: OpenedStudy, image: OpenedImage, class_name: str) -> tuple[str, np.ndarray]:
        """Return two values: the name of the explained model, and its heat map of an image for the class `class_name`.

        The heat map has the size of the decoded copy (see kitlib.reports.heat_maps). The model is the first one that
        predicts both this study and this class. Raises ValueError if no model predicts the class, and ImportError if the
        package grad-cam is missing.
        """
        from kitlib.reports.heat_maps import compute_heat

        models, _ = choose_models(system, study)
        for model in models:
            if class_name in _classes(model):
                key = (model.folder, image.key, system.longest_side, class_name)
                heat = self._heats.get(key)
                if heat is None:
                    with self._one_at_a_time:
                        xray = study.read(image, system.longest_side)
                        heat = compute_heat(self._models.predictor(system, model), [xray], [class_name])[0].heat
                        _remember(self._heats, key, heat, CACHED_HEATS)
                return f"{model.model}, fold {model.fold}", heat
        raise ValueError(f"none of the models of {system.name!r} predicts {class_name!r}; choose another class")

    def _predict(self, system: System, study: OpenedStudy) -> Answer:
        models, remarks = choose_models(system, study)
        xrays = [study.read(image, system.longest_side) for image in study.images]
        answer = self._models.answer(system, models, lambda: xrays, study.table())
        return replace(answer, remarks=(*remarks, *answer.remarks))


def choose_models(system: System, study: OpenedStudy) -> tuple[list[AnsweringModel], list[str]]:
    """Return the models of `system` that predict `study`, and remarks on which models were trained on the study.

    Models of the study's prepared run that were trained on the study are used only if that run has no other models.
    """
    models, remarks = list(system.models), []
    models_of_run = [model for model in models if study.trained_on and model.data_fingerprint == study.trained_on]
    unknown = dict.fromkeys(model.model for model in models if study.trained_on and model not in models_of_run)
    if unknown:
        names = ", ".join(unknown)
        remarks.append(f"It is not known whether the training data of {names} (another prepared run) includes this study.")
    if study.fold is None or not models_of_run:
        return models, remarks
    if system.ensemble is not None:
        remarks.append("The weights of the ensemble were fitted to predictions for all studies, including this one.")
    if all(model.fold != study.fold for model in models_of_run):
        folds = ", ".join(map(str, sorted({model.fold for model in models_of_run})))
        remark = f"These models (folds {folds}) were trained on this study, which is in fold {study.fold}."
        return models, [*remarks, remark]
    unseen = [model for model in models if model not in models_of_run or model.fold == study.fold]
    return unseen, [*remarks, f"Predicted by the models of fold {study.fold}, which were not trained on this study."]


def _classes(model: AnsweringModel) -> tuple[str, ...]:
    """Return the classes that the model predicts. Those of a study model may include `none` (no finding)."""
    if "classes" in model.answers:
        return model.classes
    return (*(STUDY_CLASSES if "study" in model.answers else ()), *(["none"] if "none" in model.answers else []))


def _remember(cache: OrderedDict, key: tuple, value: Any, limit: int) -> None:
    """Store `value` as the newest entry of `cache`. If the cache then has more than `limit` entries, drop the oldest."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)
