"""`MergedPredictions`: the merged predictions of all models for a set of images, from which answers are computed."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class MergedPredictions:
    """Predictions of all models, merged into one prediction for each image and study.

    `images` has the n images with image_id, study_id, rows and columns. `studies` has one row per predicted study: study_id
    and a probability (0..1) of each study class. `scores` has one row per image that a classifier of images has predicted:
    image_id and a probability of each image class. A probability that no model has predicted is NaN. `boxes` has one row per
    box: `row` (the position of its image in `images`), `finding` (categorical), `score` (0..1), xmin, ymin, xmax and ymax in
    original pixels. `seen`, bool (n,), is True for images that a detector has predicted, with or without boxes. `masks` has
    the columns image_id, finding and `map`, see kitlib.fusion.mask_maps.
    """

    images: pd.DataFrame
    studies: pd.DataFrame
    scores: pd.DataFrame
    boxes: pd.DataFrame
    seen: np.ndarray
    masks: pd.DataFrame

    def detections(self) -> pd.DataFrame:
        """Return the table `boxes` with the column image_id instead of `row`."""
        boxes = self.boxes.drop(columns="row")
        boxes.insert(0, "image_id", self.images["image_id"].to_numpy()[self.boxes["row"].to_numpy()])
        return boxes

    def probability(self, name: str) -> np.ndarray:
        """Return the probability (n,) of a class for each image, NaN where no model has predicted it."""
        if name not in self.scores:
            return np.full(len(self.images), np.nan)
        return self.scores.set_index("image_id")[name].reindex(self.images["image_id"]).to_numpy(float)

    def no_box(self) -> np.ndarray:
        """Return 1 minus each image's highest box score, (n,): 1 without a box, NaN if no detector predicted the image."""
        highest = np.zeros(len(self.images))
        np.maximum.at(highest, self.boxes["row"].to_numpy(), self.boxes["score"].to_numpy())
        return np.where(self.seen, 1 - highest, np.nan)

    def part(self, chosen: np.ndarray) -> "MergedPredictions":
        """Return the predictions for the images for which the boolean mask `chosen` (n,) is True, and for their studies."""
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
    """Return the weighted mean of each column of `parts`, an array (k, n). The result is an array (n,).

    `weights` (k,) has one weight per row. NaN is ignored. If all numbers in a column have weight 0, the mean is the first of
    these numbers. If a column has only NaN, the mean is NaN.
    """
    is_available = ~np.isnan(parts)
    weight = weights[:, None] * is_available
    first = parts[is_available.argmax(axis=0), np.arange(parts.shape[1])]
    total = weight.sum(axis=0)
    mean = np.divide((weight * np.nan_to_num(parts)).sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return np.where(total > 0, mean, first)
