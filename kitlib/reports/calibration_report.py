"""How far probabilities of exclusive classes can be believed, as they are and after a temperature found on other folds."""

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from kitlib.reports.classification_report import Judged, overall
from kitlib.scoring.temperature import cross_scaled

FIGURES = ("ece", "brier", "log_loss")


def calibrated(given: Judged) -> tuple[Judged, pd.Series]:
    """The same images with each fold's probabilities scaled by the temperature of the other folds; temperatures by fold.

    Which class is called does not change. Raises ValueError for images of one fold alone.
    """
    scores = pd.DataFrame(given.found, columns=list(given.classes)).assign(fold=given.answers.fold)
    after, temperatures = cross_scaled(scores, given.classes, given.truth)
    found = after[list(given.classes)].to_numpy(float)
    return replace(given, answers=replace(given.answers, found=found)), temperatures


def calibration_table(given: Mapping[str, Judged]) -> pd.DataFrame:
    """A row a model: ece, brier and log_loss, each `before` and `after` scaling, and the mean `temperature` of its folds."""
    rows = {}
    for name, each in given.items():
        after, temperatures = calibrated(each)
        parts = {"before": overall(each), "after": overall(after)}
        rows[name] = {f"{figure} {when}": told[figure] for figure in FIGURES for when, told in parts.items()}
        rows[name]["temperature"] = temperatures.mean()
    return pd.DataFrame.from_dict(rows, orient="index")
