"""Trains a study classifier on all folds but one, and predicts the images of the held-out fold."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.classes import STUDY_CLASSES
from kitlib.inference.predict import study_and_image_scores
from kitlib.models.box_mask import box_mask, mask_loss
from kitlib.models.classifier import OUTPUTS, StudyClassifier, study_loss
from kitlib.recipes.fields import StudyRecipe
from kitlib.scoring.average_precision import average_precision
from kitlib.scoring.metrics import call_metrics, most_probable
from kitlib.tables import study_labels
from kitlib.training.classifier import ClassifierTraining, check_frozen, start_from_weights
from kitlib.training.split import with_extra
from kitlib.training.strategy import Strategy, check_classes_differ
from kitlib.training.task import Task
from kitlib.training.xray_dataset import XrayDataset


class StudyTraining(ClassifierTraining):
    """Lightning module that trains and validates a study classifier; `validation_scores` computes the validation score."""

    model: StudyClassifier
    recipe: StudyRecipe

    def __init__(self, model: StudyClassifier, validation: XrayDataset, study_ids: np.ndarray) -> None:
        super().__init__(model, len(validation))
        self.validation, self.study_ids = validation, study_ids

    def targets(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.recipe.segmentation:
            return batch
        cells, stride = self.model.mask_cells, self.model.mask_decoder.stride
        return batch | {"mask": torch.stack([box_mask(boxes, cells, stride) for boxes in batch["boxes"]])}

    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        if not self.recipe.segmentation:
            return super().training_loss(batch)
        logits, mask = self.model.with_mask(self.model.normalise(batch["pixels"]))
        auxiliary_loss = mask_loss(mask, batch["mask"])
        self.log("train_mask_loss", auxiliary_loss, on_step=False, on_epoch=True, batch_size=len(mask))
        return self.loss(batch, logits, self.recipe.label_smoothing) + self.recipe.segmentation * auxiliary_loss

    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        recipe = self.recipe
        return study_loss(logits, batch["label"], batch["none"], recipe.none_weight, recipe.outputs, smoothing)

    def scores(self) -> dict[str, float]:
        truth = self.validation.label, self.validation.none
        return validation_scores(self.validation_probabilities, self.study_ids, *truth, self.recipe.outputs)


def validation_scores(
    probabilities: np.ndarray, study_ids: np.ndarray, study: np.ndarray, none: np.ndarray, outputs: str = "both"
) -> dict[str, float]:
    """Return a dict with the average precision (AP) of each of a study classifier's outputs, and `score`, the mean AP.

    `probabilities` is an array (n, 5), one row per image: the four study classes, then `none`. `study_ids` (n,) has each
    image's study. `study` (n, 4) and `none` (n,) have the labels, NaN if unknown. The AP (VOC 2010, as in the competition)
    of a study class is computed over studies, with the mean probability of a study's images; the AP of `none` is computed
    over images. If `outputs` is "study" or "none" instead of "both", only the study classes or only `none` are scored. A
    class that does not occur has an AP of NaN, which is left out of the mean; if all are NaN, `score` is NaN. If study
    classes are scored, the dict also has accuracy, precision, recall and f1 of the most probable class of each study, as in
    figure 17 of the Heidelberg report.
    """
    scores, calls = {}, {}
    if outputs != "none":
        names = list(STUDY_CLASSES)
        truth = pd.DataFrame(study, columns=names).groupby(study_ids).first()
        mean = pd.DataFrame(probabilities[:, :4], columns=names).groupby(study_ids).mean()
        for name in names:
            has_label = truth[name].notna().to_numpy()
            scores[name] = _average_precision(mean[name].to_numpy()[has_label], truth[name].to_numpy()[has_label])
        calls = call_metrics(truth.to_numpy(float), most_probable(mean.to_numpy()))
    if outputs != "study":
        is_known = ~np.isnan(none)
        scores["none"] = _average_precision(probabilities[is_known, 4], none[is_known])
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores, **calls}


def _average_precision(probabilities: np.ndarray, truth: np.ndarray) -> float:
    hits = truth > 0.5
    return average_precision(probabilities, hits, int(hits.sum()))


class StudyStrategy(Strategy):
    """Strategy that trains a classifier of the study classes and of `none` (no opacity in the image) on one fold.

    Writes its predictions for the validation fold to the tables `study_scores` and `image_scores`. If the recipe's `outputs`
    is "study", `image_scores` is empty; if it is "none", `study_scores` is empty.
    """

    uses = ("extra", "lungs")
    classes = OUTPUTS
    recipe: StudyRecipe
    train: XrayDataset
    validation: XrayDataset

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        self.training_data = with_extra(
            self.train_images, self.labels, self.boxes, task.cache, task.extra, self.validation_images
        )
        images, labels, *_ = self.training_data
        if self.recipe.outputs != "none" and labels[list(STUDY_CLASSES)].notna().any(axis=None):
            check_classes_differ(task, images, labels)

    def check(self) -> None:
        """Raise ValueError if a frozen backbone has no starting weights, or if `labels` lacks a study class."""
        check_frozen(self.recipe, self.task.model_name)
        self.labels = study_labels(self.labels)

    def start(self, model: StudyClassifier) -> str:
        return start_from_weights(model)

    def make_examples(self) -> None:
        task, recipe = self.task, self.recipe
        self.train = XrayDataset(*self.training_data, recipe, augment=True, seed=task.seed, lungs=task.lungs)
        validation_data = self.validation_images, self.labels, self.boxes, task.cache
        self.validation = XrayDataset(*validation_data, recipe, lungs=task.lungs)

    def module(self, model: StudyClassifier) -> StudyTraining:
        return StudyTraining(model, self.validation, self.validation_images.study_id.to_numpy())

    def predict(self, device: torch.device) -> dict[str, Any]:
        predictor = self.predictor(device)
        chunks = predictor.predict(map(self.task.cache.read, self.validation_images.image_id))
        study_scores, image_scores = study_and_image_scores(chunks, self.validation_images)
        self.write("study_scores", study_scores)
        self.write("image_scores", image_scores)
        return {"lungs_missed": {"training": self.train.lungs_missed(), "predicted": predictor.lungs_missed}}
