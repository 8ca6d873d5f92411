"""Figures for notebooks. Each function returns a matplotlib figure; `save_figure` writes it as PNG."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from kitlib.atomic import replacing
from kitlib.classes import MASK_CODES
from kitlib.tables import BOX, class_columns, findings_of
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.drawn_boxes import finding_colours
from kitlib.xrays.mask_store import MaskStore

TRUTH, PREDICTION = "limegreen", "orange"
# Boxes with a lower confidence add to average precision but would cover the picture.
SHOWN_SCORE = 0.2
# Position of a legend that hides nothing: right of the axes.
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
# Colours of findings may be as bright as bones and paper, so their lines have dark edges.
EDGED = [withStroke(linewidth=2.3, foreground="black")]

LONGEST_WORD = 36  # characters of a title that fit above an X-ray; RANZCR's ids have more


def save_figure(figure: Figure, path: str | Path) -> Image:
    """Write the figure to the PNG file `path` atomically (temporary file, then rename); return the picture for display.

    The result is an Image, because a notebook shows a figure only if matplotlib's inline backend is active.
    """
    with replacing(path) as temporary_path:
        figure.savefig(temporary_path, dpi=110, bbox_inches="tight")
    return Image(path)


def image_grid(count: int, per_row: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure for `count` images, `per_row` side by side, and a flat array of at least `count` axes.

    `width` and `height` are the size of each image in inches.
    """
    rows = max(1, math.ceil(count / per_row))
    figure = Figure(figsize=(width * per_row, height * rows), layout="constrained")
    axes = figure.subplots(rows, per_row, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    return figure, axes


def panels(count: int, width: float, height: float, per_row: int = 4) -> tuple[Figure, list[Axes]]:
    """Return a figure and the axes of its `count` panels, each `width` x `height` inches, at most `per_row` side by side."""
    columns = min(count, per_row)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(0.6 + width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def show_legend(figure: Figure, **names: str) -> None:
    """Add a legend below the images; each keyword argument is a colour and the name of what is drawn in this colour."""
    handles = [Line2D([], [], color=colour, label=name) for colour, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


def _show_findings(figure: Figure, colours: Mapping[str, str], **names: str) -> None:
    """Add a legend below the images: the colour of each finding, and the line styles of annotated and predicted boxes."""
    if not colours:
        show_legend(figure, **names)
        return
    kinds = [Line2D([], [], color="grey", linestyle=_style(colour, colours), label=name) for colour, name in names.items()]
    findings = [Line2D([], [], color=colour, label=name, path_effects=EDGED) for name, colour in colours.items()]
    columns = max(1, int(figure.get_figwidth() / 2.2))
    figure.legend(handles=[*kinds, *findings], loc="outside lower center", ncols=columns, fontsize=9)


def _style(colour: str, colours: Mapping[str, str]) -> str:
    """Return the line style of boxes: dashed for annotated boxes if colours show the findings, otherwise solid."""
    return "--" if colours and colour == TRUTH else "-"


def show_xray(axis: Axes, xray: CachedXray, title: str) -> None:
    """Draw the X-ray in grey with a title above it; of a long word in the title, only the last characters are shown."""
    axis.imshow(xray.pixels, cmap="gray", vmin=0, vmax=255)
    shown = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: "…" + word[0][1 - LONGEST_WORD :], title)
    axis.set_title(shown, fontsize=8)


def example_images(
    cache: XrayCache,
    images: pd.DataFrame,
    labels: pd.DataFrame | None = None,
    boxes: pd.DataFrame | None = None,
    detections: pd.DataFrame | None = None,
    per_row: int = 4,
    shown_score: float = SHOWN_SCORE,
    masks: MaskStore | None = None,
    labels_are: str = "ground truth",
) -> Figure:
    """Draw the X-rays in the table `images` with annotated boxes (green) and predicted boxes (orange, with their scores).

    The tables are as in `kitlib.tables`, with boxes in original pixels. Detections with a score below `shown_score` are not
    drawn; if none is drawn, the legend says so. If the tables have several findings, boxes have the colour and name of their
    finding, and annotated boxes are dashed. The colours depend on all findings in the tables, so pass whole tables. If
    `masks` contains an image's mask, its structures are outlined in green and named in the legend. Each title has the text
    `labels_are` and then the image's labels, if they are known.
    """
    figure, axes = image_grid(len(images), per_row, 3.2, 3.5)
    classes = {} if labels is None else _true_classes(labels[labels["id"].isin(images.study_id)])
    colours, structures, drawn_findings = finding_colours(findings_of(boxes, detections)), set[str](), set[str]()
    for axis, image in zip(axes, images.itertuples(), strict=False):
        xray = cache.read(image.image_id)
        truth = f"\n{labels_are}: {classes[image.study_id]}" if classes.get(image.study_id) else ""
        show_xray(axis, xray, image.image_id + truth)
        if masks is not None and image.image_id in masks:
            structures.update(draw_outlines(axis, masks.read(image.image_id), TRUTH))
        shown = detections
        if detections is not None:
            shown = detections[(detections.image_id == image.image_id) & (detections.score >= shown_score)]
        annotated = None if boxes is None else boxes[boxes.image_id == image.image_id]
        drawn_findings |= _draw_boxes(axis, xray, annotated, shown, colours)
    names = f": {', '.join(sorted(structures)).replace('_', ' ')}" if structures else ""
    drawn = {TRUTH: f"annotated{names}"} if boxes is not None or masks is not None else {}
    if detections is not None:
        highest = detections.loc[detections.image_id.isin(images.image_id), "score"].max()
        if highest >= shown_score:
            drawn |= {PREDICTION: "predicted, with confidence" + (f" ({shown_score:g} or more)" if shown_score else "")}
        else:  # otherwise the figure of a weak model would look as if its boxes had been forgotten
            weak = "" if pd.isna(highest) else f" with {shown_score:g} or more; the highest confidence is {highest:.2f}"
            drawn |= {PREDICTION: f"no box is predicted{weak}"}
    if drawn:
        _show_findings(figure, {name: colours[name] for name in colours if name in drawn_findings}, **drawn)
    return figure


def compare_detections(
    cache: XrayCache, images: pd.DataFrame, boxes: pd.DataFrame, answers: Mapping[str, pd.DataFrame]
) -> Figure:
    """Draw one row per image and one column per model: the X-ray with its annotated boxes and the model's predicted boxes.

    `answers` maps names of models to tables of detections. The findings in `boxes` have the same colours as in
    `example_images`. All detections are drawn, so pass only those with a sufficient score.
    """
    figure, axes = image_grid(len(images) * len(answers), len(answers), 2.8, 3.1)
    pairs = itertools.product(images.itertuples(), answers.items())
    colours, drawn = finding_colours(findings_of(boxes)), set[str]()
    for axis, (image, (name, detections)) in zip(axes, pairs, strict=True):
        xray = cache.read(image.image_id)
        show_xray(axis, xray, f"{name}\n{image.image_id}")
        annotated, predicted = (table[table.image_id == image.image_id] for table in (boxes, detections))
        drawn |= _draw_boxes(axis, xray, annotated, predicted, colours)
    names = {TRUTH: "annotated", PREDICTION: "predicted, with confidence"}
    _show_findings(figure, {name: colours[name] for name in colours if name in drawn}, **names)
    return figure


def draw_outlines(axis: Axes, codes: np.ndarray, colour: str) -> list[str]:
    """Draw the outline of each structure in the mask `codes`, and return the names of these structures.

    `codes` must have the size of the picture in `axis`, with a code of MASK_CODES at each pixel of a structure.
    """
    found = {name: codes == code for name, code in MASK_CODES.items() if (codes == code).any()}
    for inside in found.values():
        axis.contour(inside, levels=[0.5], colors=colour, linewidths=1)
    return list(found)


def fold_shares(folds: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> Figure:
    """Draw the share of each class in each fold; in good folds, the bars of a class have about the same height.

    Without classes, the bars are the number of images in each fold.
    """
    classes = class_columns(labels, "labels")
    joined = folds.merge(images, left_on="id", right_on="image_id").merge(labels, left_on="study_id", right_on="id")
    by_fold = joined.groupby("fold")
    shares = by_fold[classes].mean() if classes else by_fold.size().to_frame("images")
    figure = Figure(figsize=(max(7, len(classes)), 3), layout="constrained")
    axis = figure.subplots()
    shares.T.plot.bar(ax=axis, rot=0 if len(classes) < 6 else 30, width=0.8)
    axis.set_ylabel("share of the fold's images" if classes else "images")
    axis.legend(title="fold", fontsize=7, **BESIDE)
    return figure


def boxes_figure(images: pd.DataFrame, boxes: pd.DataFrame) -> Figure:
    """Draw two histograms, of the number of boxes per image and of the size of boxes (figures 5, 6, Heidelberg report).

    The size of a box is its area as a share of the image's area. If there are several findings, each bar of the second
    histogram is divided by finding.
    """
    counts = boxes.groupby("image_id").size().reindex(images["image_id"], fill_value=0).value_counts().sort_index()
    sized = boxes.merge(images[["image_id", "rows", "columns"]], on="image_id")
    shares = (sized.xmax - sized.xmin) * (sized.ymax - sized.ymin) / (sized["rows"] * sized["columns"])
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(counts.index.astype(str), counts)
    left.bar_label(left.containers[0], fontsize=7)
    left.set(xlabel="boxes per image", ylabel="images")
    if colours := finding_colours(findings_of(boxes)):
        by_finding = [shares[(sized["finding"] == name).to_numpy()] for name in colours]
        labels = [f"{name} ({len(of_finding)})" for name, of_finding in zip(colours, by_finding, strict=True)]
        right.hist(by_finding, bins=40, stacked=True, color=list(colours.values()), label=labels)
        right.legend(fontsize=7, **BESIDE)
    else:
        right.hist(shares, bins=40)
    right.set(xlabel="area of the box, as a share of the image", ylabel="boxes")
    return figure


def confusion_figure(matrices: Mapping[str, pd.DataFrame], shares_too: bool = False) -> Figure:
    """Draw one panel per confusion matrix; each cell shows its count, coloured by the count's share of the row.

    Rows are the true class, columns the most probable class. The keys of `matrices` become the titles. If `shares_too`, the
    shares are printed below the counts.
    """
    figure, axes = panels(len(matrices), 3.9, 3.9)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        counts = matrix.to_numpy()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:,}" + (f"\n{shares[row, column]:.1%}" if shares_too else "")
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=30, ha="right")
        axis.set_yticks(range(len(matrix.index)), matrix.index)
        axis.set(xlabel="most probable class", ylabel="ground truth", title=name)
    return figure


def precision_recall_figure(curves: Mapping[str, pd.DataFrame], findings: Iterable[str] = ()) -> Figure:
    """Draw one curve per table with the columns recall and precision; the keys of `curves` become the legend.

    To give curves the colours of findings, pass all `findings` of the run; each key must then be like `finding (AP 0.123)`.
    """
    colours = finding_colours(findings)
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        style = {"color": colours[name.rpartition(" (")[0]], "path_effects": EDGED} if colours else {}
        axis.step(curve.recall, curve.precision, where="pre", label=name, **style)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(fontsize=7, **BESIDE)
    return figure


def reliability_figure(bins: pd.DataFrame) -> Figure:
    """Draw the observed share of each class against its predicted probability, with one line per class in `bins`.

    `bins` has the columns class, predicted, observed and count; the area of a dot shows the count.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    for name, rows in bins.groupby("class", sort=False):
        line = axis.plot(rows.predicted, rows.observed, label=name)[0]
        axis.scatter(rows.predicted, rows.observed, s=4 + 200 * rows["count"] / bins["count"].sum(), color=line.get_color())
    axis.set(xlabel="predicted probability", ylabel="observed share", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=7, **BESIDE)
    return figure


def fusion_steps(steps: pd.DataFrame) -> Figure:
    """Draw the competition score after each tuning step; `steps` has the columns step, score and gain."""
    figure = Figure(figsize=(6.5, 0.5 + 0.35 * len(steps)), layout="constrained")
    axis = figure.subplots()
    # Dots and not bars: bars that do not start at 0 would exaggerate the gains.
    axis.plot(steps.score, steps.step, "o-", color="steelblue", markersize=4, linewidth=1)
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.4)
    for position, row in enumerate(steps.itertuples()):
        text = f"{row.score:.4f} ({row.gain:+.4f})"
        axis.text(1.01, position, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
    axis.set_xlabel("score, out of fold")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def rankings_figure(table: pd.DataFrame) -> Figure:
    """Draw one panel per ranking and one row per model, the best on top: the model's score, interval, recipe and changes.

    `table` has one row per model with the columns ranking, name, figure, score, low, high, images, recipe, changes and
    folds_fingerprint.
    """
    rankings = [rows for _, rows in table.groupby("ranking")]
    heights = [len(rows) + 2 for rows in rankings] or [1]
    figure = Figure(figsize=(9, 0.6 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    for axis in axes:
        axis.axis("off")
    # Rankings on the same folds share a colour.
    groups = list(dict.fromkeys(table["folds_fingerprint"]))
    for axis, rows in zip(axes, rankings, strict=False):
        first, positions = rows.iloc[0], range(len(rows))
        axis.axis("on")
        axis.hlines(positions, rows.low, rows.high, color=f"C{groups.index(first.folds_fingerprint) % 10}", linewidth=2)
        axis.plot(rows.score, positions, "o", color="black", markersize=4)
        for position, row in enumerate(rows.itertuples()):
            description = wrap("; ".join(filter(None, (row.recipe, row.changes))), 75, max_lines=2, placeholder=" ...")
            text = "\n".join([f"{row.score:.3f}  {''.join(description[:1])}", *description[1:]])
            axis.text(1.01, position, text, transform=axis.get_yaxis_transform(), va="center", fontsize=6)
        axis.set_yticks(positions, rows.name, fontsize=8)
        low, high = axis.get_xlim()
        axis.set(xlim=(max(low, 0.0), min(high, 1.0)), ylim=(len(rows) - 0.4, -0.6))
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        title = f"{first.figure}, {first.images} images, folds {first.folds_fingerprint}"
        axis.set_title(title, fontsize=9, loc="left")
    return figure


def _draw_boxes(
    axis: Axes,
    xray: CachedXray,
    truth: pd.DataFrame | None,
    predicted: pd.DataFrame | None,
    colours: Mapping[str, str],
) -> set[str]:
    """Draw annotated and predicted boxes, with scores; return the findings drawn.

    `colours` maps findings to colours. If it is not empty, boxes have the colour and name of their finding. A label that
    would cover another one is not printed; predicted boxes are labelled first, in descending order of score.
    """
    height, width = xray.pixels.shape
    scale = np.array([width / xray.columns, height / xray.rows] * 2)
    labels: list[tuple[str, str, float, float]] = []  # text, colour, left, bottom
    drawn: set[str] = set()
    effects = EDGED if colours else []
    for plain, boxes in ((TRUTH, truth), (PREDICTION, predicted)):
        of_kind = []
        if boxes is not None and "score" in boxes:
            boxes = boxes.sort_values("score", ascending=False, kind="stable")
        for row in () if boxes is None else boxes.itertuples():
            name = str(getattr(row, "finding", ""))
            drawn.add(name)
            xmin, ymin, xmax, ymax = np.array([getattr(row, side) for side in BOX]) * scale
            colour = colours.get(name, plain)
            style: dict[str, Any] = {"edgecolor": colour, "linestyle": _style(plain, colours), "path_effects": effects}
            axis.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, linewidth=1.3, **style))
            if text := " ".join([*([name] if colours else []), *([f"{row.score:.2f}"] if hasattr(row, "score") else [])]):
                bottom = ymin - 1 if plain == PREDICTION or not colours else ymax + 0.045 * height
                of_kind.append((text, colour, xmin, bottom))
        labels = of_kind + labels
    printed: list[tuple[float, float, float]] = []
    for text, colour, left, bottom in labels:
        wide = max(0.14, 0.017 * len(text)) * width
        if colours:  # names are long, so they must not reach into the next picture
            left, bottom = max(min(left, width - wide), 0), min(max(bottom, 0.05 * height), height - 1)
        if any(left < x + w and x < left + wide and abs(bottom - y) < 0.05 * height for x, y, w in printed):
            continue
        printed.append((left, bottom, wide))
        # Small coloured letters are hard to read on grey, so names are black letters on a tag in the colour of the finding.
        tag = {"color": "black", "bbox": {"facecolor": colour, "linewidth": 0, "pad": 0.5}} if colours else {"color": colour}
        axis.text(left, bottom, text, fontsize=6, va="bottom", **tag)
    return drawn


def _true_classes(labels: pd.DataFrame) -> dict[str, str]:
    """Return a dict that maps each id in `labels` to the names of its true classes, joined by commas."""
    classes = class_columns(labels, "labels")
    true = labels[classes].to_numpy() >= 0.5
    return {
        name: ", ".join(class_name for class_name, is_true in zip(classes, row, strict=True) if is_true)
        for name, row in zip(labels["id"], true, strict=True)
    }
