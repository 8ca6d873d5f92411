"""Decides which model of a submission predicts next, most valuable models first, and how much time it may take."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from kitlib.deadline import Deadline
from kitlib.tables import FINDINGS_SEPARATOR

if TYPE_CHECKING:
    from kitlib.inference.answer import AnsweringModel


class Counts(Protocol):
    """The attributes of a Predictor that are read after each batch; the last three cover only the current `predict`."""

    model: str
    fold: int
    seen: list[str]
    lungs_missed: int
    overflowed: int


@dataclass(frozen=True)
class Predicted:
    """The predictions of a model so far. The object never changes, so that another thread may read it."""

    model: str = ""  # in the tables
    fold: int = 0
    chunks: tuple[pd.DataFrame, ...] = ()  # one table of predictions per batch
    seen: tuple[str, ...] = ()  # image_ids, including those of images without boxes
    lungs_missed: int = 0  # number of images that were used uncropped because no lungs were found
    overflowed: int = 0  # number of images that were predicted again in float32


@dataclass(eq=False)
class Model:
    """A trained model of a submission, its predictions so far, and its state in the queue."""

    record: "AnsweringModel"
    predicted: Predicted = Predicted()
    turns: int = 0  # how often the model has begun to predict
    running: bool = False
    stopped: bool = False  # whether the model was stopped after its share of the time; it may continue later
    dropped: bool = False  # whether its predictions are not used; a thread may still add some

    @property
    def folder(self) -> Path:
        """The folder that contains the model's weights and model.json."""
        return self.record.folder

    @property
    def answers(self) -> frozenset[str]:
        """What the model predicts: a subset of "study", "none", "boxes", "classes" and "masks"."""
        return self.record.answers

    @property
    def may_be_fused(self) -> bool:
        """Whether the submission may use this model: it was not dropped, and its first turn has ended."""
        return not self.dropped and (not self.running or self.turns > 1)

    def coverage(self) -> pd.DataFrame:
        """Return a `coverage` table: image_id, model, fold and findings, for each image that the model has predicted."""
        seen = {"image_id": self.predicted.seen, "model": self.predicted.model, "fold": self.predicted.fold}
        return pd.DataFrame({**seen, "findings": FINDINGS_SEPARATOR.join(self.record.classes)})

    def add(self, chunk: pd.DataFrame, predictor: Counts, before: Predicted) -> None:
        """Add `chunk`, the predictions of a batch, and update the counts of images; do nothing if the model was dropped.

        A model that was stopped may continue in a second turn: `predictor` has the counts of the current turn, `before`
        those of the turn before.
        """
        if self.dropped:
            return
        self.predicted = Predicted(
            predictor.model,
            predictor.fold,
            (*self.predicted.chunks, chunk),
            (*before.seen, *predictor.seen),
            before.lungs_missed + predictor.lungs_missed,
            before.overflowed + predictor.overflowed,
        )

    def drop(self) -> None:
        """Discard all predictions of this model, and their counts, for good."""
        self.dropped, self.predicted, self.stopped = True, Predicted(), False

    def count_predicted(self) -> int:
        """Return the number of images with a prediction; a classifier's rows that contain only NaN do not count."""
        if self.answers & {"boxes", "masks"}:  # images without boxes have no row, and tables of masks no float column
            return len(self.predicted.seen)
        return sum(int(chunk.select_dtypes("float").notna().any(axis=1).sum()) for chunk in self.predicted.chunks)


@dataclass(frozen=True)
class Turn:
    """A model that is to predict now, and `budget`, the seconds that its turn may take.

    If `may_stop` is True, the model is stopped when the budget is used up, and keeps its predictions. Otherwise the model is
    dropped as soon as it is expected to exceed the budget.
    """

    model: Model
    budget: float
    may_stop: bool


class ModelQueue:
    """Decides which model of a submission predicts next; `processes` is the number of processes that predict. Thread-safe.

    `models` are in the order in which they predict. The first model of each kind of prediction, such as boxes, gets a share
    of the time. After this time it is stopped and keeps its predictions, because predictions for some images are better than
    none. Further models of this kind are dropped if they cannot finish. Stopped models get a second turn after all others.
    """

    def __init__(self, models: list[Model], deadline: Deadline, processes: int = 1) -> None:
        self.models, self.deadline, self.processes = models, deadline, processes
        self._one_at_a_time = threading.Lock()

    def next(self) -> Turn | None:
        """Return the next turn and mark its model as running, or None if no model is waiting."""
        with self._one_at_a_time:
            waiting = [model for model in self.models if not model.turns]
            stopped = [model for model in self.models if model.turns == 1 and model.stopped and not model.running]
            if not (waiting or stopped):
                return None
            turn = self._first_turn(waiting) if waiting else Turn(stopped[0], self.deadline.left(), may_stop=True)
            turn.model.turns, turn.model.running = turn.model.turns + 1, True
            return turn

    def _first_turn(self, waiting: list[Model]) -> Turn:
        predicted = frozenset[str]().union(
            *(other.answers for other in self.models if other.predicted.seen or other.running)
        )
        is_first, first_models = not waiting[0].answers <= predicted, 0
        for model in waiting:
            first_models += not model.answers <= predicted
            predicted |= model.answers
        rounds = -(-first_models // self.processes)  # the processes share the first models
        return Turn(waiting[0], self.deadline.left() / (rounds if is_first else 1), may_stop=is_first)
