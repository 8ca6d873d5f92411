"""Which run is best: out-of-fold figures of all runs, computed anew from their tables and ranked only where they compare.

Runs are ranked together that share the folds' fingerprint, the images that are judged and their truth, and what they answer.
Two figures of different rankings say nothing about which model is better.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import LeaderboardError
from kitlib.leaderboard.entries import Answer, Entry
from kitlib.leaderboard.listing import SHORT, describe
from kitlib.reports.classification_bootstrap import draws as class_draws
from kitlib.reports.classification_report import judged
from kitlib.reports.competition import interval, score_draws
from kitlib.reports.findings_report import answers, auc_draws
from kitlib.reports.lungs_report import dice_draws
from kitlib.scoring.score import truth_of

# What the score of an answer is, by the parts that it has: the competition's mean over the average precisions among them.
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
    *("studies", "none", "opacity", "auc", "accuracy", "dice", "cross_fitted", "remark", "started", "wall_s", "training_s"),
    *("memory_mb", "gpu", "gpu_memory_mb", "host", "commit", "data_fingerprint", "folds_fingerprint"),
]


@dataclass(frozen=True)
class Leaderboard:
    """`table` has a row an entry, the best of each ranking first and what has no figure last; `differences` a row for each
    entry below the first of its ranking: difference to the first (negative), low and high of its paired interval."""

    table: pd.DataFrame
    differences: pd.DataFrame

    def rankings(self) -> dict[int, pd.DataFrame]:
        """The rows of each ranking, by its number."""
        return {int(number): rows for number, rows in self.table.dropna(subset="ranking").groupby("ranking")}

    def says(self) -> str:
        """How many rankings there are, and what does not compare."""
        ranked = self.table.dropna(subset="ranking")
        rest = self.table[self.table["ranking"].isna()]
        groups = ranked["folds_fingerprint"].unique()
        said = [
            f"{len(ranked)} models in {ranked['ranking'].nunique()} rankings, {len(rest)} further runs without a figure. "
            "Ranked together is what shares folds, judged images, their truth and what it answers; figures of different "
            "rankings are not comparable."
        ]
        if len(groups) > 1:
            said.append(
                f"There are {len(groups)} groups of different folds ({', '.join(groups)}): no figure of one may be held "
                "against a figure of another."
            )
        if ranked.groupby(["folds_fingerprint", "figure"])["ranking"].nunique().gt(1).any():
            said.append(
                "Models of one group that are judged on different images, or against different labels or boxes, stand "
                "apart: name `folds` that all of them have, or `compare` two."
            )
        return "\n".join(said)


def rank(entries: Iterable[Entry], samples: int = 200, seed: int = 0) -> Leaderboard:
    """Figures with intervals of 95 % over `samples` draws of whole patients, and paired differences within each ranking."""
    if samples < 1:
        raise LeaderboardError(f"samples is {samples}; intervals need at least 1 draw, and some hundreds to be steady")
    rankings: dict[tuple[str, int, str, str], list[tuple[Entry, pd.DataFrame, dict[str, Any]]]] = {}
    rest = []
    for entry in entries:
        if (answer := entry.answer) is None:
            rest.append(_row(entry))
        else:
            figure = list(FIGURES).index(answer.parts)
            key = entry.folds_fingerprint, figure, _digest(answer.images["image_id"]), _truth_digest(entry, answer)
            draws = _draws(answer, entry.tables, samples, seed)
            rankings.setdefault(key, []).append((entry, draws, _figures(answer, draws)))
    rows, differences = [], []
    for number, key in enumerate(sorted(rankings), start=1):
        # A figure that the truth does not define (NaN) comes last.
        ranked = sorted(rankings[key], key=lambda each: -each[1]["score"].fillna(-1).iloc[0])
        best = ranked[0]
        for entry, draws, figures in ranked:
            rows.append({"ranking": number, **_row(entry), **figures})
            if entry is not best[0]:
                told = _told(draws["score"] - best[1]["score"])
                differences.append({"ranking": number, "name": entry.name, "best": best[0].name, **told})
    table = pd.DataFrame([*rows, *rest]).reindex(columns=COLUMNS).astype({"ranking": "Int64", "images": "Int64"})
    return Leaderboard(table, pd.DataFrame(differences, columns=["ranking", "name", "best", "difference", "low", "high"]))


def compare(
    entries: Iterable[Entry], first: str, second: str, across_folds: bool = False, samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Second minus first for the score and each part that both answer: figure, first, second, difference, low, high, images.

    Judged on the images that both have, the same patients drawn for both. Names are those of entries or of runs in them.
    Raises LeaderboardError for an unknown name, one without a figure, nothing in common, and, unless `across_folds`, for
    models of different folds: a model that was trained on other patients differs by that, too.
    """
    entries = list(entries)
    (one, ones), (other, others) = _named(entries, first), _named(entries, second)
    if one.folds_fingerprint != other.folds_fingerprint and not across_folds:
        raise LeaderboardError(
            f"{one.name} has folds {one.folds_fingerprint[:SHORT]}, {other.name} {other.folds_fingerprint[:SHORT]}: their "
            "figures are not comparable, as each was trained on patients that the other is judged on; train both on one "
            "prepared run, or set across_folds = True to compare them all the same"
        )
    shared = set(ones.images["image_id"]) & set(others.images["image_id"])
    parts = [part for part in ones.parts if part in others.parts]
    if not shared or not parts:
        raise LeaderboardError(
            f"{one.name} and {other.name} have nothing in common: {len(shared)} images, and answers for "
            f"{' and '.join(ones.parts)} here, {' and '.join(others.parts)} there"
        )
    judged = ones.images[ones.images["image_id"].isin(shared)]
    cut = [Answer(judged, **{part: getattr(answer, part) for part in parts}) for answer in (ones, others)]
    both = [_draws(answer, one.tables, samples, seed) for answer in cut]
    rows = []
    for name in both[0].columns:
        if name in both[1] and both[0][name].notna().any() and both[1][name].notna().any():
            told = _told(both[1][name] - both[0][name])
            values = {"first": both[0][name].iloc[0], "second": both[1][name].iloc[0]}
            rows.append({"figure": name, **values, **told, "images": len(shared)})
    return pd.DataFrame(rows)


def _draws(answer: Answer, tables: dict[str, pd.DataFrame], samples: int, seed: int) -> pd.DataFrame:
    """Figures as columns, `score` first; the first row is of all patients, then one a draw."""
    if answer.findings is not None:
        scores = answer.findings.set_index("image_id").loc[answer.images["image_id"]].reset_index()
        drawn = auc_draws(answers(scores, answer.images, tables["labels"]), samples, seed)
        return drawn.rename(columns={"mean": "score"})
    if answer.classes is not None:
        scores = answer.classes.set_index("image_id").loc[answer.images["image_id"]].reset_index()
        drawn = class_draws(judged(scores, answer.images, tables["labels"]), samples, seed)
        kept = {"f1 macro": "score", "accuracy": "accuracy", "roc_auc macro": "auc", "log_loss": "log_loss"}
        return drawn[list(kept)].rename(columns=kept)
    if answer.masks is not None:
        return dice_draws(answer.masks, answer.images, samples, seed)
    truth = truth_of(answer.images, tables["labels"], tables["boxes"])
    if answer.studies is None:
        truth = replace(truth, labels=truth.labels.head(0))
    drawn = score_draws(truth, answer.studies, answer.nones, answer.detections, answer.images, samples, seed)
    return drawn.assign(studies=drawn[list(STUDY_CLASSES)].mean(axis=1))


def _told(draws: pd.Series) -> dict[str, float]:
    told = interval(draws.to_numpy())
    return {"difference": told["value"], "low": told["low"], "high": told["high"]}


def _row(entry: Entry) -> dict[str, Any]:
    known = {"data_fingerprint": entry.data_fingerprint[:SHORT], "folds_fingerprint": entry.folds_fingerprint[:SHORT]}
    named = {"model": entry.model} if entry.model else {}
    return {"name": entry.name, **describe(entry.runs), **named, "remark": entry.remark, **known}


def _figures(answer: Answer, draws: pd.DataFrame) -> dict[str, Any]:
    told, value = interval(draws["score"].to_numpy()), draws.iloc[0]
    figures = {name: value.get(name) for name in ("studies", "none", "opacity")}
    if answer.findings is not None:
        figures = {"auc": told["value"]}
    elif answer.classes is not None:
        figures = {name: value[name] for name in ("auc", "accuracy")}
    elif answer.masks is not None:
        figures = {"dice": told["value"]}
    spread = {"score": told["value"], "low": told["low"], "high": told["high"]}
    return {"images": len(answer.images), "figure": FIGURES[answer.parts], **spread, **figures}


def _named(entries: list[Entry], name: str) -> tuple[Entry, Answer]:
    found = [entry for entry in entries if name == entry.name or name in [run.name for run in entry.runs]]
    if not found:
        there = ", ".join(entry.name for entry in entries if entry.answer is not None)
        raise LeaderboardError(f"no run is called {name!r}; those with a figure are: {there or 'none'}")
    if (answer := found[0].answer) is None:
        raise LeaderboardError(f"{name} has no out-of-fold figure ({found[0].runs[0].state}) {found[0].remark}")
    return found[0], answer


def _digest(image_ids: pd.Series) -> str:
    return hashlib.sha256("\n".join(image_ids).encode()).hexdigest()


def _truth_digest(entry: Entry, answer: Answer) -> str:
    """Of what the answer is judged against: other images of a prepared run may differ, and paths as well."""
    if answer.masks is not None:
        told = {str(fold.get("masks_fingerprint")) for run in entry.runs for fold in run.folds.values()}
        return " ".join(sorted(told))
    labels, boxes = entry.tables["labels"], entry.tables["boxes"]
    return data_fingerprint(
        labels=labels[labels["id"].isin(answer.images["study_id"])],
        boxes=boxes[boxes["image_id"].isin(answer.images["image_id"])],
    )
