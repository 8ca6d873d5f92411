"""Training of a study classifier on all folds but one, and its out-of-fold predictions of that one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.average_precision import average_precision
from kitlib.bundle import load_starting_weights
from kitlib.cache import XrayCache
from kitlib.classes import STUDY_CLASSES
from kitlib.classifier import OUTPUTS, StudyClassifier, probabilities, study_loss
from kitlib.device import pick_device, seed_everything
from kitlib.predict import load_predictor, study_and_image_scores
from kitlib.recipes import StudyRecipe
from kitlib.tables import check_table, read_table, study_labels, write_table
from kitlib.training import RecipeTraining, fit
from kitlib.training_run import finish_run, open_run, read_finished, run_identity, save_trained, split
from kitlib.xray_dataset import XrayDataset, batches


@dataclass(frozen=True)
class StudyRun:
    """A finished run. The scores are out of fold: of images that the model has not seen."""

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
    resume: bool = True,
    progress: bool = True,
) -> StudyRun:
    """Train, keep the best epoch and predict the validation fold with it; `run_folder` gets all of it, metrics.json last.

    An interrupted run goes on where it was and gives what an uninterrupted one gives; a finished one is read back. Raises
    ResumeError if the folder holds a run of other data or settings, ValueError if the recipe freezes random weights.
    Limits are numbers of images, whole patients.
    """
    run_folder = Path(run_folder)
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
    identity = run_identity(tables, fold, cache, recipe, model_name, seed, limit_train, limit_validation)
    if open_run(run_folder, identity, resume):
        return read_study_run(run_folder)

    seed_everything(seed)
    device = pick_device()
    # Convolutions are up to a third faster with the channels last.
    model = StudyClassifier(recipe).to(memory_format=torch.channels_last)
    start = "from scratch"
    if recipe.starting_weights:
        report = load_starting_weights(model, recipe.starting_weights)
        start = f"{recipe.starting_weights}: {len(report['loaded'])} tensors"
    train = XrayDataset(train_images, labels, boxes, cache, recipe, augment=True, seed=seed)
    validation = XrayDataset(validation_images, labels, boxes, cache, recipe)
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
    )
    save_trained(run_folder, model, "study", OUTPUTS, identity, fitted)
    predictor = load_predictor(run_folder / "bundle", device, 2 * recipe.batch_size)
    chunks = predictor.predict(cache.read(image_id) for image_id in validation_images.image_id)
    study_scores, image_scores = study_and_image_scores(chunks, validation_images)
    write_table(study_scores, "study_scores", run_folder / "tables" / "study_scores.parquet")
    write_table(image_scores, "image_scores", run_folder / "tables" / "image_scores.parquet")
    counts = {"starting_weights": start, "train_images": len(train), "validation_images": len(validation)}
    finish_run(run_folder, identity, counts, fitted, device)
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


class StudyTraining(RecipeTraining):
    """Loss and validation of the classifier, over batches of `XrayDataset`; the score is that of `validation_scores`."""

    def __init__(self, model: StudyClassifier, validation: XrayDataset, study_ids: np.ndarray) -> None:
        super().__init__(model, model.recipe)
        self.validation, self.study_ids = validation, study_ids
        self.found = np.zeros((len(validation), len(OUTPUTS)))

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        loss = self._loss(batch, self.model(self.model.normalise(batch["pixels"])))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits = self.model(self.model.normalise(batch["pixels"]))
        self.log("validation_loss", self._loss(batch, logits), batch_size=len(batch["pixels"]))
        self.found[batch["index"].cpu().numpy()] = probabilities(logits).double().cpu().numpy()

    def on_validation_epoch_end(self) -> None:
        self.log_dict(validation_scores(self.found, self.study_ids, self.validation.label, self.validation.none))

    def _loss(self, batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
        return study_loss(logits, batch["label"], batch["none"], self.recipe.none_weight)


def validation_scores(found: np.ndarray, study_ids: np.ndarray, study: np.ndarray, none: np.ndarray) -> dict[str, float]:
    """Average precision (VOC 2010, as in the competition) of each of the five outputs, and `score`, their mean.

    `found` (n, 5) are an image's probabilities, `study` (n, 4) and `none` (n,) its truth, NaN where unknown. The classes are
    judged over studies, by the mean over a study's images, none over images. A class without a positive is NaN and does
    not count in the mean; all NaN gives NaN.
    """
    names = list(STUDY_CLASSES)
    truth = pd.DataFrame(study, columns=names).groupby(study_ids).first()
    mean = pd.DataFrame(found[:, :4], columns=names).groupby(study_ids).mean()
    scores = {}
    for name in names:
        known = truth[name].notna().to_numpy()
        hits = truth[name].to_numpy()[known] > 0.5
        scores[name] = average_precision(mean[name].to_numpy()[known], hits, int(hits.sum()))
    told = ~np.isnan(none)
    hits = none[told] > 0.5
    scores["none"] = average_precision(found[told, 4], hits, int(hits.sum()))
    finite = [value for value in scores.values() if np.isfinite(value)]
    return {"score": float(np.mean(finite)) if finite else float("nan"), **scores}
