"""Ensemble methods, compared with loops and closed forms; evaluation by fold does not leak the evaluated fold."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.errors import FusionError
from kitlib.fusion.ensembles import (
    IN_SAMPLE,
    TIE,
    choose_held_out,
    combine,
    judge_ensembles,
    majority_vote,
    simplex_weights,
    vote_shares,
)
from kitlib.fusion.flannel import ENSEMBLES, FlannelWeights, ensemble_settings
from kitlib.fusion.stacking import NESTED, Stack, gather

CLASSES = ("COVID-19", "viral", "normal")


def drawn(n, learners, classes, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), (n, learners))


def flannel_by_loops(weight, bias, image) -> list[float]:
    """Return FLANNEL's probabilities (C,) of one image (K, C), computed by loops as the paper writes them."""
    learners, classes = len(image), len(image[0])
    features = [image[k][c] for k in range(learners) for c in range(classes)]
    logits = [0.0] * classes
    for k in range(learners):
        total = bias[k]
        for i in range(len(features)):
            for j in range(len(features)):
                total += weight[k][i * len(features) + j] * features[i] * features[j]
        for c in range(classes):
            logits[c] += np.tanh(total) * image[k][c]
    return [np.exp(each) / sum(np.exp(other) for other in logits) for each in logits]


@pytest.mark.parametrize(("learners", "classes"), [(5, 4), (2, 3), (1, 2)])
def test_numpy_flannel_equals_the_loops_and_the_torch_module(learners, classes):
    torch.manual_seed(learners)
    model, probabilities = FlannelWeights(learners, classes), drawn(6, learners, classes)
    learnt = {name: each.detach().numpy() for name, each in model.linear.named_parameters()}
    answer = combine("flannel", learnt, probabilities)
    weight, bias = learnt["weight"].tolist(), learnt["bias"].tolist()
    by_loops = [flannel_by_loops(weight, bias, image.tolist()) for image in probabilities]
    np.testing.assert_allclose(answer, by_loops, atol=1e-12)
    with torch.no_grad():
        of_module = model(torch.as_tensor(probabilities, dtype=torch.float32)).softmax(dim=1).numpy()
    np.testing.assert_allclose(answer, of_module, atol=1e-6)
    assert answer.max() <= np.e**learners / (np.e**learners + classes - 1)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 5), st.integers(0, 999))
@settings(max_examples=50)
def test_rows_sum_to_1_and_do_not_depend_on_the_order_of_learners(n, learners, classes, seed):
    probabilities, order = drawn(n, learners, classes, seed), np.random.default_rng(seed).permutation(learners)
    shares = np.random.default_rng(seed).dirichlet(np.ones(learners))
    for method, learnt, permuted in (
        ("mean", {}, {}),
        ("vote", {}, {}),
        ("weighted", {"learners": shares}, {"learners": shares[order]}),
    ):
        answer = combine(method, learnt, probabilities)
        np.testing.assert_allclose(answer.sum(axis=1), 1, atol=1e-12)
        assert answer.min() >= -1e-12
        np.testing.assert_allclose(combine(method, permuted, probabilities[:, order]), answer, atol=1e-12)
    np.testing.assert_allclose(vote_shares(probabilities).sum(axis=1), 1, atol=1e-12)


def test_a_weighted_mean_does_not_exceed_1_if_the_weights_do():
    weights = np.array([0.1, 0.2, 0.3, 0.4])[[3, 0, 1, 2]] + np.array([0, 0, 0, 3e-16])
    assert weights.sum() > 1
    assert combine("weighted", {"learners": weights}, np.tile([1.0, 0.0], (1, 4, 1))).tolist() == [[1.0, 0.0]]


def test_a_tie_goes_to_the_tied_class_of_the_highest_mean():
    # The learners vote for the classes 0, 1, 1, 0; the third class has the highest mean but no vote.
    image = [[0.50, 0.05, 0.45], [0.02, 0.50, 0.48], [0.02, 0.50, 0.48], [0.50, 0.05, 0.45]]
    clear = [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.4, 0.3, 0.3]]
    probabilities = np.array([image, clear])
    np.testing.assert_allclose(vote_shares(probabilities), [[0.5, 0.5, 0], [0.75, 0.25, 0]])
    # means .26, .275, .465: class 1 wins among the tied ones
    np.testing.assert_allclose(majority_vote(probabilities), [[0.5 - TIE, 0.5 + TIE, 0], [0.75, 0.25, 0]], atol=1e-15)
    three = np.array([[[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]]])
    answer = majority_vote(three)
    assert answer.argmax() == 1 and answer.sum() == pytest.approx(1, abs=1e-15)
    assert abs(answer - 1 / 3).max() == pytest.approx(TIE)


def test_simplex_weights_equal_those_of_expectation_maximisation():
    # EM maximises the same likelihood: shares of a mixture of known densities (Dempster, Laird and Rubin 1977).
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 3, 400)
    probabilities = drawn(400, 4, 3, seed=5)
    probabilities[:, 0] = 0.6 * probabilities[:, 0] + 0.4 * np.eye(3)[truth]
    probabilities[:, 2] = 0.8 * probabilities[:, 2] + 0.2 * np.eye(3)[truth]
    right = probabilities[np.arange(400), :, truth]
    shares = np.full(4, 0.25)
    for _ in range(1500):
        shares = (shares * right / (right @ shares)[:, None]).mean(axis=0)
    weights = simplex_weights(probabilities, truth)
    np.testing.assert_allclose(weights, shares, atol=2e-3)
    assert weights.sum() == pytest.approx(1) and weights.min() >= 0
    # A learner that is never right gets no weight, even if it gives the true class a probability of 0.
    never = np.stack([probabilities[:, 0], np.eye(3)[(truth + 1) % 3]], axis=1)
    np.testing.assert_allclose(simplex_weights(never, truth), [1, 0], atol=1e-6)


def prepared(n, folds) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Return n images, their labels, their folds and the index of their true class."""
    truth = np.arange(n) // folds % 3
    images = pd.DataFrame({"image_id": [f"i{k:03}" for k in range(n)], "study_id": [f"i{k:03}" for k in range(n)]})
    labels = pd.DataFrame(np.eye(3)[truth], columns=list(CLASSES)).assign(id=images.study_id)
    return (
        images.assign(patient_id="p" + images.image_id),
        labels,
        pd.DataFrame({"id": images.image_id, "fold": np.arange(n) % folds}),
        truth,
    )


def overfitted(name, images, fold_of, truth, folds, sure, rng) -> pd.DataFrame:
    """Return nested scores of a learner that is always right on training images, and elsewhere knows a share of `sure`.

    The learner "honest" does not overfit: it knows a share of `sure` on all images.
    """
    parts = []
    for outer in range(folds):
        for inner in range(folds):
            if outer == inner:
                continue
            guess = np.where(rng.random(len(truth)) < sure, truth, rng.integers(0, 3, len(truth)))
            trained_on = (fold_of != outer) & (fold_of != inner)
            predicted = np.where(trained_on, truth, guess) if name != "honest" else guess
            scores = 0.05 + 0.85 * np.eye(3)[predicted]
            parts.append(
                pd.DataFrame(scores, columns=list(CLASSES)).assign(image_id=images.image_id, outer=outer, fold=inner)
            )
    return pd.concat(parts, ignore_index=True).assign(model=name)


@pytest.fixture(scope="module")
def where_learners_overfit():
    """Two learners that have memorised their training images and know nothing else; "honest" is right 3 times in 4."""
    folds, rng = 4, np.random.default_rng(1)
    images, labels, fold_table, truth = prepared(240, folds)
    fold_of = fold_table.fold.to_numpy()
    shares = {"by heart": 0.0, "honest": 0.6, "by heart too": 0.0}
    tables = [overfitted(name, images, fold_of, truth, folds, sure, rng) for name, sure in shares.items()]
    return gather(tables, images, labels, fold_table), truth


def accuracy(scores, model, truth) -> float:
    rows = scores[scores.model == model].sort_values("image_id")
    assert len(rows) == len(truth)
    return float((rows[list(CLASSES)].to_numpy().argmax(axis=1) == truth).mean())


def test_out_of_fold_stacking_beats_in_sample_stacking_where_learners_overfit(where_learners_overfit):
    learner_scores, truth = where_learners_overfit
    quick = {"epochs": 25, "batch_size": 60, "patience": 0}
    ensembles = {
        "mean": ENSEMBLES["mean"],
        "vote": ENSEMBLES["vote"],
        "weighted": ENSEMBLES["weighted"],
        "weighted in-sample": ensemble_settings("weighted", stack_on="in_sample"),
        "flannel": ensemble_settings("flannel", **quick),
        "flannel in-sample": ensemble_settings("flannel", stack_on="in_sample", **quick),
    }
    judged = judge_ensembles(learner_scores, ensembles)
    right = {model: accuracy(judged.scores, model, truth) for model in judged.protocols}
    # The honest learner is right in .6 + .4 / 3 = .73 of cases, slightly more as a mean of three models; noise in 1/3.
    assert right["honest"] > 0.7 and right["by heart"] < 0.45
    for method in ("weighted", "flannel"):
        assert right[method] > right["honest"] - 0.02
        assert right[method] > right[f"{method} in-sample"] + 0.1, right
    assert judged.protocols["flannel"] == judged.protocols["honest"] == judged.protocols["mean"] == NESTED
    assert judged.protocols["flannel in-sample"] == judged.protocols["weighted in-sample"] == IN_SAMPLE
    weights = judged.weights[judged.weights.model == "flannel"]
    assert set(weights.truth) == set(CLASSES) and weights[list(learner_scores.learners)].mean().idxmax() == "honest"


def test_predictions_of_a_fold_do_not_depend_on_that_folds_truth(where_learners_overfit):
    learner_scores, _ = where_learners_overfit
    answers = learner_scores.answers
    answers = answers.assign(truth=np.where(answers.fold == 2, (answers.truth + 1) % 3, answers.truth))
    ensembles = {"weighted": ENSEMBLES["weighted"], "flannel": ensemble_settings("flannel", epochs=3, patience=2)}
    one = judge_ensembles(learner_scores, ensembles).scores
    other = judge_ensembles(type(learner_scores)(**vars(learner_scores) | {"answers": answers}), ensembles).scores
    in_fold = one.fold == 2
    pd.testing.assert_frame_equal(one[in_fold], other[in_fold])
    assert not one[~in_fold].equals(other[~in_fold])


def test_an_ensemble_may_not_have_a_learners_name(where_learners_overfit):
    with pytest.raises(FusionError, match="both an ensemble and a learner are called honest"):
        judge_ensembles(where_learners_overfit[0], {"honest": ENSEMBLES["mean"]})


def test_held_out_rows_are_a_fold_or_whole_patients():
    patient, fold = np.repeat(np.arange(10), 3), np.repeat([1, 3], 15)
    stack = Stack(np.arange(30), drawn(30, 2, 3), np.zeros(30, int), fold, patient)
    assert np.unique(fold[choose_held_out(stack, 0)]).size == 1 and choose_held_out(stack, 0).sum() == 15
    of_one_fold = choose_held_out(Stack(stack.ids, stack.probabilities, stack.truth, fold * 0, patient), 0)
    assert of_one_fold.sum() == 6 and len(np.unique(patient[of_one_fold])) == 2  # a fifth of 10 patients, whole
    assert not choose_held_out(Stack(stack.ids, stack.probabilities, stack.truth, fold * 0, patient * 0), 0).any()
