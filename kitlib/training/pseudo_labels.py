"""Soft labels for images that have none, from models that have seen neither them nor anything like them.

Every image is judged only by models that were not trained on it, on another image of its patient or study, or on a
near-duplicate of one of these: what a model remembers is no label.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from kitlib.classes import STUDY_CLASSES
from kitlib.datasets.near_duplicates import MAX_DISTANCE, group_hashes, perceptual_hash
from kitlib.fusion.model_fusion import FusionSettings, fuse
from kitlib.inference.predict import load_predictor, study_and_image_scores
from kitlib.inference.segment_lungs import LungSegmenter
from kitlib.lungs.finders import StoredLungs
from kitlib.models.families import CLASSES, STUDIES
from kitlib.tables import check_table, concatenate
from kitlib.xrays.cache import DecodedXrays, XrayCache

logger = logging.getLogger(__name__)

MODEL = ["model", "fold"]


@dataclass(frozen=True)
class Predictions:
    """Of several models and folds. `probabilities`: image_id, model, fold, the four classes and none, NaN for what a model
    has not learnt. `detections` and `coverage` are the tables of these names.
    """

    probabilities: pd.DataFrame
    detections: pd.DataFrame
    coverage: pd.DataFrame


@dataclass(frozen=True)
class PseudoLabels:
    """Tables to train on, and what did not get into them.

    `images` has two columns more: `none`, the soft target, and `unsure`, True where the boxes are no lesson for a
    detector. `labels` has the four study classes, adding to 1, for studies that a classifier has judged. `boxes` has a
    column `score`. `left_out` has image_id and reason.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    left_out: pd.DataFrame


def duplicate_groups(sources: Iterable[tuple[pd.DataFrame, XrayCache]], max_distance: int = MAX_DISTANCE) -> pd.DataFrame:
    """Columns image_id and group over the images of several (table images, cache); near-duplicates share a group.

    Raises ValueError for an image that is not decoded: what it resembles would go unnoticed.
    """
    caches = {image_id: cache for images, cache in sources for image_id in images["image_id"]}
    absent = [image_id for image_id, cache in caches.items() if image_id not in cache]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(caches)} images are not decoded, first {absent[0]}; run notebook 10 again by this kit"
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
    """Rows (image_id, model, fold) for each of `images` that a model of `models` (model, fold) must not judge.

    The model of a fold was trained on the images of `folds` in all other folds, which are rows of `trained`, and on those of
    all `extra` tables of images. It must not judge these, images of their studies and patients, images in one group of
    `groups` with them, nor any image of a study or patient of which it must not judge one.
    """
    fold_of = trained["image_id"].map(folds.set_index("id")["fold"])
    group = None if groups is None else groups.set_index("image_id")["group"]
    extra, parts = list(extra), []
    for fold, of_fold in models.groupby("fold"):
        there = pd.concat([trained[fold_of.notna() & (fold_of != fold)], *extra])
        seen = pd.Series(False, images.index)
        for column in ("image_id", "study_id", "patient_id"):
            seen |= images[column].isin(there[column])
        if group is not None:
            seen |= images["image_id"].map(group).isin(group.reindex(there["image_id"]).dropna())
        before = -1
        while seen.sum() > before:  # a study may have a second patient, where a header was not readable
            before = seen.sum()
            for column in ("study_id", "patient_id"):
                seen |= images[column].isin(images.loc[seen, column])
        parts.append(images.loc[seen, ["image_id"]].merge(of_fold[MODEL], how="cross"))
    return pd.concat(parts, ignore_index=True)


def predict_unseen(
    models: pd.DataFrame,
    images: pd.DataFrame,
    cache: DecodedXrays,
    seen: pd.DataFrame,
    batch_size: int | None = None,
    lungs: StoredLungs | LungSegmenter | None = None,
) -> Predictions:
    """What each of `models` (model, fold, bundle: a folder) says of those of `images` that `seen` does not bar it from.

    `lungs` finds the lungs of `images` for models that want a segmenter's; how many were not found is logged. Raises
    ValueError for such a model without them and for a model of findings, which knows none of these labels; BundleError as
    `load_predictor` does.
    """
    probabilities, detections, coverage = [], [], []
    for row in models.itertuples():
        predictor = load_predictor(row.bundle, batch_size=batch_size, lungs=lungs)
        if predictor.family.answers == CLASSES:
            raise ValueError(f"{row.bundle} is a classifier of findings; name runs of study classifiers and detectors")
        if predictor.wants_masks and (lungs is None or lungs.segmenter != predictor.segmenter):
            raise ValueError(
                f"{row.bundle} looks at the lungs that {'another' if lungs else 'a'} segmenter has found; set lungs_run "
                "to the run of notebook 14 that it was trained with"
            )
        barred = set(seen.loc[(seen["model"] == row.model) & (seen["fold"] == row.fold), "image_id"])
        unseen = [image_id for image_id in images["image_id"] if image_id not in barred]
        chunks = list(predictor.predict(map(cache.read, tqdm(unseen, desc=f"{row.model}, fold {row.fold}"))))
        if predictor.lungs_missed:
            missed = predictor.lungs_missed
            logger.info(
                "%s, fold %d: no lungs found in %d of %d images, seen whole", row.model, row.fold, missed, len(unseen)
            )
        if predictor.family.answers == STUDIES:
            probabilities += chunks
        else:
            detections += chunks
            coverage.append(pd.DataFrame({"image_id": predictor.seen, "model": row.model, "fold": row.fold}))
    nothing = pd.DataFrame(columns=["image_id", *MODEL, *STUDY_CLASSES, "none"])
    return Predictions(
        pd.concat(probabilities, ignore_index=True) if probabilities else nothing,
        concatenate(detections, "detections"),
        concatenate(coverage, "coverage"),
    )


def pseudo_labels(
    predicted: Predictions,
    images: pd.DataFrame,
    seen: pd.DataFrame,
    settings: FusionSettings,
    low: float = 0.1,
    kept: float = 0.3,
    high: float = 0.5,
    workers: int = 1,
) -> PseudoLabels:
    """Tables to train on for `images`, fused by `settings` from the predictions that `seen` (see `seen_by`) does not bar.

    An image that no model was allowed to judge is left out. Boxes of score `kept` or more are its boxes. A detector may
    learn from it where the best box scores `high` or more (there is something) or less than `low` (there is nothing), not
    between these, and not where no detector has judged it. Scores are of fused boxes: calibrated if the settings calibrate.

    Raises ValueError unless 0 <= low <= kept <= high <= 1.
    """
    if not 0 <= low <= kept <= high <= 1:
        raise ValueError(f"thresholds of boxes: want 0 <= low <= kept <= high <= 1, got {low}, {kept}, {high}")
    images = check_table(images, "images")
    probabilities, detections, coverage = (
        _without(table, seen, images) for table in (predicted.probabilities, predicted.detections, predicted.coverage)
    )
    study_scores, image_scores = study_and_image_scores([probabilities], images)
    fused = fuse(study_scores, image_scores, detections, images, settings, coverage, workers)
    nones = fused.nones.set_index("image_id")
    judged = ~images["image_id"].map(nones["prior"])
    barred = images["image_id"].isin(seen["image_id"])
    reason = np.where(barred, "seen by every model that could judge it", "predicted by no model")
    left_out = pd.DataFrame({"image_id": images["image_id"], "reason": reason})[~judged].reset_index(drop=True)
    images = images[judged].reset_index(drop=True)
    found = fused.detections[fused.detections["image_id"].isin(images["image_id"])]
    best = images["image_id"].map(found.groupby("image_id")["score"].max()).fillna(0.0)
    unsure = ~images["image_id"].map(nones["seen"]) | ((best >= low) & (best < high))
    images = images.drop(columns="false_none", errors="ignore")
    images = images.assign(none=images["image_id"].map(nones["none"]), unsure=unsure)
    studies = fused.studies[~fused.studies["prior"] & fused.studies["study_id"].isin(images["study_id"])]
    classes = list(STUDY_CLASSES)
    labels = studies[classes].div(studies[classes].sum(axis=1), axis=0)  # after the negative share they add to another sum
    labels.insert(0, "id", studies["study_id"])
    boxes = found[found["score"] >= kept]
    logger.info("%d images labelled, %d left out, %d with unsure boxes", len(images), len(left_out), int(unsure.sum()))
    return PseudoLabels(images, check_table(labels, "labels"), check_table(boxes, "boxes"), left_out)


def _without(table: pd.DataFrame, seen: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """The predictions of `images` that are not barred."""
    key = ["image_id", *MODEL]
    barred = pd.MultiIndex.from_frame(table[key]).isin(pd.MultiIndex.from_frame(seen[key]))
    return table[~barred & table["image_id"].isin(images["image_id"])].reset_index(drop=True)
