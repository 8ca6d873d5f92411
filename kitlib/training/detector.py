"""Training of an opacity detector of any family on all folds but one, and its out-of-fold boxes of that one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.deadline import Deadline
from kitlib.device import seed_everything, training_device
from kitlib.inference.predict import load_predictor
from kitlib.lungs.crop import check_finder
from kitlib.lungs.finders import StoredLungs
from kitlib.recipes.fields import DetectorRecipe
from kitlib.runs.reading import ExtraImages
from kitlib.scoring.average_precision import average_precision, box_hits
from kitlib.settings import override
from kitlib.tables import check_table, concatenate, read_table, write_table
from kitlib.training import data_parallel
from kitlib.training.fold_folder import (
    finish_fold,
    open_run,
    read_finished,
    run_identity,
    save_trained,
    split,
    with_extra,
)
from kitlib.training.xray_dataset import XrayDataset, batches
from kitlib.xrays.cache import XrayCache

# Settings that one family alone knows. ultralytics brings augmentation, average and schedule of its own.
OF_ONE_FAMILY = {
    "faster_rcnn": (
        *("fpn_channels", "box_hidden", "box_samples", "proposals", "ema_decay", "schedule", "plateau_epochs"),
        *("schedule_every", "shift", "turn_p", "sharpen_p", "blur_p", "cutouts", "cutouts_p", "erase_p"),
        "brightness_contrast_p",
    ),
    "yolo": ("box_gain", "class_gain", "dfl_gain", "mosaic", "mixup", "zoom", "width", "norm_momentum"),
}


@dataclass(frozen=True)
class DetectorRun:
    """A finished run. `detections` are out of fold, in original pixels: of images that the model was not trained on.

    `coverage` has a row an image of the fold, also where nothing was found.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    detections: pd.DataFrame
    coverage: pd.DataFrame


def train_detector(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    cache: XrayCache,
    recipe: DetectorRecipe,
    run_folder: str | Path,
    model_name: str,
    seed: int = 0,
    workers: int = 0,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    resume: bool = True,
    progress: bool = True,
    extra: ExtraImages | None = None,
    deadline: Deadline | None = None,
    lungs: StoredLungs | None = None,
) -> DetectorRun | None:
    """Train, keep the recipe's epoch, predict the validation fold; `run_folder` gets bundle, tables, figures, metrics.json.

    The best epoch is that of the highest opacity AP on the validation fold, images without boxes included. An interrupted
    run goes on where it was and gives what an uninterrupted one gives; a finished one is read back. Raises ResumeError if
    the folder holds a run of other data or settings, ValueError where `lungs` are not what the recipe's field asks for (see
    check_finder). Limits are numbers of images, whole patients; they do not touch `extra`, which is trained on as well (see
    kitlib.runs.reading.read_extra). Epochs on lung crops are judged by the boxes as far as these show them, the tables by
    all.
    """
    run_folder = Path(run_folder)
    check_finder(recipe, lungs, model_name)
    check_family(recipe)
    tables = {"images": images, "labels": labels, "boxes": boxes, "folds": folds}
    tables = {name: check_table(table, name) for name, table in tables.items()}
    images, labels, boxes, folds = tables.values()
    train_images, validation_images = split(images, folds, fold, seed, limit_train, limit_validation)
    identity = run_identity(tables, fold, cache, recipe, model_name, seed, limit_train, limit_validation, extra, lungs)
    seen = with_extra(train_images, labels, boxes, cache, extra, validation_images)
    train_images = with_negatives(seen[0], seen[2], recipe.negatives, seed)
    for part, name in ((train_images, "training"), (validation_images, f"validation fold {fold}")):
        if not part.image_id.isin(seen[2].image_id).any():
            raise ValueError(f"{model_name}: none of the {len(part)} images of the {name} has a box; raise the limit")
    if open_run(run_folder, identity, resume):
        return read_detector_run(run_folder)

    seed_everything(seed)
    device = training_device()
    build, fit = _family(recipe.family)
    detector = build(recipe)
    train = XrayDataset(train_images, *seen[1:], recipe, augment=recipe.family != "yolo", seed=seed, lungs=lungs)
    # Judged on the canvas that it will predict on.
    side = recipe.inference_size or recipe.image_size
    validation = XrayDataset(validation_images, labels, boxes, cache, override(recipe, image_size=side), lungs=lungs)
    # Without gradients twice as many fit the memory that training needs, and fewer where they are larger.
    at_once = max(1, int(2 * recipe.batch_size * (recipe.image_size / side) ** 2))
    judged = batches(validation, at_once, workers)
    title = f"{model_name} fold {fold}"
    fitted = fit(detector, train, judged, canvas_precision, run_folder, device, seed, workers, progress, title, deadline)
    if not data_parallel.is_first():
        return None
    save_trained(run_folder, detector, recipe.family, ["opacity"], identity, fitted)
    predictor = load_predictor(run_folder / "bundle", device, at_once, lungs=lungs)
    chunks = predictor.predict(cache.read(image_id) for image_id in validation_images.image_id)
    write_table(concatenate(chunks, "detections"), "detections", run_folder / "tables" / "detections.parquet")
    coverage = pd.DataFrame({"image_id": predictor.seen, "model": model_name, "fold": fold})
    write_table(coverage, "coverage", run_folder / "tables" / "coverage.parquet")
    counts = {
        "starting_weights": detector.starting_weights,
        "train_images": len(train),
        "train_images_with_boxes": sum(len(each) > 0 for each in train.boxes),
        "validation_images": len(validation),
        "lungs_missed": {"training": train.lungs_missed(), "predicted": predictor.lungs_missed},
    }
    finish_fold(run_folder, identity, counts, fitted, device)
    return read_detector_run(run_folder)


def read_detector_run(run_folder: str | Path) -> DetectorRun:
    """The results of a finished run; without metrics.json, which marks one, FileNotFoundError."""
    run_folder = Path(run_folder)
    metrics, history = read_finished(run_folder)
    tables = run_folder / "tables"
    return DetectorRun(
        run_folder,
        metrics,
        history,
        read_table("detections", tables / "detections.parquet"),
        read_table("coverage", tables / "coverage.parquet"),
    )


def check_family(recipe: DetectorRecipe) -> None:
    """Raise ValueError for an unknown family, and for settings that only another one would heed."""
    if recipe.family not in OF_ONE_FAMILY:
        raise ValueError(f"recipe.family is {recipe.family!r}; there are: {', '.join(OF_ONE_FAMILY)}")
    usual = DetectorRecipe()
    for family, names in OF_ONE_FAMILY.items():
        set_ = [name for name in names if getattr(recipe, name) != getattr(usual, name)]
        if family != recipe.family and set_:
            told = ", ".join(f"{name} (leave it at {getattr(usual, name)})" for name in set_)
            raise ValueError(f"{recipe.backbone} is a {recipe.family}, which heeds no {told}: settings of {family} alone")


def with_negatives(images: pd.DataFrame, boxes: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The images with a box, and of the others at most `share` times as many, drawn by `seed`; in the order of `images`."""
    if share < 0:
        raise ValueError(f"recipe.negatives is {share}; it is a share of the images with boxes, from 0")
    boxed = images.image_id.isin(boxes.image_id).to_numpy()
    others = np.random.default_rng(seed).permutation(np.flatnonzero(~boxed))
    kept = np.concatenate([np.flatnonzero(boxed), others[: round(share * boxed.sum())]])
    return images.iloc[np.sort(kept)].reset_index(drop=True)


def canvas_precision(found: list[np.ndarray], true: list[np.ndarray]) -> float:
    """Opacity AP (VOC 2010) over images: `found` (k, 5) boxes and score, `true` (m, 4) boxes an image, in canvas pixels."""
    image, true_image = (np.repeat(np.arange(len(each)), [len(boxes) for boxes in each]) for each in (found, true))
    boxes, true_boxes = np.concatenate(found), np.concatenate(true)
    hits = box_hits(image, boxes[:, 4], boxes[:, :4], true_image, true_boxes)
    return average_precision(boxes[:, 4], hits, len(true_boxes))


def _family(name: str):
    """(class of the detector, function that trains it). Only here: each family's import is slow, and one may be missing."""
    if name == "faster_rcnn":
        from kitlib.models.faster_rcnn import FasterRCNNDetector
        from kitlib.training.faster_rcnn import fit_faster_rcnn

        return FasterRCNNDetector, fit_faster_rcnn
    from kitlib.models.yolo import YoloDetector
    from kitlib.training.yolo import fit_yolo

    return YoloDetector, fit_yolo
