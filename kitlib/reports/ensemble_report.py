"""Learners and their ensembles side by side, and how much each learner weighs."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kitlib.fusion.ensemble_bundle import Ensemble
from kitlib.fusion.ensembles import Judged, combine
from kitlib.fusion.stacking import LearnerScores
from kitlib.fusion.test_split import TestSplitScores
from kitlib.reports import classification_report as report
from kitlib.reports.findings_report import Answers
from kitlib.scoring.temperature import cross_scaled, fit_temperature, scaled
from kitlib.tables import concatenate


def comparison(judged: Judged, found: LearnerScores) -> pd.DataFrame:
    """A row a learner and ensemble, best macro F1 last: protocol, rows, macro_f1, accuracy, log_loss, ece, F1 of each class.

    Of images or of studies, whichever the learners answer.
    """
    lines = []
    for model, rows in judged.scores.groupby("model", sort=False):
        answers = _judged(rows, found)
        of_class, overall = report.class_table(answers).set_index("class"), report.overall(answers)
        figures = {name: overall[name] for name in ("accuracy", "log_loss", "ece")}
        f1 = {f"f1 {name}": of_class.f1[name] for name in found.classes}
        told = {"model": model, "learns": judged.protocols[model], "rows": len(rows), "macro_f1": of_class.f1["macro"]}
        lines.append({**told, **figures, **f1})
    return pd.DataFrame(lines).sort_values("macro_f1", kind="stable").set_index("model")


def cross_scaled_scores(judged: Judged, found: LearnerScores, model: str, name: str) -> tuple[pd.DataFrame, pd.Series]:
    """The rows of `model` under the name `name`, each fold at the temperature of the others; the temperatures by fold.

    At "all" there is that of all its rows. Raises ValueError for a single fold.
    """
    rows = judged.scores[judged.scores["model"] == model].reset_index(drop=True)
    truth = found.answers["truth"].loc[rows[found.key]].to_numpy()
    scaled, temperatures = cross_scaled(rows, found.classes, truth)
    temperatures["all"] = fit_temperature(rows[list(found.classes)].to_numpy(dtype=float), truth)
    return scaled.assign(model=name), temperatures


def out_of_fold_temperature(kept: Ensemble, found: LearnerScores) -> float:
    """The temperature of `kept` on the out-of-fold scores of all its learners' images.

    Weights that were learnt from these very images count as if they were of others: where there are several folds, the
    temperature of `cross_scaled_scores` is to be preferred.
    """
    lesson = found.full_stack()
    return fit_temperature(combine(kept.method, kept.weights, lesson.probabilities), lesson.truth)


def test_split_scores(judged: Judged, test: TestSplitScores, model: str, temperature: float, name: str) -> pd.DataFrame:
    """The table class_scores of test images: learners by fold, ensembles and, as `name`, `model` at `temperature`.

    At a temperature of 1 there is no such row.
    """
    ensembles = judged.scores[~judged.scores["model"].isin(test.means.learners)]
    kept, classes = judged.scores[judged.scores["model"] == model], list(test.means.classes)
    after = pd.DataFrame(scaled(kept[classes].to_numpy(dtype=float), temperature), kept.index, classes)
    tables = [test.rows, ensembles, *([kept.assign(model=name, **after)] if temperature != 1 else [])]
    return concatenate(tables, "class_scores")


def weights_figure(weights: pd.DataFrame, learners: tuple[str, ...]) -> Figure:
    """A panel an ensemble: the mean weight of each learner, a bar a true class, with its standard deviation over images."""
    names = list(dict.fromkeys(weights["model"]))
    figure = Figure(figsize=(max(4, 1 + 1.2 * len(learners)), 2.6 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0], names, strict=True):
        of_class = weights[weights["model"] == name].groupby("truth", sort=False)[list(learners)]
        spread = of_class.std().fillna(0.0).astype(float)
        of_class.mean().astype(float).T.plot.bar(ax=axis, yerr=spread.T, rot=20, width=0.8, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("weight")
        axis.legend(fontsize=7)
    return figure


def _judged(rows: pd.DataFrame, found: LearnerScores) -> report.Judged:
    known = found.answers.loc[rows[found.key]]
    truth = known["truth"].to_numpy()
    of_class = np.eye(len(found.classes))[truth]
    scores = rows[list(found.classes)].to_numpy(dtype=float)
    answers = Answers(found.classes, of_class, scores, rows["fold"].to_numpy(), known["patient"].to_numpy())
    return report.Judged(answers, rows[found.key].to_numpy(), np.full(len(rows), ""), truth)
