"""Training of a lung segmenter, and its masks of images that it has not seen."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.bundle import read_bundle
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.errors import BundleError, MaskError
from kitlib.inference.segment_lungs import LungSegmenter, load_segmenter
from kitlib.lungs.clean_up import on_copy
from kitlib.models.segmenter import Segmenter, segmentation_loss
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.scoring.metrics import overlap
from kitlib.tables import check_table
from kitlib.training import data_parallel
from kitlib.training.loop import RecipeTraining
from kitlib.training.mask_dataset import MaskDataset, collate_masks
from kitlib.training.strategy import Strategy
from kitlib.xrays.cache import DecodedXrays
from kitlib.xrays.mask_store import MaskStore

PART = 256  # masks a file


def with_masks(images: pd.DataFrame, folds: pd.DataFrame, masks: MaskStore) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The images that have a mask, and their folds. Raises MaskError for none, or for masks of several conventions."""
    known = images[images.image_id.isin(masks.ids)]
    if known.empty:
        raise MaskError(f"none of {len(images)} images has a mask in {masks.folder}; prepare a data set of lung masks")
    conventions = sorted(set(known.convention)) if "convention" in known else []
    if len(conventions) > 1:
        raise MaskError(
            f"the masks are of {len(conventions)} conventions ({', '.join(conventions)}): what one calls lung the other "
            "does not. Prepare and segment each by itself"
        )
    return known, folds[folds.id.isin(known.image_id)]


def check_other_source(home: pd.DataFrame, other: pd.DataFrame, name: str) -> None:
    """Raise ValueError where images of `other`, another run's table, are of images or patients of `home`."""
    for column in ("image_id", "patient_id"):
        shared = other.loc[other[column].isin(home[column]), column]
        if len(shared):
            raise ValueError(
                f"{name} is no other source: {len(shared)} of its images are of the training set, by {column}, first "
                f"{shared.iloc[0]!r}; take it out of also_on"
            )


def score_masks(
    segmenter: LungSegmenter, cache: DecodedXrays, masks: MaskStore, image_ids: pd.Series, found: MaskStore | None = None
) -> pd.DataFrame:
    """Table mask_scores, fold -1, of images with a drawn mask; `found` takes the label images.

    Masks are judged as the network gives them, without any clean-up.
    A model of "lungs" is held against either side; one that tells the sides apart is judged by each structure and, as
    "lungs", by both sides together.
    """
    rows, kept = [], {}
    for xray, maps, place in segmenter.maps(cache.read(image_id) for image_id in image_ids):
        here, truth = on_copy(maps, place, xray.pixels.shape, segmenter.recipe), masks.read(xray.image_id)
        for structure in dict.fromkeys([*segmenter.recipe.structures, "lungs"]):
            wanted = LUNG_CODES if structure == "lungs" else (MASK_CODES[structure],)
            agreement = overlap(np.isin(here, wanted), np.isin(truth, wanted))
            rows.append((xray.image_id, segmenter.model, -1, structure, *agreement))
        kept[xray.image_id] = here
        if found is not None and len(kept) >= PART:
            found.add(kept)
            kept = {}
    if found is not None:
        found.add(kept)
    columns = ["image_id", "model", "fold", "structure", "dice", "jaccard"]
    return check_table(pd.DataFrame(rows, columns=columns), "mask_scores")


class LungsTraining(RecipeTraining):
    """Loss and validation over batches of `MaskDataset`; the score is the mean Dice of the validation's structures."""

    model: Segmenter
    judged: Segmenter
    recipe: SegmenterRecipe

    def __init__(self, model: Segmenter, validation_images: int) -> None:
        super().__init__(model, model.recipe)
        self.found = np.full((validation_images, len(model.recipe.structures), 2), np.nan)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        logits = self.model(self.model.normalise(batch["pixels"]))
        loss = segmentation_loss(logits, batch["truth"], self.recipe)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["pixels"]), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        logits = self.judged(self.judged.normalise(batch["pixels"]))
        size = len(batch["pixels"])
        self.log("validation_loss", segmentation_loss(logits, batch["truth"], self.recipe), batch_size=size, sync_dist=True)
        places = self.judged.probabilities(logits).argmax(dim=1).cpu().numpy()
        truth = batch["truth"].cpu().numpy()
        for row, one, drawn in zip(batch["index"].tolist(), places, truth, strict=True):
            for number in range(self.found.shape[1]):
                self.found[row, number] = overlap(one == number + 1, drawn == number + 1)

    def on_validation_epoch_end(self) -> None:
        self.found = data_parallel.gather_rows(self.found)
        dice, jaccard = self.found.mean(axis=0).T
        structures = self.recipe.structures
        told = {"score": float(dice.mean()), "jaccard": float(jaccard.mean())}
        self.log_dict(told | (dict(zip(structures, map(float, dice), strict=True)) if len(structures) > 1 else {}))


class SegmenterStrategy(Strategy):
    """A segmenter of lungs. Learns from the images that have a mask; predicts mask_scores and `masks/` of its fold.

    Raises MaskError where no image has a mask, or where masks of two conventions would be learnt as one.
    """

    uses = ("masks",)
    recipe: SegmenterRecipe
    joined = collate_masks, collate_masks

    def check(self) -> None:
        if self.task.masks is None:
            raise ValueError(
                f"{self.task.model_name}: a segmenter learns from drawn masks; give the masks of a prepared run"
            )
        self.masks = self.task.masks
        self.images, self.folds = with_masks(self.images, self.folds, self.masks)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.recipe.structures

    def start(self, model: Segmenter) -> str:
        """Load the weights of another run's bundle of the same network. Raises BundleError where they do not fit."""
        name = self.recipe.starting_weights
        if not name:
            return "from scratch"
        record, weights = read_bundle(name)
        try:
            model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise BundleError(f"{name} ({record['family']}) does not fit {self.recipe.network}: {error}") from error
        return f"{name}: {len(weights)} tensors"

    def make_examples(self) -> None:
        task, shared = self.task, (self.task.cache, self.masks, self.recipe)
        self.train = MaskDataset(self.train_images, *shared, augment=True, seed=task.seed)
        self.validation = MaskDataset(self.validation_images, *shared)

    def module(self, model: Segmenter) -> LungsTraining:
        return LungsTraining(model, len(self.validation))

    def predict(self, device: torch.device) -> dict[str, Any]:
        segmenter = load_segmenter(self.run_folder / "bundle", device, 2 * self.recipe.batch_size)
        found = MaskStore.afresh(self.run_folder / "masks")
        scores = score_masks(segmenter, self.task.cache, self.masks, self.validation_images.image_id, found)
        self.write("mask_scores", scores.assign(fold=self.fold))
        return {}
