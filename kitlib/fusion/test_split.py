"""Learners' scores of the images of the split "test", which chose neither an epoch nor a weight nor a temperature."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from kitlib.errors import FusionError
from kitlib.fusion.stacking import LearnerScores, gather
from kitlib.tables import check_table, class_columns

ALL_FOLDS = -1  # in the column `fold` of an answer that is of several folds' models together


@dataclass(frozen=True)
class TestSplitScores:
    """Checked scores of test images, made by `gather_test_split`.

    `rows` is a table class_scores, a row an image, learner and fold. `means` holds each learner's mean over its models,
    under the fold ALL_FOLDS. `left_out` counts the images with scores that do not count: their patient is in a fold.
    """

    rows: pd.DataFrame
    means: LearnerScores
    left_out: int


def gather_test_split(
    tables: Iterable[pd.DataFrame], found: LearnerScores, images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame
) -> TestSplitScores | None:
    """Check the learners' test scores (tables class_scores) against each other and against `found`; None without any.

    An image whose patient is in a fold is left out: that fold's images have chosen something. Raises FusionError: a learner
    or one of its folds without test scores, models of unlike images, images that are not of the split "test", other classes
    than the out-of-fold scores have, and all that kitlib.fusion.stacking.gather refuses.
    """
    tables = [check_table(table, "class_scores") for table in tables if len(table)]
    if not tables:
        return None
    classes = list(found.classes)
    for table in tables:
        there = class_columns(table, "class_scores")
        if set(there) != set(classes):
            told = f"the classes {', '.join(there)}, and {', '.join(classes)} out of fold"
            raise FusionError(f"test images: {table['model'].iloc[0]} has {told}; train it again")
    rows = pd.concat(tables, ignore_index=True)[["image_id", "model", "fold", *classes]]
    _check_models(rows, found)
    left_out, rows, test = _of_other_patients(rows, images, folds)
    _check_images(rows)
    if rows[classes].isna().any(axis=None):
        row = rows[rows[classes].isna().any(axis=1)].iloc[0]
        raise FusionError(f"test images: {row['model']} has a NaN among its scores, first {row['image_id']}")
    # A learner of nested folds that lies in several runs has a row of each.
    rows = rows.groupby(["image_id", "model", "fold"], as_index=False, sort=False)[classes].mean()
    means = rows.groupby(["image_id", "model"], as_index=False)[classes].mean().assign(fold=ALL_FOLDS)
    in_order = [means[means["model"] == name] for name in found.learners]
    try:
        gathered = gather(in_order, images, labels, pd.DataFrame({"id": sorted(test), "fold": ALL_FOLDS}))
    except FusionError as error:
        raise FusionError(f"test images: {error}") from error
    return TestSplitScores(rows.reset_index(drop=True), gathered, left_out)


def _check_models(rows: pd.DataFrame, found: LearnerScores) -> None:
    """The same learners and folds as out of fold: an ensemble learns what each is worth from just these models."""
    here, there = (set(zip(table["model"], table["fold"], strict=True)) for table in (rows, found.rows))
    if here != there:
        learner, fold = min(here ^ there)
        has, lacks = ("test", "out-of-fold") if (learner, fold) in here else ("out-of-fold", "test")
        raise FusionError(
            f"test images: {learner} has {has} scores of fold {fold} and no {lacks} ones; name runs of one prepared run, or "
            "train it again"
        )


def _of_other_patients(rows: pd.DataFrame, images: pd.DataFrame, folds: pd.DataFrame) -> tuple[int, pd.DataFrame, set[str]]:
    """How many images of patients in folds are left out, the other rows, and all test images that might have one."""
    test = images[images["split"] == "test"] if "split" in images else images.iloc[:0]
    strange = rows.loc[~rows["image_id"].isin(test["image_id"]) | rows["image_id"].isin(folds["id"]), "image_id"]
    if len(strange):
        raise FusionError(
            f"test images: {strange.nunique()} ids with test scores are not of the split test, first {strange.iloc[0]}; "
            "name the learners' prepared run"
        )
    inside = images.loc[images["image_id"].isin(folds["id"]), "patient_id"]
    known = test.loc[test["patient_id"].isin(inside), "image_id"]
    left_out = rows["image_id"].isin(known)
    return rows.loc[left_out, "image_id"].nunique(), rows[~left_out], set(test["image_id"]) - set(known)


def _check_images(rows: pd.DataFrame) -> None:
    """The same images for every model: a mean over fewer of them would be worth less."""
    if rows.empty:
        raise FusionError("test images: the patients of all of them are in folds too; put patients aside (test_share)")
    of_each = rows.groupby(["model", "fold"], sort=False)["image_id"].agg(frozenset)
    (learner, fold), most = max(of_each.items(), key=lambda each: len(each[1]))
    for (name, number), there in of_each.items():
        if there != most:
            first = min(there ^ most)
            raise FusionError(
                f"test images: {name}, fold {number}, has {len(there)} scores and {learner}, fold {fold}, {len(most)}: "
                f"{first} is not in both; let each predict the same images (limit_validation)"
            )
