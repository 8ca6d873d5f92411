"""How well findings are told: figures a class, and how sure the mean ROC AUC is.

The functions take a table `class_scores` with one row an image, as `mean_over_folds` makes one, and the tables images and
labels. What is unknown (NaN) of an image counts for nothing. A threshold is never chosen on the images that it judges.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from kitlib.scoring.metrics import dense_ranks, roc_auc, roc_auc_of_ranks
from kitlib.tables import check_table, class_columns

PLAIN_THRESHOLD = 0.5


@dataclass(frozen=True)
class Answers:
    """Truth and probabilities of n images, both (n, classes); truth is NaN where unknown, and 1 from one half upwards."""

    classes: tuple[str, ...]
    truth: np.ndarray
    found: np.ndarray
    fold: np.ndarray  # (n,), whose model answered
    patient: np.ndarray  # (n,)


def answers(scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> Answers:
    """The rows of `scores` beside their truth. Raises ValueError for images with several rows, and what is not known."""
    scores, labels = check_table(scores, "class_scores"), check_table(labels, "labels")
    classes = class_columns(scores, "class_scores")
    twice = scores.image_id[scores.image_id.duplicated()]
    if len(twice):
        raise ValueError(
            f"{twice.nunique()} images have several rows of scores, first {twice.iloc[0]}; mean_over_folds makes one of them"
        )
    strangers = [name for name in classes if name not in labels.columns]
    if strangers:
        raise ValueError(f"labels lack the scored classes {strangers}; they have: {class_columns(labels, 'labels')}")
    known = images.set_index("image_id").reindex(scores.image_id)
    unknown = known.index[known.study_id.isna() | ~known.study_id.isin(labels["id"])]
    if len(unknown):
        raise ValueError(f"{len(unknown)} scored images are not in images or have no label, first {unknown[0]}")
    truth = labels.set_index("id").loc[known.study_id, classes].to_numpy(float)
    truth = np.where(np.isnan(truth), np.nan, truth >= 0.5)
    found = scores[classes].to_numpy(float)
    if np.isnan(found).any():
        raise ValueError(f"image {scores.image_id[np.isnan(found).any(axis=1)].iloc[0]} has a score that is NaN")
    return Answers(tuple(classes), truth, found, scores.fold.to_numpy(), known.patient_id.to_numpy())


def mean_over_folds(scores: pd.DataFrame) -> pd.DataFrame:
    """One row an image: the mean over the models that scored it; `fold` is the first of theirs."""
    scores = check_table(scores, "class_scores")
    grouped = scores.groupby("image_id", sort=False, as_index=False)
    classes = class_columns(scores, "class_scores")
    return grouped.agg({"model": "first", "fold": "first", **dict.fromkeys(classes, "mean")})


def best_thresholds(given: Answers) -> np.ndarray:
    """The probability of each class (classes,) from which on calling it present has the greatest F1 on these images.

    A class without a positive here has one half, and without a known image too.
    """
    thresholds = np.full(len(given.classes), PLAIN_THRESHOLD)
    for place, (truth, found) in enumerate(_known(given)):
        if truth.any():
            precision, recall, steps = precision_recall_curve(truth, found)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            thresholds[place] = steps[f1[:-1].argmax()]
    return thresholds


def crossed_thresholds(given: Answers, seed: int = 0) -> np.ndarray:
    """A threshold for every image and class (n, classes): `best_thresholds` of the other folds' images.

    Where there is one fold only, its patients are cut in two halves that choose for each other.
    """
    part = given.fold
    if len(np.unique(part)) < 2:
        patients, codes = np.unique(given.patient, return_inverse=True)
        part = np.random.default_rng(seed).permutation(np.arange(len(patients)) % 2)[codes]
    thresholds = np.full(given.found.shape, PLAIN_THRESHOLD)
    for one in np.unique(part):
        thresholds[part == one] = best_thresholds(_rows(given, part != one))
    return thresholds


def class_report(given: Answers, thresholds: np.ndarray) -> pd.DataFrame:
    """A row a class: positives, of (known images), roc_auc, average_precision, threshold, precision, recall, f1.

    `thresholds` (n, classes) or (classes,), such as `crossed_thresholds`; `threshold` is their mean. ROC AUC is NaN for a
    class that is absent or all there is, what needs positives NaN where there is none; precision is 0 where nothing is
    called.
    """
    thresholds = np.broadcast_to(thresholds, given.found.shape)
    rows = []
    for place, (truth, found) in enumerate(_known(given)):
        threshold = thresholds[~np.isnan(given.truth[:, place]), place]
        positives = int(truth.sum())
        precision, recall, f1 = precision_recall_f1(truth, found >= threshold)
        rows.append(
            {
                "class": given.classes[place],
                "positives": positives,
                "of": len(truth),
                "roc_auc": roc_auc(found, truth) if len(truth) else float("nan"),
                "average_precision": average_precision_score(truth, found) if positives else float("nan"),
                "threshold": float(threshold.mean()) if len(threshold) else float("nan"),
                "precision": precision,
                "recall": recall,
                "f1": f1,
            }
        )
    return pd.DataFrame(rows)


def precision_recall_f1(truth: np.ndarray, called: np.ndarray) -> tuple[float, float, float]:
    """Of truth and calls, bool (n,); NaN without a positive, precision 0 where nothing is called."""
    positives, calls, hits = truth.sum(), called.sum(), (truth & called).sum()
    if not positives:
        return (float("nan"),) * 3
    return float(hits / max(calls, 1)), float(hits / positives), float(2 * hits / (positives + calls))


def bootstrap_auc(given: Answers, samples: int = 200, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Mean ROC AUC and each class's with its percentile interval: name, value, low, high.

    Whole patients are drawn with replacement. A sample without a class's positives or negatives leaves that class out of its
    mean.
    """
    draws = auc_draws(given, samples, seed)
    # A class that no sample can judge has no interval, and numpy would warn of it.
    bounds = np.full((2, draws.shape[1]), np.nan)
    judged = np.isfinite(draws.iloc[1:]).any(axis=0).to_numpy()
    if judged.any():
        bounds[:, judged] = np.nanquantile(draws.iloc[1:, judged], [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = draws.iloc[0].to_numpy()
    return pd.DataFrame({"name": draws.columns, "value": value, "low": bounds[0], "high": bounds[1]})


def auc_draws(given: Answers, samples: int = 200, seed: int = 0) -> pd.DataFrame:
    """ROC AUC as columns `mean` and each class; the first row is of all patients, then one for each of the draws.

    Answers for the same patients and one seed get the same draws: the difference of their tables is a paired comparison.
    """
    patients, codes = np.unique(given.patient, return_inverse=True)
    known = [~np.isnan(column) for column in given.truth.T]
    ranks = [dense_ranks(found[told]) for found, told in zip(given.found.T, known, strict=True)]
    truths = [truth[told] == 1 for truth, told in zip(given.truth.T, known, strict=True)]

    def judge(times: np.ndarray) -> list[float]:
        weight = times[codes]
        aucs = [
            roc_auc_of_ranks(rank, truth, weight[told]) if len(rank) else float("nan")
            for rank, truth, told in zip(ranks, truths, known, strict=True)
        ]
        finite = [each for each in aucs if np.isfinite(each)]
        return [float(np.mean(finite)) if finite else float("nan"), *aucs]

    rng, share = np.random.default_rng(seed), np.full(len(patients), 1 / len(patients))
    times = [np.ones(len(patients)), *(rng.multinomial(len(patients), share).astype(float) for _ in range(samples))]
    return pd.DataFrame([judge(each) for each in times], columns=["mean", *given.classes])


def roc_curves(given: Answers) -> dict[str, pd.DataFrame]:
    """Columns false_positives and recall (rates, 0..1) for each class that has both, by `class (AUC 0.123)`, best first."""
    curves = {}
    for name, (truth, found) in zip(given.classes, _known(given), strict=True):
        if truth.any() and not truth.all():
            area = roc_auc(found, truth)
            false_positives, recall, _ = roc_curve(truth, found)
            title = f"{name} (AUC {area:.3f})"
            curves[title] = (area, pd.DataFrame({"false_positives": false_positives, "recall": recall}))
    return {title: curve for title, (_, curve) in sorted(curves.items(), key=lambda item: -item[1][0])}


def uncertainty(scores: pd.DataFrame) -> pd.Series:
    """Entropy of each row of `class_scores` in bits, summed over its classes: 0 where every probability is 0 or 1."""
    probability = scores[class_columns(scores, "class_scores")].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown, absent = (np.where(each > 0, -each * np.log2(each), 0) for each in (probability, 1 - probability))
    return pd.Series((shown + absent).sum(axis=1), index=scores.index, name="uncertainty")


def _known(given: Answers) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each class, truth (bool) and probability of the images whose label is known."""
    for truth, found in zip(given.truth.T, given.found.T, strict=True):
        told = ~np.isnan(truth)
        yield truth[told] == 1, found[told]


def _rows(given: Answers, chosen: np.ndarray) -> Answers:
    return Answers(given.classes, given.truth[chosen], given.found[chosen], given.fold[chosen], given.patient[chosen])
