"""Nested cross-validation of a stacked ensemble: trains the models whose predictions the ensemble combines.

For each outer fold, one model is trained for each other fold (the inner fold), on all images outside of these two folds. The
ensemble is trained on the models' predictions for the inner folds, and evaluated on their predictions for the outer fold.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.tables import class_columns, concatenate, empty_table
from kitlib.training.driver import train_fold
from kitlib.training.task import Task, TrainedFold
from kitlib.training.train_folds import Train, train_folds

NOT_NESTED = -1  # value of the column `outer` if no outer fold was held out


@dataclass(frozen=True)
class NestedScores:
    """Predictions of all models that a nested cross-validation has trained with one recipe, in three tables.

    `nested` is a `nested_scores` table with the predictions of every model. `judged` is a `class_scores` table for
    evaluation with one row per image: the mean prediction of the models that were trained without the image's outer fold,
    which is in the column `fold`. If no outer fold was held out, `judged` has the usual out-of-fold predictions instead.
    `test` is a `class_scores` table for the images in the split "test". It has one row per image and inner fold: the mean
    over all outer folds of the predictions by the models with this inner fold.
    """

    nested: pd.DataFrame
    judged: pd.DataFrame
    test: pd.DataFrame


def hold_out(tables: Mapping[str, pd.DataFrame], outer: int) -> dict[str, pd.DataFrame]:
    """Return the tables of a prepared run after the images of fold `outer` have been moved to the split "test".

    The rows of these images are removed from the `folds` table, and their `split` in the `images` table is "test". Raises
    ValueError if `outer` is not one of the folds, or if it is the only fold.
    """
    images, folds = tables["images"], tables["folds"]
    held_out_ids = folds.id[folds.fold == outer]
    if held_out_ids.empty or len(held_out_ids) == len(folds):
        raise ValueError(
            f"fold {outer} cannot be held out of the folds {sorted(set(folds.fold))}; choose one of them, and keep at least "
            "one other fold"
        )
    split = images["split"] if "split" in images else pd.Series("train", images.index)
    images = images.assign(split=split.where(~images.image_id.isin(held_out_ids), "test"))
    return {**tables, "images": images, "folds": folds[folds.fold != outer].reset_index(drop=True)}


def train_nested(
    task: Task,
    folds: Iterable[int],
    outer_folds: Iterable[int],
    run: Path,
    at_once: int = 0,
    processes: int = 1,
    train: Train = train_fold,
) -> dict[int, list[Any]]:
    """Train all models of a nested cross-validation; return a dict from each outer fold to the results of its models.

    For each outer fold k and each other fold n in `folds`, one model is trained on the images outside of both folds, in the
    folder `run`/outer<k>/fold<n>. If `outer_folds` is empty, no fold is held out: the folders are `run`/fold<n>, and the
    dict's only key is -1 (NOT_NESTED). See `train_folds` for `at_once`, `processes`, `train` and the results. If the end of
    the session stops a fold, no further outer fold is started. Raises ValueError, before any training, if a fold is not in
    the prepared run, or if no other fold in `folds` is left besides an outer fold.
    """
    folds, outer_folds = list(folds), list(outer_folds)
    available = set(task.tables["folds"].fold)
    if unknown := sorted({*folds, *outer_folds} - available):
        raise ValueError(f"`folds` or `outer_folds` has {unknown}; the prepared run has only the folds {sorted(available)}")
    if without_inner := [outer for outer in outer_folds if not set(folds) - {outer}]:
        raise ValueError(
            f"if outer fold {without_inner[0]} is held out, none of the folds {folds} is left to validate on; add other "
            "folds to `folds`"
        )
    if not outer_folds:
        return {NOT_NESTED: train_folds(task, folds, run, at_once, processes, train=train)}
    trained: dict[int, list[Any]] = {}
    for outer in outer_folds:
        inner = [fold for fold in folds if fold != outer]
        outer_task = dataclasses.replace(task, tables=hold_out(task.tables, outer))
        trained[outer] = train_folds(outer_task, inner, run / f"outer{outer}", at_once, processes, run.name, train)
        if len(trained[outer]) < len(inner):
            break
    return trained


def is_complete(trained: dict[int, list[Any]], folds: Iterable[int], outer_folds: Iterable[int]) -> bool:
    """Return whether `trained`, which `train_nested` returned for these folds, contains the results of all models."""
    folds = list(folds)
    expected = {outer: len([fold for fold in folds if fold != outer]) for outer in list(outer_folds) or [NOT_NESTED]}
    return expected == {outer: len(models) for outer, models in trained.items()}


def gather_scores(trained: dict[int, list[TrainedFold]], folds: pd.DataFrame) -> NestedScores:
    """Collect the predictions of the models that `train_nested` has trained, and return them as NestedScores.

    `folds` is the `folds` table of the prepared run. If a model has the table `training_scores`, `nested` also includes the
    model's predictions for its own training images.
    """
    nested, judged, test = [], [], []
    for outer, models in trained.items():
        held_out = []
        for model in models:
            test_scores = model.tables["test_scores"]
            is_in_folds = test_scores.image_id.isin(folds.id)
            tables = [model.tables["class_scores"], test_scores[is_in_folds]]
            tables += [model.tables["training_scores"]] if "training_scores" in model.tables else []
            nested += [table.assign(outer=outer) for table in tables if len(table)]
            test.append(test_scores[~is_in_folds])
            held_out.append(test_scores[is_in_folds])
        if outer == NOT_NESTED:
            judged += [model.tables["class_scores"] for model in models]
        elif models:
            judged.append(_average(pd.concat(held_out).assign(fold=outer)))
    return NestedScores(
        concatenate(nested, "nested_scores") if nested else empty_table("nested_scores"),
        concatenate(judged, "class_scores"),
        concatenate([_average(pd.concat(test))] if test else [], "class_scores"),
    )


def _average(scores: pd.DataFrame) -> pd.DataFrame:
    classes = class_columns(scores, "class_scores")
    return scores.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
