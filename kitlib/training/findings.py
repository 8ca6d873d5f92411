"""Training of a findings classifier, of images or of their patches, and its predictions of images that it has not seen."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from kitlib.inference.predict import load_predictor
from kitlib.models.classifier import FindingsClassifier, check_classes, mean_of_known, smooth_labels
from kitlib.models.patch_classifier import PatchClassifier
from kitlib.recipes.fields import FindingsRecipe, PatchRecipe
from kitlib.scoring.metrics import class_weights, exclusive_scores, mean_auc
from kitlib.tables import class_columns, concatenate
from kitlib.training.classifier import ClassifierTraining, check_frozen, start_from_weights
from kitlib.training.patch_dataset import PatchDataset, collate_canvases
from kitlib.training.strategy import Strategy, without_images
from kitlib.training.task import Task
from kitlib.training.xray_dataset import XrayDataset

logger = logging.getLogger(__name__)

Labelled = XrayDataset | PatchDataset


def check_findings(
    images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame, recipe: FindingsRecipe, model_name: str
) -> None:
    """Raise ValueError where these tables and settings cannot be trained on, with what to change."""
    check_frozen(recipe, model_name)
    check_classes(recipe, class_columns(labels, "labels"))
    if "split" in images:
        test = set(images.image_id[images.split == "test"])
        inside = folds.id[folds.id.isin(test)]
        if len(inside):
            raise ValueError(
                f"{len(inside)} images of the split 'test' are in folds, first {inside.iloc[0]}; use make_folds"
            )
    if not recipe.multi_label:
        classes = class_columns(labels, "labels")
        known = labels[labels[classes].notna().all(axis=1)]
        wrong = known[(known[classes].sum(axis=1) - 1).abs() > 1e-6]
        if len(wrong):
            raise ValueError(
                f"{model_name}: with multi_label false exactly one class is true, but {len(wrong)} labels do not sum to 1, "
                f'first {wrong["id"].iloc[0]}; give overrides {{"multi_label": true}}'
            )


def unseen_test_images(images: pd.DataFrame, train_images: pd.DataFrame, limit: int | None = None) -> pd.DataFrame:
    """Images of the split "test" of patients that the model was not trained on, the first `limit` of them."""
    if "split" not in images:
        return images.iloc[:0]
    test = images[images.split == "test"]
    seen = test.patient_id.isin(train_images.patient_id)
    if seen.any():
        logger.warning(
            "%d test images are of patients that are trained on and are not predicted, first %s",
            int(seen.sum()),
            test.image_id[seen].iloc[0],
        )
    return test[~seen].iloc[:limit].reset_index(drop=True)


class FindingsTraining(ClassifierTraining):
    """Loss and validation over batches of `XrayDataset`; the score is that of the recipe's `judged_by`.

    `weights` (classes,), such as `class_weights`, multiply the losses of a class's images.
    """

    model: FindingsClassifier
    recipe: FindingsRecipe
    weights: torch.Tensor | None

    def __init__(self, model: FindingsClassifier, validation: Labelled, weights: np.ndarray | None = None) -> None:
        super().__init__(model, len(validation))
        self.truth = validation.label
        told = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        # It follows from the data, and no checkpoint has to hold it.
        self.register_buffer("weights", told, persistent=False)

    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        logits = self.model.class_logits(logits)
        return findings_loss(logits, batch["label"], self.recipe.multi_label, smoothing, self.weights)

    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        if not self.recipe.auxiliary:
            return super().training_loss(batch)
        outputs = self.model.with_auxiliary(self.model.normalise(batch["pixels"]))
        loss, beside = (self.loss(batch, logits, self.recipe.label_smoothing) for logits in outputs)
        return loss + self.recipe.auxiliary * beside

    def scores(self) -> dict[str, float]:
        if np.isnan(self.found).any():
            # Or the most probable of what is none would be the first class; `fit` stops at such a score.
            return {"score": float("nan")}
        if self.recipe.judged_by == "auc":
            return mean_auc(self.truth, self.found, self.model.classes)
        return exclusive_scores(self.truth, self.found, self.model.classes, self.recipe.judged_by)


class PatchTraining(FindingsTraining):
    """The same over batches of `PatchDataset`: a validation image is judged by the answer of several of its patches."""

    judged: PatchClassifier

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        where, size = batch["where"], len(batch["canvases"])
        logits = self.judged.patch_logits(batch["canvases"], where)
        loss = self.loss({"label": batch["label"][where[:, 0]]}, logits, smoothing=0.0)
        self.log("validation_loss", loss, batch_size=size, sync_dist=True)
        found = self.judged.scored(self.judged.probabilities(logits), where, size)
        self.found[batch["index"].cpu().numpy()] = found.numpy()


def findings_loss(
    logits: torch.Tensor,
    label: torch.Tensor,
    multi_label: bool,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross entropy, the mean over all known labels, or cross entropy, the mean over the images with all known.

    `logits` and `label` (n, classes); labels are 0..1, soft ones included, or NaN where unknown. 0 where nothing is known.
    `smoothing` is the share of the truth that goes evenly to what else could be: both sides of a label, or all classes.
    `weights` (classes,) multiply the losses of exclusive classes' images; the mean is over the images, as Keras takes it.
    """
    logits, known, truth = logits.float(), ~label.isnan(), label.nan_to_num()
    if multi_label:
        truth = smooth_labels(truth, smoothing, classes=2)
        return mean_of_known(functional.binary_cross_entropy_with_logits(logits, truth, reduction="none"), known)
    each = functional.cross_entropy(logits, truth, label_smoothing=smoothing, reduction="none")
    if weights is not None:
        each = each * (truth @ weights)
    return mean_of_known(each, known.all(dim=1))


class FindingsStrategy(Strategy):
    """A classifier of single images over the classes of the table labels, in their order.

    Predicts class_scores of its fold, test_scores of the images of the split "test" (`limit_validation` limits them, too)
    and, with the task's `in_sample`, training_scores of the images it was trained on, as they are: FLANNEL was published
    stacked on such. Its bundle is where a study classifier or a detector may start.
    """

    uses = ("lungs", "in_sample")
    recipe: FindingsRecipe
    train: Labelled
    validation: Labelled
    training: ClassVar[type[FindingsTraining]] = FindingsTraining

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        test_images = unseen_test_images(self.images, self.train_images, task.limit_validation)
        self.predicted = {"class_scores": self.validation_images, "test_scores": test_images}
        if task.in_sample:
            self.predicted["training_scores"] = self.train_images

    @property
    def classes(self) -> list[str]:
        return class_columns(self.labels, "labels")

    def check(self) -> None:
        check_findings(self.images, self.labels, self.folds, self.recipe, self.task.model_name)

    def start(self, model: FindingsClassifier) -> str:
        return start_from_weights(model)

    def make_examples(self) -> None:
        self.train = self.examples(self.train_images, augment=True, seed=self.task.seed)
        self.validation = self.examples(self.validation_images)

    def examples(self, images: pd.DataFrame, **options: Any) -> Labelled:
        """The data set of these images."""
        tables = images, self.labels, self.boxes
        return XrayDataset(*tables, self.task.cache, self.recipe, lungs=self.task.lungs, **options)

    def module(self, model: FindingsClassifier) -> FindingsTraining:
        weights = class_weights(self.train.label) if self.recipe.class_weights else None
        return self.training(model, self.validation, weights)

    def predict(self, device: torch.device) -> dict[str, Any]:
        for name in ("class_scores", "test_scores", "training_scores"):
            self._table(name).unlink(missing_ok=True)
        lungs_missed = self.complete(device)
        return {
            "classes": self.classes,
            "test_images": len(self.predicted["test_scores"]),
            "lungs_missed": {"training": self.train.lungs_missed(), "predicted": lungs_missed},
            "classes_without_images": {
                "training": without_images(self.train.label, self.classes),
                "validation": without_images(self.validation.label, self.classes),
            },
        }

    def complete(self, device: torch.device) -> int:
        """Predict those tables that are asked for and not there; the number of images whose lungs were not found."""
        missing = [name for name in self.predicted if not self._table(name).is_file()]
        if not missing:
            return 0
        bundle, at_once = self.run_folder / "bundle", 2 * self.recipe.batch_size
        predictor, lungs_missed = load_predictor(bundle, device, at_once, lungs=self.task.lungs), 0
        for name in missing:
            chunks = predictor.predict(map(self.task.cache.read, self.predicted[name].image_id))
            self.write(name, concatenate(chunks, "class_scores"), "class_scores")
            lungs_missed += predictor.lungs_missed
        return lungs_missed

    def _table(self, name: str) -> Path:
        return self.run_folder / "tables" / f"{name}.parquet"


class PatchStrategy(FindingsStrategy):
    """A classifier of patches: it learns a patch of each image an epoch, and several together judge and answer an image."""

    recipe: PatchRecipe
    training, joined = PatchTraining, (None, collate_canvases)
    # Whole canvases: few, since workers hand them over through memory that containers keep small.
    validated = 0.5

    def examples(self, images: pd.DataFrame, **options: Any) -> PatchDataset:
        tables = images, self.labels, self.boxes
        return PatchDataset(*tables, self.task.cache, self.recipe, lungs=self.task.lungs, **options)
