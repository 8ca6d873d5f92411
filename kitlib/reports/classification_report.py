"""Metrics of single-label classification: confusion, metrics per class and their means, calibration, failures by class.

All functions take the predictions of one model, one row per image, for images with exactly one true class. The predicted
class is the most probable class, in case of a tie the first one. "Sensitivity" is recall and "ppv" is precision.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from kitlib.errors import DatasetError
from kitlib.lungs.clean_up import FOUND
from kitlib.reports.findings_report import Answers, answers, mean_over_folds
from kitlib.scoring.temperature import LEAST, cross_scaled
from kitlib.tables import check_table, class_columns

COUNT_METRICS = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")
CLASS_METRICS = (*COUNT_METRICS, "roc_auc", "pr_auc", "brier")
OVERALL_METRICS = ("accuracy", "micro_f1", "papers_micro_f1", "ece", "brier", "log_loss")
CALIBRATION_METRICS = ("ece", "brier", "log_loss")
ECE_BINS = 15  # Guo et al. 2017
# The sum of an image's probabilities may differ from 1 by this, because they were averaged in single precision.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Judged:
    """Predictions of one model for n images, each of which has exactly one true class."""

    answers: Answers
    image_id: np.ndarray  # (n,)
    source: np.ndarray  # (n,), the data set that an image is from
    truth: np.ndarray  # (n,), index of the true class

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `probabilities`."""
        return self.answers.classes

    @property
    def probabilities(self) -> np.ndarray:
        """Predicted probabilities, 0..1, as an array (n, classes)."""
        return self.answers.probabilities

    @property
    def predicted(self) -> np.ndarray:
        """Index of the predicted (most probable) class of each image, as an array (n,)."""
        return self.probabilities.argmax(axis=1)

    def rows(self, chosen: np.ndarray) -> "Judged":
        """Return the predictions for only some images, `chosen` by a bool array (n,) or by indices in the required order."""
        return Judged(self.answers.rows(chosen), self.image_id[chosen], self.source[chosen], self.truth[chosen])


def check_one_class(prepared: Mapping[str, pd.DataFrame], multi_label: bool) -> None:
    """Raise DatasetError if `multi_label` is True, or if an image does not have exactly one true class.

    Call it before training: `judged` could not evaluate the trained model. `prepared` has the tables of a prepared run; only
    images in a fold or in the split "test" are checked. Without any classes, nothing is checked: training then raises its
    own error.
    """
    images, labels = prepared["images"], prepared["labels"].set_index("id")
    is_used = images.image_id.isin(prepared["folds"].id) | (images["split"] == "test" if "split" in images else False)
    label = labels.loc[images.study_id[is_used]]
    wrong = images.image_id[is_used][(label.isna().any(axis=1) | (label.sum(axis=1) != 1)).to_numpy()]
    if len(labels.columns) and (multi_label or len(wrong)):
        problem = (
            f"{len(wrong)} images have more, fewer or unknown ones; the first is {wrong.iloc[0]}"
            if len(wrong)
            else "multi_label is true in overrides"
        )
        raise DatasetError(
            f"notebook 25 needs images with exactly one true class, but {problem}. Use notebook 20 for images with several "
            "or unknown findings. Prepare your own images for it with `labels` (a list of columns) instead of `label`"
        )


def judged(scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame, source: str = "") -> Judged:
    """Return the predictions of one model (a `class_scores` table), matched with the true class of each image.

    `source` restricts the result to images from this source or, if it is "not NAME", to images from all other sources. If
    the models of several folds have predicted an image, their probabilities are averaged. Raises ValueError if the table has
    several models or no rows, if no image is from `source`, if a class of the labels is not predicted, if an image does not
    have exactly one true class, or if probabilities do not sum to 1.
    """
    scores, labels = check_table(scores, "class_scores"), check_table(labels, "labels")
    if scores.empty:
        raise ValueError("the `class_scores` table is empty")
    models = sorted(set(scores.model))
    if len(models) > 1:
        raise ValueError(f"the scores are from several models ({', '.join(models)}); pass one of the tables from `by_model`")
    absent = [name for name in class_columns(labels, "labels") if name not in scores]
    if absent:
        raise ValueError(f"the labels have classes that the scores lack: {absent}; the model cannot predict them")
    if scores.image_id.duplicated().any():
        scores = mean_over_folds(scores)
    image_table = images.set_index("image_id")
    if source:
        sources, name = sorted(set(image_table.source)), source.removeprefix("not ")
        scores = scores[(scores.image_id.map(image_table.source) == name) == (name == source)]
        if scores.empty or name not in sources:
            raise ValueError(f"no predicted image is from source {source!r}; available sources: {', '.join(sources)}")
    labelled = answers(scores, images, labels)
    ids = scores.image_id.to_numpy()
    wrong = np.flatnonzero(np.isnan(labelled.truth).any(axis=1) | (np.nansum(labelled.truth, axis=1) != 1))
    if len(wrong):
        raise ValueError(f"{len(wrong)} images do not have exactly one true class; the first is {ids[wrong[0]]}")
    sums = labelled.probabilities.sum(axis=1)
    invalid = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
    if len(invalid):
        raise ValueError(
            f"the probabilities of {len(invalid)} images do not sum to 1; the first is {ids[invalid[0]]} with "
            f"{sums[invalid[0]]:.4f}. Was the model trained for several findings per image (multi_label)?"
        )
    return Judged(labelled, ids, image_table.source.reindex(ids).to_numpy(), labelled.truth.argmax(axis=1))


def by_model(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split a `class_scores` table into one table per model, in the order in which the models appear."""
    return {str(name): rows.reset_index(drop=True) for name, rows in scores.groupby("model", sort=False)}


def on_shared_images(models: Mapping[str, Judged]) -> dict[str, Judged]:
    """Return each model's predictions for only the images that all models have predicted, in the same order for all models.

    Raises ValueError if no image is shared or if the models have different classes.
    """
    if len({predictions.classes for predictions in models.values()}) > 1:
        classes = "; ".join(f"{name}: {', '.join(predictions.classes)}" for name, predictions in models.items())
        raise ValueError(f"the models have different classes or class orders and cannot be compared ({classes})")
    shared = sorted(set.intersection(*(set(predictions.image_id) for predictions in models.values()))) if models else []
    if not shared:
        raise ValueError(f"no image was predicted by all of these models: {', '.join(models) or 'none given'}")
    return {name: model.rows(pd.Index(model.image_id).get_indexer(shared)) for name, model in models.items()}


def confusion(predictions: Judged) -> pd.DataFrame:
    """Return the confusion matrix: numbers of images by true class (rows) and predicted class (columns)."""
    size = len(predictions.classes)
    counts = np.bincount(predictions.truth * size + predictions.predicted, minlength=size * size).reshape(size, size)
    classes = predictions.classes
    return pd.DataFrame(counts, index=pd.Index(classes, name="truth"), columns=pd.Index(classes, name="called"))


def count_metrics(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, sensitivity, specificity, ppv, npv and f1 of each class against the others, as arrays (..., classes).

    `matrix` is an array (..., classes, classes) of confusion matrices, with the true classes as rows. For a class without
    images, all metrics except accuracy are NaN. For a class that contains all images, specificity is NaN. The ppv of a class
    that is never predicted is 0, and so is the npv of a class that is always predicted.
    """
    matrix = np.asarray(matrix, dtype=float)
    hits, of_class, calls = np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-1), matrix.sum(axis=-2)
    total = of_class.sum(axis=-1, keepdims=True)
    rejected = total - of_class - calls + hits
    nan = np.where(of_class > 0, 0.0, np.nan)
    return {
        "accuracy": _ratio(hits + rejected, total),
        "sensitivity": _ratio(hits, of_class),
        "specificity": _ratio(rejected, total - of_class) + nan,
        "ppv": _ratio(hits, calls, 0.0) + nan,
        "npv": _ratio(rejected, total - calls, 0.0) + nan,
        "f1": _ratio(2 * hits, of_class + calls) + nan,
    }


class Metrics:
    """Computes the metrics of one model for many weightings of its images, such as bootstrap draws.

    Whatever does not depend on the weights is computed only once.
    """

    def __init__(self, predictions: Judged) -> None:
        truth, probabilities, size = predictions.truth, predictions.probabilities, len(predictions.classes)
        self.classes = predictions.classes
        true = np.arange(size) == truth[:, None]
        gaps = (predictions.predicted == truth) - probabilities.max(axis=1)
        # All metrics except the areas under curves are computed from these columns, summed over images.
        self.cells = np.eye(size * size)[truth * size + predictions.predicted]
        self.gaps = np.eye(ECE_BINS)[confidence_bins(probabilities)] * gaps[:, None]
        self.squares = (probabilities - true) ** 2
        self.losses = log_losses(probabilities, truth)
        self.ranked = [_ranked(column, positive) for column, positive in zip(probabilities.T, true.T, strict=True)]

    def for_weights(self, weight: np.ndarray) -> pd.DataFrame:
        """Return a table with one row per draw and one column per metric.

        The columns are OVERALL_METRICS, such as "accuracy", then CLASS_METRICS for each class and their means over the
        classes, such as "f1 COVID-19" and "f1 macro". `weight` is an array (draws, n) that says how often each draw contains
        each image.
        """
        size, total = len(self.classes), weight.sum(axis=1)
        matrix = (weight @ self.cells).reshape(-1, size, size)
        figures = count_metrics(matrix)
        areas = [_areas(weight, *ranked) for ranked in self.ranked]
        figures["roc_auc"], figures["pr_auc"] = (np.stack(columns, axis=1) for columns in zip(*areas, strict=True))
        figures["brier"] = weight @ self.squares / total[:, None]
        occurs = matrix.sum(axis=2) > 0
        macro = {name: _mean_where(figures[name], occurs) for name in CLASS_METRICS}
        accuracy = np.trace(matrix, axis1=1, axis2=2) / total
        precision, recall = macro["ppv"], macro["sensitivity"]
        columns = {
            "accuracy": accuracy,
            "micro_f1": accuracy,
            "papers_micro_f1": _ratio(2 * precision * recall, precision + recall, 0.0),
            "ece": np.abs(weight @ self.gaps).sum(axis=1) / total,
            "brier": figures["brier"].sum(axis=1),
            "log_loss": weight @ self.losses / total,
        }
        for name in CLASS_METRICS:
            columns |= {f"{name} {class_name}": figures[name][:, index] for index, class_name in enumerate(self.classes)}
            columns[f"{name} macro"] = macro[name]
        return pd.DataFrame(columns)


def class_table(predictions: Judged) -> pd.DataFrame:
    """Return metrics with one row per class (against all other classes) and a last row `macro`, the mean over the classes.

    The columns are class, support (images of the class; all images for `macro`), accuracy, sensitivity, specificity, ppv,
    npv, f1, roc_auc, pr_auc (average precision) and brier (mean squared error of the class's probability). Classes without
    images are left out of the mean.
    """
    row = Metrics(predictions).for_weights(np.ones((1, len(predictions.truth)))).iloc[0]
    class_names = [*predictions.classes, "macro"]
    support = [*np.bincount(predictions.truth, minlength=len(predictions.classes)), len(predictions.truth)]
    metrics = {metric: [row[f"{metric} {name}"] for name in class_names] for metric in CLASS_METRICS}
    return pd.DataFrame({"class": class_names, "support": support, **metrics})


def overall(predictions: Judged) -> dict[str, float]:
    """Return the metrics of one model over all classes, as a dict from name to value.

    Each image has a single class, so `micro_f1` equals `accuracy`. `papers_micro_f1` is the harmonic mean of macro precision
    and macro recall, which the FLANNEL papers call micro-F1. `ece` is the expected calibration error. `brier` is the squared
    error summed over the classes (0..2, Brier 1950). `log_loss` is the mean of `log_losses`, in nats.
    """
    return Metrics(predictions).for_weights(np.ones((1, len(predictions.truth)))).iloc[0][list(OVERALL_METRICS)].to_dict()


def log_losses(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return an array (n,): for each image the negative natural logarithm of the true class's probability.

    `probabilities` is an array (n, classes), `truth` (n,) holds the indices of the true classes. A probability below LEAST
    (1e-7), such as 0 for a class without votes, counts as LEAST, as in the temperature fit; its loss is about 16.
    """
    return -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], LEAST))


def confidence_bins(probabilities: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """Return an array (n,): the index of the bin of each image's highest probability.

    `bins` is the number of bins, which divide 0..1 equally; a bin includes its upper edge.
    """
    return np.clip(np.ceil(probabilities.max(axis=1) * bins).astype(int) - 1, 0, bins - 1)


def ece(probabilities: np.ndarray, truth: np.ndarray, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error of the predicted class, 0..1.

    This is the mean of |accuracy - mean confidence| over the bins of `confidence_bins`, weighted by their numbers of images
    (Guo et al. 2017, eq. 3). `bins` is the number of bins.
    """
    gaps = (probabilities.argmax(axis=1) == truth) - probabilities.max(axis=1)
    return float(np.abs(np.bincount(confidence_bins(probabilities, bins), gaps)).sum() / len(truth))


def at_prevalence(predictions: Judged, prevalences: Iterable[float]) -> pd.DataFrame:
    """Return the ppv and npv that each class would have in populations in which the class has a given prevalence.

    The columns are class, prevalence, ppv and npv, with one row per class and prevalence. Uses Bayes' rule with the
    sensitivity and specificity of `predictions`; the other classes keep their proportions. The predictive values on a data
    set that is half COVID-19 do not hold in any other population. Raises ValueError for a prevalence that is not strictly
    between 0 and 1.
    """
    metrics, rows = count_metrics(confusion(predictions).to_numpy()), []
    for prevalence in prevalences:
        if not 0 < prevalence < 1:
            raise ValueError(f"prevalence is {prevalence}; it must be above 0 and below 1, for example 0.05")
        for name, sensitivity, specificity in zip(
            predictions.classes, metrics["sensitivity"], metrics["specificity"], strict=True
        ):
            ppv = _ratio(sensitivity * prevalence, sensitivity * prevalence + (1 - specificity) * (1 - prevalence))
            npv = _ratio(specificity * (1 - prevalence), specificity * (1 - prevalence) + (1 - sensitivity) * prevalence)
            rows.append({"class": name, "prevalence": prevalence, "ppv": float(ppv), "npv": float(npv)})
    return pd.DataFrame(rows)


def source_table(predictions: Judged) -> pd.DataFrame:
    """Return metrics with one row per source and class, first for all sources pooled, then for each source alone.

    The rows of single sources show how good a model is where recognising an image's source is of no use. The columns are
    `source`, `class`, `support` (number of images of the class), `of` (number of images from the source) and the metrics of
    `class_table`. Classes without images are omitted. If a source has a single class, specificity and the areas under curves
    are NaN.
    """
    sources = predictions.source
    parts = {"pooled": predictions} | {str(name): predictions.rows(sources == name) for name in sorted(set(sources))}
    tables = [class_table(part).assign(source=name, of=len(part.truth)) for name, part in parts.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[(table["class"] != "macro") & (table.support > 0)][["source", "class", "support", "of", *CLASS_METRICS]]


def failures(
    scores: pd.DataFrame,
    images: pd.DataFrame,
    labels: pd.DataFrame,
    folds: pd.DataFrame,
    lungs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return a table with one row per class: how many of its images were predicted, and why the others were not.

    `outside_folds` counts the images in no fold: they were excluded or set aside for testing. Among the images in folds,
    `answered` counts those with a prediction and `unanswered` those without. If a `lungs` table is passed, `lungs_not_found`
    counts the images in folds whose lungs were not found. `unanswered_share` and `lungs_not_found_share` are shares of the
    class's images in folds. If one class fails more often than another, the metrics on the remaining images look better than
    they are.
    """
    classes = class_columns(labels, "labels")
    truth = labels.set_index("id")[classes].reindex(images.study_id).to_numpy() >= 0.5
    in_folds, scored = images.image_id.isin(folds["id"]).to_numpy(), images.image_id.isin(scores.image_id).to_numpy()
    marks = {"outside_folds": ~in_folds, "unanswered": in_folds & ~scored, "answered": in_folds & scored}
    if lungs is not None:
        missed = images.image_id.isin(lungs.image_id[lungs.verdict != FOUND]).to_numpy()
        marks["lungs_not_found"] = in_folds & missed
    counts = {name: (truth & mark[:, None]).sum(axis=0) for name, mark in marks.items()}
    within = counts["unanswered"] + counts["answered"]
    shares = {f"{name}_share": _ratio(counts[name], within) for name in ("unanswered", "lungs_not_found") if name in counts}
    return pd.DataFrame({"class": classes, "images": truth.sum(axis=0), **counts, **shares})


def _ratio(above: np.ndarray, below: np.ndarray, where_none: float = np.nan) -> np.ndarray:
    """Return `above` / `below` element by element, and `where_none` where `below` is 0."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, where_none), where=below > 0)


def calibrated(predictions: Judged) -> tuple[Judged, pd.Series]:
    """Return `predictions` after temperature scaling, and a Series of the temperatures, indexed by fold.

    The temperature of each fold is fitted on the other folds. The predicted classes do not change. Raises ValueError if all
    images are in one fold.
    """
    scores = pd.DataFrame(predictions.probabilities, columns=list(predictions.classes)).assign(fold=predictions.answers.fold)
    scaled_scores, temperatures = cross_scaled(scores, predictions.classes, predictions.truth)
    probabilities = scaled_scores[list(predictions.classes)].to_numpy(float)
    return replace(predictions, answers=replace(predictions.answers, probabilities=probabilities)), temperatures


def calibration_table(models: Mapping[str, Judged]) -> pd.DataFrame:
    """Return ece, brier and log_loss before and after temperature scaling, with one row per model.

    The columns are named, for example, "ece before" and "ece after"; the last column is the mean `temperature`.
    """
    rows = {}
    for name, predictions in models.items():
        after, temperatures = calibrated(predictions)
        parts = {"before": overall(predictions), "after": overall(after)}
        rows[name] = {f"{metric} {when}": values[metric] for metric in CALIBRATION_METRICS for when, values in parts.items()}
        rows[name]["temperature"] = temperatures.mean()
    return pd.DataFrame.from_dict(rows, orient="index")


def _ranked(values: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the scores `values` of one class in descending order; return three arrays for `_areas`.

    The first has the indices that sort the scores. The second has, in sorted order, 1.0 for images of the class and 0.0 for
    others. The third has the last position of each group of equal scores.
    """
    order = np.argsort(-values, kind="stable")
    scores = values[order]
    return order, positive[order].astype(float), np.flatnonzero(np.append(scores[1:] != scores[:-1], True))


def _areas(weight: np.ndarray, order: np.ndarray, positive: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays (draws,): the ROC AUC and the average precision of each draw.

    `weight` is an array (draws, n) that says how often each draw contains each image; the other arguments are the results of
    `_ranked`. Without images of the class in a draw, both metrics are NaN; without other images, only ROC AUC is NaN.
    """
    weight = weight[:, order]
    hits, calls = (np.cumsum(values, axis=1)[:, ends] for values in (weight * positive, weight))
    false = calls - hits
    more_hits, more_false = np.diff(hits, prepend=0.0), np.diff(false, prepend=0.0)
    positives, negatives = hits[:, -1], false[:, -1]
    pairs = positives * negatives
    area = (more_false * (hits - more_hits / 2)).sum(axis=1)
    precision = np.divide(hits, calls, out=np.zeros_like(hits), where=calls > 0)
    precision_sum = (more_hits * precision).sum(axis=1)
    return (
        np.divide(area, pairs, out=np.full_like(area, np.nan), where=pairs > 0),
        np.divide(precision_sum, positives, out=np.full_like(precision_sum, np.nan), where=positives > 0),
    )


def _mean_where(values: np.ndarray, occurring: np.ndarray) -> np.ndarray:
    """Return an array (draws,): the mean of each row of `values` over the classes that occur and whose value is finite."""
    counts = occurring & np.isfinite(values)
    sums = np.where(counts, values, 0.0).sum(axis=1)
    return np.divide(sums, counts.sum(axis=1), out=np.full(len(sums), np.nan), where=counts.any(axis=1))
