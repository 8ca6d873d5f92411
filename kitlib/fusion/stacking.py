"""Tables of several learners' scores as one array a purpose: to judge an ensemble on, or to let it learn from.

What an ensemble that is judged on a fold may learn from: predictions of learners that saw neither that fold nor the image
itself. Where the learners come of nested folds (table nested_scores) that is so without exception. Of plain out-of-fold
scores (class_scores, study_scores) the other folds' predictions serve: their learners saw the judged fold's images, whose
own predictions stay unseen (cross-fitted).
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
PLACE = ("model", "outer", "fold")


@dataclass(frozen=True)
class Stack:
    """n ids under K learners and C classes: probabilities (n, K, C); truth, fold and patient of each id, (n,).

    `truth` numbers the classes from 0, `patient` is a number too.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray
    fold: np.ndarray
    patient: np.ndarray


@dataclass(frozen=True)
class LearnerScores:
    """Checked scores of all learners, made by `gather`.

    `rows`: id, model, outer, fold, own (the id's own fold) and the classes. `answers`: a row an id with truth, fold and
    patient. `key` is image_id or study_id. `unanswered` counts the ids of the folds that no learner has answered.
    """

    rows: pd.DataFrame
    answers: pd.DataFrame
    learners: tuple[str, ...]
    classes: tuple[str, ...]
    key: str
    unanswered: int

    @property
    def protocol(self) -> str:
        return NESTED if (self.rows["outer"] >= 0).any() else CROSS_FITTED

    @property
    def folds(self) -> list[int]:
        """The folds on which ensembles can be judged."""
        rows = self.rows
        if self.protocol == NESTED:
            return sorted(rows.loc[rows["outer"] >= 0, "outer"].unique().tolist())
        return sorted(rows.loc[rows["fold"] == rows["own"], "fold"].unique().tolist())

    @property
    def crosses(self) -> bool:
        """Whether an ensemble that learns can be judged on a fold: where folds are nested, or there are others."""
        return self.protocol == NESTED or len(self.folds) > 1

    def judged(self, fold: int) -> Stack:
        """The images of `fold` as learners predict them that never saw them; the mean over a learner's inner models."""
        place = "outer" if self.protocol == NESTED else "fold"
        return self._stack(self.rows[(self.rows["own"] == fold) & (self.rows[place] == fold)], f"fold {fold}, to judge")

    def lesson(self, fold: int, stack_on: str = "out_of_fold") -> Stack:
        """What an ensemble that is judged on `fold` learns from: the other folds' images, as the module says.

        `in_sample`, which is published and a fault: the learners' predictions of their own training images. Raises
        FusionError where there is none.
        """
        rows = self.rows[self.rows["own"] != fold]
        if stack_on == "in_sample":
            at = rows["outer"] == fold if self.protocol == NESTED else rows["fold"] == fold
            rows = rows[at & (rows["fold"] != rows["own"])]
        else:
            at = rows["outer"] == (fold if self.protocol == NESTED else -1)
            rows = rows[at & (rows["fold"] == rows["own"])]
        if rows.empty:
            raise FusionError(
                f"no {stack_on} scores to learn from for fold {fold}. "
                + (
                    "Write the learners' predictions of their training images too (in_sample of the training)"
                    if stack_on == "in_sample"
                    else "At least one further fold must be predicted: train the learners on more folds"
                )
            )
        return self._stack(rows, f"what fold {fold} learns from")

    def has_in_sample(self) -> bool:
        """Whether every learner's predictions of its own training images are there, for every fold that is judged."""
        place = "outer" if self.protocol == NESTED else "fold"
        trained = self.rows[self._trained_on()]
        there = set(zip(trained["model"], trained[place], strict=True))
        return there >= {(learner, fold) for learner in self.learners for fold in self.folds}

    def everything(self, stack_on: str = "out_of_fold") -> Stack:
        """Every image once, by models that were not trained on it: what the ensemble that is kept learns from.

        Of models without an outer fold, else the test predictions, else (where not every outer fold was trained) any.
        `in_sample`: by the models that were trained on it.
        """
        rows = self.rows
        if stack_on == "in_sample":
            return self._stack(rows[self._trained_on()], "training images of all folds")
        kinds = [
            (rows["outer"] == -1) & (rows["fold"] == rows["own"]),
            rows["outer"] == rows["own"],
            rows["fold"] == rows["own"],
        ]
        rank = np.select(kinds, range(3), default=3)
        best = pd.Series(rank, rows.index).groupby(rows["id"]).transform("min")
        return self._stack(rows[(rank == best) & (rank < 3)], "all folds")

    def _trained_on(self) -> pd.Series:
        return (self.rows["own"] != self.rows["outer"]) & (self.rows["own"] != self.rows["fold"])

    def _stack(self, rows: pd.DataFrame, purpose: str) -> Stack:
        """One row an id and learner; several models of one learner are their mean."""
        classes = list(self.classes)
        mean = rows.groupby(["id", "model"])[classes].mean()
        ids = rows["id"].drop_duplicates().sort_values()
        wanted = pd.MultiIndex.from_product([ids, self.learners], names=["id", "model"])
        found = mean.reindex(wanted)
        absent = found[classes[0]].isna().to_numpy()
        if absent.any():
            learner, first = wanted[absent][0][1], wanted[absent][0][0]
            of_it = sum(pair[1] == learner for pair in wanted[absent])
            raise FusionError(
                f"{purpose}: {learner} has no score of {of_it} of {len(ids)} ids that other learners have, first {first}; "
                "let each learner predict the same images"
            )
        answers = self.answers.loc[ids]
        array = found.to_numpy(dtype=float).reshape(len(ids), len(self.learners), len(classes))
        patient = pd.factorize(answers["patient"])[0]
        return Stack(ids.to_numpy(dtype=object), array, answers["truth"].to_numpy(), answers["fold"].to_numpy(), patient)


def gather(tables: Iterable[pd.DataFrame], images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame) -> LearnerScores:
    """Check the learners' tables (nested_scores, class_scores or study_scores, all of one kind) against each other.

    Learners keep the order in which they come. Raises FusionError: no scores, other classes, other folds, ids of no fold, a
    score twice, NaN, rows that do not add to 1, plain scores of an image that the model was trained on; and labels that are
    not exactly one class an id.
    """
    tables = [table for table in tables if len(table)]
    if not tables:
        raise FusionError("no scores of any learner; name runs whose models have predicted their folds")
    key = "study_id" if "study_id" in tables[0].columns else "image_id"
    parts = [_one_kind(table, key) for table in tables]
    classes = _same_classes(parts)
    rows = pd.concat([part for part, _ in parts], ignore_index=True)[["id", *PLACE, "plain", *classes]]
    _check_values(rows, classes)
    answers = _answers(key, classes, images, labels, folds)
    strange = rows.loc[~rows["id"].isin(answers.index), "id"]
    if len(strange):
        raise FusionError(
            f"{strange.nunique()} ids have scores and no fold, first {strange.iloc[0]}; name the learners' prepared run"
        )
    rows["own"] = rows["id"].map(answers["fold"])
    learners = tuple(dict.fromkeys(rows["model"]))
    _check_folds(rows, learners)
    answered = answers.index.isin(rows["id"])
    if not answered.all():
        logger.info("%d of %d ids of the folds have no score of any learner", int((~answered).sum()), len(answers))
    return LearnerScores(rows.drop(columns="plain"), answers, learners, tuple(classes), key, int((~answered).sum()))


def _one_kind(table: pd.DataFrame, key: str) -> tuple[pd.DataFrame, list[str]]:
    """The checked table with its key as `id`, an outer fold and `plain` (it promises to be out of fold); its classes."""
    if key not in table.columns:
        raise FusionError("scores of images and of studies cannot be stacked together; name runs of one kind")
    name = "study_scores" if key == "study_id" else "nested_scores" if "outer" in table.columns else "class_scores"
    table, plain = check_table(table, name), name != "nested_scores"
    classes = list(STUDY_CLASSES) if key == "study_id" else class_columns(table, name)
    return table.assign(plain=plain, **({"outer": -1} if plain else {})).rename(columns={key: "id"}), classes


def _same_classes(parts: list[tuple[pd.DataFrame, list[str]]]) -> list[str]:
    """The classes of the first table, once all have the same."""
    first = parts[0][1]
    for part, classes in parts:
        if set(classes) != set(first):
            raise FusionError(
                f"{part['model'].iloc[0]} has the classes {', '.join(sorted(classes))}, {parts[0][0]['model'].iloc[0]} has "
                f"{', '.join(sorted(first))}; stack learners of one data set"
            )
    return first


def _check_values(rows: pd.DataFrame, classes: list[str]) -> None:
    twice = rows.duplicated(["id", *PLACE])
    if twice.any():
        row = rows[twice].iloc[0]
        raise FusionError(
            f"{row['model']} has two scores of {row['id']} for fold {row['fold']}; name one run of it, or another model_name"
        )
    for fault, wrong in (
        ("a NaN among its scores", rows[classes].isna().any(axis=1)),
        ("scores that do not add to 1, so its classes do not exclude one another", _unequal(rows[classes].sum(axis=1))),
    ):
        if wrong.any():
            row = rows[wrong].iloc[0]
            raise FusionError(f"{row['model']} has {fault}: {int(wrong.sum())} rows, first {row['id']}, fold {row['fold']}")


def _unequal(sums: pd.Series) -> pd.Series:
    return (sums - 1).abs() > 1e-3  # more than what float16 softmax outputs miss


def _answers(key: str, classes: list[str], images: pd.DataFrame, labels: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    """Of each image or study in the folds: truth, fold, patient."""
    missing = [name for name in classes if name not in labels.columns]
    if missing:
        raise FusionError(f"the labels lack the class(es) {', '.join(missing)} of the learners; name their prepared run")
    held = images.merge(folds.rename(columns={"id": "image_id"}), on="image_id")
    held = held.drop_duplicates(key).set_index(key)
    of_study = labels.set_index("id")[classes]
    studies = held.index if key == "study_id" else held["study_id"]
    true = of_study.reindex(studies).to_numpy(dtype=float)
    wrong = ~(np.isin(true, (0, 1)).all(axis=1) & (true.sum(axis=1) == 1))
    if wrong.any():
        raise FusionError(
            f"{int(wrong.sum())} ids are not of exactly one class of {', '.join(classes)}, first {held.index[wrong][0]}; "
            "ensembles are of classes that exclude one another"
        )
    return pd.DataFrame(
        {"truth": true.argmax(axis=1), "fold": held["fold"].to_numpy(), "patient": held["patient_id"].to_numpy()}, held.index
    )


def _check_folds(rows: pd.DataFrame, learners: tuple[str, ...]) -> None:
    """The same folds for every learner, and no score of a training image that passes for another."""
    of_each = {name: set(map(tuple, rows.loc[rows["model"] == name, ["outer", "fold"]].to_numpy())) for name in learners}
    for name, there in of_each.items():
        differ = there ^ of_each[learners[0]]
        if differ:
            outer, fold = min(differ)
            here, elsewhere = (name, learners[0]) if (outer, fold) in there else (learners[0], name)
            raise FusionError(
                f"{here} has scores of outer fold {outer}, fold {fold} (outer -1: none), and {elsewhere} has not; train "
                "every learner on the same folds, all nested or none"
            )
    if ((rows["outer"] >= 0) & (rows["outer"] == rows["fold"])).any():
        raise FusionError(
            "nested scores whose outer fold is the inner one: the model chose its epoch on what it is to be judged on"
        )
    seen = rows[rows["plain"] & (rows["fold"] != rows["own"])]
    if len(seen):
        row = seen.iloc[0]
        raise FusionError(
            f"{row['model']}: {len(seen)} scores are of images that its model was trained on, first {row['id']} of fold "
            f"{row['own']} by the model of fold {row['fold']}; name the prepared run of the learners, or train them again"
        )
