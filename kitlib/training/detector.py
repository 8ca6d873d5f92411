"""Trains an opacity detector of any family on all folds but one, and predicts boxes for the held-out fold."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.recipes.fields import DetectorRecipe
from kitlib.scoring.average_precision import average_precision, box_hits
from kitlib.settings import override
from kitlib.tables import concatenate
from kitlib.training.split import with_extra
from kitlib.training.strategy import Strategy
from kitlib.training.task import Task
from kitlib.training.xray_dataset import XrayDataset


class DetectorStrategy(Strategy):
    """Trains a detector, and writes its predictions for the validation fold to the tables `detections` and `coverage`.

    `detections` has one row per box, in original pixels; `coverage` has one row per image, even if no box was predicted. The
    best epoch is the epoch with the highest average precision (AP) for opacities on all images of the validation fold. If
    images are cropped to the lungs, this AP uses ground-truth boxes clipped to the crop, whereas scores computed from the
    tables use whole boxes.
    """

    uses = ("extra", "lungs")
    classes = ("opacity",)
    augments = True  # whether XrayDataset augments; False if the trainer does
    recipe: DetectorRecipe
    train: XrayDataset
    validation: XrayDataset

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        tables = self.train_images, self.labels, self.boxes
        images, labels, boxes, cache = with_extra(*tables, task.cache, task.extra, self.validation_images)
        self.training_data = sample_negatives(images, boxes, self.recipe.negatives, task.seed), labels, boxes, cache
        for part_images, name in (
            (self.training_data[0], "training folds"),
            (self.validation_images, f"validation fold {fold}"),
        ):
            if not part_images.image_id.isin(boxes.image_id).any():
                advice = "raise its limit" if len(boxes) else "the prepared run has none; own boxes are named in columns"
                problem = f"none of the {len(part_images)} images in the {name} has a box"
                raise ValueError(f"{task.model_name}: {problem}; {advice}")
        # Validation uses the canvas size of prediction; if that is larger, fewer images fit a batch.
        self.validation_side = self.recipe.inference_size or self.recipe.image_size
        self.validation_batch_ratio *= (self.recipe.image_size / self.validation_side) ** 2

    def check(self) -> None:
        """Do nothing, because a detector can be trained on any boxes and recipes check their own fields."""

    def start(self, model: Any) -> str:
        return model.starting_weights

    def make_examples(self) -> None:
        task, recipe = self.task, self.recipe
        self.train = XrayDataset(*self.training_data, recipe, augment=self.augments, seed=task.seed, lungs=task.lungs)
        validation_recipe = override(recipe, image_size=self.validation_side)
        self.validation = XrayDataset(
            self.validation_images, self.labels, self.boxes, task.cache, validation_recipe, lungs=task.lungs
        )

    def predict(self, device: torch.device) -> dict[str, Any]:
        predictor = self.predictor(device)
        chunks = predictor.predict(map(self.task.cache.read, self.validation_images.image_id))
        self.write("detections", concatenate(chunks, "detections"))
        rows = {"image_id": predictor.seen, "model": self.task.model_name, "fold": self.fold}
        self.write("coverage", pd.DataFrame(rows))
        return {
            "train_images_with_boxes": sum(len(boxes) > 0 for boxes in self.train.boxes),
            "lungs_missed": {"training": self.train.lungs_missed(), "predicted": predictor.lungs_missed},
        }


def sample_negatives(images: pd.DataFrame, boxes: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Return the rows of all images that have a box, and of a random sample of the images without a box.

    The sample has at most `share` times as many images as there are images with a box. The order of `images` is kept.
    """
    has_boxes = images.image_id.isin(boxes.image_id).to_numpy()
    others = np.random.default_rng(seed).permutation(np.flatnonzero(~has_boxes))
    indices = np.concatenate([np.flatnonzero(has_boxes), others[: round(share * has_boxes.sum())]])
    return images.iloc[np.sort(indices)].reset_index(drop=True)


def canvas_precision(predictions: list[np.ndarray], ground_truth: list[np.ndarray]) -> float:
    """Return the average precision (VOC 2010) of predicted opacity boxes over all images.

    Both lists have one array per image, with one row per box: xmin, ymin, xmax, ymax in canvas pixels. Rows of `predictions`
    have the score as a fifth column.
    """
    image, true_image = (
        np.repeat(np.arange(len(arrays)), [len(boxes) for boxes in arrays]) for arrays in (predictions, ground_truth)
    )
    boxes, true_boxes = np.concatenate(predictions), np.concatenate(ground_truth)
    hits = box_hits(image, boxes[:, 4], boxes[:, :4], true_image, true_boxes)
    return average_precision(boxes[:, 4], hits, len(true_boxes))
