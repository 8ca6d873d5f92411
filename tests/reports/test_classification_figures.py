"""The figures show the numbers that they are called with."""

import numpy as np
import pandas as pd
import pytest

from kitlib.reports.classification_bootstrap import paired_differences
from kitlib.reports.classification_figures import (
    class_curves,
    confusion_figure,
    examples,
    extreme_folds,
    intervals_figure,
    model_curves,
    reliability,
    reliability_figure,
)
from kitlib.reports.classification_report import class_table, confusion, judged, overall
from tests.reports.test_classification_report import CLASSES, tables
from tests.small_xrays import SmallXrays


def test_confusion_shows_counts_and_shares_of_rows():
    predictions = judged(*tables())
    figure = confusion_figure({"m": predictions, "again": predictions})
    texts = [text.get_text() for text in figure.axes[1].texts]
    matrix = confusion(predictions).to_numpy()
    assert texts[1] == f"{matrix[0, 1]:,}\n{matrix[0, 1] / matrix[0].sum():.1%}" and len(texts) == 9


def test_extreme_folds_are_the_least_and_the_most_accurate():
    predictions = judged(*tables())
    right, folds = predictions.predicted == predictions.truth, predictions.answers.fold
    accuracy = {fold: right[folds == fold].mean() for fold in (0, 1)}
    worst, best = sorted(accuracy, key=accuracy.get)
    chosen = extreme_folds({"m": predictions})
    assert list(chosen) == [
        f"m\n{which} fold, {fold}: accuracy {accuracy[fold]:.1%}" for which, fold in (("worst", worst), ("best", best))
    ]
    assert [len(part.truth) for part in chosen.values()] == [(folds == fold).sum() for fold in (worst, best)]


def test_curves_name_their_areas_and_omit_undefined_ones():
    predictions = judged(*tables())
    table = class_table(predictions).set_index("class")
    *_, roc, pr = class_curves({"other": predictions, "m": predictions}).axes
    assert roc.get_title() == "m"
    labels = [text.get_text() for axis in (roc, pr) for text in axis.get_legend().texts]
    expected = [f"{name} (AUC {table.roc_auc[name]:.3f})" for name in CLASSES]
    assert labels == expected + [f"{name} (AP {table.pr_auc[name]:.3f})" for name in CLASSES]
    assert (roc.get_xlabel(), roc.get_ylabel()) == ("false positive rate", "sensitivity")
    assert (pr.get_xlabel(), pr.get_ylabel()) == ("sensitivity", "precision")
    assert [(axis.get_xlim(), axis.get_aspect()) for axis in (roc, pr)] == [((0, 1), 1)] * 2
    diagonal, *curves = (line.get_xydata().T for line in roc.lines)
    assert diagonal.tolist() == [[0, 1], [0, 1]]
    for name, (x, y), line in zip(CLASSES, curves, pr.lines, strict=True):
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(table.roc_auc[name])
        recall, precision = line.get_xydata().T
        assert line.get_drawstyle() == "steps-post"
        assert np.sum(-np.diff(recall) * precision[:-1]) == pytest.approx(table.pr_auc[name])
    one, _ = model_curves({"m": predictions}, "viral").axes
    assert one.get_title() == "viral against the others"
    assert [text.get_text() for text in one.get_legend().texts] == [f"m (AUC {table.roc_auc['viral']:.3f})"]
    lonely = predictions.rows(predictions.truth == 0)
    for name in ("viral", "COVID-19"):
        assert model_curves({"m": lonely}, name).axes[0].get_legend() is None
    with pytest.raises(ValueError, match=r"'m' has no class 'Mass'; its classes are \['COVID-19', 'viral', 'normal'\]"):
        model_curves({"m": predictions}, "Mass")


def test_reliability_counts_every_image_once():
    predictions = judged(*tables())
    confidence, is_right = predictions.probabilities.max(axis=1).mean(), (predictions.predicted == predictions.truth).mean()
    for bins in (reliability(predictions), reliability(predictions, bins=1000)):  # of 1000 bins, many have one image
        assert bins["count"].sum() == 240
        assert np.average(bins.observed, weights=bins["count"]) == pytest.approx(is_right)
        assert np.average(bins.predicted, weights=bins["count"]) == pytest.approx(confidence)
    bins, axes = reliability(predictions), reliability_figure({"before": predictions, "after": predictions}).axes
    error = f"ECE {overall(predictions)['ece']:.3f}"
    assert [axis.get_title() for axis in axes] == [f"before\n{error}", f"after\n{error}"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("confidence", "share correct")
    assert (axes[0].get_xlim(), axes[0].get_aspect()) == ((0, 1), 1)
    diagonal, line = axes[0].lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert line.get_xydata() == pytest.approx(bins[["predicted", "observed"]].to_numpy())
    (dots,) = axes[0].collections
    assert np.array_equal(dots.get_offsets(), line.get_xydata())
    # The area of a dot is a linear function of its number of images.
    assert np.corrcoef(dots.get_sizes(), bins["count"])[0, 1] == pytest.approx(1)


def test_intervals_have_one_panel_per_metric():
    scores, images, labels = tables(60)
    predictions = {"mean": judged(scores, images, labels), "other": judged(scores, images, labels)}
    differences = paired_differences(predictions, "mean", samples=5)
    figure = intervals_figure(differences[differences["name"].isin(["accuracy", "f1 macro"])], line=0)
    assert [axis.get_title() for axis in figure.axes] == ["accuracy", "f1 macro"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["other"]


def test_intervals_are_bars_from_top_to_bottom_with_a_dot_for_the_value():
    rows = [("a", "f1", 0.5, 0.4, 0.7), ("b", "f1", 0.6, 0.5, 0.8), ("b", "ece", 0.1, 0.0, 0.2)]
    table = pd.DataFrame(rows, columns=["model", "name", "value", "low", "high"])
    first, second = intervals_figure(table, line=0.5).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"] and first.get_ylim() == (1.5, -0.5)
    assert [bar.tolist() for bar in first.collections[0].get_segments()] == [[[0.4, 0], [0.7, 0]], [[0.5, 1], [0.8, 1]]]
    dots, line = first.lines
    assert dots.get_xydata().tolist() == [[0.5, 0], [0.6, 1]] and line.get_xdata() == [0.5, 0.5]
    # The first model has no value of the second metric.
    assert second.lines[0].get_xydata()[1].tolist() == [0.1, 1] and np.isnan(second.lines[0].get_xdata()[0])
    assert [len(axis.lines) for axis in intervals_figure(table).axes] == [1, 1]


def test_examples_show_each_class_right_and_wrong_with_its_probabilities():
    scores, images, labels = tables(60)
    small = SmallXrays(60)
    ids = dict(zip(images.image_id, small.image_ids, strict=True))
    predictions = judged(*(table.replace(ids) for table in (scores, images, labels)))
    figure = examples(predictions, small, count=3)
    upper, lower = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title().split("\n")[1] for axis in upper] == [
        f"ground truth: {predictions.classes[p]} (correct)" for p in _order(predictions, True)
    ]
    assert all(axis.get_title().endswith(" (wrong)") for axis in lower if axis.images)
    assert all(len(axis.get_xticks()) == len(axis.get_yticks()) == 0 for axis in figure.axes)
    (picture,) = upper[0].images
    assert (picture.get_cmap().name, picture.get_clim()) == ("gray", (0, 255))
    shown = predictions.image_id.tolist().index(upper[0].get_title().split("\n")[0])
    assert (
        upper[0].get_xlabel().split("\n")[0]
        == f"{CLASSES[predictions.predicted[shown]]} {predictions.probabilities[shown].max():.2f}"
    )


def _order(predictions, right):
    """Return the three classes in the order of their most confident correct image."""
    rows = np.flatnonzero((predictions.predicted == predictions.truth) == right)
    rows = rows[np.argsort(-predictions.probabilities.max(axis=1)[rows], kind="stable")]
    return list(dict.fromkeys(predictions.truth[rows].tolist()))[:3]
