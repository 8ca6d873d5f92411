"""Which images a fold's model is trained on and validated on."""

import logging

import numpy as np
import pandas as pd

from kitlib.runs.finished_run import ExtraImages
from kitlib.tables import check_table, class_columns, concatenate
from kitlib.xrays.cache import CachedXray, DecodedXrays

logger = logging.getLogger(__name__)


def split(
    images: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    seed: int,
    limit_train: int | None = None,
    limit_validation: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Images of all folds but `fold`, and images of `fold`; those marked `false_none` or without a fold are in neither.

    A limit is a number of images: patients are drawn by `seed` and kept whole as long as they fit.
    """
    known = images.set_index("image_id", drop=False)
    missing = folds.loc[~folds.id.isin(known.index), "id"]
    if len(missing):
        raise ValueError(f"{len(missing)} images of the folds are not in the table images, first {missing.iloc[0]}")
    kept = folds[~folds.id.map(known.false_none).astype(bool)] if "false_none" in images.columns else folds
    parts = []
    for chosen, limit in ((kept.fold != fold, limit_train), (kept.fold == fold, limit_validation)):
        part = known.loc[kept.id[chosen]].reset_index(drop=True)
        if limit is not None:
            part = _whole_patients(part, limit, seed)
        if part.empty:
            raise ValueError(
                f"fold {fold} leaves nothing to train or to validate on; folds: {sorted(set(kept.fold))}, limit {limit}"
            )
        parts.append(part)
    return parts[0], parts[1]


def with_extra(
    train_images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    cache: DecodedXrays,
    extra: ExtraImages | None,
    validation_images: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, DecodedXrays]:
    """The training images with the extra ones after them, and labels, boxes and a cache for both.

    Extra images marked `false_none` stay out. The labels keep their classes: an extra image's label is NaN (unknown) where
    the extra table lacks the class. Raises ValueError for extra images that are validated on, by image_id, study_id or
    patient_id, or that are trained on already.
    """
    if extra is None:
        return train_images, labels, boxes, cache
    added = check_table(extra.images, "images", "the extra images")
    added_labels = check_table(extra.labels, "labels", "the extra images")
    if "false_none" in added.columns:
        added = added[~added.false_none.fillna(False).astype(bool)]
    if added.empty:
        raise ValueError("the extra run has no image to learn this from (detectors: NIH's have no boxes); name another")
    for there, meaning, columns in (
        (validation_images, "validated on", ("image_id", "study_id", "patient_id")),
        (train_images, "trained on already", ("image_id", "study_id")),
    ):
        for column in columns:
            shared = added.loc[added[column].isin(there[column]), column]
            if len(shared):
                raise ValueError(
                    f"{len(shared)} of {len(added)} extra images are {meaning}, by {column}, first {shared.iloc[0]!r}; "
                    "leave them out of the extra run"
                )
    classes = class_columns(labels, "labels")
    unknown = [name for name in classes if name not in added_labels or added_labels[name].isna().all()]
    if unknown:
        logger.warning("the extra images tell nothing about %s: these labels count as unknown", ", ".join(unknown))
    added_boxes = check_table(extra.boxes, "boxes", "the extra images")
    # Each table speaks only for its own images: an extra box must not reach a validation image.
    labels, added_labels = labels[~labels.id.isin(added.study_id)], added_labels[added_labels.id.isin(added.study_id)]
    boxes, added_boxes = boxes[~boxes.image_id.isin(added.image_id)], added_boxes[added_boxes.image_id.isin(added.image_id)]
    return (
        concatenate((train_images, added), "images"),
        concatenate((labels, added_labels.reindex(columns=labels.columns).astype(dict.fromkeys(classes, float))), "labels"),
        concatenate((boxes, added_boxes), "boxes"),
        _BothCaches(cache, extra),
    )


class _BothCaches:
    """Reads an image from the cache that has it."""

    def __init__(self, cache: DecodedXrays, extra: ExtraImages) -> None:
        self.cache, self.extra = cache, extra.cache
        self.extra_ids = frozenset(extra.images.image_id)
        self.longest_side = cache.longest_side

    def read(self, image_id: str) -> CachedXray:
        return (self.extra if image_id in self.extra_ids else self.cache).read(image_id)


def _whole_patients(images: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    patients = np.random.default_rng(seed).permutation(images.patient_id.unique())
    sizes = images.patient_id.value_counts()
    drawn, room = set(), limit
    for patient in patients:
        if sizes[patient] <= room:
            drawn.add(patient)
            room -= sizes[patient]
    return images[images.patient_id.isin(drawn)].reset_index(drop=True)
