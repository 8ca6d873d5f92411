"""Trains a findings classifier on whole images or on lung patches, and predicts the validation fold and the test images."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from kitlib.errors import DatasetError
from kitlib.inference.predict import load_predictor
from kitlib.models.classifier import FindingsClassifier, check_classes, mean_of_known, smooth_labels
from kitlib.models.patch_classifier import PatchClassifier
from kitlib.recipes.fields import FindingsRecipe, PatchRecipe
from kitlib.scoring.metrics import DEFAULT_THRESHOLD, call_metrics, class_weights, exclusive_scores, mean_auc, most_probable
from kitlib.tables import class_columns, concatenate
from kitlib.training.classifier import ClassifierTraining, check_frozen, start_from_weights
from kitlib.training.patch_dataset import PatchDataset, collate_canvases
from kitlib.training.strategy import Strategy, check_classes_differ, without_images
from kitlib.training.task import Task
from kitlib.training.xray_dataset import XrayDataset

logger = logging.getLogger(__name__)

Labelled = XrayDataset | PatchDataset


def check_findings(
    images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame, recipe: FindingsRecipe, model_name: str
) -> None:
    """Raise ValueError if a findings classifier cannot be trained with these tables and this recipe.

    Checks that a frozen backbone has starting weights, that there are labels, that the recipe fits the classes, that no
    image in the split "test" is in a fold, and, unless the recipe is `multi_label`, that each image's labels sum to 1.
    `model_name` is used in messages.
    """
    check_frozen(recipe, model_name)
    if not class_columns(labels, "labels"):
        raise DatasetError(
            f"{model_name}: the prepared run has no labels; in notebook 10, give `label` or `labels` in the parameter "
            "`columns`, or set `class_folders`"
        )
    check_classes(recipe, class_columns(labels, "labels"))
    if "split" in images:
        test = set(images.image_id[images.split == "test"])
        in_folds = folds.id[folds.id.isin(test)]
        if len(in_folds):
            raise ValueError(
                f"{len(in_folds)} images in the split 'test' are in folds; the first is {in_folds.iloc[0]}. Make the folds "
                "with make_folds, which leaves test images out"
            )
    if not recipe.multi_label:
        classes = class_columns(labels, "labels")
        fully_labelled = labels[labels[classes].notna().all(axis=1)]
        invalid = fully_labelled[(fully_labelled[classes].sum(axis=1) - 1).abs() > 1e-6]
        if len(invalid):
            raise ValueError(
                f"{model_name}: `multi_label` is false, but {len(invalid)} rows of the table `labels` do not sum to 1; the "
                f'first is for {invalid["id"].iloc[0]}. Correct them, or set overrides {{"multi_label": true}}'
            )


def unseen_test_images(images: pd.DataFrame, train_images: pd.DataFrame, limit: int | None = None) -> pd.DataFrame:
    """Return at most `limit` rows of `images` in the split "test", without patients who also have images in `train_images`.

    Logs a warning if images are dropped because of their patient. Returns no rows if `images` has no column `split`.
    """
    if "split" not in images:
        return images.iloc[:0]
    test = images[images.split == "test"]
    is_of_trained_patient = test.patient_id.isin(train_images.patient_id)
    if is_of_trained_patient.any():
        logger.warning(
            "%d test images are not predicted, because the model is trained on other images of their patients; "
            "the first is %s",
            int(is_of_trained_patient.sum()),
            test.image_id[is_of_trained_patient].iloc[0],
        )
    return test[~is_of_trained_patient].iloc[:limit].reset_index(drop=True)


class FindingsTraining(ClassifierTraining):
    """Lightning module that trains and validates a findings classifier on batches from an `XrayDataset`.

    The validation score is the metric in the recipe's `judged_by`. `weights`, shape (classes,), has one factor per class, as
    returned by `class_weights`: the loss of each image is multiplied by the factor of its class.
    """

    model: FindingsClassifier
    recipe: FindingsRecipe
    weights: torch.Tensor | None

    def __init__(self, model: FindingsClassifier, validation: Labelled, weights: np.ndarray | None = None) -> None:
        super().__init__(model, len(validation))
        self.truth = validation.label
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        # Not in checkpoints, because it can be computed from the data.
        self.register_buffer("weights", tensor, persistent=False)

    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        logits = self.model.class_logits(logits)
        return findings_loss(logits, batch["label"], self.recipe.multi_label, smoothing, self.weights)

    def training_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        if not self.recipe.auxiliary:
            return super().training_loss(batch)
        outputs = self.model.with_auxiliary(self.model.normalise(batch["pixels"]))
        loss, auxiliary_loss = (self.loss(batch, logits, self.recipe.label_smoothing) for logits in outputs)
        return loss + self.recipe.auxiliary * auxiliary_loss

    def scores(self) -> dict[str, float]:
        if np.isnan(self.validation_probabilities).any():
            # argmax would count NaN predictions as the first class; with a NaN score, `fit` raises an error.
            return {"score": float("nan")}
        truth, probabilities, judged_by = self.truth, self.validation_probabilities, self.recipe.judged_by
        if judged_by == "auc":
            scores = mean_auc(truth, probabilities, self.model.classes)
        else:
            scores = exclusive_scores(truth, probabilities, self.model.classes, judged_by)
        called = probabilities >= DEFAULT_THRESHOLD if self.recipe.multi_label else most_probable(probabilities)
        return scores | call_metrics(truth, called)


class PatchTraining(FindingsTraining):
    """Lightning module that trains a classifier on single lung patches, and validates it on whole images.

    In validation, an image's prediction is pooled from several of its patches. Batches come from a `PatchDataset`.
    """

    evaluated_model: PatchClassifier

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        centres, size = batch["where"], len(batch["canvases"])
        logits = self.evaluated_model.patch_logits(batch["canvases"], centres)
        loss = self.loss({"label": batch["label"][centres[:, 0]]}, logits, smoothing=0.0)
        self.log("validation_loss", loss, batch_size=size, sync_dist=True)
        scores = self.evaluated_model.scored(self.evaluated_model.probabilities(logits), centres, size)
        self.validation_probabilities[batch["index"].cpu().numpy()] = scores.numpy()


def findings_loss(
    logits: torch.Tensor,
    label: torch.Tensor,
    multi_label: bool,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the scalar loss of a batch: binary cross entropy with `multi_label`, else cross entropy.

    `logits` and `label` have the shape (n, classes). Labels are 0..1 (soft labels are allowed), or NaN if unknown. Binary
    cross entropy is averaged over all known labels; cross entropy is averaged over the images whose labels are all known.
    With nothing to average, the loss is 0. `smoothing` is the share of each target that is spread evenly: over true and
    false with `multi_label`, else over all classes. `weights`, shape (classes,), is used only for cross entropy: each
    image's loss is multiplied by the weight of its class, and the sum is divided by the number of images, as in Keras.
    """
    logits, is_known, truth = logits.float(), ~label.isnan(), label.nan_to_num()
    if multi_label:
        truth = smooth_labels(truth, smoothing, classes=2)
        return mean_of_known(functional.binary_cross_entropy_with_logits(logits, truth, reduction="none"), is_known)
    losses = functional.cross_entropy(logits, truth, label_smoothing=smoothing, reduction="none")
    if weights is not None:
        # Not a matrix product, which autocast would compute in half precision.
        losses = losses * (truth * weights).sum(dim=1)
    return mean_of_known(losses, is_known.all(dim=1))


class FindingsStrategy(Strategy):
    """Strategy that trains a classifier of single images on one fold. The classes are the columns of the `labels` table.

    Writes predictions for the validation fold to the table `class_scores`, and predictions for at most `limit_validation`
    images in the split "test" to `test_scores`. With the task's `in_sample`, it also writes predictions for the model's
    training images, without augmentation, to `training_scores`; FLANNEL's published ensemble needs them. The bundle can be
    the starting weights of a study classifier or a detector.
    """

    uses = ("lungs", "in_sample")
    recipe: FindingsRecipe
    train: Labelled
    validation: Labelled
    training_module: ClassVar[type[FindingsTraining]] = FindingsTraining

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        check_classes_differ(task, self.train_images, self.labels)
        test_images = unseen_test_images(self.images, self.train_images, task.limit_validation)
        self.images_to_predict = {"class_scores": self.validation_images, "test_scores": test_images}
        if task.in_sample:
            self.images_to_predict["training_scores"] = self.train_images

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
        """Return a data set with one example per row of `images`, constructed with `options` such as `augment`."""
        tables = images, self.labels, self.boxes
        return XrayDataset(*tables, self.task.cache, self.recipe, lungs=self.task.lungs, **options)

    def module(self, model: FindingsClassifier) -> FindingsTraining:
        weights = class_weights(self.train.label) if self.recipe.class_weights else None
        return self.training_module(model, self.validation, weights)

    def predict(self, device: torch.device) -> dict[str, Any]:
        for name in ("class_scores", "test_scores", "training_scores"):
            self._table_path(name).unlink(missing_ok=True)
        lungs_missed = self.complete(device)
        return {
            "classes": self.classes,
            "test_images": len(self.images_to_predict["test_scores"]),
            "lungs_missed": {"training": self.train.lungs_missed(), "predicted": lungs_missed},
            "classes_without_images": {
                "training": without_images(self.train.label, self.classes),
                "validation": without_images(self.validation.label, self.classes),
            },
        }

    def complete(self, device: torch.device) -> int:
        """Write the tables of predictions that the task requests and the run folder lacks.

        Returns the number of predicted images in which no usable lungs were found; 0 if the model does not use lungs.
        """
        missing = [name for name in self.images_to_predict if not self._table_path(name).is_file()]
        if not missing:
            return 0
        bundle, batch_size = self.run_folder / "bundle", 2 * self.recipe.batch_size
        predictor, lungs_missed = load_predictor(bundle, device, batch_size, lungs=self.task.lungs), 0
        for name in missing:
            chunks = predictor.predict(map(self.task.cache.read, self.images_to_predict[name].image_id))
            self.write(name, concatenate(chunks, "class_scores"), "class_scores")
            lungs_missed += predictor.lungs_missed
        return lungs_missed

    def _table_path(self, name: str) -> Path:
        return self.run_folder / "tables" / f"{name}.parquet"


class PatchStrategy(FindingsStrategy):
    """Strategy that trains a classifier of lung patches on one fold.

    Training uses one patch per image and epoch. Validation and prediction pool the outputs for several patches of an image.
    """

    recipe: PatchRecipe
    training_module, collate_fns = PatchTraining, (None, collate_canvases)
    # Small, because validation examples are whole canvases that workers pass through /dev/shm, which is small in containers.
    validation_batch_ratio = 0.5

    def examples(self, images: pd.DataFrame, **options: Any) -> PatchDataset:
        tables = images, self.labels, self.boxes
        return PatchDataset(*tables, self.task.cache, self.recipe, lungs=self.task.lungs, **options)
