"""Pseudo-labels: soft labels for unlabelled images, made from the predictions of trained models.

A model may have memorised its training images. A model therefore predicts no image that is a near-duplicate of a training
image, and no image of a study or patient that has a training image or such a near-duplicate.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import SiimFusion, decide
from kitlib.datasets.near_duplicates import MAX_DISTANCE, group_hashes, perceptual_hash
from kitlib.fusion.model_fusion import ModelPredictions, merge
from kitlib.inference.predict import load_predictor, study_and_image_scores
from kitlib.inference.segment_lungs import LungSegmenter
from kitlib.lungs.finders import StoredLungs
from kitlib.models.families import BOXES, STUDIES
from kitlib.tables import check_table, concatenate
from kitlib.xrays.cache import DecodedXrays, XrayCache

logger = logging.getLogger(__name__)

MODEL = ["model", "fold"]


@dataclass(frozen=True)
class Predictions:
    """Predictions of several study classifiers and detectors, in three tables.

    `probabilities` has one row per image and classifier, with the columns `image_id`, `model`, `fold`, the four study
    classes, and `none` (NaN if the classifier does not predict it). `detections` has one row per predicted box. `coverage`
    has one row per image and detector, even if no box was predicted. See `kitlib.tables` for the last two tables' columns.
    """

    probabilities: pd.DataFrame
    detections: pd.DataFrame
    coverage: pd.DataFrame


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels as tables to train on, and a table of the images that got no pseudo-label.

    `images` has two columns in addition to those of an images table: `none`, the probability of "no opacity" as a soft
    target, and `unsure`, True if detectors should not be trained on the image. `labels` has one row per study that a
    classifier has predicted; the probabilities of its four study classes sum to 1. `boxes` has the fused boxes of the
    detectors, with the additional column `score`. `left_out` has one row per image without a pseudo-label, with the columns
    `image_id` and `reason`.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    left_out: pd.DataFrame


def duplicate_groups(sources: Iterable[tuple[pd.DataFrame, XrayCache]], max_distance: int = MAX_DISTANCE) -> pd.DataFrame:
    """Find near-duplicates among the images of several data sets; return a table with the columns image_id and group.

    Near-duplicates have the same value in `group`; `max_distance` is the largest distance between their perceptual hashes.
    Each of `sources` is a pair of an `images` table and the cache with its images. Raises ValueError if an image is not in
    its cache, because duplicates of this image would not be detected.
    """
    caches = {image_id: cache for images, cache in sources for image_id in images["image_id"]}
    missing = [image_id for image_id, cache in caches.items() if image_id not in cache]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(caches)} images are not in their cache; the first is {missing[0]!r}. Run notebook 10 "
            "again with this version of kitlib"
        )
    hashes = [
        perceptual_hash(cache.read(image_id).pixels) for image_id, cache in tqdm(caches.items(), desc="near-duplicates")
    ]
    return pd.DataFrame({"image_id": pd.Series(list(caches), dtype=object), "group": group_hashes(hashes, max_distance)})


def seen_by(
    images: pd.DataFrame,
    trained: pd.DataFrame,
    folds: pd.DataFrame,
    models: pd.DataFrame,
    groups: pd.DataFrame | None = None,
    extra: Iterable[pd.DataFrame] = (),
) -> pd.DataFrame:
    """Find the images that each model must not predict; return a table with the columns `image_id`, `model` and `fold`.

    The table has one row per model and forbidden image. `models` has one row per model, with the columns `model` and `fold`.
    The training images of a model are all images in the tables `extra`, and those images in `trained` that `folds` assigns
    to another fold than the model's. Of `images`, a model must not predict

    - training images, and other images of the study or patient of a training image
    - near-duplicates of training images: images of the same group in `groups` (columns `image_id` and `group`)
    - other images of a study or patient with an image that the model must not predict
    """
    fold_of = trained["image_id"].map(folds.set_index("id")["fold"])
    group = None if groups is None else groups.set_index("image_id")["group"]
    extra, parts = list(extra), []
    for fold, of_fold in models.groupby("fold"):
        trained_images = pd.concat([trained[fold_of.notna() & (fold_of != fold)], *extra])
        is_seen = pd.Series(False, images.index)
        for column in ("image_id", "study_id", "patient_id"):
            is_seen |= images[column].isin(trained_images[column])
        if group is not None:
            is_seen |= images["image_id"].map(group).isin(group.reindex(trained_images["image_id"]).dropna())
        previous_count = -1
        while is_seen.sum() > previous_count:  # a study may have two patient_ids if a header was unreadable
            previous_count = is_seen.sum()
            for column in ("study_id", "patient_id"):
                is_seen |= images[column].isin(images.loc[is_seen, column])
        parts.append(images.loc[is_seen, ["image_id"]].merge(of_fold[MODEL], how="cross"))
    return pd.concat(parts, ignore_index=True)


def predict_unseen(
    models: pd.DataFrame,
    images: pd.DataFrame,
    cache: DecodedXrays,
    seen: pd.DataFrame,
    batch_size: int | None = None,
    lungs: StoredLungs | LungSegmenter | None = None,
) -> Predictions:
    """Predict each image with every model. Pairs of image and model in `seen`, a result of `seen_by`, are skipped.

    `models` has one row per model, with the columns `model`, `fold` and `bundle` (a folder). `lungs` finds the lungs for
    models that use lung masks; the number of images in which no lungs were found is logged. Raises ValueError if such a
    model is given, but `lungs` is None or from another segmenter, or if a model predicts neither study classes nor boxes.
    Raises BundleError if a bundle is damaged or contains a segmenter.
    """
    probabilities, detections, coverage = [], [], []
    for row in models.itertuples():
        predictor = load_predictor(row.bundle, batch_size=batch_size, lungs=lungs)
        if predictor.family.answers not in (STUDIES, BOXES):
            raise ValueError(
                f"{row.bundle} predicts {predictor.family.answers}; give only runs of study classifiers and detectors"
            )
        if predictor.wants_masks and (lungs is None or lungs.segmenter != predictor.segmenter):
            raise ValueError(
                f"{row.bundle} {'was trained with masks of another segmenter or clean-up' if lungs else 'needs lung masks'}"
                "; set 'lungs_run' to the run of notebook 14 that the model was trained with"
            )
        seen_ids = set(seen.loc[(seen["model"] == row.model) & (seen["fold"] == row.fold), "image_id"])
        unseen = [image_id for image_id in images["image_id"] if image_id not in seen_ids]
        chunks = list(predictor.predict(map(cache.read, tqdm(unseen, desc=f"{row.model}, fold {row.fold}"))))
        if predictor.lungs_missed:
            missed = predictor.lungs_missed
            logger.info(
                "%s, fold %d: no lungs found in %d of %d images, which are predicted uncropped",
                row.model,
                row.fold,
                missed,
                len(unseen),
            )
        if predictor.family.answers == STUDIES:
            probabilities += chunks
        else:
            detections += chunks
            coverage.append(pd.DataFrame({"image_id": predictor.seen, "model": row.model, "fold": row.fold}))
    empty = pd.DataFrame(columns=["image_id", *MODEL, *STUDY_CLASSES, "none"])
    return Predictions(
        pd.concat(probabilities, ignore_index=True) if probabilities else empty,
        concatenate(detections, "detections"),
        concatenate(coverage, "coverage"),
    )


def pseudo_labels(
    predicted: Predictions,
    images: pd.DataFrame,
    seen: pd.DataFrame,
    settings: SiimFusion,
    low: float = 0.1,
    kept: float = 0.3,
    high: float = 0.5,
) -> PseudoLabels:
    """Fuse the predictions of several models for `images` into pseudo-labels, with the fusion settings `settings`.

    Predictions of a model for an image are ignored if `seen` (see `seen_by`) lists the pair. An image without any remaining
    prediction gets no pseudo-label. Fused boxes with a score of at least `kept` become boxes of the image. An image is
    `unsure` if no detector has predicted it, or if its highest box score is at least `low` and less than `high`; a detector
    is not trained on unsure images. `low`, `kept` and `high` are for scores after fusion and any calibration in `settings`.

    Raises ValueError unless 0 <= low <= kept <= high <= 1.
    """
    if not 0 <= low <= kept <= high <= 1:
        raise ValueError(f"thresholds of boxes: expected 0 <= low <= kept <= high <= 1, got {low}, {kept}, {high}")
    images = check_table(images, "images")
    probabilities, detections, coverage = (
        _drop_seen(table, seen, images) for table in (predicted.probabilities, predicted.detections, predicted.coverage)
    )
    study_scores, image_scores = study_and_image_scores([probabilities], images)
    tables = {"study_scores": study_scores, "image_scores": image_scores, "detections": detections, "coverage": coverage}
    fused = decide(merge(ModelPredictions.of(**tables), images, settings), settings)
    nones = fused.nones.set_index("image_id")
    is_predicted = ~images["image_id"].map(nones["prior"])
    is_seen = images["image_id"].isin(seen["image_id"])
    reason = np.where(
        is_seen, "every model that could predict it was trained on it or on a similar image", "no model has predicted it"
    )
    left_out = pd.DataFrame({"image_id": images["image_id"], "reason": reason})[~is_predicted].reset_index(drop=True)
    images = images[is_predicted].reset_index(drop=True)
    boxes_of_labelled = fused.detections[fused.detections["image_id"].isin(images["image_id"])]
    best = images["image_id"].map(boxes_of_labelled.groupby("image_id")["score"].max()).fillna(0.0)
    is_unsure = ~images["image_id"].map(nones["seen"]) | ((best >= low) & (best < high))
    images = images.drop(columns="false_none", errors="ignore")
    images = images.assign(none=images["image_id"].map(nones["none"]), unsure=is_unsure)
    studies = fused.studies[~fused.studies["prior"] & fused.studies["study_id"].isin(images["study_id"])]
    classes = list(STUDY_CLASSES)
    labels = studies[classes].div(studies[classes].sum(axis=1), axis=0)  # the fusion's negative share changes their sum
    labels.insert(0, "id", studies["study_id"])
    boxes = boxes_of_labelled[boxes_of_labelled["score"] >= kept]
    logger.info("%d images got pseudo-labels (%d unsure), %d did not", len(images), int(is_unsure.sum()), len(left_out))
    return PseudoLabels(images, check_table(labels, "labels"), check_table(boxes, "boxes"), left_out)


def _drop_seen(table: pd.DataFrame, seen: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `table` (predictions) for images in `images`, without the pairs of image and model in `seen`."""
    key = ["image_id", *MODEL]
    is_seen = pd.MultiIndex.from_frame(table[key]).isin(pd.MultiIndex.from_frame(seen[key]))
    return table[~is_seen & table["image_id"].isin(images["image_id"])].reset_index(drop=True)
