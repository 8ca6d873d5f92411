"""Training of a study classifier on all folds but one, and its out-of-fold predictions of that one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.classes import STUDY_CLASSES
from kitlib.deadline import Deadline
from kitlib.device import seed_everything, training_device
from kitlib.inference.predict import load_predictor, study_and_image_scores
from kitlib.lungs.crop import check_finder
from kitlib.lungs.finders import StoredLungs
from kitlib.models.box_mask import box_mask, mask_loss
from kitlib.models.classifier import OUTPUTS, StudyClassifier, study_loss
from kitlib.recipes.fields import StudyRecipe
from kitlib.runs.reading import ExtraImages
from kitlib.scoring.average_precision import average_precision
from kitlib.tables import check_table, read_table, study_labels, write_table
from kitlib.training import data_parallel
from kitlib.training.classifier import ClassifierTraining, start_from_weights
from kitlib.training.fold_folder import (
    finish_fold,
    open_run,
    read_finished,
    run_identity,
    save_trained,
    split,
    with_extra,
)
from kitlib.training.loop import fit, gathered_batches
from kitlib.training.xray_dataset import XrayDataset, batches
from kitlib.xrays.cache import XrayCache


@dataclass(frozen=True)
class StudyRun:
    """A finished run. The scores are out of fold: of images that the model has not seen.

    A recipe whose outputs are "study" or "none" leaves the table of the other empty.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    study_scores: pd.DataFrame
    image_scores: pd.DataFrame


def train_study(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    cache: XrayCache,
    recipe: StudyRecipe,
    run_folder: str | Path,
    model_name: str,
    seed: int = 0,
    workers: int = 0,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    extra: ExtraImages | None = None,
    resume: bool = True,
    progress: bool = True,
    deadline: Deadline | None = None,
    lungs: StoredLungs | None = None,
) -> StudyRun | None:
    """Train, keep the recipe's epoch, predict the validation fold with it; `run_folder` gets all of it, metrics.json last.

    An interrupted run goes on where it was and gives what an uninterrupted one gives; a finished one is read back. Raises
    ResumeError if the folder holds a run of other data or settings, ValueError if the recipe freezes random weights or if
    `extra` images, which are trained on as well, are among those validated on, or where `lungs` are not what the
    recipe's field asks for (see check_finder). Limits are numbers of images, whole patients; they do not touch `extra`.
    """
    run_folder = Path(run_folder)
    check_finder(recipe, lungs, model_name)
    if recipe.frozen_backbone and not recipe.starting_weights:
        raise ValueError(
            f"{model_name}: the recipe freezes {recipe.backbone} at random weights, from which nothing is learnt; "
            'give overrides {"starting_weights": "..."} (a .safetensors file of the NIH or ImageNet backbone) or '
            '{"frozen_backbone": false}'
        )
    tables = {"images": images, "labels": labels, "boxes": boxes, "folds": folds}
    tables = {name: check_table(table, name) for name, table in tables.items()} | {"labels": study_labels(labels)}
    images, labels, boxes, folds = tables.values()
    train_images, validation_images = split(images, folds, fold, seed, limit_train, limit_validation)
    identity = run_identity(tables, fold, cache, recipe, model_name, seed, limit_train, limit_validation, extra, lungs)
    seen = with_extra(train_images, labels, boxes, cache, extra, validation_images)
    if open_run(run_folder, identity, resume):
        return read_study_run(run_folder)

    seed_everything(seed)
    device = training_device()
    # Convolutions are up to a third faster with the channels last.
    model = StudyClassifier(recipe).to(memory_format=torch.channels_last)
    start = start_from_weights(model)
    train = XrayDataset(*seen, recipe, augment=True, seed=seed, lungs=lungs)
    validation = XrayDataset(validation_images, labels, boxes, cache, recipe, lungs=lungs)
    module = StudyTraining(model, validation, validation_images.study_id.to_numpy())
    fitted = fit(
        module,
        batches(train, recipe.batch_size, workers, shuffle=True, seed=seed),
        batches(validation, 2 * recipe.batch_size, workers),
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
    save_trained(run_folder, model, "study", OUTPUTS, identity, fitted)
    predictor = load_predictor(run_folder / "bundle", device, 2 * recipe.batch_size, lungs=lungs)
    chunks = predictor.predict(cache.read(image_id) for image_id in validation_images.image_id)
    study_scores, image_scores = study_and_image_scores(chunks, validation_images)
    write_table(study_scores, "study_scores", run_folder / "tables" / "study_scores.parquet")
    write_table(image_scores, "image_scores", run_folder / "tables" / "image_scores.parquet")
    counts = {
        "starting_weights": start,
        "train_images": len(train),
        "validation_images": len(validation),
        "lungs_missed": {"training": train.lungs_missed(), "predicted": predictor.lungs_missed},
    }
    finish_fold(run_folder, identity, counts, fitted, device)
    return read_study_run(run_folder)


def read_study_run(run_folder: str | Path) -> StudyRun:
    """The results of a finished run; without metrics.json, which marks one, FileNotFoundError."""
    run_folder = Path(run_folder)
    metrics, history = read_finished(run_folder)
    tables = run_folder / "tables"
    return StudyRun(
        run_folder,
        metrics,
        history,
        read_table("study_scores", tables / "study_scores.parquet"),
        read_table("image_scores", tables / "image_scores.parquet"),
    )


class StudyTraining(ClassifierTraining):
    """Loss and validation of the study classifier; the score is that of `validation_scores`."""

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
        auxiliary = mask_loss(mask, batch["mask"])
        self.log("train_mask_loss", auxiliary, on_step=False, on_epoch=True, batch_size=len(mask))
        return self.loss(batch, logits, self.recipe.label_smoothing) + self.recipe.segmentation * auxiliary

    def loss(self, batch: dict[str, Any], logits: torch.Tensor, smoothing: float) -> torch.Tensor:
        recipe = self.recipe
        return study_loss(logits, batch["label"], batch["none"], recipe.none_weight, recipe.outputs, smoothing)

    def scores(self) -> dict[str, float]:
        truth = self.validation.label, self.validation.none
        return validation_scores(self.found, self.study_ids, *truth, self.recipe.outputs)


def validation_scores(
    found: np.ndarray, study_ids: np.ndarray, study: np.ndarray, none: np.ndarray, outputs: str = "both"
) -> dict[str, float]:
    """Average precision (VOC 2010, as in the competition) of each of the five outputs, and `score`, their mean.

    `found` (n, 5) are an image's probabilities, `study` (n, 4) and `none` (n,) its truth, NaN where unknown. The classes are
    judged over studies, by the mean over a study's images, none over images. Of `outputs` "study" or "none" only those
    are judged. A class without a positive is NaN and does not count in the mean; all NaN gives NaN.
    """
    scores = {}
    if outputs != "none":
        names = list(STUDY_CLASSES)
        truth = pd.DataFrame(study, columns=names).groupby(study_ids).first()
        mean = pd.DataFrame(found[:, :4], columns=names).groupby(study_ids).mean()
        for name in names:
            known = truth[name].notna().to_numpy()
            scores[name] = _precision(mean[name].to_numpy()[known], truth[name].to_numpy()[known])
    if outputs != "study":
        told = ~np.isnan(none)
        scores["none"] = _precision(found[told, 4], none[told])
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}


def _precision(found: np.ndarray, truth: np.ndarray) -> float:
    hits = truth > 0.5
    return average_precision(found, hits, int(hits.sum()))
