"""Metrics of findings classifiers: a table with one row per class, thresholds, and bootstrap intervals of the mean ROC AUC.

The functions take a `class_scores` table with one row per image, as `mean_over_folds` returns it, and the `images` and
`labels` tables. Unknown labels (NaN) are ignored. A threshold is never chosen on the images that it is evaluated on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from kitlib.scoring.metrics import DEFAULT_THRESHOLD, dense_ranks, precision_recall_f1, roc_auc, roc_auc_of_ranks
from kitlib.tables import check_table, class_columns


@dataclass(frozen=True)
class Answers:
    """True labels and predicted probabilities of n images, both as arrays (n, classes).

    `truth` is NaN where the label is unknown, 1 where it is at least 0.5, and 0 otherwise.
    """

    classes: tuple[str, ...]
    truth: np.ndarray
    probabilities: np.ndarray
    fold: np.ndarray  # (n,), fold of the model that predicted the image
    patient: np.ndarray  # (n,)

    def rows(self, chosen: np.ndarray) -> "Answers":
        """Return the answers for only some images, `chosen` by a bool array (n,) or by indices in the required order."""
        truth, probabilities = self.truth[chosen], self.probabilities[chosen]
        return Answers(self.classes, truth, probabilities, self.fold[chosen], self.patient[chosen])


def answers(scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> Answers:
    """Return the predictions in `scores` (a `class_scores` table), matched with the true labels of each image.

    Raises ValueError if an image has several rows, has no label, or has a score that is NaN, or if `labels` lacks a class.
    """
    scores, labels = check_table(scores, "class_scores"), check_table(labels, "labels")
    classes = class_columns(scores, "class_scores")
    repeated = scores.image_id[scores.image_id.duplicated()]
    if len(repeated):
        raise ValueError(
            f"{repeated.nunique()} images have several rows of scores; the first is {repeated.iloc[0]}. Average the rows "
            "with mean_over_folds"
        )
    missing = [name for name in classes if name not in labels.columns]
    if missing:
        raise ValueError(f"labels lack the predicted classes {missing}; they have: {class_columns(labels, 'labels')}")
    image_rows = images.set_index("image_id").reindex(scores.image_id)
    unlabelled = image_rows.index[image_rows.study_id.isna() | ~image_rows.study_id.isin(labels["id"])]
    if len(unlabelled):
        raise ValueError(
            f"{len(unlabelled)} predicted images are not in the `images` table or have no label; the first is "
            f"{unlabelled[0]}"
        )
    truth = labels.set_index("id").loc[image_rows.study_id, classes].to_numpy(float)
    truth = np.where(np.isnan(truth), np.nan, truth >= 0.5)
    probabilities = scores[classes].to_numpy(float)
    if np.isnan(probabilities).any():
        raise ValueError(f"image {scores.image_id[np.isnan(probabilities).any(axis=1)].iloc[0]} has a score that is NaN")
    return Answers(tuple(classes), truth, probabilities, scores.fold.to_numpy(), image_rows.patient_id.to_numpy())


def mean_over_folds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per image, with the mean scores of the models that predicted it.

    The columns `model` and `fold` are those of the first of these models.
    """
    scores = check_table(scores, "class_scores")
    grouped = scores.groupby("image_id", sort=False, as_index=False)
    classes = class_columns(scores, "class_scores")
    return grouped.agg({"model": "first", "fold": "first", **dict.fromkeys(classes, "mean")})


def best_thresholds(predictions: Answers) -> np.ndarray:
    """Return an array (classes,): for each class, the threshold with the highest F1 on these images.

    A class is predicted for an image if its probability is at least the threshold. If no image has the class, the threshold
    is 0.5.
    """
    thresholds = np.full(len(predictions.classes), DEFAULT_THRESHOLD)
    for index, (truth, scores) in enumerate(_known_labels(predictions)):
        if truth.any():
            precision, recall, steps = precision_recall_curve(truth, scores)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            thresholds[index] = steps[f1[:-1].argmax()]
    return thresholds


def cross_fitted_thresholds(predictions: Answers, seed: int = 0) -> np.ndarray:
    """Return an array (n, classes): each image's thresholds, chosen by `best_thresholds` on the folds without the image.

    If there is only one fold, its patients are split into two random halves, and each half gets the thresholds that were
    chosen on the other half.
    """
    part = predictions.fold
    if len(np.unique(part)) < 2:
        patients, codes = np.unique(predictions.patient, return_inverse=True)
        part = np.random.default_rng(seed).permutation(np.arange(len(patients)) % 2)[codes]
    thresholds = np.full(predictions.probabilities.shape, DEFAULT_THRESHOLD)
    for value in np.unique(part):
        thresholds[part == value] = best_thresholds(predictions.rows(part != value))
    return thresholds


def class_report(predictions: Answers, thresholds: np.ndarray) -> pd.DataFrame:
    """Return one row per class, with ROC AUC, average precision, and precision, recall and F1 at `thresholds`.

    The columns are `class`, `positives` (number of images with the class), `of` (number with a known label), `roc_auc`,
    `average_precision`, `threshold`, `precision`, `recall` and `f1`. `thresholds` is an array (classes,), or (n, classes) as
    from `cross_fitted_thresholds`; the column `threshold` is the mean over images. For a class that no image has, all
    metrics are NaN; for a class that all images have, ROC AUC is NaN. Precision is 0 if the class is never predicted.
    """
    thresholds = np.broadcast_to(thresholds, predictions.probabilities.shape)
    rows = []
    for index, (truth, scores) in enumerate(_known_labels(predictions)):
        threshold = thresholds[~np.isnan(predictions.truth[:, index]), index]
        positives = int(truth.sum())
        precision, recall, f1 = precision_recall_f1(truth, scores >= threshold)
        rows.append(
            {
                "class": predictions.classes[index],
                "positives": positives,
                "of": len(truth),
                "roc_auc": roc_auc(scores, truth) if len(truth) else float("nan"),
                "average_precision": average_precision_score(truth, scores) if positives else float("nan"),
                "threshold": float(threshold.mean()) if len(threshold) else float("nan"),
                "precision": precision,
                "recall": recall,
                "f1": f1,
            }
        )
    return pd.DataFrame(rows)


def bootstrap_auc(predictions: Answers, samples: int = 200, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Return bootstrap intervals of each class's ROC AUC and of the classes' mean: columns `name`, `value`, `low`, `high`.

    Whole patients are drawn with replacement; the intervals are percentiles. If all or none of the images in a sample have a
    class, the sample's mean is over the other classes.
    """
    draws = auc_draws(predictions, samples, seed)
    # A class that is undefined in all samples keeps NaN, because np.nanquantile would warn about it.
    bounds = np.full((2, draws.shape[1]), np.nan)
    defined = np.isfinite(draws.iloc[1:]).any(axis=0).to_numpy()
    if defined.any():
        bounds[:, defined] = np.nanquantile(draws.iloc[1:, defined], [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = draws.iloc[0].to_numpy()
    return pd.DataFrame({"name": draws.columns, "value": value, "low": bounds[0], "high": bounds[1]})


def auc_draws(predictions: Answers, samples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Return a table of bootstrap samples: the columns are the mean ROC AUC (`mean`) and the ROC AUC of each class.

    The first row is for all patients, each further row for patients drawn with replacement. With equal patients and seeds,
    the samples of two models have the same patients, so the difference of two tables is a paired comparison.
    """
    patients, codes = np.unique(predictions.patient, return_inverse=True)
    is_known = [~np.isnan(column) for column in predictions.truth.T]
    ranks = [dense_ranks(scores[mask]) for scores, mask in zip(predictions.probabilities.T, is_known, strict=True)]
    truths = [truth[mask] == 1 for truth, mask in zip(predictions.truth.T, is_known, strict=True)]

    def judge(counts: np.ndarray) -> list[float]:
        weight = counts[codes]
        aucs = [
            roc_auc_of_ranks(rank, truth, weight[mask]) if len(rank) else float("nan")
            for rank, truth, mask in zip(ranks, truths, is_known, strict=True)
        ]
        finite = [auc for auc in aucs if np.isfinite(auc)]
        return [float(np.mean(finite)) if finite else float("nan"), *aucs]

    rng, share = np.random.default_rng(seed), np.full(len(patients), 1 / len(patients))
    counts = [np.ones(len(patients)), *(rng.multinomial(len(patients), share).astype(float) for _ in range(samples))]
    return pd.DataFrame([judge(draw) for draw in counts], columns=["mean", *predictions.classes])


def roc_curves(predictions: Answers) -> dict[str, pd.DataFrame]:
    """Return the ROC curve of each class as a table, keyed by titles such as `class (AUC 0.123)`, the largest AUC first.

    The columns are false_positives and recall (rates, 0..1). Classes without positives or without negatives are omitted.
    """
    curves = {}
    for name, (truth, scores) in zip(predictions.classes, _known_labels(predictions), strict=True):
        if truth.any() and not truth.all():
            area = roc_auc(scores, truth)
            false_positives, recall, _ = roc_curve(truth, scores)
            title = f"{name} (AUC {area:.3f})"
            curves[title] = (area, pd.DataFrame({"false_positives": false_positives, "recall": recall}))
    return {title: curve for title, (_, curve) in sorted(curves.items(), key=lambda item: -item[1][0])}


def uncertainty(scores: pd.DataFrame) -> pd.Series:
    """Return the entropy of each row of `scores` in bits, summed over classes; it is 0 if every probability is 0 or 1."""
    probability = scores[class_columns(scores, "class_scores")].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        present, absent = (np.where(share > 0, -share * np.log2(share), 0) for share in (probability, 1 - probability))
    return pd.Series((present + absent).sum(axis=1), index=scores.index, name="uncertainty")


def _known_labels(predictions: Answers) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield two arrays per class: the truth (bool) and the probability of the images whose label is known."""
    for truth, scores in zip(predictions.truth.T, predictions.probabilities.T, strict=True):
        is_known = ~np.isnan(truth)
        yield truth[is_known] == 1, scores[is_known]
