"""Metrics of findings classifiers: a table with one row per class, thresholds, and bootstrap intervals of the mean ROC AUC.

The functions take a `class_scores` table with one row per image, as `mean_over_folds` returns it, and the `images` and
`labels` tables. Unknown labels (NaN) are ignored. A threshold is never chosen on the images that it is evaluated on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from kitlib.scoring.metrics import dense_ranks, roc_auc, roc_auc_of_ranks
from kitlib.tables import check_table, class_columns

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Answers:
    """True labels and predicted probabilities of n images, both (n, classes).

    `truth` is NaN if unknown, 1 for labels of at least 0.5, and 0 otherwise.
    """

    classes: tuple[str, ...]
    truth: np.ndarray
    probabilities: np.ndarray
    fold: np.ndarray  # (n,), fold of the model that predicted the image
    patient: np.ndarray  # (n,)

    def rows(self, chosen: np.ndarray) -> "Answers":
        """Return the images selected by a boolean mask (n,) or by indices, in that order."""
        truth, probabilities = self.truth[chosen], self.probabilities[chosen]
        return Answers(self.classes, truth, probabilities, self.fold[chosen], self.patient[chosen])


def answers(scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> Answers:
    """Match the rows of `scores` (a `class_scores` table) with their true labels.

    Raises ValueError if an image has several rows, no label or a score that is NaN, or if the labels lack a class.
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
    """Return one row per image with the mean over the models that predicted it; `model` and `fold` are the first model's."""
    scores = check_table(scores, "class_scores")
    grouped = scores.groupby("image_id", sort=False, as_index=False)
    classes = class_columns(scores, "class_scores")
    return grouped.agg({"model": "first", "fold": "first", **dict.fromkeys(classes, "mean")})


def best_thresholds(predictions: Answers) -> np.ndarray:
    """Return the threshold with the highest F1 on these images for each class, shape (classes,).

    An image is called positive if its probability is at least the threshold. A class without positives gets a threshold of
    0.5.
    """
    thresholds = np.full(len(predictions.classes), DEFAULT_THRESHOLD)
    for index, (truth, scores) in enumerate(_known_labels(predictions)):
        if truth.any():
            precision, recall, steps = precision_recall_curve(truth, scores)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            thresholds[index] = steps[f1[:-1].argmax()]
    return thresholds


def cross_fitted_thresholds(predictions: Answers, seed: int = 0) -> np.ndarray:
    """Return a threshold for each image and class (n, classes), chosen by `best_thresholds` on the other folds.

    If there is only one fold, its patients are split into two random halves, and each half gets the thresholds of the other.
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
    """Return one row per class with its ROC AUC, average precision, and precision, recall and F1 at the thresholds.

    The columns are class, positives, of (number of images with a known label), roc_auc, average_precision, threshold,
    precision, recall and f1. `thresholds` is (n, classes) or (classes,), for example from `cross_fitted_thresholds`; the
    `threshold` column is the mean over images. ROC AUC is NaN without positives or negatives, the other metrics are NaN
    without positives. Precision is 0 if nothing is predicted positive.
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


def precision_recall_f1(truth: np.ndarray, called: np.ndarray) -> tuple[float, float, float]:
    """Compute precision, recall and F1 from the truth and the predictions `called`, both bool (n,).

    All three are NaN without positives. Precision is 0 if nothing is predicted positive.
    """
    positives, calls, hits = truth.sum(), called.sum(), (truth & called).sum()
    if not positives:
        return (float("nan"),) * 3
    return float(hits / max(calls, 1)), float(hits / positives), float(2 * hits / (positives + calls))


def bootstrap_auc(predictions: Answers, samples: int = 200, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Return percentile intervals of the mean ROC AUC and of each class's: name, value, low and high.

    Whole patients are drawn with replacement. A class without positives or negatives in a sample is left out of the sample's
    mean.
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
    """Return the mean ROC AUC and each class's as columns: in the first row for all patients, then one row per draw.

    Predictions for the same patients with one seed get the same draws, so the difference of two tables is a paired
    comparison.
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
    """Return the ROC curve of each class, keyed by a title such as `class (AUC 0.123)`, the largest area first.

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
    """Compute each row's entropy in bits, summed over classes; it is 0 if every probability is 0 or 1."""
    probability = scores[class_columns(scores, "class_scores")].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        present, absent = (np.where(share > 0, -share * np.log2(share), 0) for share in (probability, 1 - probability))
    return pd.Series((present + absent).sum(axis=1), index=scores.index, name="uncertainty")


def _known_labels(predictions: Answers) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield the truth (bool) and the probability of the images with a known label, class by class."""
    for truth, scores in zip(predictions.truth.T, predictions.probabilities.T, strict=True):
        is_known = ~np.isnan(truth)
        yield truth[is_known] == 1, scores[is_known]
