"""From the predictions of many models and folds to one answer an image and study: pure functions of tables.

Where several formulas are published, all are here and `FusionSettings` chooses; `kitlib.fusion.tuning` sets it out of fold.
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
from kitlib.fusion.box_fusion import Confidence, Method, calibrated, merge_boxes
from kitlib.letterbox import clip_boxes
from kitlib.scoring.submission_csv import PRIORS
from kitlib.settings import AtLeastOne, NotNegative, Positive, Probability, Settings, from_dict
from kitlib.tables import BOX, check_table, empty_table

FEW_IMAGES = 500  # so many are merged in less time than further processes take to start


@dataclass(frozen=True)
class FusionSettings(Settings):
    """How predictions become one answer. The defaults are the plainest: equal weights, no rescoring."""

    model_weights: dict[str, NotNegative] = field(default_factory=dict)  # model -> weight; 1 if not named, 0 leaves it out
    # detector -> slope and offset that make its scores probabilities, see kitlib.fusion.box_fusion; as they are if not named
    calibration: dict[str, tuple[Positive, float]] = field(default_factory=dict)
    box_method: Method = "wbf"  # used where two or more lists of boxes meet
    box_iou: Probability = 0.6  # IoU above which boxes are one (1st and 11th place 0.6, Heidelberg 0.55, 5th 0.625)
    box_min_score: Probability = 0.001  # boxes below are dropped before fusion; low ones still earn average precision
    box_limit: AtLeastOne = 50  # boxes merged per list, the most confident; time grows with its square
    box_confidence: Confidence = "avg"  # of wbf alone
    # none = the mean, with these weights, of the parts below that an image has:
    none_classifier: NotNegative = 1.0  # the classifier's own `none`
    none_negative: NotNegative = 0.0  # `negative` of the image's study
    none_no_box: NotNegative = 0.0  # 1 - the highest box score
    none_product: NotNegative = 0.0  # product of 1 - score over the boxes
    opacity_power: NotNegative = 0.0  # box scores times (1 - none)^this; 3rd place 0.4, 11th 0.16/0.84
    negative_share: Probability = 1.0  # negative = share * negative + (1 - share) * mean none of the study; 11th place 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in NONE_PARTS):
            raise SettingsError(f"FusionSettings needs a weight above 0 among {', '.join(NONE_PARTS)}")

    def weight(self, model: str) -> float:
        return float(self.model_weights.get(model, 1.0))


NONE_PARTS = ("none_classifier", "none_negative", "none_no_box", "none_product")


@dataclass(frozen=True)
class Fused:
    """One answer for every study and image of the images table; `prior` marks rows that no model has answered.

    `studies`: study_id, the four classes, prior. `nones`: image_id, none, prior, and `seen`: a detector with a weight has
    looked at the image. `detections`: image_id, score, box in original pixels. After the negative share the four classes
    need not add to 1.
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
    at most on one image. Each model has its weight, shared by its folds. A single list passes as it is, but for its scores
    where the model is calibrated.

    Boxes are cut at the image's edges; `workers` processes share the images, where there are many. Raises ValueError for an
    image whose size is unknown or that is not in `images`.
    """
    boxes = _boxes_inside(detections, images)
    boxes = boxes[(boxes["score"] >= settings.box_min_score) & (boxes["score"] > 0)]
    boxes = boxes[boxes["model"].map(settings.weight).astype(float) > 0]
    for name, line in settings.calibration.items():
        own = boxes["model"] == name
        boxes.loc[own, "score"] = calibrated(boxes.loc[own, "score"], *line)
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
    way = settings.box_method, settings.box_iou, settings.box_confidence, settings.box_min_score
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
        tasks.append(([corners[rows] / size[rows] for rows in lists], [score[rows] for rows in lists], weights, *way))
    meeting = sum(len(task[2]) > 1 for task in tasks)
    merged = Parallel(workers if meeting > FEW_IMAGES else 1)(delayed(merge_boxes)(*task) for task in tasks)
    parts = [box * side for (_, side), (box, _) in zip(images_with_boxes, merged, strict=True)]
    table = pd.DataFrame(np.concatenate(parts), columns=list(BOX))
    here = np.repeat([place for place, _ in images_with_boxes], [len(part) for part in parts])
    table.insert(0, "image_id", image_ids.to_numpy(dtype=object)[here])
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
    nones = pd.DataFrame({"image_id": image_ids, "none": none, "prior": np.isnan(none), "seen": seen})
    nones = nones.fillna({"none": PRIORS["none"]})
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
    """Raises SettingsError for unknown fields and values that make no sense."""
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
