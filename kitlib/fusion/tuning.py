"""Tunes a competition's fusion settings, one after another, so that its score on out-of-fold predictions rises."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from kitlib.competitions.contract import Competition
from kitlib.competitions.merged import MergedPredictions
from kitlib.errors import FusionError
from kitlib.fusion.box_fusion import fit_calibration
from kitlib.fusion.mask_maps import fuse_maps
from kitlib.fusion.model_fusion import BoxLists, ModelPredictions, calibration_key, fuse_boxes, fuse_scores, seen_images
from kitlib.scoring.average_precision import match_boxes
from kitlib.tables import BOX, check_table

logger = logging.getLogger(__name__)

LEAST_GAIN = 1e-4  # smallest gain in score for which a setting is changed; smaller gains are noise
MODEL_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0)

KEPT_FUSIONS = 3  # each tuning step needs the fusion of the current settings again; other fusions are rarely needed twice

Change = Callable[[Any, Any], Any]
Grid = tuple[str, Change, tuple[Any, ...]]  # name of the step, function that sets a value in the settings, values to try


def tune(judge: "Judge", rounds: int = 2) -> tuple[Any, pd.DataFrame]:
    """Tune the fusion settings; return them and a table with the columns step, setting (chosen value), score and gain.

    The table's first row is for the default settings; then there is one row per step. A step tries several values of one
    setting, or of a few settings together, and keeps the best value if it raises the score by at least LEAST_GAIN (0.0001).
    One step tries a calibration of box scores that is fitted to the scored images. A round consists of all steps. There are
    at most `rounds` rounds, and none after a round without a gain. Box fusion is slow and tuned only in the first round.
    `box_min_score` and `box_limit` are never tuned, because the boxes that they drop hardly affect the score. The final
    score is optimistic, because it is computed on the predictions on which the settings were chosen; see `cross_fit`.
    """
    return _hill_climb(judge, judge.everything, rounds)


def judge_fixed(judge: "Judge", settings: Any) -> pd.DataFrame:
    """Score `settings` without tuning; return a table with one row and the columns step, setting, score and gain."""
    return pd.DataFrame(
        [("fixed", "as given", judge.score(settings, judge.everything), 0.0)], columns=["step", "setting", "score", "gain"]
    )


def cross_fit(judge: "Judge", rounds: int = 2) -> pd.DataFrame:
    """Estimate the score of tuned settings on new images; return a table, one row per fold.

    The columns are `fold`, `images` (number of images in the fold), `default` and `cross_fitted`. The last two are the
    competition score (0..1) on the fold's images with untuned settings, and with settings tuned on the other folds. If there
    are fewer than two folds, the table is empty. Each fold is scored alone, because confidences under different settings
    have different scales and cannot be ranked together. `cross_fit` takes about as long as one `tune` per fold.
    """
    numbers, rows = sorted(set(judge.images["fold"])), []
    for fold in numbers if len(numbers) > 1 else []:
        is_in_fold = (judge.images["fold"] == fold).to_numpy()
        settings, _ = _hill_climb(judge, judge.part(~is_in_fold), rounds)
        part = judge.part(is_in_fold)
        default = judge.score(judge.competition.settings(), part)
        rows.append((fold, int(is_in_fold.sum()), default, judge.score(settings, part)))
    return pd.DataFrame(rows, columns=["fold", "images", "default", "cross_fitted"])


def _hill_climb(judge: "Judge", part: "Part", rounds: int) -> tuple[Any, pd.DataFrame]:
    settings = judge.competition.settings()
    best = judge.score(settings, part)
    if math.isnan(best):
        raise FusionError(
            "nothing can be tuned, because the score is undefined: no class of the competition can be scored on these "
            "images; give runs that have predicted more images"
        )
    calibration = judge.calibration(part)
    rows = [("0 default", "", best, 0.0)]
    for number in range(rounds):
        before = best
        grids = _score_grids(judge.classifiers, judge.competition)
        if number == 0:
            first = [grid for grid in grids if grid[0] in judge.competition.settings.FIRST]
            of_boxes = _box_grids(judge.detectors, calibration, judge.competition)
            grids = of_boxes[: bool(calibration)] + first + of_boxes[bool(calibration) :] + grids
        for name, change, values in grids:
            candidates = {value: change(settings, value) for value in values}
            scores = {value: judge.score(new, part) for value, new in candidates.items() if new != settings}
            tried = {value: -math.inf if math.isnan(score) else score for value, score in scores.items()}
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


@dataclass(frozen=True)
class Part:
    """Subset of a Judge's n images: `chosen` is a boolean mask (n,), or None for all images; `truth` is the ground truth."""

    chosen: np.ndarray | None
    truth: Any


class Judge:
    """Computes the competition score of given out-of-fold predictions for any fusion settings.

    `tables` has the tables images, labels, boxes and folds of a prepared run (notebook 10); `masks` has its masks, or is
    None. The score is computed on images that are in a fold, that every model has predicted and that an annotator has looked
    at (not `false_none`). Raises FusionError if no such image remains, if a prediction is not out-of-fold, or if an image
    has detections but no row in the table `coverage`. Also raises FusionError if a model predicts nothing that the
    competition uses, or if the competition needs boxes or masks and no model predicts them. Caches the fused boxes of the
    last KEPT_FUSIONS settings.
    """

    def __init__(
        self, competition: Competition, predictions: ModelPredictions, tables: Mapping[str, pd.DataFrame], masks: Any = None
    ) -> None:
        self.competition = competition
        _check_wanted(predictions, competition)
        _check_answers(predictions, competition)
        predictions = predictions.wanted(competition)
        self.images = images = _scored_images(predictions, tables["images"], tables["folds"])
        image_ids = images["image_id"]
        self.labels, self.masks = tables["labels"], masks
        boxes = check_table(tables["boxes"], "boxes")
        self.boxes = boxes[boxes["image_id"].isin(image_ids)]
        self.study_scores = predictions.study_scores[predictions.study_scores["study_id"].isin(images["study_id"])]
        self.image_scores, detections, self.mask_maps = (
            table[table["image_id"].isin(image_ids)]
            for table in (predictions.image_scores, predictions.detections, predictions.mask_maps)
        )
        # Every detector has predicted every remaining image, so this mask does not depend on the weights.
        self.seen = seen_images(detections, images, competition.settings(), predictions.coverage)
        self.lists = BoxLists.of(detections, images, predictions.coverage)
        self.merged: dict[tuple[Any, ...], pd.DataFrame] = {}  # the latest one last
        self.raw_hits: np.ndarray | None = None  # mask of the boxes in `lists` that match a ground-truth box
        self.averaged: dict[tuple[float, ...], tuple[pd.DataFrame, ...]] = {}  # the latest one last
        self.classifiers = sorted({*self.study_scores["model"], *self.image_scores["model"], *self.mask_maps["model"]})
        self.detectors = sorted(set(() if predictions.coverage is None else predictions.coverage["model"]))
        self.everything = Part(None, self._truth_of(images))

    def part(self, chosen: np.ndarray) -> Part:
        """Return the subset of the images that the boolean mask `chosen` (n,) selects, with its ground truth."""
        return Part(chosen, self._truth_of(self.images[chosen]))

    def score(self, settings: Any, part: Part) -> float:
        """Return the competition score with `settings` on the images of `part`."""
        merged = self.merge(settings)
        return self.competition.judged(part.truth, merged if part.chosen is None else merged.part(part.chosen), settings)

    def merge(self, settings: Any) -> MergedPredictions:
        """Return the merged predictions for all images; the boxes have the additional column `match` (see Competition)."""
        studies, scores, masks = self._averages(settings)
        return MergedPredictions(self.images, studies, scores, self._boxes(settings), self.seen, masks)

    def calibration(self, part: Part) -> dict[str, tuple[float, float]]:
        """Fit the calibration of each detector and finding on the images of `part`; return slopes and offsets.

        `calibration_key` gives the keys of the result. Detectors and findings that cannot be calibrated are omitted.
        """
        lists = self.lists
        row = lists.group // len(lists.findings)
        if self.raw_hits is None:
            finding = np.array(lists.findings, dtype=object)[lists.group % len(lists.findings)]
            self.raw_hits = self._match(row, finding, lists.corners * lists.sides[lists.group]) >= 0
        calibration = {}
        chosen = np.ones(len(row), bool) if part.chosen is None else part.chosen[row]
        chosen &= lists.score >= self.competition.settings().box_min_score  # lower scores are never fused
        for (number, model), (code, finding) in product(enumerate(lists.models), enumerate(lists.findings)):
            is_of = chosen & (lists.model == number) & (lists.group % len(lists.findings) == code)
            coefficients = fit_calibration(lists.score[is_of], self.raw_hits[is_of])
            if coefficients:
                calibration[calibration_key(model, finding, lists.findings)] = coefficients
        return calibration

    def _truth_of(self, images: pd.DataFrame) -> Any:
        return self.competition.truth_of(images, self.labels, self.boxes, self.masks)

    def _match(self, row: np.ndarray, finding: Any, corners: np.ndarray) -> np.ndarray:
        """Return an int array (n,): for each predicted box, the row of its matching true box in `self.boxes`, or -1.

        Boxes match only if they have the same image and finding. The arguments describe the n predicted boxes; `row` is the
        row of the image in `self.images`.
        """
        findings = pd.Index(pd.unique(self.boxes["finding"]))
        true_row = pd.Index(self.images["image_id"]).get_indexer(self.boxes["image_id"])
        key = row * len(findings) + findings.get_indexer(finding)
        true_key = true_row * len(findings) + findings.get_indexer(self.boxes["finding"])
        match = match_boxes(key, corners, true_key, self.boxes[list(BOX)], self.competition.hit_iou)
        return np.where(findings.get_indexer(finding) >= 0, match, -1)

    def _averages(self, settings: Any) -> tuple[pd.DataFrame, ...]:
        weights = [settings.weight(model) for model in self.classifiers]
        key = tuple(weight / (max(weights) or 1) for weight in weights)  # only their ratios matter
        if key not in self.averaged:
            studies = fuse_scores(self.study_scores, "study_id", settings)
            masks = fuse_maps(self.mask_maps, settings.weight)
            if self.competition.compare is not None:
                masks = self.competition.compare(self.everything.truth, masks).drop(columns="map")
            self.averaged[key] = studies, fuse_scores(self.image_scores, "image_id", settings), masks
            if len(self.averaged) > KEPT_FUSIONS:
                del self.averaged[next(iter(self.averaged))]
        self.averaged[key] = self.averaged.pop(key)
        return self.averaged[key]

    def _boxes(self, settings: Any) -> pd.DataFrame:
        weights = [settings.weight(model) for model in self.detectors]
        shares = tuple(weight / max(weights) for weight in weights)
        key: tuple[Any, ...] = shares, tuple(settings.calibration.items()), settings.box_min_score, settings.final_nms_iou
        if np.count_nonzero(weights) > 1:  # a single detector's boxes are not merged, so these settings do not matter
            confidence = settings.box_confidence if settings.box_method == "wbf" else ""
            key += settings.box_method, settings.box_iou, settings.box_limit, confidence
        if key not in self.merged:
            boxes = fuse_boxes(self.lists, settings)
            match = self._match(boxes["row"].to_numpy(), boxes["finding"], boxes[list(BOX)].to_numpy())
            boxes["match"] = match.astype(np.int32)
            order = np.argsort(-boxes["score"].to_numpy(), kind="stable")  # sorting again is then fast, unless rescored
            self.merged[key] = boxes.iloc[order].reset_index(drop=True).astype(dict.fromkeys(BOX, np.float32))
            if len(self.merged) > KEPT_FUSIONS:
                del self.merged[next(iter(self.merged))]
        self.merged[key] = self.merged.pop(key)
        return self.merged[key]


def _box_grids(detectors: list[str], calibration: dict[str, tuple[float, float]], competition: Competition) -> list[Grid]:
    """Return the tuning steps of box fusion, with the values to try. Trying a value is ten times slower than in other steps.

    With one detector, only its calibration is tried. Calibration can help even with one detector, because `none` may change
    the box scores or be computed from them.
    """
    first: list[Grid] = [("calibration", _calibrate(calibration), ("fitted",))] if calibration else []
    if len(detectors) < 2:
        return first
    ways: list[Grid] = [
        ("box_method", _field("box_method"), competition.settings.BOX_METHODS),
        ("box_confidence", _field("box_confidence"), competition.settings.BOX_CONFIDENCES),
        ("box_iou", _field("box_iou"), competition.settings.BOX_IOUS),
    ]
    weights: list[Grid] = [(f"weight of {model}", _weigh(model, detectors), MODEL_WEIGHTS) for model in detectors]
    return first + weights + [grid for grid in ways if len(grid[2]) > 1]


def _score_grids(classifiers: list[str], competition: Competition) -> list[Grid]:
    weights: list[Grid] = [(f"weight of {model}", _weigh(model, classifiers), MODEL_WEIGHTS) for model in classifiers]
    grids = [(name, _fields(names), values) for name, (names, values) in competition.settings.GRIDS.items()]
    return (weights if len(weights) > 1 else []) + grids


def _field(name: str) -> Change:
    return lambda settings, value: replace(settings, **{name: value})


def _fields(names: tuple[str, ...]) -> Change:
    def change(settings: Any, values: Any) -> Any:
        return replace(settings, **dict(zip(names, values if len(names) > 1 else [values], strict=True)))

    return change


def _calibrate(calibration: dict[str, tuple[float, float]]) -> Change:
    return lambda settings, _: replace(settings, calibration=calibration)


def _weigh(model: str, models: list[str]) -> Change:
    def change(settings: Any, weight: float) -> Any:
        changed = replace(settings, model_weights={**settings.model_weights, model: weight})
        # At least one model must keep a nonzero weight; the current weight is not worth trying again.
        alone = not any(changed.weight(other) for other in models)
        return settings if alone or weight == settings.weight(model) else changed

    return change


def _check_wanted(predictions: ModelPredictions, competition: Competition) -> None:
    """Raise FusionError if a model predicts nothing that the competition uses."""
    helping = set(competition.helping_classes)
    for table, classes, kind in (
        (predictions.study_scores, set(competition.study_classes), "studies"),
        (predictions.image_scores, set(competition.image_classes), "images"),
        (predictions.detections, set(competition.box_classes), "boxes"),
        (predictions.mask_maps, set(competition.mask_classes), "masks"),
    ):
        for model, rows in table.groupby("model"):
            predicted = set(rows["finding"]) if "finding" in rows else set(rows.columns[rows.notna().any()])
            helps = kind == "images" and helping and helping <= predicted
            if len(rows) and not predicted & classes and not helps:
                raise FusionError(
                    f"{model!r} predicts no class that {competition.name!r} has for {kind}; the classes for {kind} are: "
                    f"{', '.join(sorted(classes)) or '(no classes)'}. Remove the run of {model!r}, or change the competition"
                )


def _check_answers(predictions: ModelPredictions, competition: Competition) -> None:
    """Raise FusionError if no model predicts the boxes or masks that a competition without study classes wants."""
    has_boxes = len(predictions.detections) or (predictions.coverage is not None and len(predictions.coverage))
    for is_wanted, is_predicted, kind, notebook in (
        (competition.box_classes, has_boxes, "boxes", "40"),
        (competition.mask_classes, len(predictions.mask_maps), "masks", "12"),
    ):
        if is_wanted and not is_predicted and not competition.study_classes:
            raise FusionError(f"{competition.name} wants {kind}, but no run predicts any; add a run of notebook {notebook}")


def _scored_images(predictions: ModelPredictions, images: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `images` that every model has predicted, with a column fold; raises FusionError, see Judge."""
    runs = ["image_id", "model", "fold"]
    detections = predictions.detections
    coverage = detections[runs].iloc[:0] if predictions.coverage is None else predictions.coverage
    uncovered = detections[~pd.MultiIndex.from_frame(detections[runs]).isin(pd.MultiIndex.from_frame(coverage[runs]))]
    if len(uncovered):
        row = uncovered.iloc[0]
        raise FusionError(
            f"{len(uncovered)} detections are in images that the `coverage` table lacks; the first is in {row.image_id!r}, "
            f"by {row.model!r} of fold {row.fold}. Use the `detections` and `coverage` tables of the same runs"
        )
    images = images.drop(columns="fold", errors="ignore").merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    if "false_none" in images:
        images = images[~images["false_none"].astype(bool)]
    is_scored = pd.Series(True, images.index)
    by_image = [("image_id", table) for table in (predictions.image_scores, coverage, predictions.mask_maps)]
    for key, table in (("study_id", predictions.study_scores), *by_image):
        image_folds = images[[key, "fold"]].drop_duplicates()
        scores = table[[key, "model", "fold"]].merge(image_folds, on=key, suffixes=("", "_own"))
        wrong = scores[scores["fold"] != scores["fold_own"]]
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
