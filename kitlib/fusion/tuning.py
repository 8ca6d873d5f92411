"""Chooses FusionSettings on out-of-fold predictions by the competition's score, one setting after the other."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from kitlib.errors import FusionError
from kitlib.fusion.box_fusion import fit_calibration
from kitlib.fusion.model_fusion import NONE_PARTS, Fused, FusionSettings, combine, fuse_boxes, fuse_scores, seen_images
from kitlib.scoring.average_precision import match_boxes
from kitlib.scoring.score import Truth, score_tables, truth_of
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

LEAST_GAIN = 1e-4  # of the score; less is the noise of the images at hand
MODEL_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0)
BOX_CONFIDENCES = ("avg", "max", "box_and_model_avg")
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


def tune(judge: "Judge", rounds: int = 2) -> tuple[FusionSettings, pd.DataFrame]:
    """The best FusionSettings, and a table of steps: step, setting (as chosen), score, gain; the first row is the default.

    Each step tries a grid for one setting and keeps the best value if the score gains LEAST_GAIN by it; the calibration of
    box scores is fitted to the same images, and kept on the same condition. Up to `rounds` go over them until none gains;
    how boxes meet is tried in the first alone, being slow. `box_min_score` and `box_limit` are never tuned: they cut what is
    too weak or too much to matter. The last score is too good, as it is of the predictions that the settings were chosen on;
    see `cross_fit`.
    """
    return _climb(judge, judge.truth, rounds)


def cross_fit(judge: "Judge", rounds: int = 2) -> pd.DataFrame:
    """What `tune` can expect of new images: a row a fold with fold, images, default and cross_fitted.

    `cross_fitted` is the score 0..1 of the fold's images under settings tuned on the other folds, `default` that under the
    untuned ones; no rows with fewer than two folds. Each fold is scored alone: settings of different folds put scores on
    different scales, and sorting these together would judge the mixture. Boxes are fused once for each way that `tune` or
    any fold tries, so it takes as long as `tune` where the folds agree, and up to as many times that as there are folds
    where none do.
    """
    numbers, rows = sorted(set(judge.images["fold"])), []
    for fold in numbers if len(numbers) > 1 else []:
        held = judge.images["fold"] == fold
        settings, _ = _climb(judge, judge.truth_of(~held), rounds)
        truth = judge.truth_of(held)
        rows.append((fold, int(held.sum()), judge.score(FusionSettings(), truth), judge.score(settings, truth)))
    return pd.DataFrame(rows, columns=["fold", "images", "default", "cross_fitted"])


def _climb(judge: "Judge", truth: Truth, rounds: int) -> tuple[FusionSettings, pd.DataFrame]:
    settings = FusionSettings()
    best = judge.score(settings, truth)
    calibration = judge.calibration(truth)
    rows = [("0 default", "", best, 0.0)]
    for number in range(rounds):
        before = best
        boxes_first = _box_grids(judge.detectors, calibration) if number == 0 else []
        for name, change, values in boxes_first + _score_grids(judge.classifiers):
            candidates = {value: change(settings, value) for value in values}
            tried = {value: judge.score(new, truth) for value, new in candidates.items() if new != settings}
            value = max(tried, key=tried.__getitem__)
            gain = tried[value] - best
            if gain < LEAST_GAIN:
                rows.append((f"{len(rows)} {name}", "as it was", best, 0.0))
            else:
                settings, best = candidates[value], tried[value]
                rows.append((f"{len(rows)} {name}", str(value), best, gain))
            logger.info("step %s: %s, score %.4f, gain %.4f", *rows[-1])
        if best == before:
            break
    return settings, pd.DataFrame(rows, columns=["step", "setting", "score", "gain"])


class Judge:
    """The competition score of settings. Boxes are fused and matched once for each way to fuse them.

    Scored are the images of `folds` that every classifier has predicted and every detector covered, without those marked
    `false_none`. Raises FusionError for predictions that are not out of fold, detections without coverage, and where no
    image is left.
    """

    def __init__(
        self,
        study_scores: pd.DataFrame,
        image_scores: pd.DataFrame,
        detections: pd.DataFrame,
        coverage: pd.DataFrame,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        folds: pd.DataFrame,
        workers: int = 1,
    ) -> None:
        self.images = images = _scored_images(study_scores, image_scores, detections, coverage, images, folds)
        self.study_scores = study_scores[study_scores["study_id"].isin(images["study_id"])]
        self.image_scores = image_scores[image_scores["image_id"].isin(images["image_id"])]
        self.detections = detections[detections["image_id"].isin(images["image_id"])]
        self.coverage, self.workers = coverage, workers
        self.labels, self.boxes = labels, boxes
        self.truth = truth_of(images, labels, boxes)
        # Every detector has covered every image, so weights make no difference to what was seen.
        self.seen = seen_images(self.detections, images, FusionSettings(), coverage)
        self.merged: dict[tuple[Any, ...], tuple[pd.DataFrame, np.ndarray]] = {}
        self.raw_hits: np.ndarray | None = None  # which of the detections, as they came, lie on a true box
        self.averaged: dict[tuple[float, ...], tuple[pd.DataFrame, pd.DataFrame]] = {}
        self.classifiers = sorted({*self.study_scores["model"], *self.image_scores["model"]})
        self.detectors = sorted(set(coverage["model"]))

    def truth_of(self, chosen: pd.Series) -> Truth:
        """The truth of some of `images`, a bool a row."""
        return truth_of(self.images[chosen], self.labels, self.boxes)

    def score(self, settings: FusionSettings, truth: Truth) -> float:
        """Of the images of `truth`, which are some of `images`."""
        fused, matches = self.fuse(settings)
        return score_tables(truth, fused.studies, fused.nones, fused.detections, matches)["score"]

    def fuse(self, settings: FusionSettings) -> tuple[Fused, np.ndarray]:
        """The answer for all images, and the true box of each detection."""
        found, matches = self._boxes(settings)
        return combine(*self._probabilities(settings), found, self.seen, self.images, settings), matches

    def calibration(self, truth: Truth) -> dict[str, tuple[float, float]]:
        """What makes a detector's scores probabilities, learnt on the images of `truth`; not of those that teach nothing."""
        if self.raw_hits is None:
            self.raw_hits = self._match(self.detections) >= 0
        lines = {}
        for model in self.detectors:
            chosen = (self.detections["model"] == model) & self.detections["image_id"].isin(truth.image_ids)
            chosen &= self.detections["score"] >= FusionSettings().box_min_score  # others are never fused
            line = fit_calibration(self.detections.loc[chosen, "score"], self.raw_hits[chosen])
            if line:
                lines[model] = line
        return lines

    def _probabilities(self, settings: FusionSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
        key = tuple(settings.weight(model) for model in self.classifiers)
        if key not in self.averaged:
            studies = fuse_scores(self.study_scores, "study_scores", settings)
            self.averaged[key] = studies, fuse_scores(self.image_scores, "image_scores", settings)
        return self.averaged[key]

    def _boxes(self, settings: FusionSettings) -> tuple[pd.DataFrame, np.ndarray]:
        weights = [settings.weight(model) for model in self.detectors]
        key: tuple[Any, ...] = tuple(weight / max(weights) for weight in weights), tuple(settings.calibration.items())
        if np.count_nonzero(weights) > 1:  # boxes of one detector meet no others
            key += settings.box_method, settings.box_iou, settings.box_confidence if settings.box_method == "wbf" else ""
        if key not in self.merged:
            found = fuse_boxes(self.detections, self.images, settings, self.coverage, self.workers)
            self.merged[key] = found, self._match(found)
        return self.merged[key]

    def _match(self, found: pd.DataFrame) -> np.ndarray:
        """The row of the true box that each of `found` (n,) belongs to, -1 where there is none."""
        images, true = pd.Index(self.truth.image_ids), self.truth.boxes
        place, true_place = images.get_indexer(found["image_id"]), images.get_indexer(true["image_id"])
        return match_boxes(place, found[list(BOX)], true_place, true[list(BOX)])


def _box_grids(detectors: list[str], calibration: dict[str, tuple[float, float]]) -> list[Grid]:
    """How the boxes of several detectors meet; each value costs a fusion of all boxes, ten times what other steps cost.

    One detector has its scores calibrated alone: what lowers them by `none`, or makes a `none` of them, gains by that too.
    """
    first: list[Grid] = [("calibration", _calibrate(calibration), ("fitted",))] if calibration else []
    if len(detectors) < 2:
        return first
    ways: list[Grid] = [
        ("box_method", _field("box_method"), BOX_METHODS),
        ("box_confidence", _field("box_confidence"), BOX_CONFIDENCES),
        ("box_iou", _field("box_iou"), BOX_IOUS),
    ]
    weights: list[Grid] = [(f"weight of {model}", _weigh(model, detectors), MODEL_WEIGHTS) for model in detectors]
    return first + weights + ways


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


def _calibrate(calibration: dict[str, tuple[float, float]]) -> Change:
    return lambda settings, _: replace(settings, calibration=calibration)


def _mix_none(settings: FusionSettings, weights: tuple[float, ...]) -> FusionSettings:
    parts: dict[str, Any] = dict(zip(NONE_PARTS, weights, strict=True))
    return replace(settings, **parts)


def _weigh(model: str, models: list[str]) -> Change:
    def change(settings: FusionSettings, weight: float) -> FusionSettings:
        changed = replace(settings, model_weights={**settings.model_weights, model: weight})
        # The last model must stay, and a weight of 1 is no change.
        alone = not any(changed.weight(other) for other in models)
        return settings if alone or weight == settings.weight(model) else changed

    return change


def _scored_images(
    study_scores: pd.DataFrame,
    image_scores: pd.DataFrame,
    detections: pd.DataFrame,
    coverage: pd.DataFrame,
    images: pd.DataFrame,
    folds: pd.DataFrame,
) -> pd.DataFrame:
    """The images, with their fold, that every model has predicted. Raises FusionError as Judge does."""
    runs = ["image_id", "model", "fold"]
    uncovered = detections[~pd.MultiIndex.from_frame(detections[runs]).isin(pd.MultiIndex.from_frame(coverage[runs]))]
    if len(uncovered):
        row = uncovered.iloc[0]
        raise FusionError(
            f"{len(uncovered)} detections are of images that their coverage lacks, first {row.image_id} by {row.model} "
            f"of fold {row.fold}; give the coverage of the same runs"
        )
    images = images.drop(columns="fold", errors="ignore").merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    if "false_none" in images:
        images = images[~images["false_none"].astype(bool)]
    kept = pd.Series(True, images.index)
    for key, table in (("study_id", study_scores), ("image_id", image_scores), ("image_id", coverage)):
        own = images[[key, "fold"]].drop_duplicates()
        beside = table[[key, "model", "fold"]].merge(own, on=key, suffixes=("", "_own"))
        wrong = beside[beside["fold"] != beside["fold_own"]]
        if len(wrong):
            row = wrong.iloc[0]
            raise FusionError(f"{key} {row[key]} of fold {row.fold_own} was seen by {row.model} of fold {row.fold}")
        for _, ids in table.groupby("model")[key]:
            kept &= images[key].isin(ids)
    if not kept.any():
        raise FusionError("no image has predictions of every model; give runs of folds that all models were trained for")
    return images[kept].reset_index(drop=True)
