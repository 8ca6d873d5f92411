"""Entries of the leaderboard: what each model answered out of fold, gathered from the folders of its runs."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.errors import LeaderboardError
from kitlib.fusion.model_fusion import FusionSettings, fuse_scores
from kitlib.leaderboard.listing import SHORT, ListedRun, list_run
from kitlib.leaderboard.prepared import PreparedRuns, named_folder
from kitlib.reports.classification_report import by_model, judged
from kitlib.reports.findings_report import mean_over_folds
from kitlib.runs.finished_run import check_out_of_fold, judged_images, read_fused, read_out_of_fold
from kitlib.tables import concatenate, read_table


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


def _joined(names: list[str]) -> str:
    """`study-[0,1]` for study-0 and study-1."""
    start = os.path.commonprefix(names)
    rest = [name.removeprefix(start) for name in names]
    return names[0] if len(names) == 1 else f"{start}[{','.join(rest)}]" if all(rest) else " + ".join(names)
