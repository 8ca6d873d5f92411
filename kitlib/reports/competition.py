"""Report tables for SIIM's score and for detection of any findings: confusion, calibration, curves, bootstrap intervals.

Functions that take a `Truth` also take a fusion's tables of predictions: `studies` (study_id, four classes), `nones`
(image_id, none) and `detections` (image_id, score, box in original pixels), as in `kitlib.fusion.model_fusion.Fused`.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from kitlib.classes import ONE_FINDING, SCORED_CLASSES, STUDY_CLASSES
from kitlib.scoring.average_precision import OVERLAP, Ranking, average_precision, precision_recall
from kitlib.scoring.score import SCORE_KEYS, Truth, class_precision, competition_score, table_hits
from kitlib.tables import findings_of


def confusion(truth: Truth, studies: pd.DataFrame) -> pd.DataFrame:
    """Return the confusion matrix (4 x 4): numbers of studies by true class (rows) and most probable class (columns)."""
    probabilities = _in_order(studies, "study_id", truth.labels["id"], list(STUDY_CLASSES))
    actual = truth.labels[list(STUDY_CLASSES)].to_numpy().argmax(axis=1)
    counts = confusion_matrix(actual, probabilities.argmax(axis=1), labels=range(len(STUDY_CLASSES)))
    return pd.DataFrame(counts, index=list(STUDY_CLASSES), columns=list(STUDY_CLASSES))


def class_report(truth: Truth, studies: pd.DataFrame, nones: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Return a table of metrics with one row for each study class and one for `none`.

    The columns are `class`, `positives`, `of` (number of studies or, for the class `none`, of images), `average_precision`,
    `roc_auc`, `brier` (Brier score) and `calibration_error` (expected calibration error, with `bins` equal bins weighted by
    their counts); the last two are for one class against the others. Metrics are NaN if they are undefined, because the
    class is always or never true.
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
    """Return one row per class and probability bin, with the columns class, predicted, observed and count.

    The rows in a bin are studies or, for the class `none`, images. `predicted` is their mean probability, `observed` the
    share for which the class is true, and `count` their number. `bins` is the number of bins, which divide 0..1 equally;
    empty bins are omitted.
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
    """Return a dict with one entry per class that occurs: key `CLASS (AP 0.123)`, value a table of recall and precision.

    Precision is VOC's envelope: at each recall, the highest precision at this or a higher recall.
    """
    of_ids = _answers(truth, studies, nones).items()
    answers = {name: (predicted, positive, positive.sum()) for name, (positive, predicted) in of_ids}
    detections_of_truth = detections[detections["image_id"].isin(truth.image_ids)]
    hits = table_hits(detections_of_truth, "image_id", truth.boxes)
    answers["opacity"] = detections_of_truth["score"].to_numpy(), hits, len(truth.boxes)
    curves: dict[str, pd.DataFrame] = {}
    for name, (score, hit, positives) in answers.items():
        if positives:
            curves |= _curve(name, score, hit, positives)
    return curves


def _curve(name: str, score: np.ndarray, hit: np.ndarray, positives: int) -> dict[str, pd.DataFrame]:
    precision, recall = precision_recall(score, hit, positives)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    title = f"{name} (AP {average_precision(score, hit, positives):.3f})"
    return {title: pd.DataFrame({"recall": [0.0, *recall], "precision": [envelope.max(initial=0.0), *envelope]})}


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
    """Return percentile intervals of SIIM's score and its parts, with the columns name, value, low and high.

    The names are `score`, the six scored classes (their APs, whose mean is the score) and `opacity_boxed` (the AP of opacity
    on images with boxes). Whole patients are drawn with replacement, because images of one patient are not independent.
    `images` has the columns image_id, study_id and patient_id. The score of a draw is the mean of the classes that occur.
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
    """Return a table of SIIM's score and its parts: first a row for all patients, then one row per bootstrap draw.

    The columns are those of SCORE_KEYS (see `bootstrap`). Each draw samples whole patients with replacement. If `studies`,
    `nones` or `detections` is None, the APs of the classes in this table are NaN, and the score is the mean of the other
    APs. All predictions for one truth and seed get the same draws, so the difference of two such tables is a paired
    comparison. Raises ValueError if `images` lacks an image or a study of `truth`.
    """
    patient = images.set_index("image_id")["patient_id"].reindex(list(truth.image_ids))
    patient_of_study = images.drop_duplicates("study_id").set_index("study_id")["patient_id"].reindex(truth.labels["id"])
    unknown = [*patient.index[patient.isna()], *patient_of_study.index[patient_of_study.isna()]]
    if unknown:
        raise ValueError(
            f"{len(unknown)} images or studies of the ground truth are not in the `images` table; the first is {unknown[0]}"
        )
    codes, patients = pd.factorize(patient)
    study_codes = pd.Index(patients).get_indexer(patient_of_study)
    # For each class: its Ranking, the patients of its positives, and the patients of its rows, the highest score first.
    rankings = {}
    for name, (positive, predicted) in _answers(truth, studies, nones).items():
        of_patient, ranking = codes if name == "none" else study_codes, Ranking(predicted, positive)
        rankings[name] = ranking, of_patient[positive], of_patient[ranking.order]
    if detections is not None:
        image = pd.Index(truth.image_ids).get_indexer(detections["image_id"])
        detections, image = detections[image >= 0], image[image >= 0]
        ranking = Ranking(detections["score"], table_hits(detections, "image_id", truth.boxes))
        image = image[ranking.order]
        boxed = codes[pd.Index(truth.image_ids).get_indexer(truth.boxes["image_id"])]
        rankings["opacity"] = ranking, boxed, codes[image]
        on_boxed = (~truth.is_none[image]).astype(float)

    def judge(counts: np.ndarray) -> list[float]:
        precision, boxed_only = dict.fromkeys(SCORED_CLASSES, float("nan")), float("nan")
        for name, (ranking, positives, of_patient) in rankings.items():
            weight, positive_count = counts[of_patient], counts[positives].sum()
            precision[name] = ranking.average_precision(positive_count, weight)
            if name == "opacity":
                boxed_only = ranking.average_precision(positive_count, weight * on_boxed)
        return [competition_score(precision), *(precision[name] for name in SCORED_CLASSES), boxed_only]

    rng, even = np.random.default_rng(seed), np.full(len(patients), 1 / len(patients))
    counts = [np.ones(len(patients)), *(rng.multinomial(len(patients), even) for _ in range(samples))]
    return pd.DataFrame([judge(counts_of_draw) for counts_of_draw in counts], columns=list(SCORE_KEYS))


def _answers(
    truth: Truth, studies: pd.DataFrame | None, nones: pd.DataFrame | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each class two arrays (n,) for n studies: the truth (bool) and the probability.

    For the class `none`, n is the number of images. If `studies` or `nones` is None, its classes are omitted.
    """
    answers = {}
    if studies is not None:
        probabilities = _in_order(studies, "study_id", truth.labels["id"], list(STUDY_CLASSES))
        answers = {
            name: (truth.labels[name].to_numpy() == 1, probabilities[:, index]) for index, name in enumerate(STUDY_CLASSES)
        }
    if nones is not None:
        answers["none"] = truth.is_none, _in_order(nones, "image_id", truth.image_ids, ["none"])[:, 0]
    return answers


def _in_order(table: pd.DataFrame, key: str, ids: pd.Series | tuple[str, ...], columns: list[str]) -> np.ndarray:
    """Return `columns` of the rows with the `key` values `ids`, in this order. Raises ValueError if a value is missing."""
    values = table.set_index(key)[columns].reindex(list(ids))
    if values.isna().any(axis=None):
        missing = values.index[values.isna().any(axis=1)][0]
        raise ValueError(f"{key} {missing} of the ground truth lacks a prediction of {', '.join(map(repr, columns))}")
    return values.to_numpy()


def detection_by_finding(
    boxes: pd.DataFrame, detections: pd.DataFrame, images: pd.DataFrame, overlap: float = OVERLAP
) -> pd.DataFrame:
    """Return detection metrics with one row per finding in `boxes`, and a last row `all findings` (totals and means).

    The columns are `finding`, `images` (number of images with the finding), `boxes` (number of annotated boxes),
    `average_precision` (VOC 2010), `recall`, `precision` and `confidence`. The last three are for the confidence threshold
    with the finding's highest F1, or NaN if it has no detection. Only boxes on images in the column image_id of `images`
    count. A detection is a hit if its IoU with a box of the same finding is above `overlap`. Detections of a finding
    without a box in these images are ignored. The last row has no confidence.
    """
    rows = []
    for name, (score, hit, of_finding, _) in _by_finding(boxes, detections, images, overlap).items():
        precision, recall = precision_recall(score, hit, len(of_finding))
        f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        best = int(f1.argmax()) if len(f1) else None
        thresholds = np.unique(score)[::-1]
        at_best = [float("nan")] * 3 if best is None else [recall[best], precision[best], thresholds[best]]
        counts = of_finding["image_id"].nunique(), len(of_finding)
        rows.append((name, *counts, average_precision(score, hit, len(of_finding)), *at_best))
    columns = ["finding", "images", "boxes", "average_precision", "recall", "precision", "confidence"]
    table = pd.DataFrame(rows, columns=columns)
    of_images = boxes[boxes["image_id"].isin(images["image_id"])]
    whole = {"finding": "all findings", "images": of_images["image_id"].nunique(), "boxes": len(of_images)}
    whole |= {name: table[name].mean() for name in columns[3:6]}
    return pd.concat([table, pd.DataFrame([whole])], ignore_index=True)


def finding_curves(
    boxes: pd.DataFrame, detections: pd.DataFrame, images: pd.DataFrame, overlap: float = OVERLAP
) -> dict[str, pd.DataFrame]:
    """Return a dict with one entry per finding in `boxes`: key `FINDING (AP 0.123)`, value a table of recall and precision.

    Precision is VOC's envelope: at each recall, the highest precision at this or a higher recall. The arguments are those of
    `detection_by_finding`.
    """
    curves: dict[str, pd.DataFrame] = {}
    for name, (score, hit, of_finding, _) in _by_finding(boxes, detections, images, overlap).items():
        curves |= _curve(name, score, hit, len(of_finding))
    return curves


def detection_draws(
    detections: pd.DataFrame,
    coverage: pd.DataFrame,
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    samples: int = 500,
    seed: int = 0,
    overlap: float = OVERLAP,
) -> np.ndarray:
    """Return the mean AP (VOC 2010, averaged over findings) on the images in `coverage`, and its bootstrap draws.

    The result is an array (1 + samples,): first the mean AP for all patients, then that of each draw. Whole patients are
    drawn with replacement; a finding that does not occur in a draw is left out of the mean of that draw. Two detectors with
    the same images and seed get the same draws, so the difference of their arrays is a paired comparison. Folds are pooled,
    so the scores of a model must be comparable across folds. Raises ValueError if an image in `coverage` is not in `images`
    or occurs twice.
    """
    image_ids = coverage["image_id"]
    if image_ids.duplicated().any():
        repeated_id = image_ids[image_ids.duplicated()].iloc[0]
        raise ValueError(f"image {repeated_id} occurs twice in the coverage; pass the out-of-fold coverage of one detector")
    patient = images.set_index("image_id")["patient_id"].reindex(sorted(image_ids))
    if patient.isna().any():
        raise ValueError(f"image {patient.index[patient.isna()][0]} of the coverage is not in the `images` table")
    codes, patients = pd.factorize(patient)
    # For each finding: its Ranking, the patients of its boxes, and those of its detections, the highest score first.
    rankings = []
    for score, hit, of_finding, found in _by_finding(boxes, detections, coverage, overlap).values():
        ranking = Ranking(score, hit)
        boxed, detected = (codes[patient.index.get_indexer(table["image_id"])] for table in (of_finding, found))
        rankings.append((ranking, boxed, detected[ranking.order]))
    rng = np.random.default_rng(seed)
    even = np.full(len(patients), 1 / len(patients))
    draws = [np.ones(len(patients)), *(rng.multinomial(len(patients), even) for _ in range(samples))]
    precisions = [
        [ranking.average_precision(counts[boxed].sum(), counts[detected]) for counts in draws]
        for ranking, boxed, detected in rankings
    ]
    return pd.DataFrame(precisions, columns=range(len(draws))).mean().to_numpy(float)  # NaN if there is no finding at all


def _by_finding(
    boxes: pd.DataFrame, detections: pd.DataFrame, images: pd.DataFrame, overlap: float
) -> dict[str, tuple[np.ndarray, np.ndarray, pd.DataFrame, pd.DataFrame]]:
    """Return a dict whose keys are the findings that have at least one box; a value is (scores, hits, boxes, detections).

    Only boxes and detections on the images in the table `images` count. Scores and hits are arrays (n,) with one entry per
    detection of the finding; a hit is a detection that matches a box with an IoU above `overlap`.
    """
    of_images = [
        table[table["image_id"].isin(images["image_id"])].assign(finding=lambda rows: rows.get("finding", ONE_FINDING))
        for table in (boxes, detections)
    ]
    found = {}
    for name in findings_of(of_images[0]):
        true, predicted = (table[table["finding"] == name] for table in of_images)
        found[name] = predicted["score"].to_numpy(float), table_hits(predicted, "image_id", true, overlap), true, predicted
    return found


def interval(draws: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Return a dict with value, low and high: the first element of `draws`, and a percentile interval of the others.

    `draws` is an array that `detection_draws` returned, or the difference of two such arrays.
    """
    low, high = np.nanquantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}
