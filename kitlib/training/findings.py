"""Training of a findings classifier, of images or of their patches, and its predictions of images that it has not seen."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from kitlib.deadline import Deadline
from kitlib.device import seed_everything, training_device
from kitlib.inference.predict import Predictor, load_predictor
from kitlib.lungs.crop import check_finder
from kitlib.lungs.finders import StoredLungs
from kitlib.models.classifier import FindingsClassifier, check_classes, mean_of_known, smoothed
from kitlib.models.patch_classifier import PatchClassifier, check_patches
from kitlib.recipes.fields import FindingsRecipe, PatchRecipe
from kitlib.scoring.metrics import class_weights, exclusive_scores, mean_auc
from kitlib.tables import check_table, class_columns, concatenate, empty_table, read_table, write_table
from kitlib.training import data_parallel
from kitlib.training.classifier import ClassifierTraining, start_from_weights
from kitlib.training.fold_folder import finish_fold, open_run, read_finished, run_identity, save_trained, split
from kitlib.training.loop import fit, gathered_batches
from kitlib.training.patch_dataset import PatchDataset, collate_canvases
from kitlib.training.xray_dataset import XrayDataset, batches
from kitlib.xrays.cache import XrayCache

logger = logging.getLogger(__name__)

# What a run predicts, the last one only where it is asked for.
TABLES = ("class_scores", "test_scores", "training_scores")


@dataclass(frozen=True)
class FindingsRun:
    """A finished run. `class_scores` are out of fold; `test_scores` are of the data set's own test images, often none.

    `training_scores` are of the images that it was trained on, if they were asked for.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    class_scores: pd.DataFrame
    test_scores: pd.DataFrame
    training_scores: pd.DataFrame


def train_findings(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    cache: XrayCache,
    recipe: FindingsRecipe,
    run_folder: str | Path,
    model_name: str,
    seed: int = 0,
    workers: int = 0,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    resume: bool = True,
    progress: bool = True,
    deadline: Deadline | None = None,
    lungs: StoredLungs | None = None,
    in_sample: bool = False,
) -> FindingsRun | None:
    """Train, keep the recipe's epoch, predict the validation fold and the images of the split "test" with it.

    The classes are those of `labels`, in their order. `run_folder` gets all of it, metrics.json last: the bundle is where a
    study classifier or a detector may start. An interrupted run goes on where it was and gives what an uninterrupted one
    gives; a finished one is read back. With `in_sample` the training images, as they are, are predicted too
    (tables/training_scores.parquet): FLANNEL was published stacked on such. A PatchRecipe trains a classifier of patches, a
    patch of each image an epoch; an image is judged and predicted by several. Limits are numbers of images, whole patients;
    `limit_validation` is the test images' too. Raises ResumeError if the folder holds a run of other data or settings,
    ValueError if the recipe freezes random weights, test images are in a fold, labels of exclusive classes do not sum to 1,
    a setting does not go with the classes (see check_classes), or where `lungs` are not what the recipe's field asks for
    (see check_finder).
    """
    run_folder = Path(run_folder)
    check_finder(recipe, lungs, model_name)
    tables = {"images": images, "labels": labels, "boxes": boxes, "folds": folds}
    tables = {name: check_table(table, name) for name, table in tables.items()}
    images, labels, boxes, folds = tables.values()
    classes = class_columns(labels, "labels")
    check_findings(images, labels, folds, recipe, model_name)
    train_images, validation_images = split(images, folds, fold, seed, limit_train, limit_validation)
    test_images = unseen_test_images(images, train_images, limit_validation)
    identity = run_identity(tables, fold, cache, recipe, model_name, seed, limit_train, limit_validation, lungs=lungs)
    finished, device = open_run(run_folder, identity, resume), training_device()
    shown = dict(zip(TABLES, (validation_images, test_images, *([train_images] if in_sample else [])), strict=False))
    if finished:
        _predict(run_folder, shown, device, cache, recipe, lungs)
        return read_findings_run(run_folder)

    seed_everything(seed)
    way = PATCHES if isinstance(recipe, PatchRecipe) else IMAGES
    model = way.network(recipe, classes).to(memory_format=torch.channels_last)
    start = start_from_weights(model)
    train = way.dataset(train_images, labels, boxes, cache, recipe, augment=True, seed=seed, lungs=lungs)
    validation = way.dataset(validation_images, labels, boxes, cache, recipe, lungs=lungs)
    fitted = fit(
        way.training(model, validation, class_weights(train.label) if recipe.class_weights else None),
        batches(train, recipe.batch_size, workers, shuffle=True, seed=seed),
        batches(validation, max(1, round(way.validated * recipe.batch_size)), workers, joined=way.joined),
        run_folder,
        device,
        seed,
        progress,
        title=f"{model_name} fold {fold}",
        gathered=gathered_batches(recipe),
        deadline=deadline,
    )
    if not data_parallel.is_first():
        return None
    save_trained(run_folder, model, way.family, classes, identity, fitted)
    for name in TABLES:
        (run_folder / "tables" / f"{name}.parquet").unlink(missing_ok=True)
    lungs_missed = _predict(run_folder, shown, device, cache, recipe, lungs)
    counts = {
        "classes": classes,
        "starting_weights": start,
        "train_images": len(train),
        "validation_images": len(validation),
        "test_images": len(test_images),
        "lungs_missed": {"training": train.lungs_missed(), "predicted": lungs_missed},
        "classes_without_images": {
            "training": _absent(train.label, classes),
            "validation": _absent(validation.label, classes),
        },
    }
    finish_fold(run_folder, identity, counts, fitted, device)
    return read_findings_run(run_folder)


def read_findings_run(run_folder: str | Path) -> FindingsRun:
    """The results of a finished run; without metrics.json, which marks one, FileNotFoundError."""
    run_folder = Path(run_folder)
    metrics, history = read_finished(run_folder)
    *asked, training = (run_folder / "tables" / f"{name}.parquet" for name in TABLES)
    in_sample = read_table("class_scores", training) if training.is_file() else empty_table("class_scores")
    return FindingsRun(run_folder, metrics, history, *(read_table("class_scores", path) for path in asked), in_sample)


def check_findings(
    images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame, recipe: FindingsRecipe, model_name: str
) -> None:
    """Raise ValueError where these tables and settings cannot be trained on, with what to change."""
    if recipe.frozen_backbone and not recipe.starting_weights:
        raise ValueError(
            f"{model_name}: the recipe freezes {recipe.backbone} at random weights, from which nothing is learnt; "
            'give overrides {"starting_weights": "..."} or {"frozen_backbone": false}'
        )
    if isinstance(recipe, PatchRecipe):
        check_patches(recipe)
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

    def __init__(self, model: FindingsClassifier, validation: XrayDataset, weights: np.ndarray | None = None) -> None:
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

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        where, size = batch["where"], len(batch["canvases"])
        logits = self.judged.patch_logits(batch["canvases"], where)
        loss = self.loss({"label": batch["label"][where[:, 0]]}, logits, smoothing=0.0)
        self.log("validation_loss", loss, batch_size=size, sync_dist=True)
        found = self.judged.scored(self.judged.probabilities(logits), where, size)
        self.found[batch["index"].cpu().numpy()] = found.numpy()


@dataclass(frozen=True)
class Way:
    """How a family of classifiers is trained; `validated`: a validation batch's images, as a share of a training one's."""

    family: str
    network: type[FindingsClassifier]
    dataset: type[XrayDataset] | type[PatchDataset]
    training: type[FindingsTraining]
    joined: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    validated: float


IMAGES = Way("findings", FindingsClassifier, XrayDataset, FindingsTraining, None, 2)
# Whole canvases: few, since workers hand them over through memory that containers keep small.
PATCHES = Way("patches", PatchClassifier, PatchDataset, PatchTraining, collate_canvases, 0.5)


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
        truth = smoothed(truth, smoothing, classes=2)
        return mean_of_known(functional.binary_cross_entropy_with_logits(logits, truth, reduction="none"), known)
    each = functional.cross_entropy(logits, truth, label_smoothing=smoothing, reduction="none")
    if weights is not None:
        each = each * (truth @ weights)
    return mean_of_known(each, known.all(dim=1))


def _predict(
    run_folder: Path,
    shown: dict[str, pd.DataFrame],
    device: torch.device,
    cache: XrayCache,
    recipe: FindingsRecipe,
    lungs: StoredLungs | None,
) -> int:
    """Write those tables of `shown`, images by the table's name, that are not there; how many images' lungs were missed."""
    paths = {name: run_folder / "tables" / f"{name}.parquet" for name in shown}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if not missing:
        return 0
    predictor, lungs_missed = load_predictor(run_folder / "bundle", device, 2 * recipe.batch_size, lungs=lungs), 0
    for name in missing:
        write_table(_scores(predictor, cache, shown[name]), "class_scores", paths[name])
        lungs_missed += predictor.lungs_missed
    return lungs_missed


def _absent(label: np.ndarray, classes: list[str]) -> list[str]:
    """Classes that no image is known to have."""
    present = (np.nan_to_num(label) >= 0.5).any(axis=0)
    return [name for name, there in zip(classes, present, strict=True) if not there]


def _scores(predictor: Predictor, cache: XrayCache, images: pd.DataFrame) -> pd.DataFrame:
    return concatenate(predictor.predict(cache.read(image_id) for image_id in images.image_id), "class_scores")
