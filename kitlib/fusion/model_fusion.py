"""Fuses the predictions of many models and folds into one prediction per image and study: pure functions of tables.

All published formulas are implemented; `FusionSettings` chooses among them, and `kitlib.fusion.tuning` finds the best
settings on out-of-fold predictions.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import SettingsError
from kitlib.fusion.box_fusion import Confidence, Method, calibrate_scores, merge_boxes, suppress_overlaps
from kitlib.letterbox import clip_boxes
from kitlib.scoring.submission_csv import PRIORS
from kitlib.settings import AtLeastOne, NotNegative, Positive, Probability, Settings, from_dict
from kitlib.tables import BOX, check_table, empty_table

FEW_IMAGES = 500  # up to this number of images, merging takes less time than starting processes for it


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
    # IoU above which the less confident of two fused boxes is dropped; 1: none is. Heidelberg's code: 0.1
    final_nms_iou: Probability = 1.0
    # An image's `none` is the mean of those of the following four parts that are available, with these weights:
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
    workers: int = 1,
) -> Fused:
    """Fuse `study_scores`, `image_scores` and `detections` into predictions for all images and studies in `images`.

    None or an empty table means that no model predicts such scores. Studies and images that no model has predicted get the
    class frequencies PRIORS. `coverage` and `workers` are described at `fuse_boxes`.
    """
    studies = fuse_scores(study_scores, "study_scores", settings)
    nones = fuse_scores(image_scores, "image_scores", settings)
    boxes = fuse_boxes(detections, images, settings, coverage, workers)
    has_boxes = seen_images(detections, images, settings, coverage)
    return combine(studies, nones, boxes, has_boxes, images, settings)


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
    workers: int = 1,
) -> pd.DataFrame:
    """Fuse the boxes of all models and folds; return a table: image_id, score, xmin, ymin, xmax and ymax in original pixels.

    Each model and fold has one list of boxes per image. A box that only some of an image's lists contain gets a lower score,
    so the number of lists matters, including empty ones. `coverage` records which detector has predicted which image, so
    that a model that was stopped early does not lower the scores on images it never predicted. Without it, each model counts
    as having predicted every image, with the largest number of folds that it has on any image. A model's folds share its
    weight. A single list is returned unchanged, except for its scores if the model is calibrated. Last, boxes that overlap a
    more confident one are dropped if `final_nms_iou` is below 1.

    Boxes are clipped to the image. More than FEW_IMAGES images are merged in `workers` processes. Raises ValueError for an
    image whose size is unknown or that is not in `images`, and for a score that is NaN.
    """
    boxes = _clip_detections(detections, images)
    boxes = boxes[(boxes["score"] >= settings.box_min_score) & (boxes["score"] > 0)]
    boxes = boxes[boxes["model"].map(settings.weight).astype(float) > 0]
    for name, coefficients in settings.calibration.items():
        is_calibrated = boxes["model"] == name
        boxes.loc[is_calibrated, "score"] = calibrate_scores(boxes.loc[is_calibrated, "score"], *coefficients)
    if boxes.empty:
        return boxes[["image_id", "score", *BOX]].reset_index(drop=True)
    image, image_ids = pd.factorize(boxes["image_id"])
    # A model that predicted no box at all occurs only in the coverage; its empty lists count too.
    names = set(boxes["model"]) | (set() if coverage is None else set(coverage["model"]))
    models = pd.Index(sorted(name for name in names if settings.weight(name)))
    model = models.get_indexer(boxes["model"])
    order = np.lexsort((-boxes["score"], boxes["fold"], model, image))
    boxes, image, model = boxes.iloc[order], image[order], model[order]
    score, corners = boxes["score"].to_numpy(), boxes[list(BOX)].to_numpy()
    size = boxes[["columns", "rows", "columns", "rows"]].to_numpy(dtype=float)
    starts = _run_starts(image, model, boxes["fold"].to_numpy())  # the first row of each list of boxes
    ends = np.append(starts[1:], len(image))
    list_counts = np.zeros((len(image_ids), len(models)), dtype=int)
    np.add.at(list_counts, (image[starts], model[starts]), 1)
    list_totals = np.maximum(list_counts, _count_lists(coverage, image_ids, models, list_counts))
    weight = np.array([settings.weight(name) for name in models])
    options = settings.box_method, settings.box_iou, settings.box_confidence, settings.box_min_score
    images_with_boxes, tasks = [], []
    for first, last in _run_ranges(image[starts]):
        image_index = image[starts[first]]
        if list_totals[image_index].sum() == 1:
            lists, weights = [slice(starts[first], ends[first])], np.ones(1)
        else:
            share = weight / np.maximum(list_totals[image_index], 1)
            lists = [slice(starts[k], min(ends[k], starts[k] + settings.box_limit)) for k in range(first, last)]
            weights = np.concatenate(
                [share[model[starts[first:last]]], np.repeat(share, list_totals[image_index] - list_counts[image_index])]
            )
        images_with_boxes.append((image_index, size[starts[first]]))
        tasks.append(([corners[rows] / size[rows] for rows in lists], [score[rows] for rows in lists], weights, *options))
    merge_count = sum(len(task[2]) > 1 for task in tasks)
    merged = Parallel(workers if merge_count > FEW_IMAGES else 1)(delayed(merge_boxes)(*task) for task in tasks)
    if settings.final_nms_iou < 1:
        merged = [suppress_overlaps(box, score, settings.final_nms_iou) for box, score in merged]
    parts = [box * side for (_, side), (box, _) in zip(images_with_boxes, merged, strict=True)]
    table = pd.DataFrame(np.concatenate(parts), columns=list(BOX))
    image_index = np.repeat([index for index, _ in images_with_boxes], [len(part) for part in parts])
    table.insert(0, "image_id", image_ids.to_numpy(dtype=object)[image_index])
    table.insert(1, "score", np.concatenate([scores for _, scores in merged]))
    return table


def combine(
    study_probabilities: pd.DataFrame,
    none_probabilities: pd.DataFrame,
    boxes: pd.DataFrame,
    seen: np.ndarray,
    images: pd.DataFrame,
    settings: FusionSettings,
) -> Fused:
    """Return fused predictions: compute each image's `none` from its parts, then rescore boxes and `negative` with it.

    `seen` (n,) is a boolean mask of the rows of `images` that a detector has predicted. If all available parts of an image
    have weight 0, its `none` is the first available part in the order of NONE_PARTS. Studies and images without any
    prediction get the class frequencies PRIORS.
    """
    image_ids, study_ids = pd.Index(images["image_id"]), pd.Index(images["study_id"].unique())
    studies = study_probabilities.set_index("study_id").reindex(study_ids)[list(STUDY_CLASSES)]
    study_of_image = study_ids.get_indexer(images["study_id"])
    box_image, score = image_ids.get_indexer(boxes["image_id"]), boxes["score"].to_numpy()
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
    rescored = boxes.assign(score=score * (1 - nones["none"].to_numpy()[box_image]) ** settings.opacity_power)
    return Fused(studies.assign(prior=has_no_score).rename_axis("study_id").reset_index(), nones, rescored)


def seen_images(
    detections: pd.DataFrame | None, images: pd.DataFrame, settings: FusionSettings, coverage: pd.DataFrame | None = None
) -> np.ndarray:
    """Return a boolean mask (n,) of the rows of `images` that at least one detector with a nonzero weight has predicted.

    Without `coverage`, all images count as predicted if such a detector has at least one detection in any image; otherwise
    no image counts.
    """
    detections = empty_table("detections") if detections is None else detections
    predicted = pd.concat([table for table in (detections, coverage) if table is not None])[["image_id", "model"]]
    predicted = predicted[predicted["model"].map(settings.weight).astype(float) > 0]
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


def _clip_detections(detections: pd.DataFrame | None, images: pd.DataFrame) -> pd.DataFrame:
    """Return the detections clipped to their images, with the images' `rows` and `columns`; boxes outside are dropped.

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
    return boxes.assign(rows=sizes[:, 0], columns=sizes[:, 1])[is_inside]


def _count_lists(
    coverage: pd.DataFrame | None, image_ids: pd.Index, models: pd.Index, list_counts: np.ndarray
) -> np.ndarray:
    """Return an int array (images, models): how many lists of boxes, including empty ones, each model has for each image.

    `list_counts` (images, models) counts only the lists that are not empty. If `coverage` is None, a model's number for
    every image is its largest in `list_counts`.
    """
    if coverage is None:
        return np.broadcast_to(list_counts.max(axis=0), list_counts.shape)
    coverage = coverage[["image_id", "model", "fold"]].drop_duplicates()
    image, model = image_ids.get_indexer(coverage["image_id"]), models.get_indexer(coverage["model"])
    is_included = (image >= 0) & (model >= 0)
    lists = np.zeros_like(list_counts)
    np.add.at(lists, (image[is_included], model[is_included]), 1)
    return lists


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


def _run_starts(*keys: np.ndarray) -> np.ndarray:
    """Return the indices at which the combination of the sorted `keys` changes, starting with 0."""
    changed = np.zeros(len(keys[0]), dtype=bool)
    changed[0] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changed)


def _run_ranges(key: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, end) of each run of equal values in the sorted `key`; `end` is the index after the run's last value."""
    starts = _run_starts(key)
    return list(zip(starts, np.append(starts[1:], len(key)), strict=True))
