"""Trains a segmenter on one fold, and scores the masks that it predicts for the held-out images."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.bundle import read_bundle, read_record
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.errors import BundleError, MaskError
from kitlib.inference.segment_lungs import LungSegmenter, MaskPredictor, TrainedSegmenter, load_any_segmenter
from kitlib.lungs.clean_up import decode_maps
from kitlib.models.albunet import AlbuNet
from kitlib.models.families import LUNGS, MASKS, recorded_family
from kitlib.models.segmenter import Segmenter, segmentation_loss
from kitlib.models.starting_weights import load_starting_weights
from kitlib.paths import find_starting_weights
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.scoring.metrics import overlap
from kitlib.tables import check_table, concatenate
from kitlib.training import data_parallel
from kitlib.training.loop import RecipeTraining
from kitlib.training.mask_dataset import MaskDataset, collate_masks
from kitlib.training.strategy import Strategy
from kitlib.xrays.cache import DecodedXrays
from kitlib.xrays.mask_store import MaskStore

MASKS_PER_FILE = 256


def with_masks(images: pd.DataFrame, folds: pd.DataFrame, masks: MaskStore) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `images` and `folds` with only the rows of images that have a mask in `masks`.

    Raises MaskError if no image has a mask, or if these images have several values in the column `convention`, because
    conventions define lungs differently.
    """
    with_mask = images[images.image_id.isin(masks.ids)]
    if with_mask.empty:
        raise MaskError(f"none of the {len(images)} images has a mask in {masks.folder}; prepare a data set with lung masks")
    conventions = sorted(set(with_mask.convention)) if "convention" in with_mask else []
    if len(conventions) > 1:
        raise MaskError(
            f"the masks follow {len(conventions)} conventions ({', '.join(conventions)}), which define lungs differently; "
            "prepare and train on one convention at a time"
        )
    return with_mask, folds[folds.id.isin(with_mask.image_id)]


def check_other_source(home: pd.DataFrame, other: pd.DataFrame, name: str) -> None:
    """Raise ValueError if an image in `other` has the same image_id or patient_id as an image in `home`.

    `home` is the `images` table of the training set, `other` the `images` table of a data set for evaluation. `name` is the
    name of the run that prepared `other`; it is used in messages.
    """
    for column in ("image_id", "patient_id"):
        shared = other.loc[other[column].isin(home[column]), column]
        if len(shared):
            raise ValueError(
                f"{name} is not an independent source: {len(shared)} of its images have the same {column} as images of the "
                f"training set; the first {column} is {shared.iloc[0]!r}. Remove {name!r} from `also_on`"
            )


def score_masks(
    segmenter: TrainedSegmenter,
    cache: DecodedXrays,
    masks: MaskStore,
    image_ids: pd.Series,
    predicted_masks: MaskStore | None = None,
    predicted_maps: list[pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Segment images, compare the result with their ground-truth masks in `masks`, and return a `mask_scores` table.

    For each image, the table has one row for each of the recipe's structures and, if the segmenter is a LungSegmenter, one
    for "lungs" (left and right lung together). The columns are image_id, model, fold (always -1), structure, dice and
    jaccard. Masks are scored as predicted, without clean-up. If `predicted_masks` is given, the predicted masks are added to
    this store. If `predicted_maps` is given, a MaskPredictor's `mask_maps` tables are added to this list.
    """
    rows, pending = [], {}
    structures = dict.fromkeys([*segmenter.recipe.structures, *(["lungs"] if isinstance(segmenter, LungSegmenter) else [])])
    for xray, maps, place in segmenter.maps(cache.read(image_id) for image_id in image_ids):
        predicted, truth = decode_maps(maps, place, xray.pixels.shape, segmenter.recipe), masks.read(xray.image_id)
        for structure in structures:
            codes = LUNG_CODES if structure == "lungs" else (MASK_CODES[structure],)
            agreement = overlap(np.isin(predicted, codes), np.isin(truth, codes))
            rows.append((xray.image_id, segmenter.model, -1, structure, *agreement))
        if predicted_maps is not None and isinstance(segmenter, MaskPredictor):
            predicted_maps.append(segmenter.map_table(xray, maps, place))
        pending[xray.image_id] = predicted
        if predicted_masks is not None and len(pending) >= MASKS_PER_FILE:
            predicted_masks.add(pending)
            pending = {}
    if predicted_masks is not None:
        predicted_masks.add(pending)
    columns = ["image_id", "model", "fold", "structure", "dice", "jaccard"]
    return check_table(pd.DataFrame(rows, columns=columns), "mask_scores")


def _is_segmenter(source: Path) -> bool:
    return source.is_dir() and recorded_family(read_record(source), source).answers in (LUNGS, MASKS)


class LungsTraining(RecipeTraining):
    """Lightning module that trains and validates a segmenter on batches from a `MaskDataset`.

    The validation score is the Dice coefficient of the predicted and the ground-truth mask on the canvas, averaged over
    images and structures; it is 1 if both masks are empty.
    """

    model: Segmenter
    evaluated_model: Segmenter
    recipe: SegmenterRecipe

    def __init__(self, model: Segmenter, validation_images: int) -> None:
        super().__init__(model, model.recipe)
        self.overlaps = np.full((validation_images, len(model.recipe.structures), 2), np.nan)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        logits = self.model(self.model.normalise(batch["pixels"]))
        loss = segmentation_loss(logits, batch["truth"], self.recipe)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits = self.evaluated_model(self.evaluated_model.normalise(batch["pixels"]))
        size = len(batch["pixels"])
        self.log("validation_loss", segmentation_loss(logits, batch["truth"], self.recipe), batch_size=size, sync_dist=True)
        predicted = self.evaluated_model.labels(logits)
        truth = batch["truth"].cpu().numpy()
        for row, prediction, mask in zip(batch["index"].tolist(), predicted, truth, strict=True):
            for number in range(self.overlaps.shape[1]):
                self.overlaps[row, number] = overlap(prediction == number + 1, mask == number + 1)

    def on_validation_epoch_end(self) -> None:
        self.overlaps = data_parallel.gather_rows(self.overlaps)
        dice, jaccard = self.overlaps.mean(axis=0).T
        structures = self.recipe.structures
        scores = {"score": float(dice.mean()), "jaccard": float(jaccard.mean())}
        self.log_dict(scores | (dict(zip(structures, map(float, dice), strict=True)) if len(structures) > 1 else {}))


class SegmenterStrategy(Strategy):
    """Strategy that trains a segmenter on one fold, using only images that have a ground-truth mask, which may be empty.

    Writes the predicted masks for the validation fold to `masks/` and their scores to the `mask_scores` table. With a
    SparseSegmenterRecipe, also writes probability maps to the `mask_maps` table. The constructor raises MaskError if no
    image has a mask, if no mask shows the recipe's structures, or if the masks follow several conventions.
    """

    uses = ("masks",)
    recipe: SegmenterRecipe
    collate_fns = collate_masks, collate_masks

    def check(self) -> None:
        if self.task.masks is None:
            raise ValueError(
                f"{self.task.model_name}: a segmenter requires masks, but the task has no masks; prepare a data set with "
                "lung masks"
            )
        self.masks = self.task.masks
        self.images, self.folds = with_masks(self.images, self.folds, self.masks)
        codes = [
            code for name in self.recipe.structures for code in (LUNG_CODES if name == "lungs" else (MASK_CODES[name],))
        ]
        if not any(np.isin(self.masks.read(image_id), codes).any() for image_id in self.images.image_id):
            raise MaskError(
                f"no mask in {self.masks.folder} shows {' or '.join(self.recipe.structures)}; choose a recipe with "
                "structures that the masks show, or prepare other data"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.recipe.structures

    def start(self, model: Segmenter) -> str:
        """Load the recipe's `starting_weights` into `model`, and return a text that says what was loaded.

        `starting_weights` is the bundle of a segmenter with the same network. For an albunet, it may also be a classifier's
        bundle with the backbone resnet34, or a file of weights; only the encoder is loaded from these two. Returns
        "from scratch" if `starting_weights` is empty. Raises BundleError if the weights do not fit the network.
        """
        name = self.recipe.starting_weights
        if not name:
            return "from scratch"
        if isinstance(model.network, AlbuNet) and not _is_segmenter(find_starting_weights(name)):
            report = load_starting_weights(model, name, "network.encoder.")
            if missing := [tensor for tensor in report["random"] if tensor.startswith("network.encoder.")]:
                raise BundleError(
                    f"{name} lacks {len(missing)} tensors of a resnet34, such as {missing[0]}; use complete weights"
                )
            return f"{name}: {len(report['loaded'])} tensors of the encoder"
        record, weights = read_bundle(name)
        try:
            model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise BundleError(
                f"{name} ({record['family']}) does not fit the network {self.recipe.network}: {error}"
            ) from error
        return f"{name}: {len(weights)} tensors"

    def make_examples(self) -> None:
        task, shared = self.task, (self.task.cache, self.masks, self.recipe)
        self.train = MaskDataset(self.train_images, *shared, augment=True, seed=task.seed)
        self.validation = MaskDataset(self.validation_images, *shared)

    def module(self, model: Segmenter) -> LungsTraining:
        return LungsTraining(model, len(self.validation))

    def predict(self, device: torch.device) -> dict[str, Any]:
        segmenter = load_any_segmenter(self.run_folder / "bundle", device, 2 * self.recipe.batch_size)
        predicted, maps = MaskStore.create_empty(self.run_folder / "masks"), list[pd.DataFrame]()
        scores = score_masks(segmenter, self.task.cache, self.masks, self.validation_images.image_id, predicted, maps)
        self.write("mask_scores", scores.assign(fold=self.fold))
        if isinstance(segmenter, MaskPredictor):
            self.write("mask_maps", concatenate(maps, "mask_maps"))
        return {}
