"""Scores of the test split: which are used, which are refused, and ensembles that are evaluated on them."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from kitlib.errors import FusionError
from kitlib.fusion.ensemble_bundle import apply_ensemble, learnt_ensemble
from kitlib.fusion.ensembles import judge_test_split, majority_vote
from kitlib.fusion.flannel import ENSEMBLES, ensemble_settings
from kitlib.fusion.stacking import gather
from kitlib.fusion.test_split import ALL_FOLDS, gather_test_split
from kitlib.reports.ensemble_report import collect_test_scores, out_of_fold_temperature

CLASSES = ["sick", "well"]
# a to d are in the folds 0 and 1, t to w in the split test; w is of the same patient as a
IMAGES = pd.DataFrame({"image_id": list("abcdtuvw"), "patient_id": list("pqrsxyzp"), "split": ["train"] * 4 + ["test"] * 4})
IMAGES = IMAGES.assign(study_id=IMAGES.image_id, path="", rows=1, columns=1, source="", view="")
LABELS = pd.DataFrame({"id": IMAGES.image_id, "sick": [1, 0] * 4, "well": [0, 1] * 4})
FOLDS = pd.DataFrame({"id": list("abcd"), "fold": [0, 0, 1, 1]})
PREPARED = IMAGES, LABELS, FOLDS


def scores(model, ids, fold, sick) -> pd.DataFrame:
    table = pd.DataFrame({"image_id": list(ids), "model": model, "fold": fold, "sick": sick})
    return table.assign(well=1 - table.sick)


def learner(model, *folds, sick=0.6) -> pd.DataFrame:
    """Return out-of-fold scores that give the true class the probability `sick`."""
    return pd.concat([scores(model, "abcd"[2 * k : 2 * k + 2], k, [sick, 1 - sick]) for k in folds])


ONE, TWO = scores("one", "tuv", 0, [0.9, 0.2, 0.3]), scores("two", "tuv", 0, [0.6, 0.7, 0.1])


def gathered_scores(*folds, **sick):
    return gather([learner(name, *folds, sick=value) for name, value in sick.items()], *PREPARED)


def test_learners_are_averaged_over_folds_in_the_order_of_the_out_of_fold_scores():
    gathered = gathered_scores(0, 1, two=0.6, one=0.8)
    later = scores("one", "vut", 1, [0.5, 0.0, 0.7])[["image_id", "model", "fold", "well", "sick"]]
    test = gather_test_split([pd.concat([ONE, TWO]), later, TWO.assign(fold=1)], gathered, *PREPARED)
    stack = test.means.full_stack()
    assert (
        (test.means.learners, test.means.classes)
        == (gathered.learners, gathered.classes)
        == (("two", "one"), ("sick", "well"))
    )
    assert stack.ids.tolist() == ["t", "u", "v"] and stack.truth.tolist() == [0, 1, 0]
    # one: (.9 + .7) / 2, (.2 + 0) / 2, (.3 + .5) / 2
    np.testing.assert_allclose(stack.probabilities[:, :, 0], [[0.6, 0.8], [0.7, 0.1], [0.1, 0.4]])
    assert len(test.rows) == 12 and test.left_out == 0 and test.means.unanswered == 0


def test_images_of_patients_in_a_fold_are_excluded_and_images_without_a_score_are_counted():
    gathered = gathered_scores(0, one=0.8)
    test = gather_test_split([scores("one", "tuw", 0, 0.5)], gathered, *PREPARED)
    assert test.left_out == 1 and test.means.unanswered == 1
    assert test.means.full_stack().ids.tolist() == test.rows.image_id.tolist() == ["t", "u"]
    assert gather_test_split([ONE.head(0)], gathered, *PREPARED) is None
    assert gather_test_split([], gathered, *PREPARED) is None


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([ONE], "'two' has out-of-fold scores of fold 0 but no test scores"),
        ([ONE, TWO, TWO.assign(fold=1)], "'two' has test scores of fold 1 but no out-of-fold scores"),
        ([ONE, TWO.head(2)], "fold 0 of 'two' has 2 scores, but fold 0 of 'one' has 3; only one of them has a score of 'v'"),
        ([ONE, TWO.replace({"image_id": {"v": "b"}})], "1 ids with test scores are not in the test split; the first is b"),
        ([ONE, TWO.replace({"image_id": {"v": "X"}})], "1 ids with test scores are not in the test split; the first is X"),
        (
            [ONE, TWO.rename(columns={"well": "fine"})],
            r"'two' has the classes \['sick', 'fine'\], but its out-of-fold scores have \['sick', 'well'\]",
        ),
        ([ONE, TWO.assign(sick=np.nan)], "'two' has NaN scores, the first for 't'"),
        ([ONE, TWO.assign(sick=0.5)], "3 rows have scores that do not sum to 1, .* 't', by 'two'"),
        ([table.assign(image_id="w").head(1) for table in (ONE, TWO)], "all patients with test scores also have images in"),
    ],
)
def test_test_scores_that_do_not_belong_to_the_learners_are_refused(tables, message):
    with pytest.raises(FusionError, match=f"^test images: .*{message}"):
        gather_test_split(tables, gathered_scores(0, one=0.8, two=0.6), *PREPARED)


def test_without_a_split_no_image_is_a_test_image():
    images, *others = PREPARED
    with pytest.raises(FusionError, match="3 ids with test scores are not in the test split; the first is t"):
        gather_test_split([ONE], gathered_scores(0, one=0.8), images.drop(columns="split"), *others)


def test_ensembles_are_trained_out_of_fold_and_evaluated_on_the_test_images():
    # `one` is always right out of fold and `two` always wrong, so `one` gets all weight. On the test images it is the other
    # way round, which must not change the weights.
    gathered = gathered_scores(0, one=0.8, two=0.1)
    assert gathered.folds == [0] and not gathered.crosses and gathered_scores(0, 1, one=0.8).crosses
    wrong, right = scores("one", "tuv", 0, [0.1, 0.9, 0.1]), scores("two", "tuv", 0, [0.9, 0.1, 0.9])
    test = gather_test_split([wrong, right], gathered, *PREPARED)
    ensembles = {name: ENSEMBLES[name] for name in ("mean", "vote", "weighted")}
    ensembles["flannel"] = ensemble_settings("flannel", epochs=3)
    judged = judge_test_split(gathered, test.means, ensembles)
    assert judged.protocols == dict.fromkeys(["one", "two", *ensembles], "out-of-fold")
    of_model = {name: rows.set_index("image_id").sick for name, rows in judged.scores.groupby("model")}
    np.testing.assert_allclose(of_model["mean"], 0.5)
    np.testing.assert_allclose(of_model["weighted"], wrong.sick, atol=1e-6)
    np.testing.assert_allclose(of_model["vote"], majority_vote(test.means.full_stack().probabilities)[:, 0])
    assert set(judged.scores.fold) == {ALL_FOLDS} and len(judged.scores) == 6 * 3
    weights = judged.weights[judged.weights.model == "weighted"]
    np.testing.assert_allclose(weights[["one", "two"]], [[1, 0]] * 3, atol=1e-6)
    with pytest.raises(FusionError, match="both an ensemble and a learner are called one"):
        judge_test_split(gathered, test.means, {"one": ENSEMBLES["mean"]})


def test_the_final_ensemble_predicts_as_evaluated_and_its_temperature_is_fitted_out_of_fold():
    # .9 everywhere, right 3 times in 4: log 9 / T = log 3, so T = 2; the truth of the test images is not used.
    gathered = gather([scores("one", "abcd", [0, 0, 1, 1], [0.9, 0.1, 0.9, 0.9])], *PREPARED)
    test = gather_test_split([ONE, ONE.assign(fold=1)], gathered, *PREPARED)
    judged = judge_test_split(gathered, test.means, {"mean": ENSEMBLES["mean"]})
    ensemble = learnt_ensemble(gathered, "mean", ENSEMBLES["mean"])
    assert out_of_fold_temperature(ensemble, gathered) == pytest.approx(2, abs=1e-3) and ensemble.folds == (0, 1)
    assert (ensemble.name, ensemble.method, ensemble.temperature, ensemble.key) == ("mean", "mean", 1, "image_id")
    assert ensemble.settings == asdict(ENSEMBLES["mean"]) and ensemble.protocol == gathered.protocol
    assert learnt_ensemble(gathered, "mean", ENSEMBLES["mean"], 2.0).temperature == 2
    table = collect_test_scores(judged, test, "mean", 0.5, "mean scaled")
    assert list(dict.fromkeys(table.model)) == ["one", "mean", "mean scaled"]
    after = table[table.model == "mean scaled"].set_index("image_id").sick
    # .9^2 / (.9^2 + .1^2)
    assert after["t"] == pytest.approx(0.81 / 0.82) and table[table.model == "one"].fold.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(collect_test_scores(judged, test, "mean", 1.0, "mean scaled")) == 9
    applied = apply_ensemble(ensemble, test.rows).set_index("image_id")
    np.testing.assert_allclose(applied.sick, table[table.model == "mean"].sick)


def test_an_ensemble_records_the_folds_it_was_trained_on():
    # Models of fold 0 with predictions of their training images: scores of the other fold are in-sample and not used.
    whole = [scores(name, "abcd", 0, sick).assign(outer=-1) for name, sick in (("one", [0.8, 0.2] * 2), ("two", 0.5))]
    gathered = gather(whole, *PREPARED)
    assert gathered.folds == [0] and gathered.has_in_sample()
    assert learnt_ensemble(gathered, "kept", ENSEMBLES["weighted"]).folds == (0,)
    in_sample = learnt_ensemble(gathered, "kept", ensemble_settings("weighted", stack_on="in_sample"))
    assert (in_sample.folds, in_sample.protocol) == ((1,), "in-sample")
