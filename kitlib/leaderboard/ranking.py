"""Ranks models by out-of-fold scores, which are recomputed from the tables in the models' runs.

Models are ranked together if they share the folds' fingerprint, the scored images, the ground truth of these images, and the
kind of prediction. Scores in different rankings are not comparable.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import LeaderboardError
from kitlib.leaderboard.entries import Entry, Predictions
from kitlib.leaderboard.listing import SHORT, describe
from kitlib.reports.classification_bootstrap import draws as class_draws
from kitlib.reports.classification_report import judged
from kitlib.reports.competition import interval, score_draws
from kitlib.reports.findings_report import answers, auc_draws
from kitlib.reports.lungs_report import dice_draws
from kitlib.scoring.score import truth_of

# Name of the score for each combination of predictions. With studies, nones or detections, the score is the competition's:
# the mean average precision (AP) over the predicted classes.
FIGURES = {
    ("studies", "nones", "detections"): "competition score",
    ("studies", "nones"): "mean AP of study classes and none",
    ("studies",): "mean AP of study classes",
    ("nones",): "AP of none",
    ("detections",): "AP of opacity",
    ("findings",): "mean ROC AUC",
    ("classes",): "macro F1",
    ("masks",): "mean Dice of the lungs",
}
COLUMNS = [
    *("ranking", "name", "kind", "model", "state", "recipe", "changes", "folds", "images", "figure", "score", "low", "high"),
    *("kaggle_public", "kaggle_private", "studies", "none", "opacity", "auc", "accuracy", "dice", "cross_fitted", "remark"),
    *("started", "wall_s", "training_s", "memory_mb", "gpu", "gpu_memory_mb", "host", "commit", "data_fingerprint"),
    "folds_fingerprint",
]


@dataclass(frozen=True)
class Leaderboard:
    """The ranked entries, and how far each entry's score is from the best score of its ranking.

    `table` has one row per entry, ordered by ranking and score; entries without a score come last. Its columns are COLUMNS.
    `differences` has one row per entry except the best of each ranking. Its columns are ranking, name, best (the name of the
    best entry), difference (the entry's score minus the best score, at most 0), and low and high (the paired 95 % interval
    of the difference).
    """

    table: pd.DataFrame
    differences: pd.DataFrame

    def rankings(self) -> dict[int, pd.DataFrame]:
        """Return the rows of `table` that belong to each ranking, keyed by the ranking's number, which starts at 1."""
        return {int(number): rows for number, rows in self.table.dropna(subset="ranking").groupby("ranking")}

    def summary(self) -> str:
        """Return a text that says how many models, rankings and unscored runs there are, and which scores not to compare."""
        ranked = self.table.dropna(subset="ranking")
        unranked = self.table[self.table["ranking"].isna()]
        groups = ranked["folds_fingerprint"].unique()
        sentences = [
            f"{len(ranked)} models in {ranked['ranking'].nunique()} rankings, {len(unranked)} other runs without a score. "
            "Models are ranked together if they share folds, scored images, ground truth and kind of prediction; scores in "
            "different rankings are not comparable."
        ]
        if len(groups) > 1:
            sentences.append(
                f"The models use {len(groups)} different sets of folds ({', '.join(groups)}): scores of models with "
                "different folds are not comparable."
            )
        if ranked.groupby(["folds_fingerprint", "figure"])["ranking"].nunique().gt(1).any():
            sentences.append(
                "Models with the same folds that are scored on different images, or against different labels or boxes, are "
                "ranked separately: set `folds` to folds that all of them have, or `compare` two of them."
            )
        return "\n".join(sentences)


def rank(entries: Iterable[Entry], samples: int = 200, seed: int = 0) -> Leaderboard:
    """Return the leaderboard of `entries`, with 95 % bootstrap intervals over patients for scores and differences.

    Differences are paired: the two models are scored on the same draws. `samples` is the number of bootstrap draws. Raises
    LeaderboardError if `samples` is below 1.
    """
    if samples < 1:
        raise LeaderboardError(f"`samples` is {samples}; expected at least 1 bootstrap draw, a few hundred for stability")
    rankings: dict[tuple[str, int, str, str], list[tuple[Entry, pd.DataFrame, dict[str, Any]]]] = {}
    unranked = []
    for entry in entries:
        if (predictions := entry.predictions) is None:
            unranked.append(_row(entry))
        else:
            figure = list(FIGURES).index(predictions.parts)
            images_digest = _digest(predictions.images["image_id"])
            key = entry.folds_fingerprint, figure, images_digest, _truth_digest(entry, predictions)
            draws = _draw_scores(predictions, entry.tables, samples, seed)
            rankings.setdefault(key, []).append((entry, draws, _scores_of_row(predictions, draws)))
    rows, differences = [], []
    for number, key in enumerate(sorted(rankings), start=1):
        # Entries whose score is undefined (NaN) for this ground truth come last.
        ranked = sorted(rankings[key], key=lambda item: -item[1]["score"].fillna(-1).iloc[0])
        best_entry, best_draws, _ = ranked[0]
        for entry, draws, scores in ranked:
            rows.append({"ranking": number, **_row(entry), **scores})
            if entry is not best_entry:
                difference = _difference(draws["score"] - best_draws["score"])
                differences.append({"ranking": number, "name": entry.name, "best": best_entry.name, **difference})
    table = pd.DataFrame([*rows, *unranked]).reindex(columns=COLUMNS).astype({"ranking": "Int64", "images": "Int64"})
    return Leaderboard(table, pd.DataFrame(differences, columns=["ranking", "name", "best", "difference", "low", "high"]))


def compare(
    entries: Iterable[Entry], first: str, second: str, across_folds: bool = False, samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Compare two models on the images that both have predicted; return a table of their scores and differences.

    `first` and `second` are names of entries, or of runs in entries. The table has one row for the score and one for each of
    its parts, with the columns `figure` (name of the score or part), `first`, `second`, `difference` (second minus first),
    `low` and `high` (the paired 95 % bootstrap interval of the difference, over patients), and `images` (the number of
    images). Raises LeaderboardError if a name is unknown, if a model has no score, or if the models share no images or no
    kind of prediction. Models with different folds are compared only if `across_folds` is true, otherwise LeaderboardError
    is raised: training on other patients changes the score too.
    """
    entries = list(entries)
    (entry, predictions), (other_entry, other_predictions) = _find_entry(entries, first), _find_entry(entries, second)
    if entry.folds_fingerprint != other_entry.folds_fingerprint and not across_folds:
        raise LeaderboardError(
            f"{entry.name!r} has folds {entry.folds_fingerprint[:SHORT]}, but {other_entry.name!r} has folds "
            f"{other_entry.folds_fingerprint[:SHORT]}. Their scores are not comparable, because the training patients "
            "differ. Train both on the same prepared run, or set `across_folds = True` to compare them anyway"
        )
    shared = set(predictions.images["image_id"]) & set(other_predictions.images["image_id"])
    parts = [part for part in predictions.parts if part in other_predictions.parts]
    if not shared or not parts:
        raise LeaderboardError(
            f"{entry.name!r} and {other_entry.name!r} cannot be compared: they share {len(shared)} images; "
            f"{entry.name!r} predicts {' and '.join(predictions.parts)}, and {other_entry.name!r} predicts "
            f"{' and '.join(other_predictions.parts)}"
        )
    images = predictions.images[predictions.images["image_id"].isin(shared)]
    draws, other_draws = (
        _draw_scores(Predictions(images, **{part: getattr(model, part) for part in parts}), entry.tables, samples, seed)
        for model in (predictions, other_predictions)
    )
    rows = []
    for name in draws.columns:
        if name in other_draws and draws[name].notna().any() and other_draws[name].notna().any():
            values = {"first": draws[name].iloc[0], "second": other_draws[name].iloc[0]}
            difference = _difference(other_draws[name] - draws[name])
            rows.append({"figure": name, **values, **difference, "images": len(shared)})
    return pd.DataFrame(rows)


def _draw_scores(predictions: Predictions, tables: dict[str, pd.DataFrame], samples: int, seed: int) -> pd.DataFrame:
    """Return a table with the score and its parts as columns, and as rows: all patients, then each bootstrap draw."""
    if predictions.findings is not None:
        scores = predictions.findings.set_index("image_id").loc[predictions.images["image_id"]].reset_index()
        drawn = auc_draws(answers(scores, predictions.images, tables["labels"]), samples, seed)
        return drawn.rename(columns={"mean": "score"})
    if predictions.classes is not None:
        scores = predictions.classes.set_index("image_id").loc[predictions.images["image_id"]].reset_index()
        drawn = class_draws(judged(scores, predictions.images, tables["labels"]), samples, seed)
        names = {"f1 macro": "score", "accuracy": "accuracy", "roc_auc macro": "auc", "log_loss": "log_loss"}
        return drawn[list(names)].rename(columns=names)
    if predictions.masks is not None:
        return dice_draws(predictions.masks, predictions.images, samples, seed)
    truth = truth_of(predictions.images, tables["labels"], tables["boxes"])
    if predictions.studies is None:
        truth = replace(truth, labels=truth.labels.head(0))
    drawn = score_draws(
        truth, predictions.studies, predictions.nones, predictions.detections, predictions.images, samples, seed
    )
    return drawn.assign(studies=drawn[list(STUDY_CLASSES)].mean(axis=1))


def _difference(draws: pd.Series) -> dict[str, float]:
    limits = interval(draws.to_numpy())
    return {"difference": limits["value"], "low": limits["low"], "high": limits["high"]}


def _row(entry: Entry) -> dict[str, Any]:
    fingerprints = {"data_fingerprint": entry.data_fingerprint[:SHORT], "folds_fingerprint": entry.folds_fingerprint[:SHORT]}
    model = {"model": entry.model} if entry.model else {}
    return {"name": entry.name, **describe(entry.runs), **model, "remark": entry.remark, **fingerprints}


def _scores_of_row(predictions: Predictions, draws: pd.DataFrame) -> dict[str, Any]:
    limits, values = interval(draws["score"].to_numpy()), draws.iloc[0]
    scores = {name: values.get(name) for name in ("studies", "none", "opacity")}
    if predictions.findings is not None:
        scores = {"auc": limits["value"]}
    elif predictions.classes is not None:
        scores = {name: values[name] for name in ("auc", "accuracy")}
    elif predictions.masks is not None:
        scores = {"dice": limits["value"]}
    spread = {"score": limits["value"], "low": limits["low"], "high": limits["high"]}
    return {"images": len(predictions.images), "figure": FIGURES[predictions.parts], **spread, **scores}


def _find_entry(entries: list[Entry], name: str) -> tuple[Entry, Predictions]:
    matches = [entry for entry in entries if name == entry.name or name in [run.name for run in entry.runs]]
    if not matches:
        available = ", ".join(entry.name for entry in entries if entry.predictions is not None)
        raise LeaderboardError(f"unknown run {name!r}; runs with a score: {available or 'none'}")
    if (predictions := matches[0].predictions) is None:
        raise LeaderboardError(f"{name} has no out-of-fold score (state {matches[0].runs[0].state}). {matches[0].remark}")
    return matches[0], predictions


def _digest(image_ids: pd.Series) -> str:
    return hashlib.sha256("\n".join(image_ids).encode()).hexdigest()


def _truth_digest(entry: Entry, predictions: Predictions) -> str:
    """Return a digest of the ground truth for the predicted images; file paths and other images do not change it."""
    if predictions.masks is not None:
        fingerprints = {str(fold.get("masks_fingerprint")) for run in entry.runs for fold in run.folds.values()}
        return " ".join(sorted(fingerprints))
    labels, boxes = entry.tables["labels"], entry.tables["boxes"]
    return data_fingerprint(
        labels=labels[labels["id"].isin(predictions.images["study_id"])],
        boxes=boxes[boxes["image_id"].isin(predictions.images["image_id"])],
    )
