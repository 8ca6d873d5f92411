"""Tunes FusionSettings on out-of-fold predictions for the competition score, one setting after another."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from kitlib.errors import FusionError
from kitlib.fusion.box_fusion import fit_calibration
from kitlib.fusion.model_fusion import NONE_PARTS, BoxLists, FusionSettings, combine, fuse_lists, fuse_scores, seen_images
from kitlib.scoring.score import Truth, match_in_images, score_matched, truth_of

logger = logging.getLogger(__name__)

LEAST_GAIN = 1e-4  # smallest gain in score for which a setting is changed; smaller gains are noise
MODEL_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0)
BOX_CONFIDENCES = ("avg", "max", "box_and_model_avg")
BOX_IOUS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # published: 0.55 to 0.625
BOX_METHODS = ("wbf", "nms")  # soft_nms and nmw are too slow to try on thousands of images
# Weights of NONE_PARTS: each part alone, published mixtures (3rd place 0.7 and 0.3, 11th 0.5 and 0.5) and similar mixtures.
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

KEPT_FUSIONS = 3  # each tuning step needs the fusion of the current settings again; other fusions are rarely needed twice

Change = Callable[[FusionSettings, Any], FusionSettings]
Grid = tuple[str, Change, tuple[Any, ...]]  # name of the step, function that sets a value in the settings, values to try


def tune(judge: "Judge", rounds: int = 2) -> tuple[FusionSettings, pd.DataFrame]:
    """Find good FusionSettings; return them and a table of steps with the columns step, setting (chosen value), score, gain.

    The first row is the default. Each step tries a grid of values for one setting and keeps the best value if it raises the
    score by at least LEAST_GAIN; the calibration of box scores is fitted to the same images and kept on the same condition.
    All settings are tuned for up to `rounds` rounds, until a round gains nothing; box fusion, which is slow, is tuned only
    in the first round. `box_min_score` and `box_limit` are never tuned, because the boxes that they drop hardly affect the
    score. The final score is optimistic, because the settings were chosen on the same predictions; see `cross_fit`.
    """
    return _hill_climb(judge, judge.truth, rounds)


def judge_fixed(judge: "Judge", settings: FusionSettings) -> pd.DataFrame:
    """Return a table with one row, the score of `settings` without tuning; the columns are those of the table of `tune`."""
    return pd.DataFrame(
        [("fixed", "as given", judge.score(settings, judge.truth), 0.0)], columns=["step", "setting", "score", "gain"]
    )


def cross_fit(judge: "Judge", rounds: int = 2) -> pd.DataFrame:
    """Estimate the score of tuned settings on new images; return a table, one row per fold.

    Its columns are fold, images (their number), default and cross_fitted. `cross_fitted` is the score (0..1) on the fold's
    images with settings tuned on the other folds, `default` the score with untuned settings. The table is empty if there are
    fewer than two folds. Each fold is scored alone, because settings of different folds put scores on different scales,
    which cannot be ranked together. This takes about as many times as long as `tune` as there are folds.
    """
    numbers, rows = sorted(set(judge.images["fold"])), []
    for fold in numbers if len(numbers) > 1 else []:
        is_in_fold = judge.images["fold"] == fold
        settings, _ = _hill_climb(judge, judge.truth_of(~is_in_fold), rounds)
        truth = judge.truth_of(is_in_fold)
        rows.append((fold, int(is_in_fold.sum()), judge.score(FusionSettings(), truth), judge.score(settings, truth)))
    return pd.DataFrame(rows, columns=["fold", "images", "default", "cross_fitted"])


def _hill_climb(judge: "Judge", truth: Truth, rounds: int) -> tuple[FusionSettings, pd.DataFrame]:
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
                rows.append((f"{len(rows)} {name}", "unchanged", best, 0.0))
            else:
                settings, best = candidates[value], tried[value]
                rows.append((f"{len(rows)} {name}", str(value), best, gain))
            logger.info("step %s: %s, score %.4f, gain %.4f", *rows[-1])
        if best == before:
            break
    return settings, pd.DataFrame(rows, columns=["step", "setting", "score", "gain"])


class Judge:
    """Computes the competition score of FusionSettings; caches the fused boxes of the latest KEPT_FUSIONS box settings.

    The score is computed on the images in `folds` that every classifier and every detector has predicted, without images
    marked `false_none`. Raises FusionError for predictions that are not out-of-fold, for detections in images that
    `coverage` lacks, and if no image remains.
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
    ) -> None:
        self.images = images = _scored_images(study_scores, image_scores, detections, coverage, images, folds)
        self.study_scores = study_scores[study_scores["study_id"].isin(images["study_id"])]
        self.image_scores = image_scores[image_scores["image_id"].isin(images["image_id"])]
        self.labels, self.boxes = labels, boxes
        self.truth = truth_of(images, labels, boxes)
        detections = detections[detections["image_id"].isin(images["image_id"])]
        # Every detector has predicted every remaining image, so this mask does not depend on the weights.
        self.seen = seen_images(detections, images, FusionSettings(), coverage)
        self.lists = BoxLists.of(detections, images, coverage)
        self.merged: dict[tuple[Any, ...], MergedBoxes] = {}  # the latest one last
        self.raw_hits: np.ndarray | None = None  # mask of the boxes in `lists` that match a ground-truth box
        self.averaged: dict[tuple[float, ...], tuple[pd.DataFrame, pd.DataFrame]] = {}
        self.classifiers = sorted({*self.study_scores["model"], *self.image_scores["model"]})
        self.detectors = sorted(set(coverage["model"]))

    def truth_of(self, chosen: pd.Series) -> Truth:
        """Return the ground truth for the rows of `images` that the boolean mask `chosen` selects."""
        return truth_of(self.images[chosen], self.labels, self.boxes)

    def score(self, settings: FusionSettings, truth: Truth) -> float:
        """Return the competition score of `settings` on the images of `truth`, a subset of `images`."""
        studies, nones, boxes = self.fuse(settings)
        image = pd.Index(truth.image_ids).get_indexer(self.images["image_id"])[boxes.image]
        return score_matched(truth, studies, nones, image, boxes.score, boxes.match)["score"]

    def fuse(self, settings: FusionSettings) -> tuple[pd.DataFrame, pd.DataFrame, "MergedBoxes"]:
        """Return the fused predictions for all images: the tables `studies` and `nones` of `Fused`, and the boxes."""
        boxes = self._boxes(settings)
        probabilities = self._probabilities(settings)
        studies, nones, score = combine(*probabilities, boxes.image, boxes.score, self.seen, self.images, settings)
        return studies, nones, replace(boxes, score=score)

    def calibration(self, truth: Truth) -> dict[str, tuple[float, float]]:
        """Fit each detector's calibration on the images of `truth`; return slope and offset, keyed by detector.

        Detectors that cannot be calibrated are omitted.
        """
        lists = self.lists
        if self.raw_hits is None:
            self.raw_hits = match_in_images(self.truth, lists.image, lists.corners * lists.sides[lists.image]) >= 0
        calibration = {}
        chosen = self.images["image_id"].isin(truth.image_ids).to_numpy()[lists.image]
        chosen &= lists.score >= FusionSettings().box_min_score  # lower scores are never fused
        for number, model in enumerate(lists.models):
            of_model = chosen & (lists.model == number)
            coefficients = fit_calibration(lists.score[of_model], self.raw_hits[of_model])
            if coefficients:
                calibration[model] = coefficients
        return calibration

    def _probabilities(self, settings: FusionSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
        key = tuple(settings.weight(model) for model in self.classifiers)
        if key not in self.averaged:
            studies = fuse_scores(self.study_scores, "study_scores", settings)
            self.averaged[key] = studies, fuse_scores(self.image_scores, "image_scores", settings)
        return self.averaged[key]

    def _boxes(self, settings: FusionSettings) -> "MergedBoxes":
        weights = [settings.weight(model) for model in self.detectors]
        shares = tuple(weight / max(weights) for weight in weights)
        key: tuple[Any, ...] = shares, tuple(settings.calibration.items()), settings.box_min_score, settings.final_nms_iou
        if np.count_nonzero(weights) > 1:  # a single detector's boxes are not merged, so these settings do not matter
            confidence = settings.box_confidence if settings.box_method == "wbf" else ""
            key += settings.box_method, settings.box_iou, settings.box_limit, confidence
        if key not in self.merged:
            corners, score, image = fuse_lists(self.lists, settings)
            match = match_in_images(self.truth, image, corners)
            order = np.argsort(-score, kind="stable")  # sorting again is then fast, unless boxes are rescored
            self.merged[key] = MergedBoxes(image[order].astype(np.int32), score[order], match[order].astype(np.int32))
            if len(self.merged) > KEPT_FUSIONS:
                del self.merged[next(iter(self.merged))]
        self.merged[key] = self.merged.pop(key)
        return self.merged[key]


@dataclass(frozen=True)
class MergedBoxes:
    """The image, score and match of k merged boxes, on which the competition score depends.

    `image` is the row of each box's image in the table of images, `match` the row of the ground-truth box that it matches,
    or -1.
    """

    image: np.ndarray
    score: np.ndarray
    match: np.ndarray


def _box_grids(detectors: list[str], calibration: dict[str, tuple[float, float]]) -> list[Grid]:
    """Return the grids of the box fusion settings, which take ten times as long to try as other settings.

    For a single detector the only grid is its calibration, which helps even without box fusion: when boxes are rescored by
    `none`, and when `none` is computed from box scores.
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
        # At least one model must keep a nonzero weight; the current weight is not worth trying again.
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
    """Return the rows of `images` that every model has predicted, with a column fold. Raises FusionError as Judge does."""
    runs = ["image_id", "model", "fold"]
    uncovered = detections[~pd.MultiIndex.from_frame(detections[runs]).isin(pd.MultiIndex.from_frame(coverage[runs]))]
    if len(uncovered):
        row = uncovered.iloc[0]
        raise FusionError(
            f"{len(uncovered)} detections are in images that the `coverage` table lacks; the first is in {row.image_id}, "
            f"predicted by {row.model} of fold {row.fold}. Use the coverage of the same runs"
        )
    images = images.drop(columns="fold", errors="ignore").merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    if "false_none" in images:
        images = images[~images["false_none"].astype(bool)]
    is_scored = pd.Series(True, images.index)
    for key, table in (("study_id", study_scores), ("image_id", image_scores), ("image_id", coverage)):
        image_folds = images[[key, "fold"]].drop_duplicates()
        predictions = table[[key, "model", "fold"]].merge(image_folds, on=key, suffixes=("", "_own"))
        wrong = predictions[predictions["fold"] != predictions["fold_own"]]
        if len(wrong):
            row = wrong.iloc[0]
            raise FusionError(
                f"{key} {row[key]} belongs to fold {row.fold_own}, but was predicted by {row.model} of fold {row.fold}, "
                "which was trained on it; use out-of-fold predictions"
            )
        for _, ids in table.groupby("model")[key]:
            is_scored &= images[key].isin(ids)
    if not is_scored.any():
        raise FusionError("no image was predicted by every model; give runs whose models were trained on the same folds")
    return images[is_scored].reset_index(drop=True)
