"""Several learners' probabilities as one: mean, majority vote, weighted mean and FLANNEL, learnt and judged fold by fold.

Predicting wants no torch, so that a submission stays light; learning imports what it needs.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kitlib.errors import FusionError
from kitlib.fusion.stacking import LearnerScores, Stack
from kitlib.fusion.test_split import ALL_FOLDS
from kitlib.scoring.temperature import LEAST

if TYPE_CHECKING:  # imports torch
    from kitlib.fusion.flannel import EnsembleSettings

logger = logging.getLogger(__name__)

Weights = dict[str, np.ndarray]  # what a method has learnt; empty for mean and vote
IN_SAMPLE, OUT_OF_FOLD = "in-sample", "out-of-fold"
TIE = 1e-6  # of a vote: what settles a tie between the largest shares


@dataclass(frozen=True)
class Judged:
    """Test predictions of every learner and ensemble.

    `scores`: key, model, fold, the classes. `weights`: the learners' weights in each ensemble that has any, an id a row:
    key, model, fold, truth, and a column a learner. `protocols`: what each ensemble learnt from, nested or cross-fitted (see
    kitlib.fusion.stacking), out-of-fold (all folds, judged on test images) or in-sample; of learners, means and votes, which
    learn nothing, the same as of an ensemble that learns.
    """

    scores: pd.DataFrame
    weights: pd.DataFrame
    protocols: dict[str, str]


def combine(method: str, weights: Weights, probabilities: np.ndarray) -> np.ndarray:
    """(n, K, C) -> (n, C), each row on the simplex, by a method of EnsembleSettings and what it has learnt."""
    if method == "mean":
        return probabilities.mean(axis=1)
    if method == "vote":
        return majority_vote(probabilities)
    if method == "weighted":
        mean = np.einsum("nkc,k->nc", probabilities, weights["learners"].astype(float))
        return np.minimum(mean, 1.0)  # weights may add to a hair more, and no table takes such a probability
    if method == "flannel":
        logits = (flannel_weights(weights, probabilities)[:, :, None] * probabilities).sum(axis=1)
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)
    raise ValueError(f"no ensemble method is called {method!r}; there are: mean, vote, weighted, flannel")


def vote_shares(probabilities: np.ndarray) -> np.ndarray:
    """(n, K, C) -> (n, C): the share of learners whose most probable class it is (the first of equals)."""
    return np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)].mean(axis=1)


def majority_vote(probabilities: np.ndarray) -> np.ndarray:
    """Vote shares (n, C) in which a tie for the most votes goes to the tied class of the highest mean probability.

    The winner of a tie has TIE more than its share, taken from the other tied classes, so that the largest entry of a row is
    the answer and rows still add to 1.
    """
    shares = vote_shares(probabilities)
    tied = shares > shares.max(axis=1, keepdims=True) - 0.5 / probabilities.shape[1]
    winner = np.where(tied, probabilities.mean(axis=1), -1.0).argmax(axis=1)
    won = np.eye(shares.shape[1])[winner]
    others = tied.sum(axis=1, keepdims=True) - 1
    return shares + TIE * np.where(others > 0, won - (tied - won) / np.maximum(others, 1), 0.0)


def flannel_weights(weights: Weights, probabilities: np.ndarray) -> np.ndarray:
    """Weight (n, K) in -1..1 of each learner for each row of (n, K, C): tanh of a linear map of all pairs."""
    features = probabilities.reshape(len(probabilities), -1)
    pairs = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    return np.tanh(pairs @ weights["weight"].astype(float).T + weights["bias"].astype(float))


def simplex_weights(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Weights (K,) of at least 0 that add to 1 and give the mean of (n, K, C) the lowest log loss on `truth` (n,)."""
    from scipy.optimize import minimize

    right = np.maximum(probabilities[np.arange(len(truth)), :, truth], LEAST)  # (n, K)
    count = right.shape[1]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        p = right @ w
        return float(-np.log(p).mean()), -(right / p[:, None]).mean(axis=0)

    found = minimize(
        *(loss, np.full(count, 1 / count)),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    if not found.success:
        raise FusionError(f"the weights of {count} learners were not found: {found.message}")
    weights = np.clip(found.x, 0, None)
    return weights / weights.sum()


def learn(stack: Stack, settings: "EnsembleSettings") -> Weights:
    """What the method of `settings` learns from `stack`. FLANNEL holds out one of its folds, or a fifth of its patients."""
    if settings.method == "weighted":
        return {"learners": simplex_weights(stack.probabilities, stack.truth)}
    if settings.method == "flannel":
        from kitlib.fusion.flannel import train_flannel

        learnt, losses = train_flannel(stack.probabilities, stack.truth, settings, held_out(stack, settings.seed))
        logger.info("FLANNEL learnt from %d rows, best after %d epochs", len(stack.ids), 1 + int(np.argmin(losses or [0])))
        return learnt
    return {}


def held_out(stack: Stack, seed: int) -> np.ndarray:
    """Rows (n,) that tell when to stop: one fold drawn by `seed`, or of a single fold a fifth of its patients.

    A fold keeps near-duplicates together as well, patients alone do not. None where there is a single patient.
    """
    folds, rng = np.unique(stack.fold), np.random.default_rng(seed)
    if len(folds) > 1:
        return stack.fold == rng.choice(folds)
    patients = np.unique(stack.patient)
    held = rng.permutation(patients)[: max(1, len(patients) // 5) if len(patients) > 1 else 0]
    return np.isin(stack.patient, held)


def judge_ensembles(found: LearnerScores, ensembles: Mapping[str, "EnsembleSettings"]) -> Judged:
    """Test predictions of the learners and of `ensembles` (name -> settings), learnt anew for each fold.

    Raises FusionError where an ensemble has a learner's name or nothing to learn from.
    """
    parts = [_judge(found, found.judged(fold), fold, partial(found.lesson, fold), ensembles) for fold in found.folds]
    return _joined(found, parts, ensembles, found.protocol)


def judge_test_split(found: LearnerScores, test: LearnerScores, ensembles: Mapping[str, "EnsembleSettings"]) -> Judged:
    """Predictions of test images: of the learners' means in `test` and of `ensembles`, each learnt from all of `found`.

    That is LearnerScores.everything: it is the ensemble that would be kept. Raises FusionError as `judge_ensembles` does.
    """
    return _joined(found, [_judge(found, test.everything(), ALL_FOLDS, found.everything, ensembles)], ensembles, OUT_OF_FOLD)


def _judge(
    found: LearnerScores,
    test: Stack,
    fold: int,
    lesson: Callable[[str], Stack],
    ensembles: Mapping[str, "EnsembleSettings"],
) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """Scores and weights of `test`, a table a model; `lesson` gives what an ensemble learns from, by its stack_on."""
    shared = sorted(set(ensembles) & set(found.learners))
    if shared:
        raise FusionError(f"{', '.join(shared)}: both an ensemble and a learner; train the learner with another model_name")
    scores, weights = [], []
    for place, learner in enumerate(found.learners):
        scores.append(_rows(found, test, learner, fold, test.probabilities[:, place]))
    for name, settings in ensembles.items():
        learnt = learn(lesson(settings.stack_on), settings) if settings.learns else {}
        scores.append(_rows(found, test, name, fold, combine(settings.method, learnt, test.probabilities)))
        if settings.learns:
            weights.append(_weights(found, test, name, fold, learnt))
    return scores, weights


def _joined(
    found: LearnerScores,
    parts: list[tuple[list[pd.DataFrame], list[pd.DataFrame]]],
    ensembles: Mapping[str, "EnsembleSettings"],
    protocol: str,
) -> Judged:
    scores, weights = ([table for part in parts for table in part[place]] for place in (0, 1))
    in_sample = [name for name, settings in ensembles.items() if settings.learns and settings.stack_on == "in_sample"]
    protocols = dict.fromkeys([*found.learners, *ensembles], protocol) | dict.fromkeys(in_sample, IN_SAMPLE)
    empty = pd.DataFrame(columns=[found.key, "model", "fold", "truth", *found.learners])
    joined = pd.concat(weights, ignore_index=True) if weights else empty
    return Judged(pd.concat(scores, ignore_index=True), joined, protocols)


def _rows(found: LearnerScores, test: Stack, model: str, fold: int, answer: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame({found.key: test.ids, "model": model, "fold": fold})
    return table.join(pd.DataFrame(answer, columns=list(found.classes)))


def _weights(found: LearnerScores, test: Stack, name: str, fold: int, learnt: Weights) -> pd.DataFrame:
    truth = np.array(found.classes, dtype=object)[test.truth]
    table = pd.DataFrame({found.key: test.ids, "model": name, "fold": fold, "truth": truth})
    if "learners" in learnt:
        of_each = np.broadcast_to(learnt["learners"], (len(test.ids), len(found.learners)))
    else:
        of_each = flannel_weights(learnt, test.probabilities)
    return table.join(pd.DataFrame(of_each, columns=list(found.learners)))
