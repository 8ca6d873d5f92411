"""Nested folds: models for an ensemble that is judged on a fold which neither they nor it have learnt from."""

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

NOT_NESTED = -1  # in the column `outer`, where no fold was held out


@dataclass(frozen=True)
class NestedScores:
    """What the models of one learner say.

    `nested` is the table nested_scores. `judged` is a table class_scores with one answer an image: of an outer fold's images
    the mean over the models that were trained without it (fold: the outer one), else the out-of-fold answer. `test` are the
    answers for images of the split "test", a row a `fold`: the mean over the outer folds, where there are several.
    """

    nested: pd.DataFrame
    judged: pd.DataFrame
    test: pd.DataFrame


def hold_out(tables: Mapping[str, pd.DataFrame], outer: int) -> dict[str, pd.DataFrame]:
    """The tables of a prepared run with the images of fold `outer` as test images: in no fold, of the split "test".

    Raises ValueError where the folds have no such fold or no other.
    """
    images, folds = tables["images"], tables["folds"]
    held = folds.id[folds.fold == outer]
    if held.empty or len(held) == len(folds):
        raise ValueError(f"outer fold {outer}: wanted one of the folds {sorted(set(folds.fold))}, and others beside it")
    split = images["split"] if "split" in images else pd.Series("train", images.index)
    images = images.assign(split=split.where(~images.image_id.isin(held), "test"))
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
    """What `train_folds` gives for each outer fold: its models are trained without it, on all inner `folds` but one each.

    Those of outer fold k lie in `run`/outer<k>/fold<n>. Without outer folds, `run`/fold<n>, under the key NOT_NESTED. Once
    the session's end has stopped one, no further outer fold is begun. Raises ValueError, before any training, for folds
    that the tables do not have, and for an outer fold that leaves no inner one.
    """
    folds, outer_folds = list(folds), list(outer_folds)
    available = set(task.tables["folds"].fold)
    if absent := sorted({*folds, *outer_folds} - available):
        raise ValueError(f"folds {absent} are not among those of the prepared run, {sorted(available)}; leave them out")
    if alone := [outer for outer in outer_folds if not set(folds) - {outer}]:
        raise ValueError(f"outer folds {alone} leave none of the folds {folds} to validate on; name others in folds")
    if not outer_folds:
        return {NOT_NESTED: train_folds(task, folds, run, at_once, processes, train=train)}
    trained: dict[int, list[Any]] = {}
    for outer in outer_folds:
        inner = [fold for fold in folds if fold != outer]
        held = dataclasses.replace(task, tables=hold_out(task.tables, outer))
        trained[outer] = train_folds(held, inner, run / f"outer{outer}", at_once, processes, run.name, train)
        if len(trained[outer]) < len(inner):
            break
    return trained


def is_whole(trained: dict[int, list[Any]], folds: Iterable[int], outer_folds: Iterable[int]) -> bool:
    """Whether `train_nested` with these folds has finished all its models."""
    folds = list(folds)
    wanted = {outer: len([fold for fold in folds if fold != outer]) for outer in list(outer_folds) or [NOT_NESTED]}
    return wanted == {outer: len(models) for outer, models in trained.items()}


def gather(trained: dict[int, list[TrainedFold]], folds: pd.DataFrame) -> NestedScores:
    """All that finished models have answered; rows of their own training images where the runs keep them."""
    nested, judged, test = [], [], []
    for outer, models in trained.items():
        held_out = []
        for model in models:
            tested = model.tables["test_scores"]
            inside = tested.image_id.isin(folds.id)
            answered = [model.tables["class_scores"], tested[inside]]
            answered += [model.tables["training_scores"]] if "training_scores" in model.tables else []
            nested += [table.assign(outer=outer) for table in answered if len(table)]
            test.append(tested[~inside])
            held_out.append(tested[inside])
        if outer == NOT_NESTED:
            judged += [model.tables["class_scores"] for model in models]
        elif models:
            judged.append(_mean(pd.concat(held_out).assign(fold=outer)))
    return NestedScores(
        concatenate(nested, "nested_scores") if nested else empty_table("nested_scores"),
        concatenate(judged, "class_scores"),
        concatenate([_mean(pd.concat(test))] if test else [], "class_scores"),
    )


def _mean(scores: pd.DataFrame) -> pd.DataFrame:
    classes = class_columns(scores, "class_scores")
    return scores.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
