"""Figures of single-label classifiers: confusion, curves, calibration, intervals, correct and wrong examples."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from kitlib.reports import figures
from kitlib.reports.classification_report import Judged, confidence_bins, confusion, ece
from kitlib.scoring.metrics import roc_auc
from kitlib.xrays.cache import XrayCache

RELIABILITY_BINS = 10


def confusion_figure(models: Mapping[str, Judged]) -> Figure:
    """Draw one confusion matrix per model. Each cell shows the number of images and their share of the row.

    Rows are the true class, columns the predicted class.
    """
    return figures.confusion_figure({name: confusion(predictions) for name, predictions in models.items()}, shares_too=True)


def extreme_folds(models: Mapping[str, Judged]) -> dict[str, Judged]:
    """Return two entries per model: its predictions for its least accurate fold, and those for its most accurate fold.

    If several folds have the same accuracy, the first one is used. The keys are texts with model, fold and accuracy. Figures
    13 and 14 of the UNet + HRNet paper show confusion matrices of such folds.
    """
    chosen = {}
    for model, predictions in models.items():
        folds = predictions.answers.fold
        accuracy = pd.Series(predictions.predicted == predictions.truth).groupby(folds).mean()
        for which, fold in (("worst", accuracy.idxmin()), ("best", accuracy.idxmax())):
            name = f"{model}\n{which} fold, {fold}: accuracy {accuracy[fold]:.1%}"
            chosen[name] = predictions.rows(folds == fold)
    return chosen


def class_curves(models: Mapping[str, Judged]) -> Figure:
    """Draw one row per model, with the ROC and the precision-recall curve of each class against the others."""
    rows = {}
    for model, predictions in models.items():
        truth = np.arange(len(predictions.classes)) == predictions.truth[:, None]
        columns = zip(predictions.classes, predictions.probabilities.T, truth.T, strict=True)
        rows[model] = {name: (scores, true) for name, scores, true in columns}
    return _curves(rows)


def model_curves(models: Mapping[str, Judged], class_name: str) -> Figure:
    """Draw the ROC and precision-recall curves of each model for one class against the others.

    Raises ValueError if a model does not predict the class.
    """
    lines = {}
    for name, predictions in models.items():
        if class_name not in predictions.classes:
            raise ValueError(f"{name!r} has no class {class_name!r}; its classes are {list(predictions.classes)}")
        index = predictions.classes.index(class_name)
        lines[name] = predictions.probabilities[:, index], predictions.truth == index
    return _curves({f"{class_name} against the others": lines})


def reliability(predictions: Judged, bins: int = RELIABILITY_BINS) -> pd.DataFrame:
    """Return one row per confidence bin that contains images, with the columns predicted, observed and count.

    An image's confidence is its highest probability. `predicted` is the mean confidence, `observed` the share of correctly
    classified images and `count` the number of images. `bins` is the number of bins, which divide 0..1 equally (see
    `confidence_bins`).
    """
    bin_of, confidence = confidence_bins(predictions.probabilities, bins), predictions.probabilities.max(axis=1)
    counts = np.bincount(bin_of, minlength=bins)
    sums = [
        np.bincount(bin_of, values, minlength=bins) for values in (confidence, predictions.predicted == predictions.truth)
    ]
    predicted, observed = (total[counts > 0] / counts[counts > 0] for total in sums)
    return pd.DataFrame({"predicted": predicted, "observed": observed, "count": counts[counts > 0]})


def reliability_figure(models: Mapping[str, Judged]) -> Figure:
    """Draw one panel per model: the share of correctly classified images against the mean confidence, bin by bin.

    The area of a dot shows the number of images in the bin. The keys of `models` become the titles. `models` can also
    contain the same model twice, before and after temperature scaling.
    """
    figure, axes = figures.panels(len(models), 3.4, 3.6)
    for axis, (name, predictions) in zip(axes, models.items(), strict=True):
        bins = reliability(predictions)
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axis.plot(bins.predicted, bins.observed, color="steelblue")
        axis.scatter(
            bins.predicted, bins.observed, s=6 + 200 * bins["count"] / bins["count"].sum(), color="steelblue", clip_on=False
        )
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="share correct", aspect="equal")
        axis.set_title(f"{name}\nECE {ece(predictions.probabilities, predictions.truth):.3f}", fontsize=9)
    return figure


def intervals_figure(intervals: pd.DataFrame, line: float | None = None) -> Figure:
    """Draw one panel per metric, with a row per model: a dot for the value and a horizontal bar for its interval.

    `intervals` has the columns `model`, `name` (of the metric), `value`, `low` and `high`. `line` is a reference value, such
    as 0 for differences or 0.5 for ROC AUC; it is drawn as a vertical line in each panel.
    """
    names = list(dict.fromkeys(intervals["name"]))
    models = list(dict.fromkeys(intervals["model"]))
    figure = Figure(figsize=(1.8 + 2.8 * max(len(names), 1), 1 + 0.28 * len(models)), layout="constrained")
    axes = figure.subplots(1, max(len(names), 1), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=False):
        rows = intervals[intervals["name"] == name].set_index("model").reindex(models)
        positions = range(len(models))
        axis.hlines(positions, rows.low, rows.high, color="steelblue", linewidth=2)
        axis.plot(rows.value, positions, "o", color="black", markersize=4)
        if line is not None:
            axis.axvline(line, color="grey", linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].set_ylim(len(models) - 0.5, -0.5)
    return figure


def examples(predictions: Judged, cache: XrayCache, count: int = 4) -> Figure:
    """Draw `count` correctly classified images in the first row and `count` misclassified ones in the second.

    Each row starts with the most confident image of each true class, followed by the second most confident ones, and so on.
    Above each image are its id and true class, below it are the predicted probabilities. Raises KeyError if an image has no
    decoded copy.
    """
    right = predictions.predicted == predictions.truth
    rows = [_surest(predictions, np.flatnonzero(chosen), count) for chosen in (right, ~right)]
    figure = Figure(figsize=(3 * count, 7.6), layout="constrained")
    for axes, indices, verdict in zip(figure.subplots(2, count, squeeze=False), rows, ("correct", "wrong"), strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, index in zip(axes, indices, strict=False):
            axis.imshow(cache.read(predictions.image_id[index]).pixels, cmap="gray", vmin=0, vmax=255)
            axis.set_title(
                f"{predictions.image_id[index]}\nground truth: {predictions.classes[predictions.truth[index]]} ({verdict})",
                fontsize=8,
            )
            order = np.argsort(-predictions.probabilities[index], kind="stable")
            below = "\n".join(
                f"{predictions.classes[class_index]} {predictions.probabilities[index, class_index]:.2f}"
                for class_index in order
            )
            axis.set_xlabel(below, fontsize=8)
    return figure


def _surest(predictions: Judged, indices: np.ndarray, count: int) -> list[int]:
    """Return up to `count` elements of `indices`, the most confident images first, alternating between true classes."""
    order = indices[np.argsort(-predictions.probabilities.max(axis=1)[indices], kind="stable")]
    turns = pd.Series(predictions.truth[order]).groupby(predictions.truth[order]).cumcount().to_numpy()
    return order[np.lexsort((np.arange(len(order)), turns))][:count].tolist()


def _curves(rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Draw ROC curves (left) and precision-recall curves (right) in one row of axes per entry of `rows`.

    `rows` maps a row's title to a dict, which maps the name of each curve to a pair of arrays: scores, and the truth as
    bool. A curve whose truth is all True or all False is omitted.
    """
    figure = Figure(figsize=(9, 4.4 * len(rows)), layout="constrained")
    for (left, right), (title, lines) in zip(figure.subplots(len(rows), 2, squeeze=False), rows.items(), strict=True):
        left.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
        for name, (scores, true) in lines.items():
            if true.any() and not true.all():
                false_positives, recall, _ = roc_curve(true, scores)
                left.plot(false_positives, recall, label=f"{name} (AUC {roc_auc(scores, true):.3f})", linewidth=1.2)
                precision, recall, _ = precision_recall_curve(true, scores)
                area = average_precision_score(true, scores)
                right.plot(recall, precision, label=f"{name} (AP {area:.3f})", linewidth=1.2, drawstyle="steps-post")
        left.set(xlabel="false positive rate", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        right.set(xlabel="sensitivity", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        for axis in (left, right):
            axis.set_title(title, fontsize=9)
            if len(axis.get_legend_handles_labels()[0]):
                axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure
