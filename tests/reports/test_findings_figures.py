"""The figures show the values that they are called with."""

import numpy as np
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
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("false positive rate", "recall")
    assert (figure.axes[0].get_xlim(), figure.axes[0].get_aspect()) == ((0, 1), 1)
    assert lines[0].get_xydata().tolist() == [[0, 0], [1, 1]] and lines[3].get_xydata().tolist() == curve.to_numpy().tolist()
    # Each style is used for ten lines, until matplotlib's colours repeat.
    styles = [line.get_linestyle() for line in roc_figure({f"{number}": curve for number in range(31)}).axes[0].lines[1:]]
    assert styles == ["-"] * 10 + ["--"] * 10 + [":"] * 10 + ["-"]
    assert not roc_figure({}).legends


def test_the_mean_is_drawn_above_the_classes():
    intervals = pd.DataFrame({"name": ["mean", "Mass"], "value": [0.8, 0.7], "low": [0.7, 0.6], "high": [0.9, 0.8]})
    axis = auc_figure(intervals).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mean", "Mass"] and axis.yaxis_inverted()
    assert axis.get_title() == "ROC AUC with its interval over patients" and axis.lines[-1].get_xdata() == [0.5, 0.5]


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
    assert np.array_equal(axes[0].images[0].get_array(), small.pixels["image002"])
    labels = pd.DataFrame([("study001", 0.4, 0.4, 0.4, 0.4), ("study002", 0, 0.5, 0.5, 0)], columns=["id", *classes])
    titles = [axis.get_title().split(": ")[-1] for axis in findings_images(small, scores, small.images, labels).axes[:3]]
    assert titles == ["none of the classes", "none of the classes", "typical, indeterminate"]
