"""From the predictions of many models and folds to one answer an image and study: pure functions of tables.

Where several formulas are published, all are here and `FusionSettings` chooses; `kitlib.tuning` sets it out of fold.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from ensemble_boxes import non_maximum_weighted, weighted_boxes_fusion
from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float, nms
from joblib import Parallel, delayed

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.geometry import clip_boxes
from kitlib.recipes import RecipeError, from_dict
from kitlib.submission import PRIORS
from kitlib.tables import BOX, check_table, empty_table

BOX_METHODS = ("wbf", "nms", "soft_nms", "nmw")
CONFIDENCES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")
FEW_IMAGES = 500  # so many are merged in less time than further processes take to start


@dataclass(frozen=True)
class FusionSettings:
    """How predictions become one answer. The defaults are the plainest: equal weights, no rescoring."""

    model_weights: dict[str, float] = field(default_factory=dict)  # model -> weight; 1 if not named, 0 leaves it out
    box_method: str = "wbf"  # one of BOX_METHODS, used where two or more lists of boxes meet
    box_iou: float = 0.6  # IoU above which boxes are one (1st and 11th place 0.6, Heidelberg 0.55, 5th 0.625)
    box_min_score: float = 0.001  # boxes below are dropped before fusion; low ones still earn average precision
    box_limit: int = 50  # boxes of each list that are merged, the most confident: time grows with the square
    box_confidence: str = "avg"  # one of CONFIDENCES, of wbf alone
    # none = the mean, with these weights, of the parts below that an image has:
    none_classifier: float = 1.0  # the classifier's own `none`
    none_negative: float = 0.0  # `negative` of the image's study
    none_no_box: float = 0.0  # 1 - the highest box score
    none_product: float = 0.0  # product of 1 - score over the boxes
    opacity_power: float = 0.0  # box scores times (1 - none)^this; 3rd place 0.4, 11th 0.16/0.84
    negative_share: float = 1.0  # negative = share * negative + (1 - share) * mean none of the study; 11th place 0.7

    def __post_init__(self) -> None:
        choices = (("box_method", BOX_METHODS), ("box_confidence", CONFIDENCES))
        for name, valid in choices:
            if getattr(self, name) not in valid:
                raise RecipeError(f"FusionSettings.{name} is one of {', '.join(valid)}, not {getattr(self, name)!r}")
        for name in ("box_iou", "box_min_score", "negative_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"FusionSettings.{name} lies in 0..1, not {getattr(self, name)!r}")
        weights = {name: getattr(self, name) for name in (*NONE_PARTS, "opacity_power")} | self.model_weights
        for name, value in weights.items():
            if not (isinstance(value, int | float) and 0 <= value < np.inf):
                raise RecipeError(f"FusionSettings: the weight of {name} is finite and not negative, not {value!r}")
        if self.box_limit < 1:
            raise RecipeError(f"FusionSettings.box_limit is at least 1, not {self.box_limit}")
        if not any(getattr(self, name) for name in NONE_PARTS):
            raise RecipeError(f"FusionSettings needs a weight above 0 among {', '.join(NONE_PARTS)}")

    def weight(self, model: str) -> float:
        return float(self.model_weights.get(model, 1.0))


NONE_PARTS = ("none_classifier", "none_negative", "none_no_box", "none_product")


@dataclass(frozen=True)
class Fused:
    """One answer for every study and image of the images table; `prior` marks rows that no model has answered.

    `studies`: study_id, the four classes, prior. `nones`: image_id, none, prior. `detections`: image_id, score, box in
    original pixels. After the negative share the four classes need not add to 1.
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
    """Fuse the tables study_scores, image_scores and detections over the images and studies of `images`.

    None or an empty table: no such model; what no model has answered gets PRIORS. `coverage` and `workers` as
    in `fuse_boxes`.
    """
    studies = fuse_scores(study_scores, "study_scores", settings)
    nones = fuse_scores(image_scores, "image_scores", settings)
    boxes = fuse_boxes(detections, images, settings, coverage, workers)
    has_boxes = seen_images(detections, images, settings, coverage)
    return combine(studies, nones, boxes, has_boxes, images, settings)


def fuse_scores(scores: pd.DataFrame | None, table: str, settings: FusionSettings) -> pd.DataFrame:
    """Probabilities of a table study_scores or image_scores: the mean over a model's folds, then over models by weight.

    A model that has not answered for an id, or with NaN, has no weight there. One row an id, without ids that none answered.
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
    """One list of boxes an image from those of every (model, fold): image_id, score, box in original pixels.

    A box that only some of an image's lists have found is scaled down, so it matters how many lists there are, empty ones
    too. The table `coverage` says which detector has seen which image, so that a model that was stopped half-way does not
    lower the scores of images it never saw. Without it, every model has seen every image, with as many folds as it shows
    at most on one image. Each model has its weight, shared by its folds. A single list passes as it is.

    Boxes are cut at the image's edges; `workers` processes share the images, where there are many. Raises ValueError for an
    image whose size is unknown or that is not in `images`.
    """
    boxes = _boxes_inside(detections, images)
    boxes = boxes[(boxes["score"] >= settings.box_min_score) & (boxes["score"] > 0)]
    boxes = boxes[boxes["model"].map(settings.weight).astype(float) > 0]
    if boxes.empty:
        return boxes[["image_id", "score", *BOX]].reset_index(drop=True)
    image, image_ids = pd.factorize(boxes["image_id"])
    # A model that has found nothing anywhere is in the coverage alone, and its lists count too.
    names = set(boxes["model"]) | (set() if coverage is None else set(coverage["model"]))
    models = pd.Index(sorted(name for name in names if settings.weight(name)))
    model = models.get_indexer(boxes["model"])
    order = np.lexsort((-boxes["score"], boxes["fold"], model, image))
    boxes, image, model = boxes.iloc[order], image[order], model[order]
    score, corners = boxes["score"].to_numpy(), boxes[list(BOX)].to_numpy()
    size = boxes[["columns", "rows", "columns", "rows"]].to_numpy(dtype=float)
    starts = _starts(image, model, boxes["fold"].to_numpy())  # of lists
    ends = np.append(starts[1:], len(image))
    found = np.zeros((len(image_ids), len(models)), dtype=int)
    np.add.at(found, (image[starts], model[starts]), 1)
    there = np.maximum(found, _lists_an_image(coverage, image_ids, models, found))
    weight = np.array([settings.weight(name) for name in models])
    images_with_boxes, tasks = [], []
    for first, last in _spans(image[starts]):
        here = image[starts[first]]
        if there[here].sum() == 1:
            lists, weights = [slice(starts[first], ends[first])], np.ones(1)
        else:
            share = weight / np.maximum(there[here], 1)
            lists = [slice(starts[k], min(ends[k], starts[k] + settings.box_limit)) for k in range(first, last)]
            weights = np.concatenate([share[model[starts[first:last]]], np.repeat(share, there[here] - found[here])])
        images_with_boxes.append((here, size[starts[first]]))
        tasks.append(([corners[rows] / size[rows] for rows in lists], [score[rows] for rows in lists], weights, settings))
    meeting = sum(len(task[2]) > 1 for task in tasks)
    merged = Parallel(workers if meeting > FEW_IMAGES else 1)(delayed(merge_boxes)(*task) for task in tasks)
    parts = [box * side for (_, side), (box, _) in zip(images_with_boxes, merged, strict=True)]
    table = pd.DataFrame(np.concatenate(parts), columns=list(BOX))
    here = np.repeat([place for place, _ in images_with_boxes], [len(part) for part in parts])
    table.insert(0, "image_id", image_ids.to_numpy(dtype=object)[here])
    table.insert(1, "score", np.concatenate([scores for _, scores in merged]))
    return table


def merge_boxes(
    boxes: list[np.ndarray], scores: list[np.ndarray], weights: np.ndarray, settings: FusionSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Merge one image's lists of boxes (k, 4) and scores (k,), all in 0..1, by ensemble-boxes into (n, 4) and (n,).

    `weights` has one entry a list; entries beyond them stand for lists that are empty. A single list stays as it is.
    Raises ValueError for what ensemble-boxes would swap, clamp or leave the process for.
    """
    weights = np.asarray(weights, dtype=float)
    if len(boxes) != len(scores) or len(weights) < len(boxes) or not (weights > 0).all():
        raise ValueError(f"{len(boxes)} lists of boxes, {len(scores)} of scores, weights {weights}: want as many, above 0")
    for box, score in zip(boxes, scores, strict=True):
        if box.shape != (len(score), 4):
            raise ValueError(f"boxes {box.shape} and scores {score.shape} do not fit; want (k, 4) and (k,)")
        # A NaN fails every comparison.
        if not ((box >= 0) & (box <= 1)).all() or not (box[:, :2] < box[:, 2:]).all():
            raise ValueError(f"boxes must lie in 0..1 with xmin < xmax and ymin < ymax; got {box.tolist()}")
        if not ((score > 0) & (score <= 1)).all():
            raise ValueError(f"scores must lie in 0..1 and not be 0; got {score.tolist()}")
    if len(weights) == 1:
        return boxes[0], scores[0]
    if not any(len(score) for score in scores):
        return np.empty((0, 4)), np.empty(0)
    empty = len(weights) - len(boxes)
    boxes, scores = [*boxes, *[np.empty((0, 4))] * empty], [*scores, *[np.empty(0)] * empty]
    labels = [np.zeros(len(score)) for score in scores]
    if settings.box_method == "wbf":
        merged, score, _ = weighted_boxes_fusion(
            boxes, scores, labels, weights, iou_thr=settings.box_iou, conf_type=settings.box_confidence
        )
    elif settings.box_method == "nmw":
        merged, score, _ = non_maximum_weighted(boxes, scores, labels, weights, iou_thr=settings.box_iou)
    else:
        # The package divides by the sum of weights, which would shrink the scores by the number of models.
        scores = [score * weight / weights.max() for score, weight in zip(scores, weights, strict=True)]
        if settings.box_method == "nms":
            merged, score, _ = nms(boxes, scores, labels, iou_thr=settings.box_iou)
        else:
            # The package's soft_nms gives scores back undecayed; what it calls sorts and decays them in place.
            merged, score = np.concatenate(boxes), np.concatenate(scores)
            least = settings.box_min_score
            kept = cpu_soft_nms_float(merged, score, Nt=settings.box_iou, sigma=0.5, thresh=least, method=1)
            merged, score = merged[kept], score[score > least]
    # "avg" passes 1 where one list has several boxes in a cluster and more than its share of the weight.
    merged, score = np.clip(merged, 0, 1), np.clip(score, 0, 1)
    whole = (merged[:, :2] < merged[:, 2:]).all(axis=1)
    return merged[whole].astype(float), score[whole].astype(float)


def combine(
    study_probabilities: pd.DataFrame,
    none_probabilities: pd.DataFrame,
    boxes: pd.DataFrame,
    seen: np.ndarray,
    images: pd.DataFrame,
    settings: FusionSettings,
) -> Fused:
    """The rescoring of fused parts: none from its parts, opacity by none, negative by none; priors where nothing is known.

    `seen` (n,) bool: which of `images` a detector has looked at. An image that has none of the parts with a weight takes
    the first of NONE_PARTS that it has.
    """
    image_ids, study_ids = pd.Index(images["image_id"]), pd.Index(images["study_id"].unique())
    studies = study_probabilities.set_index("study_id").reindex(study_ids)[list(STUDY_CLASSES)]
    study_of_image = study_ids.get_indexer(images["study_id"])
    place, score = image_ids.get_indexer(boxes["image_id"]), boxes["score"].to_numpy()
    highest, missed = np.zeros(len(images)), np.ones(len(images))
    np.maximum.at(highest, place, score)
    np.multiply.at(missed, place, 1 - score)
    parts = np.stack(
        [
            none_probabilities.set_index("image_id")["none"].reindex(image_ids).to_numpy(),
            studies["negative"].to_numpy()[study_of_image],
            np.where(seen, 1 - highest, np.nan),
            np.where(seen, missed, np.nan),
        ]
    )
    none = _weighted_none(parts, np.array([getattr(settings, name) for name in NONE_PARTS]))
    of_study = pd.Series(none).groupby(study_of_image).mean().reindex(range(len(study_ids))).to_numpy()
    studies = studies.fillna(PRIORS)
    share = np.where(np.isnan(of_study), 1.0, settings.negative_share)
    prior = ~study_ids.isin(study_probabilities["study_id"])
    studies["negative"] = share * studies["negative"] + (1 - share) * np.nan_to_num(of_study)
    nones = pd.DataFrame({"image_id": image_ids, "none": none, "prior": np.isnan(none)}).fillna({"none": PRIORS["none"]})
    rescored = boxes.assign(score=score * (1 - nones["none"].to_numpy()[place]) ** settings.opacity_power)
    return Fused(studies.assign(prior=prior).rename_axis("study_id").reset_index(), nones, rescored)


def seen_images(
    detections: pd.DataFrame | None, images: pd.DataFrame, settings: FusionSettings, coverage: pd.DataFrame | None = None
) -> np.ndarray:
    """Which of `images` (n,) a detector with a weight has looked at; without `coverage`, all where there are detections."""
    detections = empty_table("detections") if detections is None else detections
    looked = pd.concat([table for table in (detections, coverage) if table is not None])[["image_id", "model"]]
    looked = looked[looked["model"].map(settings.weight).astype(float) > 0]
    if coverage is None:
        return np.full(len(images), len(looked) > 0)
    return images["image_id"].isin(looked["image_id"]).to_numpy()


def write_settings(settings: FusionSettings, path: str | Path) -> None:
    write_json(path, asdict(settings))


def read_settings(path: str | Path) -> FusionSettings:
    """Raises RecipeError for unknown fields and values that make no sense."""
    return from_dict(FusionSettings, json.loads(Path(path).read_text(encoding="utf-8")))


def _boxes_inside(detections: pd.DataFrame | None, images: pd.DataFrame) -> pd.DataFrame:
    """The table detections, cut at the edges of its images, with their `rows` and `columns`."""
    boxes = empty_table("detections") if detections is None else check_table(detections, "detections")
    if boxes["score"].isna().any():
        raise ValueError(f"detections of {boxes.loc[boxes['score'].isna(), 'image_id'].iloc[0]} have no score")
    places = pd.Index(images["image_id"]).get_indexer(boxes["image_id"])
    sizes = images[["rows", "columns"]].to_numpy()[places]
    bad = (places < 0) | (sizes < 1).any(axis=1)
    if bad.any():
        first = boxes.loc[bad, "image_id"].iloc[0]
        raise ValueError(f"image {first} has detections but no size among the images; the cache knows rows and columns")
    clipped, whole = clip_boxes(boxes[list(BOX)].to_numpy(), sizes[:, [0]], sizes[:, [1]])
    boxes[list(BOX)] = clipped
    return boxes.assign(rows=sizes[:, 0], columns=sizes[:, 1])[whole]


def _lists_an_image(coverage: pd.DataFrame | None, image_ids: pd.Index, models: pd.Index, found: np.ndarray) -> np.ndarray:
    """How many lists of boxes (images, models) each model has made of each image, empty ones included."""
    if coverage is None:
        return np.broadcast_to(found.max(axis=0), found.shape)
    coverage = coverage[["image_id", "model", "fold"]].drop_duplicates()
    image, model = image_ids.get_indexer(coverage["image_id"]), models.get_indexer(coverage["model"])
    known = (image >= 0) & (model >= 0)
    lists = np.zeros_like(found)
    np.add.at(lists, (image[known], model[known]), 1)
    return lists


def _weighted_none(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean (n,) over the parts (4, n) that are not NaN; the first that is there where no weighted one is."""
    there = ~np.isnan(parts)
    weight = weights[:, None] * there
    first = parts[there.argmax(axis=0), np.arange(parts.shape[1])]
    total = weight.sum(axis=0)
    mean = np.divide((weight * np.nan_to_num(parts)).sum(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return np.where(total > 0, mean, first)


def _starts(*keys: np.ndarray) -> np.ndarray:
    """Where a new combination of the sorted `keys` begins."""
    changed = np.zeros(len(keys[0]), dtype=bool)
    changed[0] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changed)


def _spans(key: np.ndarray) -> list[tuple[int, int]]:
    """(first, past the last) of each run of equal values."""
    starts = _starts(key)
    return list(zip(starts, np.append(starts[1:], len(key)), strict=True))
