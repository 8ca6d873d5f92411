"""Checks the learners' scores for images of the "test" split, on which nothing was trained, chosen or calibrated."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from kitlib.errors import FusionError
from kitlib.fusion.stacking import LearnerScores, gather
from kitlib.tables import check_table, class_columns

ALL_FOLDS = -1  # value of the `fold` column for predictions that combine the models of several folds


@dataclass(frozen=True)
class TestSplitScores:
    """Checked scores of test images, as `gather_test_split` returns them.

    `rows` is a `class_scores` table with one row per image, learner and fold. `means` holds one prediction per image and
    learner: the mean over the learner's folds, with ALL_FOLDS (-1) in the column `fold`. `left_out` is the number of images
    that have test scores but are excluded, because their patient also has images in a fold.
    """

    rows: pd.DataFrame
    means: LearnerScores
    left_out: int


def gather_test_split(
    tables: Iterable[pd.DataFrame],
    learner_scores: LearnerScores,
    images: pd.DataFrame,
    labels: pd.DataFrame,
    folds: pd.DataFrame,
) -> TestSplitScores | None:
    """Join the test scores and check them against the out-of-fold scores; return None if there are no test scores.

    `tables` are the test scores, as `class_scores` tables; `learner_scores` are the out-of-fold scores. Images of patients
    who also have images in a fold are excluded, because models were trained or chosen on these patients. Raises FusionError
    if test scores and out-of-fold scores have different learners, folds or classes; if the models have predicted different
    images; if an image is not in the "test" split; and if kitlib.fusion.stacking.gather refuses the test scores.
    """
    tables = [check_table(table, "class_scores") for table in tables if len(table)]
    if not tables:
        return None
    classes = list(learner_scores.classes)
    for table in tables:
        table_classes = class_columns(table, "class_scores")
        if set(table_classes) != set(classes):
            difference = f"the classes {table_classes}, but its out-of-fold scores have {classes}"
            raise FusionError(f"test images: {table['model'].iloc[0]!r} has {difference}; train this model again")
    rows = pd.concat(tables, ignore_index=True)[["image_id", "model", "fold", *classes]]
    _check_models(rows, learner_scores)
    left_out, rows, test = _exclude_fold_patients(rows, images, folds)
    _check_images(rows)
    if rows[classes].isna().any(axis=None):
        row = rows[rows[classes].isna().any(axis=1)].iloc[0]
        raise FusionError(
            f"test images: {row['model']!r} has NaN scores, the first for {row['image_id']!r}; train this model again"
        )
    # The nested folds of a learner can be spread over several runs, which then have one row each per image and fold.
    rows = rows.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
    means = rows.groupby(["image_id", "model"], as_index=False)[classes].mean().assign(fold=ALL_FOLDS)
    ordered = [means[means["model"] == name] for name in learner_scores.learners]
    try:
        gathered = gather(ordered, images, labels, pd.DataFrame({"id": sorted(test), "fold": ALL_FOLDS}))
    except FusionError as error:
        raise FusionError(f"test images: {error}") from error
    return TestSplitScores(rows.reset_index(drop=True), gathered, left_out)


def _check_models(rows: pd.DataFrame, learner_scores: LearnerScores) -> None:
    """Raise FusionError unless the test scores have the same learners and folds as the out-of-fold scores.

    The out-of-fold scores decide an ensemble's weights, which fit only the models that made these scores.
    """
    test_models, fold_models = (
        set(zip(table["model"], table["fold"], strict=True)) for table in (rows, learner_scores.rows)
    )
    if test_models != fold_models:
        learner, fold = min(test_models ^ fold_models)
        has, lacks = ("test", "out-of-fold") if (learner, fold) in test_models else ("out-of-fold", "test")
        raise FusionError(
            f"test images: {learner!r} has {has} scores of fold {fold} but no {lacks} scores; give training runs that all "
            f"used the same run of notebook 10, or train {learner!r} again"
        )


def _exclude_fold_patients(
    rows: pd.DataFrame, images: pd.DataFrame, folds: pd.DataFrame
) -> tuple[int, pd.DataFrame, set[str]]:
    """Exclude test images of patients who have images in a fold; `rows` are the test scores.

    Returns the number of excluded images that have scores, the remaining rows, and the ids of the test images that are not
    excluded. Raises FusionError for scores of images that are not in the "test" split.
    """
    test = images[images["split"] == "test"] if "split" in images else images.iloc[:0]
    unknown = rows.loc[~rows["image_id"].isin(test["image_id"]) | rows["image_id"].isin(folds["id"]), "image_id"]
    if len(unknown):
        raise FusionError(
            f"test images: {unknown.nunique()} ids with test scores are not in the test split; the first is "
            f"{unknown.iloc[0]}. Give the run of notebook 10 that the learners were trained on"
        )
    fold_patients = images.loc[images["image_id"].isin(folds["id"]), "patient_id"]
    excluded = test.loc[test["patient_id"].isin(fold_patients), "image_id"]
    left_out = rows["image_id"].isin(excluded)
    return rows.loc[left_out, "image_id"].nunique(), rows[~left_out], set(test["image_id"]) - set(excluded)


def _check_images(rows: pd.DataFrame) -> None:
    """Raise FusionError if `rows` is empty, or unless all models have predicted the same images."""
    if rows.empty:
        raise FusionError(
            "test images: all patients with test scores also have images in the folds; set `test_share` in notebook 10 "
            "to reserve test patients"
        )
    image_ids = rows.groupby(["model", "fold"], sort=False)["image_id"].agg(frozenset)
    (learner, fold), largest = max(image_ids.items(), key=lambda item: len(item[1]))
    for (name, number), ids in image_ids.items():
        if ids != largest:
            first = min(ids ^ largest)
            raise FusionError(
                f"test images: fold {number} of {name!r} has {len(ids)} scores, but fold {fold} of {learner!r} has "
                f"{len(largest)}; only one of them has a score of {first!r}. Train both with the same `limit_validation`"
            )
