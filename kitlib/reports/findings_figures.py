"""Figures of findings classifiers: ROC curves, and images with their most probable findings."""

import pandas as pd
from matplotlib.figure import Figure

from kitlib.reports.classification_figures import intervals_figure
from kitlib.reports.figures import image_grid, show_xray
from kitlib.tables import class_columns
from kitlib.xrays.cache import XrayCache

SHOWN_CLASSES = 3  # how many of the most probable classes are printed below an image
LINES = ("-", "--", ":")  # line style, changed after every ten lines because matplotlib repeats its ten colours


def roc_figure(curves: dict[str, pd.DataFrame]) -> Figure:
    """Draw one ROC curve per table with the columns false_positives and recall; the keys of `curves` become the legend."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for index, (name, curve) in enumerate(curves.items()):
        axis.plot(curve.false_positives, curve.recall, label=name, linewidth=1.2, linestyle=LINES[index // 10 % len(LINES)])
    axis.set(xlabel="false positive rate", ylabel="recall", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    if curves:
        figure.legend(fontsize=7, loc="outside right upper")
    return figure


def auc_figure(intervals: pd.DataFrame) -> Figure:
    """Draw the ROC AUC of each class and their mean with `intervals`, a table with the columns name, value, low and high."""
    named = intervals.assign(model=intervals["name"], name="ROC AUC with its interval over patients")
    return intervals_figure(named, line=0.5)


def findings_images(
    cache: XrayCache, scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame, per_row: int = 4
) -> Figure:
    """Draw the images listed in `scores`, with the true classes above each and its most probable classes below.

    `scores` is a `class_scores` table, see kitlib.tables.
    """
    figure, axes = image_grid(len(scores), per_row, 3.2, 4)
    classes = class_columns(scores, "class_scores")
    truth = labels.set_index("id").loc[images.set_index("image_id").study_id.reindex(scores.image_id), classes]
    for axis, image_id, row, actual in zip(
        axes, scores.image_id, scores[classes].to_numpy(), truth.to_numpy(), strict=False
    ):
        true = [name for name, value in zip(classes, actual, strict=True) if value >= 0.5]
        most_probable = sorted(zip(row, classes, strict=True), reverse=True)[:SHOWN_CLASSES]
        show_xray(axis, cache.read(image_id), f"{image_id}\nground truth: {', '.join(true) or 'none of the classes'}")
        text = "\n".join(f"{name} {value:.2f}" for value, name in most_probable)
        axis.text(0.5, -0.02, text, transform=axis.transAxes, ha="center", va="top", fontsize=8)
    return figure
