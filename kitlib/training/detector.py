"""Training of an opacity detector of any family on all folds but one, and its out-of-fold boxes of that one."""

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
    """An opacity detector. Predicts detections, in original pixels, and coverage: a row an image, also without a box.

    The best epoch is that of the highest opacity AP on the validation fold, images without boxes included. Epochs on lung
    crops are judged by the boxes as far as these show them, the tables by all boxes.
    """

    uses = ("extra", "lungs")
    classes = ("opacity",)
    augments = True  # by the kit's own data set; False where the trainer augments
    recipe: DetectorRecipe
    train: XrayDataset
    validation: XrayDataset

    def __init__(self, task: Task, fold: int, run_folder: Path) -> None:
        super().__init__(task, fold, run_folder)
        tables = self.train_images, self.labels, self.boxes
        images, labels, boxes, cache = with_extra(*tables, task.cache, task.extra, self.validation_images)
        self.seen = with_negatives(images, boxes, self.recipe.negatives, task.seed), labels, boxes, cache
        for part, name in ((self.seen[0], "training"), (self.validation_images, f"validation fold {fold}")):
            if not part.image_id.isin(boxes.image_id).any():
                raise ValueError(
                    f"{task.model_name}: none of the {len(part)} images of the {name} has a box; raise the limit"
                )
        # Judged on the canvas that it will predict on, of which fewer fit where it is larger.
        self.judged_side = self.recipe.inference_size or self.recipe.image_size
        self.validated *= (self.recipe.image_size / self.judged_side) ** 2

    def check(self) -> None:
        """Its recipe has been checked, and any boxes will do."""

    def start(self, model: Any) -> str:
        return model.starting_weights

    def make_examples(self) -> None:
        task, recipe = self.task, self.recipe
        self.train = XrayDataset(*self.seen, recipe, augment=self.augments, seed=task.seed, lungs=task.lungs)
        judged = override(recipe, image_size=self.judged_side)
        self.validation = XrayDataset(self.validation_images, self.labels, self.boxes, task.cache, judged, lungs=task.lungs)

    def predict(self, device: torch.device) -> dict[str, Any]:
        predictor = self.predictor(device)
        chunks = predictor.predict(map(self.task.cache.read, self.validation_images.image_id))
        self.write("detections", concatenate(chunks, "detections"))
        seen = {"image_id": predictor.seen, "model": self.task.model_name, "fold": self.fold}
        self.write("coverage", pd.DataFrame(seen))
        return {
            "train_images_with_boxes": sum(len(each) > 0 for each in self.train.boxes),
            "lungs_missed": {"training": self.train.lungs_missed(), "predicted": predictor.lungs_missed},
        }


def with_negatives(images: pd.DataFrame, boxes: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The images with a box, and of the others at most `share` times as many, drawn by `seed`; in the order of `images`."""
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
