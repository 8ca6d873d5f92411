"""Combines the probabilities of several learners (mean, majority vote, weighted mean, FLANNEL) and evaluates the ensembles.

Prediction does not import torch, so that a submission stays light; only the training functions import it.
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

Weights = dict[str, np.ndarray]  # the trained arrays of a method, keyed by name; empty for mean and vote
IN_SAMPLE, OUT_OF_FOLD = "in-sample", "out-of-fold"
TIE = 1e-6  # vote share that is moved to the winner of a tie


@dataclass(frozen=True)
class Judged:
    """Predictions of every learner (a model that ensembles combine) and every ensemble, for images not used to train them.

    `scores` has the columns image_id or study_id, model (a learner or ensemble), fold and the classes. `weights` has one row
    per id and trained ensemble: image_id or study_id, model (the ensemble), fold, truth (name of the true class), and one
    column per learner with the learner's weight. `protocols` maps each learner and ensemble to the kind of predictions on
    which ensembles were trained: "nested", "cross-fitted" (see kitlib.fusion.stacking), "out-of-fold" (of all folds, for
    evaluation on test images) or "in-sample". Only trained ensembles can be "in-sample". The learners and all ensembles that
    are not "in-sample" share one value.
    """

    scores: pd.DataFrame
    weights: pd.DataFrame
    protocols: dict[str, str]


def combine(method: str, weights: Weights, probabilities: np.ndarray) -> np.ndarray:
    """Combine K learners' probabilities (n, K, C) of C classes into an ensemble's probabilities (n, C); rows sum to 1.

    `method` is a value of EnsembleSettings.method; `weights` holds the method's trained arrays. Raises ValueError for an
    unknown method.
    """
    if method == "mean":
        return probabilities.mean(axis=1)
    if method == "vote":
        return majority_vote(probabilities)
    if method == "weighted":
        mean = np.einsum("nkc,k->nc", probabilities, weights["learners"].astype(float))
        return np.minimum(mean, 1.0)  # rounding can make the weights sum to slightly more than 1, which tables refuse
    if method == "flannel":
        logits = (flannel_weights(weights, probabilities)[:, :, None] * probabilities).sum(axis=1)
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)
    raise ValueError(f"unknown ensemble method {method!r}; valid methods are: mean, vote, weighted, flannel")


def vote_shares(probabilities: np.ndarray) -> np.ndarray:
    """Return for each of n rows and C classes the share of K learners that vote for the class; `probabilities` is (n, K, C).

    A learner votes for its most probable class; among equally probable classes, for the first.
    """
    return np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)].mean(axis=1)


def majority_vote(probabilities: np.ndarray) -> np.ndarray:
    """Return the shares (n, C) of `vote_shares`, with ties broken: each row's largest share is that of the predicted class.

    `probabilities` is (n, K, C). If several classes of a row have the most votes, the tied class with the highest mean
    probability wins. TIE is added to the winner's share and taken, in equal parts, from the shares of the tied losers. So
    rows still sum to 1.
    """
    shares = vote_shares(probabilities)
    tied = shares > shares.max(axis=1, keepdims=True) - 0.5 / probabilities.shape[1]
    winner = np.where(tied, probabilities.mean(axis=1), -1.0).argmax(axis=1)
    winner_one_hot = np.eye(shares.shape[1])[winner]
    others = tied.sum(axis=1, keepdims=True) - 1
    return shares + TIE * np.where(others > 0, winner_one_hot - (tied - winner_one_hot) / np.maximum(others, 1), 0.0)


def flannel_weights(weights: Weights, probabilities: np.ndarray) -> np.ndarray:
    """Return FLANNEL's weight of each learner for each image or study, (n, K), -1..1; `probabilities` is (n, K, C).

    All pairwise products of a row's K * C probabilities are the inputs of a linear layer. The tanh of the layer's K outputs
    is the row of learner weights. `weights` holds the layer's trained arrays `weight` and `bias`.
    """
    features = probabilities.reshape(len(probabilities), -1)
    pairs = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    return np.tanh(pairs @ weights["weight"].astype(float).T + weights["bias"].astype(float))


def simplex_weights(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return weights (K,) of K learners, at least 0 and summing to 1, whose weighted mean has the smallest log loss.

    `probabilities` (n, K, C) are the learners' probabilities, and `truth` (n,) holds the true class indices. Raises
    FusionError if the optimiser does not converge.
    """
    from scipy.optimize import minimize

    true_class_probability = np.maximum(probabilities[np.arange(len(truth)), :, truth], LEAST)  # (n, K)
    count = true_class_probability.shape[1]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        p = true_class_probability @ w
        return float(-np.log(p).mean()), -(true_class_probability / p[:, None]).mean(axis=0)

    result = minimize(
        *(loss, np.full(count, 1 / count)),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    if not result.success:
        raise FusionError(f"optimising the weights of {count} learners failed: {result.message}")
    weights = np.clip(result.x, 0, None)
    return weights / weights.sum()


def learn(stack: Stack, settings: "EnsembleSettings") -> Weights:
    """Train an ensemble of the kind `settings.method` on `stack`; return its trained arrays by name ({} for mean and vote).

    For early stopping, FLANNEL holds out the rows that `choose_held_out` selects.
    """
    if settings.method == "weighted":
        return {"learners": simplex_weights(stack.probabilities, stack.truth)}
    if settings.method == "flannel":
        from kitlib.fusion.flannel import train_flannel

        held_out = choose_held_out(stack, settings.seed)
        learnt, losses = train_flannel(stack.probabilities, stack.truth, settings, held_out)
        if losses:
            best_epoch, held = 1 + int(np.argmin(losses)), int(held_out.sum())
            logger.info(
                "FLANNEL: trained on %d rows; epoch %d was best for %d held-out rows", len(held_out) - held, best_epoch, held
            )
        return learnt
    return {}


def choose_held_out(stack: Stack, seed: int) -> np.ndarray:
    """Return a boolean mask (n,) of the rows of `stack` to hold out for early stopping.

    If the stack has several folds, the rows of a random one are held out; near-duplicates are in the same fold. If there is
    only one fold, the rows of a random fifth of the patients, at least one, are held out. If there is only one patient, no
    row is held out. `seed` decides the random choice.
    """
    folds, rng = np.unique(stack.fold), np.random.default_rng(seed)
    if len(folds) > 1:
        return stack.fold == rng.choice(folds)
    patients = np.unique(stack.patient)
    held_patients = rng.permutation(patients)[: max(1, len(patients) // 5) if len(patients) > 1 else 0]
    return np.isin(stack.patient, held_patients)


def judge_ensembles(learner_scores: LearnerScores, ensembles: Mapping[str, "EnsembleSettings"]) -> Judged:
    """Return predictions of the learners and of `ensembles` for every fold; see Judged.

    `ensembles` maps names to settings. For each fold, the ensembles are trained anew on the other folds. Raises FusionError
    if an ensemble has the name of a learner, or if there are no scores to train an ensemble on.
    """
    parts = [
        _judge(
            learner_scores, learner_scores.test_stack(fold), fold, partial(learner_scores.training_stack, fold), ensembles
        )
        for fold in learner_scores.folds
    ]
    return _join(learner_scores, parts, ensembles, learner_scores.protocol)


def judge_test_split(
    learner_scores: LearnerScores, test: LearnerScores, ensembles: Mapping[str, "EnsembleSettings"]
) -> Judged:
    """Return predictions of the learners and of `ensembles` for the test images; see Judged.

    `test` holds one prediction per learner and test image: the mean over the learner's folds. `ensembles` maps names to
    settings. Like the final ensemble, every ensemble is trained on all folds (LearnerScores.full_stack). Raises FusionError
    if an ensemble has the name of a learner, or if there are no scores to train an ensemble on.
    """
    return _join(
        learner_scores,
        [_judge(learner_scores, test.full_stack(), ALL_FOLDS, learner_scores.full_stack, ensembles)],
        ensembles,
        OUT_OF_FOLD,
    )


def _judge(
    learner_scores: LearnerScores,
    test: Stack,
    fold: int,
    training_stack: Callable[[str], Stack],
    ensembles: Mapping[str, "EnsembleSettings"],
) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """Train ensembles and predict `test`; return two lists: tables of scores, and tables of the learners' weights.

    There is one table of scores per learner and ensemble, and one table of weights per trained ensemble. All have one row
    per id in `test`; for the columns see Judged. `training_stack` returns the training rows for a value of
    EnsembleSettings.stack_on. Raises FusionError if an ensemble has the name of a learner.
    """
    shared_names = sorted(set(ensembles) & set(learner_scores.learners))
    if shared_names:
        raise FusionError(
            f"both an ensemble and a learner are called {', '.join(shared_names)}; train the learner with another model_name"
        )
    scores, weights = [], []
    for column, learner in enumerate(learner_scores.learners):
        scores.append(_score_table(learner_scores, test, learner, fold, test.probabilities[:, column]))
    for name, settings in ensembles.items():
        learnt = learn(training_stack(settings.stack_on), settings) if settings.learns else {}
        scores.append(_score_table(learner_scores, test, name, fold, combine(settings.method, learnt, test.probabilities)))
        if settings.learns:
            weights.append(_weight_table(learner_scores, test, name, fold, learnt))
    return scores, weights


def _join(
    learner_scores: LearnerScores,
    parts: list[tuple[list[pd.DataFrame], list[pd.DataFrame]]],
    ensembles: Mapping[str, "EnsembleSettings"],
    protocol: str,
) -> Judged:
    scores, weights = ([table for part in parts for table in part[index]] for index in (0, 1))
    in_sample = [name for name, settings in ensembles.items() if settings.learns and settings.stack_on == "in_sample"]
    protocols = dict.fromkeys([*learner_scores.learners, *ensembles], protocol) | dict.fromkeys(in_sample, IN_SAMPLE)
    empty = pd.DataFrame(columns=[learner_scores.key, "model", "fold", "truth", *learner_scores.learners])
    joined = pd.concat(weights, ignore_index=True) if weights else empty
    return Judged(pd.concat(scores, ignore_index=True), joined, protocols)


def _score_table(learner_scores: LearnerScores, test: Stack, model: str, fold: int, prediction: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame({learner_scores.key: test.ids, "model": model, "fold": fold})
    return table.join(pd.DataFrame(prediction, columns=list(learner_scores.classes)))


def _weight_table(learner_scores: LearnerScores, test: Stack, name: str, fold: int, learnt: Weights) -> pd.DataFrame:
    truth = np.array(learner_scores.classes, dtype=object)[test.truth]
    table = pd.DataFrame({learner_scores.key: test.ids, "model": name, "fold": fold, "truth": truth})
    if "learners" in learnt:
        learner_weights = np.broadcast_to(learnt["learners"], (len(test.ids), len(learner_scores.learners)))
    else:
        learner_weights = flannel_weights(learnt, test.probabilities)
    return table.join(pd.DataFrame(learner_weights, columns=list(learner_scores.learners)))
