"""Fuses the predictions of many models and folds into one prediction per image and study: pure functions of tables.

All published formulas are implemented; `FusionSettings` chooses among them, and `kitlib.fusion.tuning` finds the best
settings on out-of-fold predictions.
"""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import SettingsError
from kitlib.fusion.box_fusion import Method, calibrate_scores, merge_lists, suppress_overlaps
from kitlib.fusion.weighted_boxes import Confidence, ImageLists
from kitlib.letterbox import clip_boxes
from kitlib.scoring.submission_csv import PRIORS
from kitlib.settings import AtLeastOne, NotNegative, Positive, Probability, Settings, from_dict
from kitlib.tables import BOX, check_table, empty_table


@dataclass(frozen=True)
class FusionSettings(Settings):
    """Settings of the fusion of predictions. The defaults are the simplest: equal weights, no rescoring."""

    model_weights: dict[str, NotNegative] = field(default_factory=dict)  # model -> weight; default 1, and 0 excludes a model
    # detector -> slope and offset of its calibration (kitlib.fusion.box_fusion); other detectors' scores stay unchanged
    calibration: dict[str, tuple[Positive, float]] = field(default_factory=dict)
    box_method: Method = "wbf"  # applies to images with two or more lists of boxes
    box_iou: Probability = 0.6  # IoU above which boxes are merged (1st and 11th place 0.6, Heidelberg 0.55, 5th 0.625)
    # boxes with a lower score are dropped before fusion; the limit is low because unlikely boxes still add average precision
    box_min_score: Probability = 0.001
    box_limit: AtLeastOne = 50  # number of boxes merged per list, the most confident; time grows with its square
    box_confidence: Confidence = "avg"  # applies only to wbf
    # IoU above which the less confident of two fused boxes is dropped; 1: no box is dropped. Heidelberg's code: 0.1
    final_nms_iou: Probability = 1.0
    # An image's `none` is the weighted mean of the available ones of four parts; these are the parts' weights:
    none_classifier: NotNegative = 1.0  # `none` as the classifier predicts it
    none_negative: NotNegative = 0.0  # `negative` of the image's study
    none_no_box: NotNegative = 0.0  # 1 - the highest box score
    none_product: NotNegative = 0.0  # product of 1 - score over the boxes
    opacity_power: NotNegative = 0.0  # box score = score * (1 - none)^opacity_power; 3rd place 0.4, 11th 0.16/0.84
    negative_share: Probability = 1.0  # negative = share * negative + (1 - share) * mean none of the study; 11th place 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in NONE_PARTS):
            raise SettingsError(f"FusionSettings needs a weight above 0 among {', '.join(NONE_PARTS)}")

    def weight(self, model: str) -> float:
        """Return the weight of `model`, 1 if `model_weights` does not contain it."""
        return float(self.model_weights.get(model, 1.0))


NONE_PARTS = ("none_classifier", "none_negative", "none_no_box", "none_product")


@dataclass(frozen=True)
class Fused:
    """Fused predictions for every study and image of a table of images.

    `studies` has the columns study_id, the four classes and prior; `nones` has image_id, none, prior and seen; `detections`
    has image_id, score, xmin, ymin, xmax and ymax in original pixels. `prior` is true in rows that no model has predicted;
    they get a placeholder prediction (the class frequencies). `seen` is true for images that a detector with a nonzero
    weight has predicted. If `negative_share` is below 1, the four classes need not sum to 1.
    """

    studies: pd.DataFrame
    nones: pd.DataFrame
    detections: pd.DataFrame


def fuse(
    study_scores: pd.DataFrame | None,
    image_scores: pd.DataFrame | None,
    detections: pd.DataFrame | None,
    images: pd.DataFrame,
    settings: FusionSettings,
    coverage: pd.DataFrame | None = None,
) -> Fused:
    """Fuse `study_scores`, `image_scores` and `detections` into predictions for all images and studies in `images`.

    None or an empty table means that no model predicts such scores. Studies and images that no model has predicted get the
    class frequencies PRIORS. `coverage` is described at `fuse_boxes`.
    """
    studies = fuse_scores(study_scores, "study_scores", settings)
    nones = fuse_scores(image_scores, "image_scores", settings)
    boxes = fuse_boxes(detections, images, settings, coverage)
    seen = seen_images(detections, images, settings, coverage)
    image = pd.Index(images["image_id"]).get_indexer(boxes["image_id"])
    studies, nones, score = combine(studies, nones, image, boxes["score"].to_numpy(), seen, images, settings)
    return Fused(studies, nones, boxes.assign(score=score))


def fuse_scores(scores: pd.DataFrame | None, table: str, settings: FusionSettings) -> pd.DataFrame:
    """Return the mean of `scores` over each model's folds, then over the models with their weights.

    `table` is the schema of `scores`, "study_scores" or "image_scores". A model whose score for an id is missing or NaN does
    not count for that id. The result has the columns study_id and the four classes, or image_id and none, and one row per id
    that at least one model with a nonzero weight has predicted.
    """
    key, columns = ("study_id", list(STUDY_CLASSES)) if table == "study_scores" else ("image_id", ["none"])
    scores = empty_table(table) if scores is None else check_table(scores, table)
    models = scores.dropna(subset=columns).groupby([key, "model"], sort=False)[columns].mean()
    weights = models.index.get_level_values("model").map(settings.weight).to_numpy(dtype=float)
    models, weights = models[weights > 0], weights[weights > 0]
    total = pd.Series(weights, models.index).groupby(level=key, sort=False).sum()
    return models.mul(weights, axis=0).groupby(level=key, sort=False).sum().div(total, axis=0).reset_index()


def fuse_boxes(
    detections: pd.DataFrame | None,
    images: pd.DataFrame,
    settings: FusionSettings,
    coverage: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Fuse the boxes of all models and folds; return a table: image_id, score, xmin, ymin, xmax and ymax in original pixels.

    For each image, every pair of model and fold contributes one list of boxes. A box that is in only some of these lists
    gets a lower score, so the number of lists matters, including empty ones. `coverage` has one row per detector, fold and
    predicted image, so that a model that was stopped early does not lower the scores on images it never predicted. Without
    `coverage`, each model is assumed to have predicted every image, with as many folds as on the image where it has most. A
    model's weight is divided among its folds. If an image has a single list, its boxes are returned unchanged, with
    calibrated scores if the model is calibrated. Finally, boxes that overlap a more confident box are dropped if
    `final_nms_iou` is below 1.

    Boxes are clipped to the image. Raises ValueError for an image whose size is unknown or that is not in `images`, and for
    a score that is NaN.
    """
    corners, score, image = fuse_lists(BoxLists.of(detections, images, coverage), settings)
    table = pd.DataFrame(corners, columns=list(BOX))
    table.insert(0, "image_id", images["image_id"].to_numpy(dtype=object)[image])
    table.insert(1, "score", score)
    return table


@dataclass(frozen=True)
class BoxLists:
    """The boxes of n detections as lists, one per image, model and fold; sorted by image, model, fold and falling score.

    `image` (n,) is the row of each box's image in the table of images, `model` (n,) the index of its model in `models`, and
    `rank` (n,) its position in its list, from 0. `sides` (images, 4) has each image's columns, rows, columns and rows in
    pixels; `corners` (n, 4) has xmin, ymin, xmax and ymax of each box, divided by these. `covered` (images, models) is the
    number of lists, including empty ones, that each model has for each image, or None if this is unknown.
    """

    image: np.ndarray
    model: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    corners: np.ndarray
    sides: np.ndarray
    models: tuple[str, ...]
    covered: np.ndarray | None

    @classmethod
    def of(cls, detections: pd.DataFrame | None, images: pd.DataFrame, coverage: pd.DataFrame | None) -> "BoxLists":
        """Return BoxLists of the `detections`; drops boxes outside their image or with score 0. Errors: see `fuse_boxes`."""
        boxes, image = _clip_detections(detections, images)
        # A model that predicted no box at all occurs only in the coverage; its empty lists count too.
        names = set(boxes["model"]) | (set() if coverage is None else set(coverage["model"]))
        models = pd.Index(sorted(names), dtype=object)
        model, fold, score = models.get_indexer(boxes["model"]), boxes["fold"].to_numpy(), boxes["score"].to_numpy(float)
        order = np.lexsort((-score, fold, model, image))
        image, model, fold = image[order], model[order], fold[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (np.diff(image) != 0) | (np.diff(model) != 0) | (np.diff(fold) != 0)
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        sides = images[["columns", "rows", "columns", "rows"]].to_numpy(dtype=float, na_value=np.nan)
        corners = boxes[list(BOX)].to_numpy()[order] / sides[image]
        covered = None
        if coverage is not None:
            coverage = coverage[["image_id", "model", "fold"]].drop_duplicates()
            of_image = pd.Index(images["image_id"]).get_indexer(coverage["image_id"])
            covered = _count(of_image, models.get_indexer(coverage["model"]), (len(images), len(models)))
        return cls(image, model, rank, score[order], corners, sides, tuple(models), covered)


def fuse_lists(lists: BoxLists, settings: FusionSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fuse boxes as `fuse_boxes` does; return boxes (k, 4) in original pixels, scores (k,) and indices of images (k,)."""
    weight, score = np.array([settings.weight(name) for name in lists.models]), lists.score
    is_used = (score >= settings.box_min_score) & (weight > 0)[lists.model]
    for number, name in enumerate(lists.models):
        if name in settings.calibration:
            score = np.where(lists.model == number, calibrate_scores(score, *settings.calibration[name]), score)
    is_first = is_used & (lists.rank == 0)
    filled = _count(lists.image[is_first], lists.model[is_first], (len(lists.sides), len(weight)))  # lists with boxes
    totals = np.maximum(filled, filled.max(axis=0, initial=0) if lists.covered is None else lists.covered) * (weight > 0)
    is_used &= (lists.rank < settings.box_limit) | (totals.sum(axis=1) == 1)[lists.image]
    numbers, counts = np.unique(lists.image[is_used], return_counts=True)
    # Each image's lists with boxes come first, then its empty lists.
    empty_image, empty_model = (
        np.indices(filled.shape)[:, numbers].reshape(2, -1).repeat((totals - filled)[numbers].ravel(), 1)
    )
    list_image = np.concatenate([lists.image[is_first], empty_image])
    list_model = np.concatenate([lists.model[is_first], empty_model])
    order = np.argsort(list_image, kind="stable")
    shares = weight / np.maximum(totals, 1)  # a model's folds share its weight
    list_number = np.cumsum(is_first) - 1 - (np.cumsum(filled.sum(axis=1)) - filled.sum(axis=1))[lists.image]
    merged, merged_score, of_image = merge_lists(
        ImageLists(
            corners=lists.corners[is_used],
            score=score[is_used],
            ends=np.cumsum(counts),
            list_of=list_number[is_used],
            weights=shares[list_image, list_model][order],
            list_ends=np.cumsum(totals[numbers].sum(axis=1)),
        ),
        *(settings.box_method, settings.box_iou, settings.box_confidence, settings.box_min_score),
    )
    if settings.final_nms_iou < 1 and len(merged):
        ends = np.searchsorted(of_image, np.arange(len(numbers) + 1))
        kept = [
            suppress_overlaps(merged[start:end], merged_score[start:end], settings.final_nms_iou)
            for start, end in pairwise(ends)
        ]
        of_image = np.repeat(np.arange(len(numbers)), [len(scores) for _, scores in kept])
        merged, merged_score = np.concatenate([box for box, _ in kept]), np.concatenate([scores for _, scores in kept])
    return merged * lists.sides[numbers[of_image]], merged_score, numbers[of_image]


def combine(
    study_probabilities: pd.DataFrame,
    none_probabilities: pd.DataFrame,
    box_image: np.ndarray,
    score: np.ndarray,
    seen: np.ndarray,
    images: pd.DataFrame,
    settings: FusionSettings,
) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Compute `none` of each image, and adjust box scores and `negative` with it; return Fused's studies, nones, new scores.

    The fused boxes have the scores `score` (k,), and their images are the rows `box_image` (k,) of `images`; the third
    result has their new scores (k,). `seen` (n,) is a boolean mask of the rows of `images` that a detector has predicted.
    `none` is the weighted mean of NONE_PARTS; if all available parts of an image have weight 0, it is the first available
    part. Studies and images without any prediction get the class frequencies PRIORS.
    """
    image_ids, study_ids = pd.Index(images["image_id"]), pd.Index(images["study_id"].unique())
    studies = study_probabilities.set_index("study_id").reindex(study_ids)[list(STUDY_CLASSES)]
    study_of_image = study_ids.get_indexer(images["study_id"])
    highest, no_box_product = np.zeros(len(images)), np.ones(len(images))
    np.maximum.at(highest, box_image, score)
    np.multiply.at(no_box_product, box_image, 1 - score)
    parts = np.stack(
        [
            none_probabilities.set_index("image_id")["none"].reindex(image_ids).to_numpy(),
            studies["negative"].to_numpy()[study_of_image],
            np.where(seen, 1 - highest, np.nan),
            np.where(seen, no_box_product, np.nan),
        ]
    )
    none = _weighted_mean(parts, np.array([getattr(settings, name) for name in NONE_PARTS]))
    study_none = pd.Series(none).groupby(study_of_image).mean().reindex(range(len(study_ids))).to_numpy()
    studies = studies.fillna(PRIORS)
    share = np.where(np.isnan(study_none), 1.0, settings.negative_share)
    has_no_score = ~study_ids.isin(study_probabilities["study_id"])
    studies["negative"] = share * studies["negative"] + (1 - share) * np.nan_to_num(study_none)
    nones = pd.DataFrame({"image_id": image_ids, "none": none, "prior": np.isnan(none), "seen": seen})
    nones = nones.fillna({"none": PRIORS["none"]})
    rescored = score * (1 - nones["none"].to_numpy()[box_image]) ** settings.opacity_power
    return studies.assign(prior=has_no_score).rename_axis("study_id").reset_index(), nones, rescored


def seen_images(
    detections: pd.DataFrame | None, images: pd.DataFrame, settings: FusionSettings, coverage: pd.DataFrame | None = None
) -> np.ndarray:
    """Return a boolean mask (n,) of the rows of `images` that at least one detector with a nonzero weight has predicted.

    Without `coverage`, all entries are True if a detector with a nonzero weight has at least one detection in any image;
    otherwise all are False.
    """
    detections = empty_table("detections") if detections is None else detections
    predicted = pd.concat([table for table in (detections, coverage) if table is not None])[["image_id", "model"]]
    predicted = predicted[predicted["model"].isin([name for name in predicted["model"].unique() if settings.weight(name)])]
    if coverage is None:
        return np.full(len(images), len(predicted) > 0)
    return images["image_id"].isin(predicted["image_id"]).to_numpy()


def write_settings(settings: FusionSettings, path: str | Path) -> None:
    """Write the settings to `path` as JSON."""
    write_json(path, asdict(settings))


def read_settings(path: str | Path) -> FusionSettings:
    """Read settings from the JSON file `path`. Raises SettingsError for invalid JSON, unknown fields and invalid values."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read as JSON ({error}); run notebook 60 again") from error
    return from_dict(FusionSettings, values)


def _clip_detections(detections: pd.DataFrame | None, images: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the detections, clipped to their images, and an int array with the row in `images` of each detection's image.

    Boxes outside their image and boxes with score 0 are dropped.

    Raises ValueError for an image whose size is unknown or that is not in `images`, and for a score that is NaN.
    """
    boxes = empty_table("detections") if detections is None else check_table(detections, "detections")
    if boxes["score"].isna().any():
        raise ValueError(f"a detection in image {boxes.loc[boxes['score'].isna(), 'image_id'].iloc[0]} has no score (NaN)")
    image_index = pd.Index(images["image_id"]).get_indexer(boxes["image_id"])
    sizes = images[["rows", "columns"]].to_numpy()[image_index]
    bad = (image_index < 0) | (sizes < 1).any(axis=1)
    if bad.any():
        first = boxes.loc[bad, "image_id"].iloc[0]
        raise ValueError(
            f"image {first} has detections but no size in the `images` table; take its rows and columns from the cache"
        )
    clipped, is_inside = clip_boxes(boxes[list(BOX)].to_numpy(), sizes[:, [0]], sizes[:, [1]])
    boxes[list(BOX)] = clipped
    is_kept = is_inside & (boxes["score"].to_numpy() > 0)
    return boxes[is_kept], image_index[is_kept]


def _count(image: np.ndarray, model: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an int array of shape `shape` = (images, models) that counts how often each pair (image, model) occurs.

    `image` and `model` are int arrays (n,); pairs that contain -1 are not counted.
    """
    is_known = (image >= 0) & (model >= 0)
    pairs = image[is_known] * shape[1] + model[is_known]
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def _weighted_mean(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean (n,) of `parts` (4, n) over those that are not NaN; `weights` is (4,).

    If the weights of these parts are all 0, the result is the first part that is not NaN; it is NaN if all parts are NaN.
    """
    is_available = ~np.isnan(parts)
    weight = weights[:, None] * is_available
    first = parts[is_available.argmax(axis=0), np.arange(parts.shape[1])]
    total = weight.sum(axis=0)
    mean = np.divide((weight * np.nan_to_num(parts)).sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return np.where(total > 0, mean, first)
