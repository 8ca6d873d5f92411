"""Figures of study classifiers: out-of-fold images with their true and predicted classes."""

import pandas as pd
from matplotlib.figure import Figure

from kitlib.classes import STUDY_CLASSES
from kitlib.reports.figures import example_images
from kitlib.tables import study_labels
from kitlib.xrays.cache import XrayCache


def study_examples(
    cache: XrayCache,
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    study_scores: pd.DataFrame,
    image_scores: pd.DataFrame,
    count: int = 4,
) -> Figure:
    """Draw one image per study: in row 1 the studies whose true class got the highest probability, in row 2 the lowest.

    Each row has up to `count` images. An image shows its annotated boxes. Its title has the true class, the two most
    probable classes in `study_scores`, and `none` in `image_scores`; an empty table adds nothing to the titles. Studies
    without a known class are not drawn. The tables are as in `kitlib.tables`.
    """
    shown = images.merge(_answers(images, labels, boxes, study_scores, image_scores), on="image_id")
    shown = shown.drop_duplicates("study_id").sort_values("truth_found", ascending=False, kind="stable")
    chosen = pd.concat([shown.head(count), shown.tail(min(count, max(0, len(shown) - count)))[::-1]])
    figure = example_images(cache, chosen, boxes=boxes, per_row=count)
    for axis, title in zip(figure.axes, chosen.title, strict=False):
        axis.set_title(title, fontsize=7)
    return figure


def _answers(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    study_scores: pd.DataFrame,
    image_scores: pd.DataFrame,
) -> pd.DataFrame:
    """Return a table with the columns `image_id`, `title` and `truth_found` (predicted probability of the true class)."""
    classes = list(STUDY_CLASSES)
    studies = study_scores.groupby("study_id")[classes].mean()
    nones = image_scores.groupby("image_id").none.mean()
    truth = study_labels(labels).dropna().set_index("id").idxmax(axis=1)
    rows = []
    for image in images.itertuples():
        probabilities = studies.loc[image.study_id] if image.study_id in studies.index else None
        none = nones.get(image.image_id)
        if image.study_id not in truth.index or (probabilities is None and none is None):
            continue
        name, is_none = truth[image.study_id], image.image_id not in set(boxes.image_id)
        lines = [image.image_id, f"ground truth: {name}, {'no box' if is_none else 'boxes'}"]
        if probabilities is not None:
            lines.append(
                "predicted: "
                + "  ".join(f"{class_name} {value:.2f}" for class_name, value in probabilities.nlargest(2).items())
            )
        if none is not None:
            lines.append(f"predicted: none {none:.2f}")
        truth_probability = probabilities[name] if probabilities is not None else (none if is_none else 1 - none)
        rows.append({"image_id": image.image_id, "title": "\n".join(lines), "truth_found": truth_probability})
    return pd.DataFrame(rows, columns=["image_id", "title", "truth_found"])
