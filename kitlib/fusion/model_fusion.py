"""Merges the predictions of several models and folds, given as tables, into one prediction per image and study.

The competition's module in kitlib.competitions turns the merged predictions into answers. `kitlib.fusion.tuning` finds the
best settings on out-of-fold predictions. The merging functions are pure.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.atomic import write_json
from kitlib.classes import ONE_FINDING
from kitlib.competitions.contract import Competition
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.errors import SettingsError
from kitlib.fusion.box_fusion import calibrate_scores, merge_lists, suppress_overlaps
from kitlib.fusion.mask_maps import fuse_maps
from kitlib.fusion.weighted_boxes import ImageLists
from kitlib.letterbox import clip_boxes
from kitlib.settings import from_dict
from kitlib.tables import BOX, FINDINGS_SEPARATOR, check_table, empty_table, findings_of

# Field of ModelPredictions -> schema in kitlib.tables, where their names differ.
KINDS = {"image_scores": "class_scores"}


@dataclass(frozen=True)
class ModelPredictions:
    """Predictions of one or more models, as tables of kitlib.tables; tables without predictions are empty.

    `image_scores` is a `class_scores` table. `coverage` lists the images that detectors have predicted, with or without
    boxes: one row per detector, fold and image. `coverage` is None if these images are unknown.
    """

    study_scores: pd.DataFrame
    image_scores: pd.DataFrame
    detections: pd.DataFrame
    mask_maps: pd.DataFrame
    coverage: pd.DataFrame | None = None

    @classmethod
    def of(cls, **tables: pd.DataFrame | None) -> "ModelPredictions":
        """Return ModelPredictions with the given tables, checked; tables that are None or not given are empty."""
        given = {name: check_table(table, KINDS.get(name, name)) for name, table in tables.items() if table is not None}
        empty = {name: empty_table(name) for name in ("study_scores", "image_scores", "detections", "mask_maps")}
        return cls(**empty | given)

    def wanted(self, competition: Competition) -> "ModelPredictions":
        """Return the predictions without the boxes and masks of findings that the competition does not ask for."""
        boxes, masks = self.detections, self.mask_maps
        return replace(
            self,
            detections=boxes[boxes["finding"].isin(competition.box_classes)],
            mask_maps=masks[masks["finding"].isin(competition.mask_classes)],
        )

    def only(self, image_ids: pd.Series) -> "ModelPredictions":
        """Return the predictions with only the boxes, masks and coverage of images in `image_ids`; all scores are kept."""
        tables = {name: getattr(self, name) for name in ("detections", "mask_maps", "coverage")}
        known = {name: table for name, table in tables.items() if table is not None}
        return replace(self, **{name: table[table["image_id"].isin(image_ids)] for name, table in known.items()})


def fuse(predictions: ModelPredictions, images: pd.DataFrame, settings: Any, competition: Competition = SIIM_COVID19) -> Any:
    """Merge the predictions of all models for `images`; return the competition's answers (see `Competition.decide`)."""
    return competition.decide(merge(predictions.wanted(competition), images, settings), settings)


def merge(predictions: ModelPredictions, images: pd.DataFrame, settings: FusionSettings) -> MergedPredictions:
    """Merge the predictions of all models for `images`, a table with the columns image_id, study_id, rows and columns."""
    detections, coverage = predictions.detections, predictions.coverage
    return MergedPredictions(
        images,
        fuse_scores(predictions.study_scores, "study_id", settings),
        fuse_scores(predictions.image_scores, "image_id", settings),
        fuse_boxes(BoxLists.of(detections, images, coverage), settings),
        seen_images(detections, images, settings, coverage),
        fuse_maps(predictions.mask_maps, settings.weight),
    )


def fuse_scores(scores: pd.DataFrame, key: str, settings: FusionSettings) -> pd.DataFrame:
    """Average `scores` over each model's folds, then take the models' weighted mean; return one row per image or study.

    `key` is the name of the id column, "study_id" or "image_id". The other columns of `scores` are `model`, `fold` and the
    classes. NaN scores and missing rows are ignored. The result has the id column and the classes. An id has a row if at
    least one model with a nonzero weight has a score for it.
    """
    classes = [name for name in scores.columns if name not in (key, "model", "fold")]
    models = scores.dropna(subset=classes, how="all").groupby([key, "model"], sort=False)[classes].mean()
    weights = models.index.get_level_values("model").map(settings.weight).to_numpy(dtype=float)
    models, weights = models[weights > 0], weights[weights > 0]
    total = models.notna().mul(weights, axis=0).groupby(level=key, sort=False).sum()
    return (models.mul(weights, axis=0).groupby(level=key, sort=False).sum() / total.where(total > 0)).reset_index()


def fuse_boxes(lists: "BoxLists", settings: FusionSettings) -> pd.DataFrame:
    """Fuse the boxes of all models and folds, finding by finding; return the table `boxes` of MergedPredictions.

    For each image and finding, every fold of every model contributes one list of boxes. A box that is in only some of these
    lists gets a lower score, so lists without boxes matter too (see `BoxLists.of`). A model's weight is divided among its
    folds. The boxes of a single list are not merged. Scores are calibrated if the model has a calibration. Finally, if
    `final_nms_iou` is below 1, non-maximum suppression drops each box whose IoU with a more confident box of the same
    finding and image is above `final_nms_iou`.
    """
    corners, score, group = fuse_lists(lists, settings)
    table = pd.DataFrame(corners, columns=list(BOX))
    row, code = np.divmod(group, len(lists.findings))
    table.insert(0, "row", row.astype(np.int32))
    table.insert(1, "finding", pd.Categorical.from_codes(code, categories=lists.findings))
    table.insert(2, "score", score)
    return table


@dataclass(frozen=True)
class BoxLists:
    """The boxes of n detections, as flat arrays. The boxes of one image, finding, model and fold form a list.

    A group is one finding of one image. Its number is (row of the image in the table of images) * len(findings) + (index of
    the finding in `findings`). Boxes are sorted by group, model, fold and falling score. For each box, `group` (n,) has the
    group's number, `model` (n,) the index in `models`, `rank` (n,) the position in the list, from 0, and `corners` (n, 4)
    xmin, ymin, xmax and ymax, divided by the sides of the image. `sides` (groups, 4) has width, height, width and height of
    each group's image in pixels. `covered` (groups, models) is the number of lists, with or without boxes, that each model
    has for each group, or None if this number is unknown.
    """

    group: np.ndarray
    model: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    corners: np.ndarray
    sides: np.ndarray
    models: tuple[str, ...]
    findings: tuple[str, ...]
    covered: np.ndarray | None

    @classmethod
    def of(cls, detections: pd.DataFrame, images: pd.DataFrame, coverage: pd.DataFrame | None = None) -> "BoxLists":
        """Return BoxLists of the `detections`, clipped to their images. Drops boxes outside their image or with score 0.

        A list without boxes lowers the scores of other models' boxes. `coverage` decides which lists there are: it has one
        row per detector, fold and predicted image, and its column `findings`, if any, has the findings that the detector
        predicts. Without `coverage`, every model is assumed to have predicted every image. Each model then has the same
        number of lists for all images and findings: the largest number of its folds with boxes of one finding in one image.
        Raises ValueError if an image is not in `images` or its size is unknown, and if a score is NaN.
        """
        boxes, image = _clip_detections(detections, images)
        # A model that predicted no box at all occurs only in the coverage; its empty lists count too.
        names = set(boxes["model"]) | (set() if coverage is None else set(coverage["model"]))
        models = pd.Index(sorted(names), dtype=object)
        findings = findings_of(boxes) or (ONE_FINDING,)
        finding = pd.Index(findings).get_indexer(boxes["finding"])
        group = image * len(findings) + finding
        model, fold, score = models.get_indexer(boxes["model"]), boxes["fold"].to_numpy(), boxes["score"].to_numpy(float)
        order = np.lexsort((-score, fold, model, group))
        group, model, fold = group[order], model[order], fold[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (np.diff(group) != 0) | (np.diff(model) != 0) | (np.diff(fold) != 0)
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        sides = images[["columns", "rows", "columns", "rows"]].to_numpy(dtype=float, na_value=np.nan)
        sides = sides.repeat(len(findings), axis=0)
        corners = boxes[list(BOX)].to_numpy()[order] / sides[group]
        covered = None
        if coverage is not None:
            whole_coverage, coverage = coverage, coverage[["image_id", "model", "fold"]].drop_duplicates()
            of_image = pd.Index(images["image_id"]).get_indexer(coverage["image_id"])
            covered = _count(of_image, models.get_indexer(coverage["model"]), (len(images), len(models)))
            covered = covered.repeat(len(findings), axis=0)
            if "findings" in whole_coverage:
                covered *= np.tile(_predicted_findings(whole_coverage, findings, models), (len(images), 1))
        return cls(group, model, rank, score[order], corners, sides, tuple(models), findings, covered)


def calibration_key(model: str, finding: str, findings: tuple[str, ...]) -> str:
    """Return the key of FusionSettings.calibration: "MODEL: FINDING" if there are several `findings`, otherwise "MODEL"."""
    return f"{model}: {finding}" if len(findings) > 1 else model


def fuse_lists(lists: BoxLists, settings: FusionSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fuse boxes as `fuse_boxes` does; return boxes (k, 4) in original pixels, scores (k,) and group numbers (k,)."""
    weight, score = np.array([settings.weight(name) for name in lists.models]), lists.score
    is_used = (score >= settings.box_min_score) & (weight > 0)[lists.model]
    for number, name in enumerate(lists.models):
        for code, finding in enumerate(lists.findings):
            key = calibration_key(name, finding, lists.findings)
            if key in settings.calibration:
                is_of = (lists.model == number) & (lists.group % len(lists.findings) == code)
                score = np.where(is_of, calibrate_scores(score, *settings.calibration[key]), score)
    is_first = is_used & (lists.rank == 0)
    filled = _count(lists.group[is_first], lists.model[is_first], (len(lists.sides), len(weight)))  # lists with boxes
    totals = np.maximum(filled, filled.max(axis=0, initial=0) if lists.covered is None else lists.covered) * (weight > 0)
    is_used &= (lists.rank < settings.box_limit) | (totals.sum(axis=1) == 1)[lists.group]
    numbers, counts = np.unique(lists.group[is_used], return_counts=True)
    # Each group's lists with boxes come first, then its empty lists.
    empty_group, empty_model = (
        np.indices(filled.shape)[:, numbers].reshape(2, -1).repeat((totals - filled)[numbers].ravel(), 1)
    )
    list_group = np.concatenate([lists.group[is_first], empty_group])
    list_model = np.concatenate([lists.model[is_first], empty_model])
    order = np.argsort(list_group, kind="stable")
    shares = weight / np.maximum(totals, 1)  # a model's folds share its weight
    list_number = np.cumsum(is_first) - 1 - (np.cumsum(filled.sum(axis=1)) - filled.sum(axis=1))[lists.group]
    merged, merged_score, of_group = merge_lists(
        ImageLists(
            corners=lists.corners[is_used],
            score=score[is_used],
            ends=np.cumsum(counts),
            list_of=list_number[is_used],
            weights=shares[list_group, list_model][order],
            list_ends=np.cumsum(totals[numbers].sum(axis=1)),
        ),
        *(settings.box_method, settings.box_iou, settings.box_confidence, settings.box_min_score),
    )
    if settings.final_nms_iou < 1 and len(merged):
        ends = np.searchsorted(of_group, np.arange(len(numbers) + 1))
        kept = [
            suppress_overlaps(merged[start:end], merged_score[start:end], settings.final_nms_iou)
            for start, end in pairwise(ends)
        ]
        of_group = np.repeat(np.arange(len(numbers)), [len(scores) for _, scores in kept])
        merged, merged_score = np.concatenate([box for box, _ in kept]), np.concatenate([scores for _, scores in kept])
    return merged * lists.sides[numbers[of_group]], merged_score, numbers[of_group]


def seen_images(
    detections: pd.DataFrame, images: pd.DataFrame, settings: FusionSettings, coverage: pd.DataFrame | None = None
) -> np.ndarray:
    """Return a bool array (n,), True for rows of `images` that at least one detector with a nonzero weight has predicted.

    Without `coverage`, all entries are the same: True if a detector with a nonzero weight has a detection in any image.
    """
    predicted = pd.concat([table for table in (detections, coverage) if table is not None])[["image_id", "model"]]
    predicted = predicted[predicted["model"].isin([name for name in predicted["model"].unique() if settings.weight(name)])]
    if coverage is None:
        return np.full(len(images), len(predicted) > 0)
    return images["image_id"].isin(predicted["image_id"]).to_numpy()


def write_settings(settings: FusionSettings, path: str | Path, competition: Competition = SIIM_COVID19) -> None:
    """Write the settings to `path` as JSON, with the name of the competition unless it is SIIM-COVID."""
    name = {} if competition is SIIM_COVID19 else {"competition": competition.name}
    write_json(path, name | asdict(settings))


def read_settings(path: str | Path, competition: Competition = SIIM_COVID19) -> Any:
    """Return a competition's settings from a JSON file.

    Raises SettingsError for invalid JSON, settings of another competition, unknown fields, and invalid values.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read as JSON ({error}); run notebook 60 again") from error
    name = values.pop("competition", SIIM_COVID19.name) if isinstance(values, dict) else competition.name
    if name != competition.name:
        raise SettingsError(
            f"{path} has settings for {name!r}, but the submission is to {competition.name!r}; run notebook 60 with "
            f"`competition` set to {competition.name!r}"
        )
    return from_dict(competition.settings, values)


def _clip_detections(detections: pd.DataFrame, images: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the detections, clipped to their images, and an int array with the row in `images` of each detection's image.

    Boxes outside their image and boxes with score 0 are dropped. Raises ValueError if an image is not in `images` or its
    size is unknown, and if a score is NaN.
    """
    boxes = check_table(detections, "detections")
    if boxes["score"].isna().any():
        raise ValueError(f"a detection in image {boxes.loc[boxes['score'].isna(), 'image_id'].iloc[0]} has no score (NaN)")
    image_index = pd.Index(images["image_id"]).get_indexer(boxes["image_id"])
    sizes = images[["rows", "columns"]].to_numpy()[image_index]
    bad = (image_index < 0) | (sizes < 1).any(axis=1)
    if bad.any():
        first = boxes.loc[bad, "image_id"].iloc[0]
        raise ValueError(
            f"image {first!r} has detections but no size in the table `images`; set `rows` and `columns` there, in pixels"
        )
    clipped, is_inside = clip_boxes(boxes[list(BOX)].to_numpy(), sizes[:, [0]], sizes[:, [1]])
    boxes[list(BOX)] = clipped
    is_kept = is_inside & (boxes["score"].to_numpy() > 0)
    return boxes[is_kept], image_index[is_kept]


def _predicted_findings(coverage: pd.DataFrame, findings: tuple[str, ...], models: pd.Index) -> np.ndarray:
    """Return a boolean array (findings, models): whether each model predicts each finding.

    A model without values in the column `findings` of `coverage` is assumed to predict all findings.
    """
    predicts = np.ones((len(findings), len(models)), dtype=bool)
    for model, texts in coverage.dropna(subset="findings").groupby("model")["findings"]:
        classes = {name for text in texts.unique() for name in str(text).split(FINDINGS_SEPARATOR)}
        predicts[:, models.get_loc(model)] = [name in classes for name in findings]
    return predicts


def _count(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an int array of shape `shape` that counts how often each pair (first, second) of indices occurs.

    `first` and `second` are int arrays (n,); pairs that contain -1 are not counted.
    """
    is_known = (first >= 0) & (second >= 0)
    pairs = first[is_known] * shape[1] + second[is_known]
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
