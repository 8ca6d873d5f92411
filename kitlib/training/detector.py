"""Trains a detector of any family on all folds but one, and predicts boxes for the held-out fold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.classes import ONE_FINDING
from kitlib.recipes.fields import DetectorRecipe
from kitlib.scoring.average_precision import average_precision, box_hits
from kitlib.settings import override
from kitlib.tables import FINDINGS_SEPARATOR, concatenate, findings_of
from kitlib.training.split import with_extra
from kitlib.training.strategy import Strategy
from kitlib.training.task import Task
from kitlib.training.xray_dataset import XrayDataset


class DetectorStrategy(Strategy):
    """Trains a detector, and writes its predictions for the validation fold to the tables `detections` and `coverage`.

    The classes are all findings in the prepared run's `boxes`. `detections` has one row per box, in original pixels;
    `coverage` has one row per image, even if no box was predicted. The best epoch is the epoch with the highest AP on all
    images of the validation fold (see `canvas_precision`). If images are cropped to the lungs, this AP uses ground-truth
    boxes clipped to the crop, whereas metrics computed from the tables use whole boxes.
    """

    uses = ("extra", "lungs")
    augments = True  # whether XrayDataset augments; False if the trainer does
    recipe: DetectorRecipe
    train: XrayDataset
    validation: XrayDataset

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        tables = self.train_images, self.labels, self.boxes
        images, labels, boxes, cache = with_extra(*tables, task.cache, task.extra, self.validation_images)
        unknown = sorted(set(findings_of(boxes)) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{task.model_name}: the extra images have boxes of {', '.join(unknown)}, but the prepared run has only "
                f"boxes of {', '.join(self.classes)}; use an extra run that has only boxes of these findings"
            )
        self.training_data = sample_negatives(images, boxes, self.recipe.negatives, task.seed), labels, boxes, cache
        for part_images, name in (
            (self.training_data[0], "training folds"),
            (self.validation_images, f"validation fold {fold}"),
        ):
            if not part_images.image_id.isin(boxes.image_id).any():
                advice = (
                    "raise limit_train or limit_validation"
                    if len(boxes)
                    else "the prepared run has no boxes; in notebook 10, name the columns of your boxes in `columns`"
                )
                problem = f"none of the {len(part_images)} images in the {name} has a box"
                raise ValueError(f"{task.model_name}: {problem}; {advice}")
        # Validation uses the canvas size of prediction; if that is larger, fewer images fit a batch.
        self.validation_side = self.recipe.inference_size or self.recipe.image_size
        self.validation_batch_ratio *= (self.recipe.image_size / self.validation_side) ** 2

    @property
    def classes(self) -> Sequence[str]:
        return findings_of(self.boxes)

    def check(self) -> None:
        """Do nothing, because a detector can be trained on any boxes and recipes check their own fields."""

    def start(self, model: Any) -> str:
        return model.starting_weights

    def make_examples(self) -> None:
        task, recipe = self.task, self.recipe
        options: dict[str, Any] = {"lungs": task.lungs, "classes": self.classes}
        self.train = XrayDataset(*self.training_data, recipe, augment=self.augments, seed=task.seed, **options)
        validation_data = self.validation_images, self.labels, self.boxes, task.cache
        self.validation = XrayDataset(*validation_data, override(recipe, image_size=self.validation_side), **options)

    def predict(self, device: torch.device) -> dict[str, Any]:
        predictor = self.predictor(device)
        chunks = predictor.predict(map(self.task.cache.read, self.validation_images.image_id))
        self.write("detections", concatenate(chunks, "detections"))
        rows = {"image_id": predictor.seen, "model": self.task.model_name, "fold": self.fold}
        if tuple(self.classes) != (ONE_FINDING,):
            rows["findings"] = FINDINGS_SEPARATOR.join(self.classes)
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


def canvas_precision(
    predictions: list[np.ndarray], ground_truth: list[np.ndarray], classes: Sequence[str]
) -> dict[str, float]:
    """Return the average precision (AP, VOC 2010) of predicted boxes over all images: a dict with the key `score`.

    With several `classes`, `score` is the mean AP of the classes that occur in the ground truth. The dict then also has the
    AP of each class, keyed by the class; the AP of a class without ground-truth boxes is NaN. `predictions` and
    `ground_truth` have one array per image, with one row per box. The columns of `ground_truth` are xmin, ymin, xmax, ymax
    in canvas pixels and the index of the class. In `predictions`, the score comes before this index.
    """
    image, true_image = (
        np.repeat(np.arange(len(arrays)), [len(boxes) for boxes in arrays]) for arrays in (predictions, ground_truth)
    )
    boxes, true_boxes = np.concatenate(predictions), np.concatenate(ground_truth)
    precision = {}
    for code, name in enumerate(classes):
        found, true = boxes[:, 5] == code, true_boxes[:, 4] == code
        score = boxes[found, 4]
        hits = box_hits(image[found], score, boxes[found, :4], true_image[true], true_boxes[true, :4])
        precision[name] = average_precision(score, hits, true.sum())
    present = [value for value in precision.values() if not np.isnan(value)]
    score = float(np.mean(present)) if present else np.nan
    return {"score": score, **(precision if len(classes) > 1 else {})}


def true_rows(batch: dict[str, Any]) -> list[np.ndarray]:
    """Return a batch's ground truth for `canvas_precision`: per image an array (k, 5) of xmin, ymin, xmax, ymax, class."""
    pairs = zip(batch["boxes"], batch["findings"], strict=True)
    return [torch.column_stack([boxes, codes]).cpu().numpy() for boxes, codes in pairs]
