"""Scaling on other folds: what is known of a FLANNEL-like, under-confident model, and of a single fold."""

import numpy as np
import pandas as pd
import pytest

from kitlib.reports.calibration_report import calibrated, calibration_table
from kitlib.reports.classification_report import judged
from tests.reports.test_classification_report import CLASSES, tables


def soft_model(count=3000, temperature=4.0):
    """Truth drawn from probabilities p, and a model that says p^(1/T): its right temperature is 1/T."""
    scores, images, labels = tables(count)
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(3, 0.3), count)
    truth = (rng.random((count, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    soft = p.clip(1e-6) ** (1 / temperature)
    scores[CLASSES] = soft / soft.sum(axis=1, keepdims=True)
    labels[CLASSES] = np.eye(3)[truth]
    return judged(scores, images, labels)


def test_an_under_confident_model_is_sharpened_to_what_the_truth_was_drawn_from():
    given = soft_model()
    after, temperatures = calibrated(given)
    assert sorted(temperatures.index) == [0, 1] and temperatures.to_numpy() == pytest.approx(0.25, abs=0.03)
    assert (after.called == given.called).all()
    row = calibration_table({"flannel": given}).loc["flannel"]
    assert row["ece before"] > 0.2 and row["ece after"] < 0.03
    assert row["log_loss after"] < row["log_loss before"] and row["brier after"] < row["brier before"]
    assert row.temperature == pytest.approx(temperatures.mean())


def test_a_temperature_of_one_changes_no_figure_of_votes(monkeypatch):
    scores, images, labels = tables(60)
    scores[CLASSES] = np.eye(3)[scores[CLASSES].to_numpy().argmax(axis=1)]
    monkeypatch.setattr("kitlib.scoring.temperature.fit_temperature", lambda found, truth: 1.0)
    row = calibration_table({"vote": judged(scores, images, labels)}).loc["vote"]
    for figure in ("ece", "brier", "log_loss"):
        assert row[f"{figure} after"] == pytest.approx(row[f"{figure} before"], abs=1e-6)


def test_one_fold_cannot_be_scaled_on_others():
    scores, images, labels = tables(20)
    with pytest.raises(ValueError, match=r"scores of one fold \(0\)"):
        calibration_table({"m": judged(scores[scores.fold == 0], images, labels)})
    assert calibration_table({}).empty and isinstance(calibration_table({}), pd.DataFrame)
