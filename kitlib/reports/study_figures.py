"""Pictures of a study classifier's answers: out-of-fold images with what is true and what was found."""

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
    """One image a study: in the first row `count` whose true class was found most surely, in the second the worst missed.

    Each has its annotated boxes and, above it, the true class, the three most probable ones and `none`. A model that answers
    only one of the two tables is shown by that one. Studies of unknown class are left out; tables as in `kitlib.tables`.
    """
    shown = images.merge(_answers(images, labels, boxes, study_scores, image_scores), on="image_id")
    shown = shown.drop_duplicates("study_id").sort_values("truth_found", ascending=False, kind="stable")
    chosen = pd.concat([shown.head(count), shown.tail(min(count, max(0, len(shown) - count)))[::-1]])
    figure = example_images(cache, chosen, boxes=boxes, a_row=count)
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
    """image_id, title and truth_found, the probability that the model gave to what is true."""
    classes = list(STUDY_CLASSES)
    studies = study_scores.groupby("study_id")[classes].mean()
    nones = image_scores.groupby("image_id").none.mean()
    truth = study_labels(labels).dropna().set_index("id").idxmax(axis=1)
    rows = []
    for image in images.itertuples():
        found = studies.loc[image.study_id] if image.study_id in studies.index else None
        none = nones.get(image.image_id)
        if image.study_id not in truth.index or (found is None and none is None):
            continue
        name, is_none = truth[image.study_id], image.image_id not in set(boxes.image_id)
        lines = [f"{image.image_id}: {name}, {'no box' if is_none else 'boxes'}"]
        if found is not None:
            lines.append("  ".join(f"{each} {value:.2f}" for each, value in found.nlargest(3).items()))
        if none is not None:
            lines.append(f"none {none:.2f}")
        sure = found[name] if found is not None else (none if is_none else 1 - none)
        rows.append({"image_id": image.image_id, "title": "\n".join(lines), "truth_found": sure})
    return pd.DataFrame(rows, columns=["image_id", "title", "truth_found"])
