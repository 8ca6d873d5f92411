"""Selects the training and the validation images of a fold; drops images without lungs, adds images of another run."""

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd

from kitlib.lungs.finders import StoredLungs
from kitlib.runs.finished_run import ExtraImages
from kitlib.tables import check_table, class_columns, concatenate
from kitlib.xrays.cache import CachedXray, DecodedXrays

logger = logging.getLogger(__name__)


def leave_out_rejected(tables: Mapping[str, pd.DataFrame], lungs: StoredLungs | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drop images without usable lungs; return the remaining rows of the `folds` table, and a table of counts.

    Such images cannot be masked. If they stayed unmasked and one class had more of them, a model could recognise this class
    by the missing mask. The counts have one row per class and a row "all", with the columns `class`, `images` and `dropped`.
    `tables` are the tables of a prepared run. Raises ValueError if `lungs` is None.
    """
    if lungs is None:
        raise ValueError("`drop_rejected` requires `lungs_run`, the run of notebook 14 that judged the lungs")
    folds, images = tables["folds"], tables["images"]
    in_folds = images[images.image_id.isin(folds.id)]
    dropped = in_folds[~in_folds.image_id.isin(list(lungs.frames))]
    labels = tables["labels"].set_index("id")
    counts = pd.DataFrame({"images": labels.loc[in_folds.study_id].sum(), "dropped": labels.loc[dropped.study_id].sum()})
    counts.loc["all"] = [len(in_folds), len(dropped)]
    return folds[~folds.id.isin(dropped.image_id)].reset_index(drop=True), counts.rename_axis("class").reset_index()


def split(
    images: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    seed: int,
    limit_train: int | None = None,
    limit_validation: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two `images` tables: the training images (all folds but `fold`) and the validation images (`fold`).

    Images without a fold, and images that no annotator looked at (`false_none`), are in neither table. `limit_train` and
    `limit_validation` cap the number of images in the tables: patients are drawn at random with `seed`, each with all of
    their images. Raises ValueError if the folds contain images that are not in `images`, or if either table is empty.
    """
    images_by_id = images.set_index("image_id", drop=False)
    missing = folds.loc[~folds.id.isin(images_by_id.index), "id"]
    if len(missing):
        raise ValueError(f"{len(missing)} ids in `folds` are not in the `images` table; the first is {missing.iloc[0]!r}")
    usable = folds[~folds.id.map(images_by_id.false_none).astype(bool)] if "false_none" in images.columns else folds
    parts = []
    for purpose, is_selected, limit in (
        ("training", usable.fold != fold, limit_train),
        ("validation", usable.fold == fold, limit_validation),
    ):
        part = images_by_id.loc[usable.id[is_selected]].reset_index(drop=True)
        if limit is not None:
            part = _sample_patients(part, limit, seed)
        if part.empty:
            raise ValueError(
                f"fold {fold} leaves no images for {purpose} (limit: {limit}); available folds: {sorted(set(usable.fold))}"
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
    """Add the images in `extra` to the training images; return tables of images, labels and boxes, and a cache.

    The tables and the cache contain the training images and the extra images. Extra images whose column `false_none` is True
    are left out, because no annotator looked at them. The returned labels have the classes of `labels`; a class that the
    extra labels lack is NaN (unknown) for the extra images. If `extra` is None, returns `train_images`, `labels`, `boxes`
    and `cache` unchanged. Raises ValueError if no extra image remains. Also raises ValueError if an extra image has the
    image_id or study_id of a training or validation image, or the patient_id of a validation image.
    """
    if extra is None:
        return train_images, labels, boxes, cache
    added = check_table(extra.images, "images", "the extra images")
    added_labels = check_table(extra.labels, "labels", "the extra images")
    if "false_none" in added.columns:
        added = added[added.false_none.ne(True)]
    if added.empty:
        raise ValueError(
            "the extra run has no image to train this model on (NIH images have no boxes for a detector); choose another run"
        )
    for other_images, part, columns in (
        (validation_images, "validation images", ("image_id", "study_id", "patient_id")),
        (train_images, "training images", ("image_id", "study_id")),
    ):
        for column in columns:
            shared = added.loc[added[column].isin(other_images[column]), column]
            if len(shared):
                raise ValueError(
                    f"{len(shared)} of {len(added)} extra images have the same {column} as {part}; the first {column} "
                    f"is {shared.iloc[0]!r}. Remove these images from the extra run"
                )
    classes = class_columns(labels, "labels")
    unknown = [name for name in classes if name not in added_labels or added_labels[name].isna().all()]
    if unknown:
        logger.warning("the extra images have no labels for %s; these labels are treated as unknown", ", ".join(unknown))
    added_boxes = check_table(extra.boxes, "boxes", "the extra images")
    # Each run's labels and boxes are used only for its own images, so that no extra box is added to a validation image.
    labels, added_labels = labels[~labels.id.isin(added.study_id)], added_labels[added_labels.id.isin(added.study_id)]
    boxes, added_boxes = boxes[~boxes.image_id.isin(added.image_id)], added_boxes[added_boxes.image_id.isin(added.image_id)]
    return (
        concatenate((train_images, added), "images"),
        concatenate((labels, added_labels.reindex(columns=labels.columns).astype(dict.fromkeys(classes, float))), "labels"),
        concatenate((boxes, added_boxes), "boxes"),
        _CombinedCache(cache, extra),
    )


class _CombinedCache:
    """Cache that reads extra images from the extra run's cache, and all other images from the task's cache."""

    def __init__(self, cache: DecodedXrays, extra: ExtraImages) -> None:
        self.cache, self.extra = cache, extra.cache
        self.extra_ids = frozenset(extra.images.image_id)
        self.longest_side = cache.longest_side

    def read(self, image_id: str) -> CachedXray:
        return (self.extra if image_id in self.extra_ids else self.cache).read(image_id)


def _sample_patients(images: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Return the rows of at most `limit` images: patients are drawn at random with `seed`, each with all of their images."""
    patients = np.random.default_rng(seed).permutation(images.patient_id.unique())
    sizes = images.patient_id.value_counts()
    selected, remaining = set(), limit
    for patient in patients:
        if sizes[patient] <= remaining:
            selected.add(patient)
            remaining -= sizes[patient]
    return images[images.patient_id.isin(selected)].reset_index(drop=True)
