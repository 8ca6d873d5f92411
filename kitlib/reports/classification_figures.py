"""Pictures of classifiers of exclusive classes: confusion, curves, calibration, intervals, images right and wrong."""

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


def confusion_figure(given: Mapping[str, Judged]) -> Figure:
    """A panel a model: images and, below, their share of the true class (row); columns are the called class."""
    return figures.confusion_figure({name: confusion(each) for name, each in given.items()}, shares_too=True)


def class_curves(given: Judged) -> Figure:
    """ROC and precision-recall curve of each class against the rest, one model."""
    truth = np.arange(len(given.classes)) == given.truth[:, None]
    return _curves({name: (given.found[:, place], truth[:, place]) for place, name in enumerate(given.classes)})


def model_curves(given: Mapping[str, Judged], class_name: str) -> Figure:
    """ROC and precision-recall curve of each model for one class against the rest. ValueError for an unknown class."""
    lines = {}
    for name, each in given.items():
        if class_name not in each.classes:
            raise ValueError(f"{name} has no class {class_name!r}; there are: {', '.join(each.classes)}")
        place = each.classes.index(class_name)
        lines[name] = each.found[:, place], each.truth == place
    return _curves(lines)


def reliability(given: Judged, bins: int = RELIABILITY_BINS) -> pd.DataFrame:
    """A row a bin of confidence (see confidence_bins) that has images: predicted and observed share right, count."""
    places, confidence = confidence_bins(given.found, bins), given.found.max(axis=1)
    counts = np.bincount(places, minlength=bins)
    sums = [np.bincount(places, values, minlength=bins) for values in (confidence, given.called == given.truth)]
    predicted, observed = (each[counts > 0] / counts[counts > 0] for each in sums)
    return pd.DataFrame({"predicted": predicted, "observed": observed, "count": counts[counts > 0]})


def reliability_figure(given: Mapping[str, Judged]) -> Figure:
    """A panel a name, such as a model before and after scaling: share right against confidence, dots as large as counts."""
    figure = Figure(figsize=(0.6 + 3.4 * len(given), 3.6), layout="constrained")
    for axis, (name, each) in zip(figure.subplots(1, len(given), squeeze=False)[0], given.items(), strict=True):
        bins = reliability(each)
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axis.plot(bins.predicted, bins.observed, color="steelblue")
        axis.scatter(bins.predicted, bins.observed, s=6 + 200 * bins["count"] / bins["count"].sum(), color="steelblue")
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="share right", aspect="equal")
        axis.set_title(f"{name}\nECE {ece(each.found, each.truth):.3f}", fontsize=9)
    return figure


def intervals_figure(told: pd.DataFrame, line: float | None = None) -> Figure:
    """Dots with their intervals, a panel a figure, a line a model: `told` has model, name, value, low and high.

    `line` is drawn across: where nothing differs, or nothing is known.
    """
    names = list(dict.fromkeys(told["name"]))
    models = list(dict.fromkeys(told["model"]))
    figure = Figure(figsize=(1.8 + 2.8 * max(len(names), 1), 1 + 0.28 * len(models)), layout="constrained")
    axes = figure.subplots(1, max(len(names), 1), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=False):
        rows = told[told["name"] == name].set_index("model").reindex(models)
        places = range(len(models))
        axis.hlines(places, rows.low, rows.high, color="steelblue", linewidth=2)
        axis.plot(rows.value, places, "o", color="black", markersize=4)
        if line is not None:
            axis.axvline(line, color="grey", linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].invert_yaxis()
    return figure


def examples(given: Judged, cache: XrayCache, count: int = 4) -> Figure:
    """In the first row `count` images called right, in the second as many called wrong.

    They are the surest of each true class in turn. Above a picture the truth, below it the probabilities. An image
    whose decoded copy is not there raises KeyError.
    """
    right = given.called == given.truth
    rows = [_surest(given, np.flatnonzero(chosen), count) for chosen in (right, ~right)]
    figure = Figure(figsize=(3 * count, 7.6), layout="constrained")
    for axes, places, verdict in zip(figure.subplots(2, count, squeeze=False), rows, ("right", "wrong"), strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, place in zip(axes, places, strict=False):
            axis.imshow(cache.read(given.image_id[place]).pixels, cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"{given.image_id[place]}\n{given.classes[given.truth[place]]}: {verdict}", fontsize=8)
            order = np.argsort(-given.found[place], kind="stable")
            below = "\n".join(f"{given.classes[each]} {given.found[place, each]:.2f}" for each in order)
            axis.set_xlabel(below, fontsize=8)
    return figure


def _surest(given: Judged, places: np.ndarray, count: int) -> list[int]:
    """Of `places` the most confident, one of each true class in turn: the commonest class would fill the row else."""
    order = places[np.argsort(-given.found.max(axis=1)[places], kind="stable")]
    turns = pd.Series(given.truth[order]).groupby(given.truth[order]).cumcount().to_numpy()
    return order[np.lexsort((np.arange(len(order)), turns))][:count].tolist()


def _curves(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Of scores and truth (bool) by name; a name without a positive or without a negative has no line."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
    for name, (found, true) in lines.items():
        if true.any() and not true.all():
            false_positives, recall, _ = roc_curve(true, found)
            left.plot(false_positives, recall, label=f"{name} (AUC {roc_auc(found, true):.3f})", linewidth=1.2)
            precision, recall, _ = precision_recall_curve(true, found)
            area = average_precision_score(true, found)
            right.plot(recall, precision, label=f"{name} (AP {area:.3f})", linewidth=1.2, drawstyle="steps-post")
    left.set(xlabel="false positive rate", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    right.set(xlabel="sensitivity", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    for axis in (left, right):
        if len(axis.get_legend_handles_labels()[0]):
            axis.legend(fontsize=7, loc="best")
    return figure
