"""Learners and ensembles in one table, with metrics that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest

from kitlib.fusion.ensemble_bundle import learnt_ensemble
from kitlib.fusion.ensembles import judge_ensembles
from kitlib.fusion.flannel import ENSEMBLES
from kitlib.fusion.stacking import gather
from kitlib.reports.ensemble_report import comparison, cross_scaled_scores, weights_figure
from kitlib.scoring.temperature import fit_temperature

CLASSES = ["sick", "well"]


@pytest.fixture(scope="module")
def learner_scores():
    """Eight images in two folds: `good` is right seven times, `bad` is never right."""
    ids = [f"i{k}" for k in range(8)]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids})
    truth = np.arange(8) // 2 % 2
    labels = pd.DataFrame(np.eye(2)[truth], columns=CLASSES).assign(id=ids)
    folds = pd.DataFrame({"id": ids, "fold": np.arange(8) % 2})
    predicted = {"good": np.where(np.arange(8) == 0, 1 - truth, truth), "bad": 1 - truth}
    tables = [
        pd.DataFrame(0.2 + 0.6 * np.eye(2)[classes], columns=CLASSES).assign(image_id=ids, model=name, fold=folds.fold)
        for name, classes in predicted.items()
    ]
    return gather(tables, images, labels, folds)


def test_the_table_has_a_row_for_each_learner_and_ensemble(learner_scores):
    judged = judge_ensembles(learner_scores, {name: ENSEMBLES[name] for name in ("mean", "weighted")})
    table = comparison(judged, learner_scores)
    assert set(table.index) == {"good", "bad", "mean", "weighted"} and (table.learns == "cross-fitted").all()
    assert table.accuracy["good"] == 7 / 8 and table.accuracy["bad"] == 0 and (table["rows"] == 8).all()
    # sick: 3 of 4 images are found without false positives: F1 6/7; well: 4 of 4 with one false positive: F1 8/9.
    assert table.macro_f1["good"] == pytest.approx((6 / 7 + 8 / 9) / 2) and table["f1 sick"]["good"] == pytest.approx(6 / 7)
    assert table.log_loss["bad"] == pytest.approx(-np.log(0.2))
    # The confidence is always 0.8, and never right.
    assert table.ece["bad"] == pytest.approx(0.8) and table.ece["good"] == pytest.approx(7 / 8 - 0.8)
    assert table.index[0] == "bad" and table.macro_f1.is_monotonic_increasing
    assert list(table) == ["learns", "rows", "macro_f1", "accuracy", "log_loss", "ece", "f1 sick", "f1 well"]
    # In both folds the good learner gets all of the weight.
    assert table.loc["weighted", "accuracy"] == 7 / 8 and judged.weights.good.min() > 0.999
    (axis,) = weights_figure(judged.weights, learner_scores.learners).axes
    assert axis.get_title() == "weighted" and axis.get_ylabel() == "weight"
    bars = [each for each in axis.containers if each.get_label() in CLASSES]
    assert [each.get_label() for each in bars] == CLASSES
    for name, each in zip(CLASSES, bars, strict=True):
        means = judged.weights[judged.weights["truth"] == name][["good", "bad"]].mean()
        assert [patch.get_height() for patch in each.patches] == pytest.approx(means.tolist())


def test_scores_are_scaled_on_the_other_fold_and_the_final_ensemble_records_its_protocol(learner_scores):
    judged = judge_ensembles(learner_scores, {"mean": ENSEMBLES["mean"]})
    scaled, temperatures = cross_scaled_scores(judged, learner_scores, "good", "good scaled")
    assert set(scaled.model) == {"good scaled"} and set(temperatures.index) == {0, 1, "all"}
    rows = judged.scores[(judged.scores.model == "good") & (judged.scores.fold == 1)]
    truth = learner_scores.answers.truth.loc[rows.image_id].to_numpy()
    assert temperatures[0] == pytest.approx(fit_temperature(rows[CLASSES].to_numpy(), truth))
    # Seven of eight are right, with odds of 4: log 4 / T = log 7.
    assert temperatures["all"] == pytest.approx(np.log(4) / np.log(7), abs=1e-3)
    ensemble = learnt_ensemble(learner_scores, "ensemble", ENSEMBLES["weighted"], temperature=0.8)
    assert (ensemble.name, ensemble.method, ensemble.folds, ensemble.protocol) == (
        "ensemble",
        "weighted",
        (0, 1),
        "cross-fitted",
    )
    assert (
        ensemble.weights["learners"].tolist() == pytest.approx([1, 0], abs=1e-3)
        and ensemble.settings["method"] == "weighted"
    )
