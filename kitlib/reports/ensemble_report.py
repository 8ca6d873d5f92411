"""Compares learners with their ensembles, scales ensembles by temperature, and draws the weight of each learner."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kitlib.fusion.ensemble_bundle import Ensemble
from kitlib.fusion.ensembles import Judged, combine
from kitlib.fusion.stacking import LearnerScores
from kitlib.fusion.test_split import TestSplitScores
from kitlib.reports import classification_report as report
from kitlib.reports.figures import BESIDE
from kitlib.reports.findings_report import Answers
from kitlib.scoring.temperature import cross_scaled, fit_temperature, scaled
from kitlib.tables import concatenate


def comparison(judged: Judged, learners: LearnerScores) -> pd.DataFrame:
    """Return a table of metrics, indexed by the name of the learner or ensemble and sorted by macro F1, the best last.

    The columns are `learns` (the predictions on which weights were fitted: a value of `judged.protocols`), `rows` (the
    number of images or studies), `macro_f1`, `accuracy`, `log_loss`, `ece`, and `f1 CLASS` for each class.
    """
    lines = []
    for model, rows in judged.scores.groupby("model", sort=False):
        answers = _judged(rows, learners)
        class_metrics, overall = report.class_table(answers).set_index("class"), report.overall(answers)
        figures = {name: overall[name] for name in ("accuracy", "log_loss", "ece")}
        f1 = {f"f1 {name}": class_metrics.f1[name] for name in learners.classes}
        columns = {
            "model": model,
            "learns": judged.protocols[model],
            "rows": len(rows),
            "macro_f1": class_metrics.f1["macro"],
        }
        lines.append({**columns, **figures, **f1})
    return pd.DataFrame(lines).sort_values("macro_f1", kind="stable").set_index("model")


def cross_scaled_scores(judged: Judged, learners: LearnerScores, model: str, name: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return the temperature-scaled scores of `model`, and the temperatures, each fitted on the other folds.

    The scaled rows have the model name `name`. The temperatures are indexed by fold; the entry "all" is the temperature
    fitted on all rows. Raises ValueError if there is only one fold.
    """
    rows = judged.scores[judged.scores["model"] == model].reset_index(drop=True)
    truth = learners.answers["truth"].loc[rows[learners.key]].to_numpy()
    scaled, temperatures = cross_scaled(rows, learners.classes, truth)
    temperatures["all"] = fit_temperature(rows[list(learners.classes)].to_numpy(dtype=float), truth)
    return scaled.assign(model=name), temperatures


def out_of_fold_temperature(ensemble: Ensemble, learners: LearnerScores) -> float:
    """Return the temperature of `ensemble`, fitted on its predictions from the learners' out-of-fold scores.

    This ignores that the ensemble's weights were fitted on the same images, so it may be too optimistic. With several folds,
    prefer `cross_scaled_scores`.
    """
    examples = learners.full_stack()
    return fit_temperature(combine(ensemble.method, ensemble.weights, examples.probabilities), examples.truth)


def collect_test_scores(judged: Judged, test: TestSplitScores, model: str, temperature: float, name: str) -> pd.DataFrame:
    """Return a `class_scores` table of the test images, with the scores of all learners and ensembles.

    Learners have one row per image and fold, ensembles one row per image. Unless `temperature` is 1, the table also has the
    temperature-scaled scores of `model`, with the model name `name`.
    """
    ensembles = judged.scores[~judged.scores["model"].isin(test.means.learners)]
    chosen, classes = judged.scores[judged.scores["model"] == model], list(test.means.classes)
    scaled_columns = pd.DataFrame(scaled(chosen[classes].to_numpy(dtype=float), temperature), chosen.index, classes)
    tables = [test.rows, ensembles, *([chosen.assign(model=name, **scaled_columns)] if temperature != 1 else [])]
    return concatenate(tables, "class_scores")


def weights_figure(weights: pd.DataFrame, learners: tuple[str, ...]) -> Figure:
    """Plot one panel per ensemble: each learner's weight for each true class, as a mean with a standard deviation."""
    names = list(dict.fromkeys(weights["model"]))
    figure = Figure(figsize=(max(4, 1 + 1.2 * len(learners)), 2.6 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0], names, strict=True):
        of_class = weights[weights["model"] == name].groupby("truth", sort=False)[list(learners)]
        spread = of_class.std().fillna(0.0).astype(float)
        of_class.mean().astype(float).T.plot.bar(ax=axis, yerr=spread.T, rot=20, width=0.8, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("weight")
        axis.legend(title="ground truth", fontsize=7, **BESIDE)
    return figure


def _judged(rows: pd.DataFrame, learners: LearnerScores) -> report.Judged:
    truth_table = learners.answers.loc[rows[learners.key]]
    truth = truth_table["truth"].to_numpy()
    of_class = np.eye(len(learners.classes))[truth]
    scores = rows[list(learners.classes)].to_numpy(dtype=float)
    answers = Answers(learners.classes, of_class, scores, rows["fold"].to_numpy(), truth_table["patient"].to_numpy())
    return report.Judged(answers, rows[learners.key].to_numpy(), np.full(len(rows), ""), truth)
