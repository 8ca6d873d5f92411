"""What a report shows beside the score: confusion, calibration, curves, and how sure the score or one detector's AP is.

Functions with a `Truth` take fused tables: `studies` (study_id, four classes), `nones` (image_id, none), `detections`
(image_id, score, box in original pixels), as `kitlib.fusion.model_fusion.Fused` has them.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from kitlib.classes import SCORED_CLASSES, STUDY_CLASSES
from kitlib.scoring.average_precision import average_precision, precision_recall
from kitlib.scoring.score import SCORE_KEYS, Truth, class_precision, competition_score, table_hits


def confusion(truth: Truth, studies: pd.DataFrame) -> pd.DataFrame:
    """Counts of studies (4 x 4): rows are the true class, columns the most probable one."""
    probabilities = _in_order(studies, "study_id", truth.labels["id"], list(STUDY_CLASSES))
    actual = truth.labels[list(STUDY_CLASSES)].to_numpy().argmax(axis=1)
    counts = confusion_matrix(actual, probabilities.argmax(axis=1), labels=range(len(STUDY_CLASSES)))
    return pd.DataFrame(counts, index=list(STUDY_CLASSES), columns=list(STUDY_CLASSES))


def class_report(truth: Truth, studies: pd.DataFrame, nones: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """A row for each study class and `none`: positives, of, average_precision, roc_auc, brier, calibration_error.

    Brier score and expected calibration error (equal bins, weighted by their counts) are of the one class against the rest;
    a class that is absent, or all there is, has NaN for what is not defined then.
    """
    calibration = reliability(truth, studies, nones, bins)
    rows = []
    for name, (positive, predicted) in _answers(truth, studies, nones).items():
        of_class = calibration[calibration["class"] == name]
        gap = (of_class["observed"] - of_class["predicted"]).abs()
        rows.append(
            {
                "class": name,
                "positives": int(positive.sum()),
                "of": len(positive),
                "average_precision": class_precision(predicted, positive),
                "roc_auc": roc_auc_score(positive, predicted) if 0 < positive.sum() < len(positive) else float("nan"),
                "brier": brier_score_loss(positive, predicted),
                "calibration_error": np.average(gap, weights=of_class["count"]),
            }
        )
    return pd.DataFrame(rows)


def reliability(truth: Truth, studies: pd.DataFrame, nones: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """How often a class is true where it was given a probability: class, predicted (mean), observed (share), count.

    `bins` of equal width over 0..1, the empty ones left out; study classes count studies, `none` counts images.
    """
    tables = []
    for name, (positive, predicted) in _answers(truth, studies, nones).items():
        table = pd.DataFrame({"predicted": predicted, "observed": positive.astype(float)})
        grouped = table.groupby(np.minimum((predicted * bins).astype(int), bins - 1))
        tables.append(grouped.mean().assign(count=grouped.size()).assign(**{"class": name}))
    return pd.concat(tables, ignore_index=True)[["class", "predicted", "observed", "count"]]


def precision_recall_curves(
    truth: Truth, studies: pd.DataFrame, nones: pd.DataFrame, detections: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Columns recall and precision (VOC's envelope) for each class of the truth, by `class (AP 0.123)`."""
    of_ids = _answers(truth, studies, nones).items()
    answers = {name: (predicted, positive, positive.sum()) for name, (positive, predicted) in of_ids}
    known = detections[detections["image_id"].isin(truth.image_ids)]
    hits = table_hits(known, "image_id", truth.boxes)
    answers["opacity"] = known["score"].to_numpy(), hits, len(truth.boxes)
    curves = {}
    for name, (score, hit, positives) in answers.items():
        if positives:
            precision, recall = precision_recall(score, hit, positives)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            title = f"{name} (AP {average_precision(score, hit, positives):.3f})"
            curves[title] = pd.DataFrame({"recall": [0.0, *recall], "precision": [*envelope[:1], *envelope]})
    return curves


def bootstrap(
    truth: Truth,
    studies: pd.DataFrame,
    nones: pd.DataFrame,
    detections: pd.DataFrame,
    images: pd.DataFrame,
    samples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The score, the six APs and opacity_boxed, each with low and high of the percentile interval: name, value, low, high.

    Whole patients are drawn with replacement (`images` has image_id, study_id, patient_id), since images of one patient are
    no independent evidence. A sample without a class leaves it out of that sample's mean.
    """
    draws = score_draws(truth, studies, nones, detections, images, samples, seed)
    low, high = np.nanquantile(draws.iloc[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"name": SCORE_KEYS, "value": draws.iloc[0].to_numpy(), "low": low, "high": high})


def score_draws(
    truth: Truth,
    studies: pd.DataFrame | None,
    nones: pd.DataFrame | None,
    detections: pd.DataFrame | None,
    images: pd.DataFrame,
    samples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """SCORE_KEYS as columns; the first row is of all patients, then one for each of the bootstrap's draws, see `bootstrap`.

    None: not answered, so NaN, and the score is the mean of what is. Answers for one truth and seed get the same draws: the
    difference of their tables is a paired comparison.
    """
    patient = images.set_index("image_id")["patient_id"].reindex(list(truth.image_ids))
    patient_of_study = images.drop_duplicates("study_id").set_index("study_id")["patient_id"].reindex(truth.labels["id"])
    unknown = [*patient.index[patient.isna()], *patient_of_study.index[patient_of_study.isna()]]
    if unknown:
        raise ValueError(f"{len(unknown)} images or studies of the truth are not in the images table, first {unknown[0]}")
    codes, patients = pd.factorize(patient)
    study_codes = pd.Index(patients).get_indexer(patient_of_study)
    places = pd.Index(truth.image_ids)
    boxed = codes[places.get_indexer(truth.boxes["image_id"])]
    answers = _answers(truth, studies, nones)
    if detections is not None:
        known = detections[detections["image_id"].isin(places)].sort_values("score", ascending=False)
        hits, found = table_hits(known, "image_id", truth.boxes), codes[places.get_indexer(known["image_id"])]
        on_boxed = known["image_id"].isin(truth.boxes["image_id"]).to_numpy()
        scores = known["score"].to_numpy()

    def judge(times: np.ndarray) -> list[float]:
        precision = dict.fromkeys(SCORED_CLASSES, float("nan")) | {
            name: class_precision(predicted, positive, times[codes if name == "none" else study_codes])
            for name, (positive, predicted) in answers.items()
        }
        alone = float("nan")
        if detections is not None:
            positives, weight = times[boxed].sum(), times[found]
            precision["opacity"] = average_precision(scores, hits, positives, weight)
            alone = average_precision(scores[on_boxed], hits[on_boxed], positives, weight[on_boxed])
        return [competition_score(precision), *(precision[name] for name in SCORED_CLASSES), alone]

    rng, even = np.random.default_rng(seed), np.full(len(patients), 1 / len(patients))
    times = [np.ones(len(patients)), *(rng.multinomial(len(patients), even) for _ in range(samples))]
    return pd.DataFrame([judge(each) for each in times], columns=list(SCORE_KEYS))


def _answers(
    truth: Truth, studies: pd.DataFrame | None, nones: pd.DataFrame | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Class -> whether it is true (n,) bool and its probability (n,), of studies, and of images for `none`, where given."""
    answers = {}
    if studies is not None:
        probabilities = _in_order(studies, "study_id", truth.labels["id"], list(STUDY_CLASSES))
        answers = {
            name: (truth.labels[name].to_numpy() == 1, probabilities[:, place]) for place, name in enumerate(STUDY_CLASSES)
        }
    if nones is not None:
        answers["none"] = truth.is_none, _in_order(nones, "image_id", truth.image_ids, ["none"])[:, 0]
    return answers


def _in_order(table: pd.DataFrame, key: str, ids: pd.Series | tuple[str, ...], columns: list[str]) -> np.ndarray:
    values = table.set_index(key)[columns].reindex(list(ids))
    if values.isna().any(axis=None):
        raise ValueError(f"{key} {values.index[values.isna().any(axis=1)][0]} of the truth has no {', '.join(columns)}")
    return values.to_numpy()


def detection_draws(
    detections: pd.DataFrame,
    coverage: pd.DataFrame,
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    samples: int = 500,
    seed: int = 0,
) -> np.ndarray:
    """Opacity AP (VOC 2010) of the images in `coverage`, (1 + samples,): of all patients, then of the bootstrap's draws.

    Whole patients are drawn with replacement. Two detectors over the same images and seed get the same draws, so the
    difference of their arrays is a paired comparison. Folds are pooled: a model's scores must mean the same in each.
    Raises ValueError where an image of `coverage` is not in `images`, or has been looked at twice.
    """
    looked = coverage["image_id"]
    if looked.duplicated().any():
        raise ValueError(f"image {looked[looked.duplicated()].iloc[0]} was looked at twice; give one detector's folds")
    patient = images.set_index("image_id")["patient_id"].reindex(sorted(looked))
    if patient.isna().any():
        raise ValueError(f"image {patient.index[patient.isna()][0]} of the coverage is not in the table images")
    codes, patients = pd.factorize(patient)
    known = detections[detections["image_id"].isin(looked)]
    true = boxes[boxes["image_id"].isin(looked)]
    hits, score = table_hits(known, "image_id", true), known["score"].to_numpy()
    found, boxed = (codes[patient.index.get_indexer(table["image_id"])] for table in (known, true))
    rng = np.random.default_rng(seed)
    even = np.full(len(patients), 1 / len(patients))
    draws = [np.ones(len(patients)), *(rng.multinomial(len(patients), even) for _ in range(samples))]
    return np.array([average_precision(score, hits, times[boxed].sum(), times[found]) for times in draws])


def interval(draws: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """value, low and high of an array of `detection_draws`, or of the difference of two: the percentile interval."""
    low, high = np.nanquantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}
