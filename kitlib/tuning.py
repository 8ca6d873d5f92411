"""Chooses FusionSettings on out-of-fold predictions by the competition's score, one setting after the other."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from kitlib.average_precision import match_boxes
from kitlib.fusion import NONE_PARTS, FusionSettings, combine, coverage_of_folds, fuse_boxes, fuse_scores, seen_images
from kitlib.scoring import Truth, score_tables
from kitlib.tables import BOX

log = logging.getLogger(__name__)

MODEL_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0)
BOX_IOUS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # published: 0.55 to 0.625
BOX_METHODS = ("wbf", "nms")  # soft_nms and nmw take too long to be tried on thousands of images
# Weights of NONE_PARTS: each alone, the published mixtures (3rd place 0.7 and 0.3, 11th half and half) and others like them.
NONE_MIXTURES = (
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
    (0.5, 0.5, 0.0, 0.0),
    (0.7, 0.0, 0.3, 0.0),
    (0.5, 0.0, 0.5, 0.0),
    (0.3, 0.0, 0.7, 0.0),
    (0.0, 0.5, 0.5, 0.0),
    (0.0, 0.5, 0.0, 0.5),
    (0.7, 0.0, 0.0, 0.3),
    (0.5, 0.0, 0.0, 0.5),
    (0.4, 0.3, 0.3, 0.0),
    (0.25, 0.25, 0.25, 0.25),
)
OPACITY_POWERS = (0.0, 0.1, 0.16 / 0.84, 0.3, 0.4, 0.6, 0.8, 1.0)
NEGATIVE_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

Change = Callable[[FusionSettings, Any], FusionSettings]
Grid = tuple[str, Change, tuple[Any, ...]]  # name of the step, how a value changes the settings, the values


class TuningError(ValueError):
    """Predictions that are not out of fold, or leave nothing to tune on."""


def tune(
    study_scores: pd.DataFrame,
    image_scores: pd.DataFrame,
    detections: pd.DataFrame,
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    folds: pd.DataFrame | None = None,
    rounds: int = 2,
    workers: int = 1,
) -> tuple[FusionSettings, pd.DataFrame]:
    """The best FusionSettings, and a table of steps: step, setting (as chosen), score, gain; the first row is the default.

    The tables hold out-of-fold predictions; images marked `false_none` are left out. With `folds`, each row must come from
    its image's own fold, and detectors count as having seen every image of the folds they have boxes in. Scored are the
    images that every model has predicted. Each step tries a grid for one setting and keeps the best value only if the
    score gains by it. Up to `rounds` go over them again until none gains, the fusion of boxes excepted, which is slow.

    Raises TuningError where an image or study has predictions of two folds of one model.
    """
    if "false_none" in images:
        images = images[~images["false_none"].astype(bool)]
    kept, coverage = _out_of_fold(study_scores, image_scores, detections, images, folds)
    images = images[images["image_id"].isin(kept)].reset_index(drop=True)
    if images.empty:
        raise TuningError("no image has predictions of every model; give tables of folds that all models were trained for")
    judge = _Judge(study_scores, image_scores, detections, images, labels, boxes, coverage, workers)
    settings = FusionSettings()
    best = judge(settings)
    rows = [("0 default", "", best, 0.0)]
    for number in range(rounds):
        before = best
        boxes_first = _box_grids(judge.detectors) if number == 0 else []
        for name, change, values in boxes_first + _score_grids(judge.classifiers):
            tried = {value: judge(candidate) for value in values if (candidate := change(settings, value)) != settings}
            value = max(tried, key=tried.__getitem__)
            gain = max(0.0, tried[value] - best)
            if gain > 0:
                settings, best = change(settings, value), tried[value]
            rows.append((f"{len(rows)} {name}", str(value) if gain > 0 else "as it was", best, gain))
            log.info("step %s: %s, score %.4f, gain %.4f", *rows[-1])
        if best == before:
            break
    return settings, pd.DataFrame(rows, columns=["step", "setting", "score", "gain"])


class _Judge:
    """The competition score of settings. Boxes are fused and matched once for each way to fuse them."""

    def __init__(
        self,
        study_scores: pd.DataFrame,
        image_scores: pd.DataFrame,
        detections: pd.DataFrame,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        coverage: pd.DataFrame | None,
        workers: int,
    ) -> None:
        self.study_scores = study_scores[study_scores["study_id"].isin(images["study_id"])]
        self.image_scores = image_scores[image_scores["image_id"].isin(images["image_id"])]
        self.detections = detections[detections["image_id"].isin(images["image_id"])]
        self.images, self.coverage, self.workers = images, coverage, workers
        self.truth = Truth(
            labels[labels["id"].isin(images["study_id"])],
            tuple(images["image_id"]),
            boxes[boxes["image_id"].isin(images["image_id"])],
        )
        self.seen = seen_images(self.detections, images, coverage)
        self.merged: dict[tuple[Any, ...], tuple[pd.DataFrame, np.ndarray]] = {}
        self.averaged: dict[tuple[float, ...], tuple[pd.DataFrame, pd.DataFrame]] = {}
        self.classifiers = sorted({*self.study_scores["model"], *self.image_scores["model"]})
        self.detectors = sorted(set(self.detections["model"]))

    def __call__(self, settings: FusionSettings) -> float:
        found, matches = self._boxes(settings)
        fused = combine(*self._probabilities(settings), found, self.seen, self.images, settings)
        return score_tables(self.truth, fused.studies, fused.nones, fused.detections, matches)["score"]

    def _probabilities(self, settings: FusionSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
        key = tuple(settings.weight(model) for model in self.classifiers)
        if key not in self.averaged:
            studies = fuse_scores(self.study_scores, "study_scores", settings)
            self.averaged[key] = studies, fuse_scores(self.image_scores, "image_scores", settings)
        return self.averaged[key]

    def _boxes(self, settings: FusionSettings) -> tuple[pd.DataFrame, np.ndarray]:
        key = (*(settings.weight(model) for model in self.detectors), settings.box_method, settings.box_iou)
        if key not in self.merged:
            found = fuse_boxes(self.detections, self.images, settings, self.coverage, self.workers)
            images, true = pd.Index(self.truth.image_ids), self.truth.boxes
            place, true_place = images.get_indexer(found["image_id"]), images.get_indexer(true["image_id"])
            self.merged[key] = found, match_boxes(place, found[list(BOX)], true_place, true[list(BOX)])
        return self.merged[key]


def _box_grids(detectors: list[str]) -> list[Grid]:
    """How the boxes of several detectors meet; each value costs a fusion of all boxes, ten times what other steps cost."""
    if len(detectors) < 2:
        return []
    ways: list[Grid] = [("box_method", _field("box_method"), BOX_METHODS), ("box_iou", _field("box_iou"), BOX_IOUS)]
    return [(f"weight of {model}", _weigh(model, detectors), MODEL_WEIGHTS) for model in detectors] + ways


def _score_grids(classifiers: list[str]) -> list[Grid]:
    weights: list[Grid] = [(f"weight of {model}", _weigh(model, classifiers), MODEL_WEIGHTS) for model in classifiers]
    return [
        *(weights if len(weights) > 1 else []),
        ("none: " + ", ".join(part.removeprefix("none_") for part in NONE_PARTS), _mix_none, NONE_MIXTURES),
        ("opacity_power", _field("opacity_power"), OPACITY_POWERS),
        ("negative_share", _field("negative_share"), NEGATIVE_SHARES),
    ]


def _field(name: str) -> Change:
    return lambda settings, value: replace(settings, **{name: value})


def _mix_none(settings: FusionSettings, weights: tuple[float, ...]) -> FusionSettings:
    return replace(settings, **dict(zip(NONE_PARTS, weights, strict=True)))


def _weigh(model: str, models: list[str]) -> Change:
    def change(settings: FusionSettings, weight: float) -> FusionSettings:
        changed = replace(settings, model_weights={**settings.model_weights, model: weight})
        # The last model must stay, and a weight of 1 is no change.
        alone = not any(changed.weight(other) for other in models)
        return settings if alone or weight == settings.weight(model) else changed

    return change


def _out_of_fold(
    study_scores: pd.DataFrame,
    image_scores: pd.DataFrame,
    detections: pd.DataFrame,
    images: pd.DataFrame,
    folds: pd.DataFrame | None,
) -> tuple[set[str], pd.DataFrame | None]:
    """Check that predictions are out of fold; the ids of images that every model has predicted, and detectors' coverage."""
    tables = (("study_id", study_scores), ("image_id", image_scores), ("image_id", detections))
    own_fold = None if folds is None else images.merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    kept = set(images["image_id"])
    for key, table in tables:
        runs = table[[key, "model", "fold"]].drop_duplicates()
        twice = runs.duplicated([key, "model"])
        if twice.any():
            row = runs[twice].iloc[0]
            raise TuningError(f"{key} {row[key]} has predictions of several folds of {row['model']}, so not out of fold")
        if own_fold is not None:
            beside = runs.merge(own_fold[[key, "fold"]].drop_duplicates(), on=key, suffixes=("", "_own"))
            wrong = beside[beside["fold"] != beside["fold_own"]]
            if len(wrong):
                row = wrong.iloc[0]
                raise TuningError(
                    f"{key} {row[key]} of fold {row['fold_own']} was seen by {row['model']} of fold {row['fold']}"
                )
        if table is not detections:
            for _, ids in runs.groupby("model")[key]:
                kept &= set(images.loc[images[key].isin(ids), "image_id"])
    if folds is None:
        return kept, None
    coverage = coverage_of_folds(detections, folds)
    for _, ids in coverage.groupby("model")["image_id"]:
        kept &= set(ids)
    return kept, coverage
