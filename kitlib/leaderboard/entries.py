"""Leaderboard entries: one per model, with its out-of-fold predictions gathered from the folders of its runs."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.errors import LeaderboardError
from kitlib.fusion.model_fusion import fuse_scores
from kitlib.leaderboard.listing import SHORT, ListedRun, list_run
from kitlib.leaderboard.prepared import PreparedRuns
from kitlib.reports.classification_report import by_model, judged
from kitlib.reports.findings_report import mean_over_folds
from kitlib.runs.predictions import check_out_of_fold, judged_images, read_fused, read_out_of_fold
from kitlib.runs.run_kinds import named_folder
from kitlib.tables import concatenate, empty_table, read_table


@dataclass(frozen=True)
class Predictions:
    """A model's out-of-fold predictions: one table for each kind, or None for a kind that the model does not predict.

    `images` lists the images that the predictions are for, sorted by image_id. `studies`, `nones` and `detections` are
    described in `kitlib.competitions.siim_covid19.Fused`; `masks` is a `mask_scores` table. `findings` and `classes` are
    `class_scores` tables: an image may have several of the `findings`, but has exactly one of the `classes`.
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
        """Names of the tables of predictions that are not None, such as ("studies", "nones")."""
        names = ("studies", "nones", "detections", "findings", "classes", "masks")
        return tuple(name for name in names if getattr(self, name) is not None)


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard: a run, a model whose folds come from several runs, or an ensemble in a run.

    `model` is the ensemble's name, or empty. `predictions` is None if the entry has no score; if a score was expected,
    `remark` says why the score is missing. `tables` has the tables of the prepared run that the model was trained on; it is
    empty if `predictions` is None.
    """

    name: str
    runs: tuple[ListedRun, ...]
    remark: str
    folds_fingerprint: str = ""
    data_fingerprint: str = ""
    predictions: Predictions | None = None
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    model: str = ""


def read_entries(runs: Iterable[ListedRun], folds: Iterable[int] = ()) -> list[Entry]:
    """Return the leaderboard entries of listed runs.

    An entry has the predictions for the images in `folds`, or for all images if `folds` is empty. Runs in one folder that
    hold different folds of the same model become one entry. A run of notebook 65 becomes one entry per ensemble; the models
    that an ensemble combines (learners) get entries from their own runs.
    """
    runs, scored_folds = list(runs), frozenset(folds)
    prepared = PreparedRuns(runs)
    return [
        _read_entry(group, runs, prepared, scored_folds, model)
        for group in _group_by_model(runs)
        for model in _ensemble_names(group[0])
    ]


def _ensemble_names(run: ListedRun) -> list[str]:
    """Return the names of the ensembles that have scores in a run of notebook 65, or [""] for any other run."""
    path = run.folder / "tables" / "class_scores.parquet"
    if run.kind != "ensemble" or run.state != "finished" or not path.is_file():
        return [""]
    try:
        models = by_model(read_table("class_scores", path))
    except (OSError, ValueError):
        return [""]  # the run gets one entry, whose remark states the error
    return [name for name in models if name not in run.metrics.get("learners", ())] or [""]


def _group_by_model(runs: list[ListedRun]) -> list[tuple[ListedRun, ...]]:
    """Return the runs in groups: runs in the same folder that differ only in their folds are one group.

    Any other run is a group of its own. Groups keep the order of `runs`.
    """
    groups: dict[Any, list[ListedRun]] = {}
    for index, run in enumerate(runs):
        shared = [{key: value for key, value in fold.items() if key in SHARED_METRICS} for fold in run.folds.values()]
        if run.is_nested:
            # The data differ between outer folds, so runs are matched by the fingerprint of all folds instead.
            # `find_for_nested` checks later that the data are parts of one prepared run.
            whole = {"data_fingerprint": run.metrics.get("folds_fingerprint")}
            shared = [fold | whole for fold in shared]
        is_one_model = run.state == "finished" and shared and all(fold == shared[0] for fold in shared)
        key = (run.folder.parent, repr(sorted(shared[0].items()))) if is_one_model else index
        groups.setdefault(key, []).append(run)
    models: list[tuple[ListedRun, ...]] = []
    for group in groups.values():
        folds = [fold for run in group for fold in run.folds]
        models += [tuple(group)] if len(folds) == len(set(folds)) else [(run,) for run in group]
    return models


# Keys of a fold's metrics.json whose values must be equal in all folds of one model.
SHARED_METRICS = (
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


def _read_entry(
    group: tuple[ListedRun, ...], runs: list[ListedRun], prepared: PreparedRuns, folds: frozenset[int], model: str
) -> Entry:
    run = group[0]
    remarks = dict.fromkeys(member.remark for member in group if member.remark)
    name = _join_names([member.name for member in group])
    entry = Entry(f"{name}: {model}" if model else name, group, "; ".join(remarks), model=model)
    sources, missing = list(group), list[str]()
    if run.kind == "fusion":
        found = {str(name): _find_source(name, run, runs) for name in run.metrics.get("runs", ())}
        sources = [source for source in found.values() if source]
        missing = [name for name, source in found.items() if not source]
    fingerprints = sorted({fold.get("data_fingerprint", "") for source in sources for fold in source.folds.values()})
    if run.kind == "prepared" and run.state == "finished":
        return _add_folds_fingerprint(entry, run)
    folds_digests = {
        fold["folds_fingerprint"] for source in sources for fold in source.folds.values() if "folds_fingerprint" in fold
    }
    if len(fingerprints) == 1:
        folds_digest = folds_digests.pop() if len(folds_digests) == 1 else ""
        entry = replace(entry, folds_fingerprint=folds_digest, data_fingerprint=fingerprints[0])
    if run.state != "finished" or run.kind not in ("study", "detector", "findings", "ensemble", "lungs", "fusion"):
        return entry
    try:
        if run.kind == "ensemble" or run.is_nested:
            folds_digest, tables = prepared.find_for_nested(group)
            entry = replace(entry, folds_fingerprint=folds_digest, data_fingerprint=data_fingerprint(**tables))
        else:
            if missing and not fingerprints:  # one of the fused runs is enough to find the prepared run
                raise LeaderboardError(
                    f"the fused runs were not found: {', '.join(missing)}; add their folders to the leaderboard's folders"
                )
            if len(fingerprints) != 1:
                raise LeaderboardError(
                    f"the folds have {len(fingerprints)} different data fingerprints instead of one; runs are missing, or "
                    "were trained on different data"
                )
            match = prepared.find(fingerprints[0], run)
            if match is None:
                raise LeaderboardError(
                    f"the prepared run with the training data (data fingerprint {fingerprints[0][:SHORT]}) was not found; "
                    "add its folder to the leaderboard's folders"
                )
            folds_digest, tables = match
            entry = replace(entry, folds_fingerprint=folds_digest, data_fingerprint=fingerprints[0])
        predictions = _read_predictions(group, tables, folds, model)
        if predictions.images.empty:
            raise LeaderboardError(f"no predictions for {f'folds {sorted(folds)}' if folds else 'any fold'}")
        return replace(entry, predictions=predictions, tables=tables)
    # pyarrow raises ValueError or OSError for a damaged table; the kit's own errors are subclasses of these.
    except (OSError, ValueError, KeyError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        score = run.metrics.get("score")
        recorded = f" (its own metrics.json says {score:.4f})" if isinstance(score, float) else ""
        return replace(entry, remark="; ".join(filter(None, (entry.remark, f"no score: {reason}{recorded}"))))


def _read_predictions(
    runs: tuple[ListedRun, ...], tables: dict[str, pd.DataFrame], folds: frozenset[int], model: str = ""
) -> Predictions:
    """Return one model's out-of-fold predictions for the images in `folds`, read from the model's `runs`.

    `tables` are those of the prepared run that the model was trained on; `model` is the name of an ensemble, or empty.
    Raises RunError if a prediction is not out of fold.
    """
    fold_of = tables["folds"].set_index("id")["fold"]
    images = tables["images"][tables["images"]["image_id"].isin(fold_of.index)].sort_values("image_id")
    if folds:
        images = images[images["image_id"].map(fold_of).isin(folds)]
    if runs[0].kind == "fusion":
        fused = read_fused(runs[0].folder)
        return Predictions(judged_images(images, fused), fused.studies, fused.nones, fused.detections)
    if runs[0].kind == "findings" or model:
        parts = [read_table("class_scores", run.folder / "tables" / "class_scores.parquet") for run in runs]
        scores = concatenate([table[table["model"] == model] if model else table for table in parts], "class_scores")
        check_out_of_fold(scores, "image_id", fold_of)
        scores = scores[scores["image_id"].isin(images["image_id"])]
        images, scores = images[images["image_id"].isin(scores["image_id"])], mean_over_folds(scores)
        recipes = [fold.get("recipe") or {} for run in runs for fold in run.folds.values()]
        if not model and any(recipe.get("multi_label", True) for recipe in recipes):
            return Predictions(images, findings=scores)
        if len(scores):
            judged(scores, images, tables["labels"])  # raises the error here if these scores cannot be evaluated
        return Predictions(images, classes=scores)
    if runs[0].kind == "lungs":
        parts = [read_table("mask_scores", run.folder / "tables" / "mask_scores.parquet") for run in runs]
        scores = concatenate(parts, "mask_scores")
        check_out_of_fold(scores, "image_id", fold_of)
        scores = scores[(scores.structure == "lungs") & scores.image_id.isin(images.image_id)]
        return Predictions(images[images.image_id.isin(scores.image_id)], masks=scores)
    predicted = read_out_of_fold([run.folder for run in runs])
    fold_of_study = images.drop_duplicates("study_id").set_index("study_id")["image_id"].map(fold_of)
    check_out_of_fold(
        predicted.study_scores[predicted.study_scores["study_id"].isin(fold_of_study.index)], "study_id", fold_of_study
    )
    coverage = empty_table("coverage") if predicted.coverage is None else predicted.coverage
    for table in (predicted.image_scores, predicted.detections, coverage):
        check_out_of_fold(table, "image_id", fold_of)
    if len(coverage):
        covered = images["image_id"].isin(coverage["image_id"])
        return Predictions(images[covered], detections=predicted.detections)
    studies = fuse_scores(predicted.study_scores, "study_id", FusionSettings())
    nones = fuse_scores(predicted.image_scores, "image_id", FusionSettings())
    for table, key in ((studies, "study_id"), (nones, "image_id")):
        if len(table):
            images = images[images[key].isin(table[key])]
    return Predictions(images, studies if len(studies) else None, nones if len(nones) else None)


def _add_folds_fingerprint(entry: Entry, run: ListedRun) -> Entry:
    """Return the entry of a prepared run with the fingerprint of its folds added.

    If the folds cannot be read, a remark that says so is added instead.
    """
    fingerprint = run.metrics.get("folds_fingerprint")
    if not fingerprint:
        try:
            fingerprint = data_fingerprint(folds=read_table("folds", run.folder / "tables" / "folds.parquet"))
        except (OSError, ValueError) as error:
            return replace(entry, remark="; ".join(filter(None, (run.remark, f"its folds cannot be read: {error}"))))
    return replace(entry, folds_fingerprint=str(fingerprint))


def _find_source(name: Any, run: ListedRun, runs: list[ListedRun]) -> ListedRun | None:
    """Return the run that the fusion `run` refers to as `name`, or None if it does not exist.

    The run is taken from the listed `runs` or, if it is not listed, read from disk.
    """
    folder = named_folder(name, run.folder)
    if folder is None:
        return None
    matches = [candidate for candidate in runs if candidate.folder.resolve() == folder.resolve()]
    return matches[0] if matches else list_run(folder, str(name))


def _join_names(names: list[str]) -> str:
    """Return one name for several runs, such as `study-[0,1]` for study-0 and study-1."""
    prefix = os.path.commonprefix(names)
    endings = [name.removeprefix(prefix) for name in names]
    return names[0] if len(names) == 1 else f"{prefix}[{','.join(endings)}]" if all(endings) else " + ".join(names)
