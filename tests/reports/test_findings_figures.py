"""The figures show the values that they are called with."""

import pandas as pd

from kitlib.reports.findings_figures import auc_figure, findings_images, roc_figure
from kitlib.tables import class_columns
from tests.small_xrays import SmallXrays


def test_a_line_for_each_class_and_the_diagonal():
    curve = pd.DataFrame({"false_positives": [0, 0.5, 1], "recall": [0, 1, 1]})
    figure = roc_figure({f"class {number}": curve for number in range(15)})
    lines = figure.axes[0].lines
    assert len(lines) == 16 and lines[1].get_linestyle() != lines[11].get_linestyle()
    assert [text.get_text() for text in figure.legends[0].texts][:2] == ["class 0", "class 1"]
    roc_figure({})


def test_the_mean_is_drawn_above_the_classes():
    intervals = pd.DataFrame({"name": ["mean", "Mass"], "value": [0.8, 0.7], "low": [0.7, 0.6], "high": [0.9, 0.8]})
    axis = auc_figure(intervals).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mean", "Mass"] and axis.yaxis_inverted()


def test_pictures_name_the_truth_and_the_most_probable_classes():
    small = SmallXrays(8)
    classes = class_columns(small.labels, "labels")
    scores = pd.DataFrame({"image_id": small.image_ids[2:5], "model": "m", "fold": 0})
    scores[classes] = [0.1, 0.7, 0.3, 0.2]
    figure = findings_images(small, scores, small.images, small.labels, per_row=2)
    axes = figure.axes
    truth = {"image002": "typical", "image003": "typical", "image004": "indeterminate"}
    assert [axis.get_title() for axis in axes] == [*(f"{image}\nground truth: {name}" for image, name in truth.items()), ""]
    assert axes[0].texts[0].get_text() == "typical 0.70\nindeterminate 0.30\natypical 0.20"
    assert axes[0].images[0].get_array().shape == small.pixels["image002"].shape
