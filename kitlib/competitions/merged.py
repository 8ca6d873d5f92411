"""`MergedPredictions`: what all models together predict for a set of images, before a competition decides on its answers."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class MergedPredictions:
    """Predictions of all models, merged into one for each image and study. Pure data; boxes are in original pixels.

    `images` has the n images with image_id, study_id, rows and columns. `studies` has study_id and a probability (0..1) of
    each class, `scores` image_id and a probability of each class of images; both have no row for what no model has
    predicted, and NaN for a class that no model predicts. `boxes` has one row per box: `row`, its image's position in
    `images`, `finding` (categorical), `score` (0..1), xmin, ymin, xmax and ymax. `seen` (n,) says which images a detector
    has predicted, with or without boxes. `masks` has image_id, finding and `map`, see kitlib.fusion.mask_maps.
    """

    images: pd.DataFrame
    studies: pd.DataFrame
    scores: pd.DataFrame
    boxes: pd.DataFrame
    seen: np.ndarray
    masks: pd.DataFrame

    def detections(self) -> pd.DataFrame:
        """Return the boxes with the column image_id instead of row."""
        boxes = self.boxes.drop(columns="row")
        boxes.insert(0, "image_id", self.images["image_id"].to_numpy(dtype=object)[self.boxes["row"].to_numpy()])
        return boxes

    def probability(self, name: str) -> np.ndarray:
        """Return the probability (n,) of a class for each image, NaN where no model has predicted it."""
        if name not in self.scores:
            return np.full(len(self.images), np.nan)
        return self.scores.set_index("image_id")[name].reindex(self.images["image_id"]).to_numpy(float)

    def no_box(self) -> np.ndarray:
        """Return 1 - the highest box score (n,) of each image, NaN for images that no detector has predicted."""
        highest = np.zeros(len(self.images))
        np.maximum.at(highest, self.boxes["row"].to_numpy(), self.boxes["score"].to_numpy())
        return np.where(self.seen, 1 - highest, np.nan)

    def part(self, chosen: np.ndarray) -> "MergedPredictions":
        """Return the predictions for the images that the boolean mask `chosen` (n,) selects, and their studies."""
        images = self.images[chosen]
        position = np.cumsum(chosen) - 1
        boxes = self.boxes[chosen[self.boxes["row"].to_numpy()]]
        return replace(
            self,
            images=images,
            studies=self.studies[self.studies["study_id"].isin(images["study_id"])],
            scores=self.scores[self.scores["image_id"].isin(images["image_id"])],
            boxes=boxes.assign(row=position[boxes["row"].to_numpy()].astype(np.int32)),
            seen=self.seen[chosen],
            masks=self.masks[self.masks["image_id"].isin(images["image_id"])],
        )


def weighted_mean(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean (n,) of `parts` (k, n) over those that are not NaN; `weights` is (k,).

    If the weights of these parts are all 0, the result is the first part that is not NaN; it is NaN if all parts are NaN.
    """
    is_available = ~np.isnan(parts)
    weight = weights[:, None] * is_available
    first = parts[is_available.argmax(axis=0), np.arange(parts.shape[1])]
    total = weight.sum(axis=0)
    mean = np.divide((weight * np.nan_to_num(parts)).sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return np.where(total > 0, mean, first)
