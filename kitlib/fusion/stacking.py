"""Checks the score tables of several learners and turns them into arrays for training and evaluating ensembles.

A learner is a model that an ensemble combines. An ensemble that is evaluated on a fold should be trained only on predictions
by models that were trained neither on this fold nor on the predicted image. Nested scores (`nested_scores` tables) allow
this. Plain out-of-fold scores (`class_scores`, `study_scores`) do not allow it: the ensemble is trained on the predictions
for the other folds, and the models that made these predictions were trained on the evaluated fold. Only the predictions for
the evaluated fold are hidden from the ensemble. Such an ensemble is called cross-fitted.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kitlib.classes import STUDY_CLASSES
from kitlib.errors import FusionError
from kitlib.tables import check_table, class_columns

logger = logging.getLogger(__name__)

NESTED, CROSS_FITTED = "nested", "cross-fitted"
MODEL_KEY = ("model", "outer", "fold")


@dataclass(frozen=True)
class Stack:
    """Predictions of K learners for n images or studies (`ids`) and C classes, and the ground truth.

    `probabilities` is (n, K, C). The other arrays are (n,): `truth` holds class indices, `fold` the fold that each id
    belongs to, and `patient` an integer per patient.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray
    fold: np.ndarray
    patient: np.ndarray


@dataclass(frozen=True)
class LearnerScores:
    """Checked scores of all learners, as `gather` returns them.

    `rows` has the columns `id`, `model` (the learner), `outer`, `fold`, `own` and a probability per class. The model was
    trained neither on the outer fold `outer` (-1: not nested) nor on the inner fold `fold`. `own` is the id's fold.
    `answers` is the ground truth, indexed by id, with the columns `truth` (class index), `fold` and `patient`. `key` is
    "image_id" or "study_id": what ids are. `unanswered` is the number of ids in the folds that no learner has predicted.
    """

    rows: pd.DataFrame
    answers: pd.DataFrame
    learners: tuple[str, ...]
    classes: tuple[str, ...]
    key: str
    unanswered: int

    @property
    def protocol(self) -> str:
        """How ensembles are evaluated on these scores: "nested" or "cross-fitted", see the docstring of this file."""
        return NESTED if (self.rows["outer"] >= 0).any() else CROSS_FITTED

    @property
    def folds(self) -> list[int]:
        """The folds on which ensembles can be evaluated, sorted."""
        rows = self.rows
        if self.protocol == NESTED:
            return sorted(rows.loc[rows["outer"] >= 0, "outer"].unique().tolist())
        return sorted(rows.loc[rows["fold"] == rows["own"], "fold"].unique().tolist())

    @property
    def crosses(self) -> bool:
        """Whether trained ensembles can be evaluated: this requires nested scores or more than one fold."""
        return self.protocol == NESTED or len(self.folds) > 1

    def test_stack(self, fold: int) -> Stack:
        """Return the Stack for evaluation on `fold`: predictions for its images by models that were not trained on the fold.

        If the scores are nested, the predictions of each learner's inner models are averaged.
        """
        fold_column = "outer" if self.protocol == NESTED else "fold"
        return self._stack(
            self.rows[(self.rows["own"] == fold) & (self.rows[fold_column] == fold)], f"test scores of fold {fold}"
        )

    def training_stack(self, fold: int, stack_on: str = "out_of_fold") -> Stack:
        """Return the Stack for training an ensemble that is evaluated on `fold`: predictions for images of the other folds.

        If `stack_on` is "out_of_fold", the predictions for an image are by models that were not trained on the image. If
        `stack_on` is "in_sample", they are by models that were trained on the image, as in FLANNEL's published method.
        Raises FusionError if there are no such predictions.
        """
        rows = self.rows[self.rows["own"] != fold]
        if stack_on == "in_sample":
            is_selected = rows["outer"] == fold if self.protocol == NESTED else rows["fold"] == fold
            rows = rows[is_selected & (rows["fold"] != rows["own"])]
        else:
            is_selected = rows["outer"] == (fold if self.protocol == NESTED else -1)
            rows = rows[is_selected & (rows["fold"] == rows["own"])]
        if rows.empty:
            raise FusionError(
                f"there are no {stack_on!r} scores to train the ensemble that is evaluated on fold {fold}. "
                + (
                    "Train the learners with `in_sample`, so that they predict their training images too"
                    if stack_on == "in_sample"
                    else "At least one other fold must be predicted: train the learners on more folds"
                )
            )
        return self._stack(rows, f"training scores for fold {fold}")

    def has_in_sample(self) -> bool:
        """Return whether each learner has, for every fold, its model's scores for the model's own training images."""
        fold_column = "outer" if self.protocol == NESTED else "fold"
        trained = self.rows[self._trained_on()]
        available = set(zip(trained["model"], trained[fold_column], strict=True))
        return available >= {(learner, fold) for learner in self.learners for fold in self.folds}

    def full_stack(self, stack_on: str = "out_of_fold") -> Stack:
        """Return the Stack for training the final ensemble: predictions for the ids of all folds.

        If `stack_on` is "in_sample", the predictions for an id are by models that were trained on the id. Otherwise, they
        are by models that were not trained on the id, of the first kind that is available for the id: models without an
        outer fold, then models whose outer fold contains the id, then models whose inner fold contains the id.
        """
        rows = self.rows
        if stack_on == "in_sample":
            return self._stack(rows[self._trained_on()], "in-sample scores of all folds")
        kinds = [
            (rows["outer"] == -1) & (rows["fold"] == rows["own"]),
            rows["outer"] == rows["own"],
            rows["fold"] == rows["own"],
        ]
        rank = np.select(kinds, range(3), default=3)
        best = pd.Series(rank, rows.index).groupby(rows["id"]).transform("min")
        return self._stack(rows[(rank == best) & (rank < 3)], "out-of-fold scores of all folds")

    def _trained_on(self) -> pd.Series:
        """Return a bool Series: for each of `rows`, whether the row's model was trained on the row's id."""
        return (self.rows["own"] != self.rows["outer"]) & (self.rows["own"] != self.rows["fold"])

    def _stack(self, rows: pd.DataFrame, purpose: str) -> Stack:
        """Return the Stack of `rows`, averaged over all rows of the same id and learner.

        Raises FusionError if a learner has no row for one of the ids in `rows`; `purpose` describes `rows` in the message.
        """
        classes = list(self.classes)
        mean = rows.groupby(["id", "model"])[classes].mean()
        ids = rows["id"].drop_duplicates().sort_values()
        pairs = pd.MultiIndex.from_product([ids, self.learners], names=["id", "model"])
        scores = mean.reindex(pairs)
        is_missing = scores[classes[0]].isna().to_numpy()
        if is_missing.any():
            learner, first = pairs[is_missing][0][1], pairs[is_missing][0][0]
            missing_count = sum(pair[1] == learner for pair in pairs[is_missing])
            raise FusionError(
                f"{purpose}: {learner} has no score for {missing_count} of {len(ids)} ids that other learners have "
                f"predicted; the first is {first}. Let each learner predict the same images"
            )
        answers = self.answers.loc[ids]
        array = scores.to_numpy(dtype=float).reshape(len(ids), len(self.learners), len(classes))
        patient = pd.factorize(answers["patient"])[0]
        return Stack(ids.to_numpy(dtype=object), array, answers["truth"].to_numpy(), answers["fold"].to_numpy(), patient)


def gather(tables: Iterable[pd.DataFrame], images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame) -> LearnerScores:
    """Join and check the learners' scores in `tables`, all of one kind: `nested_scores`, `class_scores` or `study_scores`.

    Learners keep the order of the tables. Raises FusionError in these cases: there are no scores; tables have different
    kinds of ids or classes; learners have different folds; an id has no fold, or not exactly one class; a score is NaN or
    given twice; a row does not sum to 1; a plain score is for a model's training image; a nested score's folds are equal.
    """
    tables = [table for table in tables if len(table)]
    if not tables:
        raise FusionError("no learner has scores; give runs whose models have predicted their folds")
    key = "study_id" if "study_id" in tables[0].columns else "image_id"
    parts = [_check_kind(table, key) for table in tables]
    classes = _check_classes(parts)
    rows = pd.concat([part for part, _ in parts], ignore_index=True)[["id", *MODEL_KEY, "plain", *classes]]
    _check_values(rows, classes)
    answers = _ground_truth(key, classes, images, labels, folds)
    unknown = rows.loc[~rows["id"].isin(answers.index), "id"]
    if len(unknown):
        raise FusionError(
            f"{unknown.nunique()} ids have scores but no fold; the first is {unknown.iloc[0]}. Give the run of notebook 10 "
            "that the learners were trained on"
        )
    rows["own"] = rows["id"].map(answers["fold"])
    learners = tuple(dict.fromkeys(rows["model"]))
    _check_folds(rows, learners)
    has_scores = answers.index.isin(rows["id"])
    if not has_scores.all():
        logger.info("%d of %d ids in the folds were predicted by no learner", int((~has_scores).sum()), len(answers))
    return LearnerScores(rows.drop(columns="plain"), answers, learners, tuple(classes), key, int((~has_scores).sum()))


def _check_kind(table: pd.DataFrame, key: str) -> tuple[pd.DataFrame, list[str]]:
    """Check one table of scores; return it with changed columns, and the names of its classes.

    In the returned table, the id column `key` is called `id`. The new column `plain` is False for `nested_scores`, otherwise
    True. Plain scores get the column `outer`, with -1. Raises FusionError if the table lacks the column `key`.
    """
    if key not in table.columns:
        raise FusionError("scores of images and scores of studies cannot be stacked together; give runs of only one kind")
    name = "study_scores" if key == "study_id" else "nested_scores" if "outer" in table.columns else "class_scores"
    table, plain = check_table(table, name), name != "nested_scores"
    classes = list(STUDY_CLASSES) if key == "study_id" else class_columns(table, name)
    return table.assign(plain=plain, **({"outer": -1} if plain else {})).rename(columns={key: "id"}), classes


def _check_classes(parts: list[tuple[pd.DataFrame, list[str]]]) -> list[str]:
    """Return the classes of the first table. Raises FusionError if another table has different classes."""
    first = parts[0][1]
    for part, classes in parts:
        if set(classes) != set(first):
            raise FusionError(
                f"{part['model'].iloc[0]} has the classes {', '.join(sorted(classes))}, but {parts[0][0]['model'].iloc[0]} "
                f"has {', '.join(sorted(first))}; stack learners that were trained on the same data set"
            )
    return first


def _check_values(rows: pd.DataFrame, classes: list[str]) -> None:
    is_duplicate = rows.duplicated(["id", *MODEL_KEY])
    if is_duplicate.any():
        row = rows[is_duplicate].iloc[0]
        raise FusionError(
            f"{row['model']!r} has two scores for {row['id']!r} in fold {row['fold']}; give only one run of this model, or "
            "train the second run again with another `model_name`"
        )
    for fault, wrong in (
        ("NaN scores", rows[classes].isna().any(axis=1)),
        ("scores that do not sum to 1, so the classes are not mutually exclusive", _is_not_one(rows[classes].sum(axis=1))),
    ):
        if wrong.any():
            row = rows[wrong].iloc[0]
            raise FusionError(
                f"{int(wrong.sum())} rows have {fault}; the first: {row['id']!r}, by {row['model']!r} of fold {row['fold']}"
            )


def _is_not_one(sums: pd.Series) -> pd.Series:
    return (sums - 1).abs() > 1e-3  # more than the rounding error of float16 softmax outputs


def _ground_truth(
    key: str, classes: list[str], images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame
) -> pd.DataFrame:
    """Return a table indexed by the id of each image or study in the folds: truth (class index), fold and patient.

    `key` is image_id or study_id. Raises FusionError if `labels` lacks a class, or an id does not have exactly one class.
    """
    missing = [name for name in classes if name not in labels.columns]
    if missing:
        raise FusionError(
            f"the labels lack the learners' classes {missing}; give the run of notebook 10 that the learners were trained on"
        )
    rows = images.merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    rows = rows.drop_duplicates(key).set_index(key)
    study_labels = labels.set_index("id")[classes]
    studies = rows.index if key == "study_id" else rows["study_id"]
    true = study_labels.reindex(studies).to_numpy(dtype=float)
    wrong = ~(np.isin(true, (0, 1)).all(axis=1) & (true.sum(axis=1) == 1))
    if wrong.any():
        raise FusionError(
            f"{int(wrong.sum())} ids do not have exactly one of the classes {', '.join(classes)}; the first is "
            f"{rows.index[wrong][0]}. Ensembles need mutually exclusive classes"
        )
    return pd.DataFrame(
        {"truth": true.argmax(axis=1), "fold": rows["fold"].to_numpy(), "patient": rows["patient_id"].to_numpy()}, rows.index
    )


def _check_folds(rows: pd.DataFrame, learners: tuple[str, ...]) -> None:
    """Raise FusionError if learners have different folds, or if a model has scores that would flatter it.

    Two kinds of scores flatter a model: plain scores for the model's own training images, and nested scores whose outer and
    inner fold are equal, because the model's epoch was chosen on this fold.
    """
    folds_of = {name: set(map(tuple, rows.loc[rows["model"] == name, ["outer", "fold"]].to_numpy())) for name in learners}
    for name, model_folds in folds_of.items():
        differ = model_folds ^ folds_of[learners[0]]
        if differ:
            outer, fold = min(differ)
            with_scores, without_scores = (name, learners[0]) if (outer, fold) in model_folds else (learners[0], name)
            place = f"fold {fold} (not nested)" if outer < 0 else f"outer fold {outer}, inner fold {fold}"
            raise FusionError(
                f"{with_scores!r} has scores for {place}, but {without_scores!r} has none; train all learners on the same "
                "folds, and either all or none of them nested"
            )
    if ((rows["outer"] >= 0) & (rows["outer"] == rows["fold"])).any():
        raise FusionError(
            "some nested scores have the same outer and inner fold, so the model is evaluated on the fold on which its "
            "epoch was chosen. Train the model again with different folds"
        )
    in_sample = rows[rows["plain"] & (rows["fold"] != rows["own"])]
    if len(in_sample):
        row = in_sample.iloc[0]
        raise FusionError(
            f"{len(in_sample)} scores are for images that their model was trained on; the first is {row['id']!r} in fold "
            f"{row['own']}, by {row['model']!r} of fold {row['fold']}. Give the run of notebook 10 that the models were "
            "trained on, or train them again"
        )
