"""Which run is best: out-of-fold figures of all runs, computed anew from their tables and ranked only where they compare.

Runs are ranked together that share the folds' fingerprint, the images that are judged and their truth, and what they answer.
Two figures of different rankings say nothing about which model is better.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import LeaderboardError
from kitlib.fusion.model_fusion import FusionSettings, fuse_scores
from kitlib.leaderboard.listing import SHORT, ListedRun, describe, list_run
from kitlib.leaderboard.prepared import PreparedRuns, named_folder
from kitlib.reports.classification_bootstrap import draws as class_draws
from kitlib.reports.classification_report import by_model, judged
from kitlib.reports.competition import interval, score_draws
from kitlib.reports.findings_report import answers, auc_draws, mean_over_folds
from kitlib.reports.lungs_report import dice_draws
from kitlib.runs.finished_run import check_out_of_fold, judged_images, read_fused, read_out_of_fold
from kitlib.scoring.score import truth_of
from kitlib.tables import concatenate, read_table

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
class Answer:
    """What a model says out of fold of `images`, rows of that table in the order of their ids; a part may be None.

    `findings` and `classes` are both tables class_scores, the second of classes of which exactly one is true.
    """

    images: pd.DataFrame
    studies: pd.DataFrame | None = None
    nones: pd.DataFrame | None = None
    detections: pd.DataFrame | None = None
    findings: pd.DataFrame | None = None
    classes: pd.DataFrame | None = None
    masks: pd.DataFrame | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        known = ("studies", "nones", "detections", "findings", "classes", "masks")
        return tuple(name for name in known if getattr(self, name) is not None)


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard: a run, runs that hold the folds of one model, or one ensemble, `model`, of a run.

    `answer` is None for what has no out-of-fold figure, and `remark` says why where there should be one. `tables` are those
    of the prepared run that it was trained on, none without an answer.
    """

    name: str
    runs: tuple[ListedRun, ...]
    remark: str
    folds_fingerprint: str = ""
    data_fingerprint: str = ""
    answer: Answer | None = None
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    model: str = ""


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


def read_entries(runs: Iterable[ListedRun], folds: Iterable[int] = ()) -> list[Entry]:
    """The entries of listed runs. `folds`: answers are judged on the images of these alone; none given: of all.

    Runs in one folder that hold different folds of one model, trained alike, are one entry; of a run of ensembles each is
    one, and its learners have theirs by their own runs.
    """
    runs, chosen = list(runs), frozenset(folds)
    prepared = PreparedRuns(runs)
    return [
        _entry(together, runs, prepared, chosen, model) for together in _by_model(runs) for model in _ensembles(together[0])
    ]


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


def _ensembles(run: ListedRun) -> list[str]:
    """The ensembles of such a run that have scores; of any other run one without a name."""
    path = run.folder / "tables" / "class_scores.parquet"
    if run.kind != "ensemble" or run.state != "finished" or not path.is_file():
        return [""]
    try:
        models = by_model(read_table("class_scores", path))
    except (OSError, ValueError):
        return [""]  # its one line says what is wrong
    return [name for name in models if name not in run.metrics.get("learners", ())] or [""]


def _by_model(runs: list[ListedRun]) -> list[tuple[ListedRun, ...]]:
    """Runs of one folder that were trained alike but for their folds; each of the others by itself, in the runs' order."""
    groups: dict[Any, list[ListedRun]] = {}
    for place, run in enumerate(runs):
        known = [{key: value for key, value in fold.items() if key in SAME} for fold in run.folds.values()]
        if run.nested:
            # Each outer fold leaves other data; that they are of one prepared run is found out with it.
            whole = {"data_fingerprint": run.metrics.get("folds_fingerprint")}
            known = [fold | whole for fold in known]
        alike = run.state == "finished" and known and all(each == known[0] for each in known)
        key = (run.folder.parent, repr(sorted(known[0].items()))) if alike else place
        groups.setdefault(key, []).append(run)
    found: list[tuple[ListedRun, ...]] = []
    for together in groups.values():
        folds = [fold for run in together for fold in run.folds]
        found += [tuple(together)] if len(folds) == len(set(folds)) else [(run,) for run in together]
    return found


# Of a fold's metrics: what all folds of one model have in common.
SAME = (
    "model",
    "recipe",
    "seed",
    "limit_train",
    "limit_validation",
    "longest_side",
    "data_fingerprint",
    "extra",
    "masks_fingerprint",
    "lungs_fingerprint",
)


def _entry(
    together: tuple[ListedRun, ...], runs: list[ListedRun], prepared: PreparedRuns, folds: frozenset[int], model: str
) -> Entry:
    run = together[0]
    remarks = dict.fromkeys(each.remark for each in together if each.remark)
    name = _joined([each.name for each in together])
    entry = Entry(f"{name}: {model}" if model else name, together, "; ".join(remarks), model=model)
    sources = list(together)
    if run.kind == "fusion":
        sources = [found for name in run.metrics.get("runs", ()) if (found := _listed(name, run, runs)) is not None]
    prints = sorted({fold.get("data_fingerprint", "") for source in sources for fold in source.folds.values()})
    if run.kind == "prepared" and run.state == "finished":
        return _of_prepared(entry, run)
    told = {fold["folds_fingerprint"] for source in sources for fold in source.folds.values() if "folds_fingerprint" in fold}
    if len(prints) == 1:
        entry = replace(entry, folds_fingerprint=told.pop() if len(told) == 1 else "", data_fingerprint=prints[0])
    if run.state != "finished" or run.kind not in ("study", "detector", "findings", "ensemble", "lungs", "fusion"):
        return entry
    try:
        if run.kind == "ensemble" or run.nested:
            there = prepared.find_whole(together)
            entry = replace(entry, folds_fingerprint=there[0], data_fingerprint=data_fingerprint(**there[1]))
        else:
            if len(prints) != 1:
                raise LeaderboardError(f"its models were trained on {len(prints)} sets of data instead of one")
            known = prepared.find(prints[0], run)
            if known is None:
                raise LeaderboardError(f"the prepared run with data fingerprint {prints[0][:SHORT]} is not here")
            there = known
            entry = replace(entry, folds_fingerprint=there[0], data_fingerprint=prints[0])
        answer = _answer(together, there[1], folds, model)
        if answer.images.empty:
            raise LeaderboardError(f"no image of the folds {sorted(folds)} is answered")
        return replace(entry, answer=answer, tables=there[1])
    # A damaged table raises pyarrow's errors, which are ValueError and OSError, as this kit's are.
    except (OSError, ValueError, KeyError) as error:
        why = error.args[0] if isinstance(error, KeyError) and error.args else error
        own = run.metrics.get("score")
        said = f", its own metrics.json says {own:.4f}" if isinstance(own, float) else ""
        return replace(entry, remark="; ".join(filter(None, (entry.remark, f"no figure: {why}{said}"))))


def _answer(runs: tuple[ListedRun, ...], tables: dict[str, pd.DataFrame], folds: frozenset[int], model: str = "") -> Answer:
    """The out-of-fold answer of one model, on images of `folds`. Raises RunError for one that is not out of fold."""
    fold_of = tables["folds"].set_index("id")["fold"]
    images = tables["images"][tables["images"]["image_id"].isin(fold_of.index)].sort_values("image_id")
    if folds:
        images = images[images["image_id"].map(fold_of).isin(folds)]
    if runs[0].kind == "fusion":
        fused = read_fused(runs[0].folder)
        return Answer(judged_images(images, fused), fused.studies, fused.nones, fused.detections)
    if runs[0].kind == "findings" or model:
        read = [read_table("class_scores", run.folder / "tables" / "class_scores.parquet") for run in runs]
        scores = concatenate([table[table["model"] == model] if model else table for table in read], "class_scores")
        check_out_of_fold(scores, "image_id", fold_of)
        scores = scores[scores["image_id"].isin(images["image_id"])]
        images, scores = images[images["image_id"].isin(scores["image_id"])], mean_over_folds(scores)
        recipes = [fold.get("recipe") or {} for run in runs for fold in run.folds.values()]
        if not model and any(recipe.get("multi_label", True) for recipe in recipes):
            return Answer(images, findings=scores)
        if len(scores):
            judged(scores, images, tables["labels"])  # says now what cannot be judged
        return Answer(images, classes=scores)
    if runs[0].kind == "lungs":
        read = [read_table("mask_scores", run.folder / "tables" / "mask_scores.parquet") for run in runs]
        scores = concatenate(read, "mask_scores")
        check_out_of_fold(scores, "image_id", fold_of)
        scores = scores[(scores.structure == "lungs") & scores.image_id.isin(images.image_id)]
        return Answer(images[images.image_id.isin(scores.image_id)], masks=scores)
    found = read_out_of_fold([run.folder for run in runs])
    fold_of_study = images.drop_duplicates("study_id").set_index("study_id")["image_id"].map(fold_of)
    check_out_of_fold(
        found.study_scores[found.study_scores["study_id"].isin(fold_of_study.index)], "study_id", fold_of_study
    )
    for table in (found.image_scores, found.detections, found.coverage):
        check_out_of_fold(table, "image_id", fold_of)
    if len(found.coverage):
        return Answer(images[images["image_id"].isin(found.coverage["image_id"])], detections=found.detections)
    studies = fuse_scores(found.study_scores, "study_scores", FusionSettings())
    nones = fuse_scores(found.image_scores, "image_scores", FusionSettings())
    for answered, key in ((studies, "study_id"), (nones, "image_id")):
        if len(answered):
            images = images[images[key].isin(answered[key])]
    return Answer(images, studies if len(studies) else None, nones if len(nones) else None)


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


def _of_prepared(entry: Entry, run: ListedRun) -> Entry:
    told = run.metrics.get("folds_fingerprint")
    if not told:
        try:
            told = data_fingerprint(folds=read_table("folds", run.folder / "tables" / "folds.parquet"))
        except (OSError, ValueError) as error:
            return replace(entry, remark="; ".join(filter(None, (run.remark, f"its folds cannot be read: {error}"))))
    return replace(entry, folds_fingerprint=str(told))


def _listed(name: Any, run: ListedRun, runs: list[ListedRun]) -> ListedRun | None:
    folder = named_folder(name, run)
    if folder is None:
        return None
    there = [each for each in runs if each.folder.resolve() == folder.resolve()]
    return there[0] if there else list_run(folder, str(name))


def _named(entries: list[Entry], name: str) -> tuple[Entry, Answer]:
    found = [entry for entry in entries if name == entry.name or name in [run.name for run in entry.runs]]
    if not found:
        there = ", ".join(entry.name for entry in entries if entry.answer is not None)
        raise LeaderboardError(f"no run is called {name!r}; those with a figure are: {there or 'none'}")
    if (answer := found[0].answer) is None:
        raise LeaderboardError(f"{name} has no out-of-fold figure ({found[0].runs[0].state}) {found[0].remark}")
    return found[0], answer


def _joined(names: list[str]) -> str:
    """`study-[0,1]` for study-0 and study-1."""
    start = os.path.commonprefix(names)
    rest = [name.removeprefix(start) for name in names]
    return names[0] if len(names) == 1 else f"{start}[{','.join(rest)}]" if all(rest) else " + ".join(names)


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
