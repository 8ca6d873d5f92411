"""Training and validation images of a fold, with extra training images of another run."""

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
    """Return the training images (all folds but `fold`) and the validation images (`fold`).

    Images without a fold or marked `false_none` are in neither. A limit is a largest number of images; patients are drawn by
    `seed` and taken with all of their images as long as these fit. Raises ValueError if the folds have images that are not
    in the table, or if either part is empty.
    """
    images_by_id = images.set_index("image_id", drop=False)
    missing = folds.loc[~folds.id.isin(images_by_id.index), "id"]
    if len(missing):
        raise ValueError(f"{len(missing)} images of the folds are not in the table images, first {missing.iloc[0]}")
    usable = folds[~folds.id.map(images_by_id.false_none).astype(bool)] if "false_none" in images.columns else folds
    parts = []
    for is_selected, limit in ((usable.fold != fold, limit_train), (usable.fold == fold, limit_validation)):
        part = images_by_id.loc[usable.id[is_selected]].reset_index(drop=True)
        if limit is not None:
            part = _sample_patients(part, limit, seed)
        if part.empty:
            raise ValueError(
                f"fold {fold} leaves no images to train or to validate on; folds: {sorted(set(usable.fold))}, limit: {limit}"
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
    """Append extra images to the training images; return the images, labels, boxes and a cache that reads both.

    Extra images marked `false_none` are left out. The classes stay those of `labels`: an extra image's label is NaN
    (unknown) for a class that the extra table lacks. Raises ValueError if no extra image remains, if extra images share an
    image_id, study_id or patient_id with validation images, or an image_id or study_id with training images.
    """
    if extra is None:
        return train_images, labels, boxes, cache
    added = check_table(extra.images, "images", "the extra images")
    added_labels = check_table(extra.labels, "labels", "the extra images")
    if "false_none" in added.columns:
        added = added[~added.false_none.fillna(False).astype(bool)]
    if added.empty:
        raise ValueError(
            "the extra run has no image to train this model on (NIH's have no boxes for a detector); name another run"
        )
    for other_images, meaning, columns in (
        (validation_images, "validated on", ("image_id", "study_id", "patient_id")),
        (train_images, "trained on already", ("image_id", "study_id")),
    ):
        for column in columns:
            shared = added.loc[added[column].isin(other_images[column]), column]
            if len(shared):
                raise ValueError(
                    f"{len(shared)} of {len(added)} extra images are {meaning}, by {column}, first {shared.iloc[0]!r}; "
                    "remove them from the extra run"
                )
    classes = class_columns(labels, "labels")
    unknown = [name for name in classes if name not in added_labels or added_labels[name].isna().all()]
    if unknown:
        logger.warning("the extra images have no labels of %s, which count as unknown", ", ".join(unknown))
    added_boxes = check_table(extra.boxes, "boxes", "the extra images")
    # Each run's tables count only for its own images: an extra box must not reach a validation image.
    labels, added_labels = labels[~labels.id.isin(added.study_id)], added_labels[added_labels.id.isin(added.study_id)]
    boxes, added_boxes = boxes[~boxes.image_id.isin(added.image_id)], added_boxes[added_boxes.image_id.isin(added.image_id)]
    return (
        concatenate((train_images, added), "images"),
        concatenate((labels, added_labels.reindex(columns=labels.columns).astype(dict.fromkeys(classes, float))), "labels"),
        concatenate((boxes, added_boxes), "boxes"),
        _CombinedCache(cache, extra),
    )


class _CombinedCache:
    """Reads extra images from the extra run's cache, and all others from the task's."""

    def __init__(self, cache: DecodedXrays, extra: ExtraImages) -> None:
        self.cache, self.extra = cache, extra.cache
        self.extra_ids = frozenset(extra.images.image_id)
        self.longest_side = cache.longest_side

    def read(self, image_id: str) -> CachedXray:
        return (self.extra if image_id in self.extra_ids else self.cache).read(image_id)


def _sample_patients(images: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Return at most `limit` images of patients that are drawn by `seed`, each with all of its images."""
    patients = np.random.default_rng(seed).permutation(images.patient_id.unique())
    sizes = images.patient_id.value_counts()
    selected, remaining = set(), limit
    for patient in patients:
        if sizes[patient] <= remaining:
            selected.add(patient)
            remaining -= sizes[patient]
    return images[images.patient_id.isin(selected)].reset_index(drop=True)
