"""Findings metrics compared with scikit-learn, thresholds chosen on other images, and bootstrap intervals over patients."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from kitlib.reports.findings_report import (
    answers,
    auc_draws,
    best_thresholds,
    bootstrap_auc,
    class_report,
    cross_fitted_thresholds,
    mean_over_folds,
    roc_curves,
    uncertainty,
)
from kitlib.reports.heidelberg_report import heidelberg_figures

CLASSES = ["Mass", "Nodule", "No Finding"]


def tables(count=200, folds=2, seed=0, unknown=0.0):
    """Two images per patient; the probabilities follow the truth, most closely for the first class."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, 3)) < [0.3, 0.1, 0.5]).astype(float)
    probabilities = np.clip(truth * [0.5, 0.3, 0.1] + 0.6 * rng.random((count, 3)), 0, 1)
    truth[rng.random(truth.shape) < unknown] = np.nan
    ids = [f"i{number}" for number in range(count)]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": [f"p{n // 2}" for n in range(count)]})
    images = images.assign(path="", rows=1, columns=1, source="", view="")
    labels = pd.DataFrame(truth, columns=CLASSES).assign(id=ids)
    scores = pd.DataFrame(probabilities, columns=CLASSES).assign(image_id=ids, model="m", fold=np.arange(count) // 2 % folds)
    return scores, images, labels


def test_the_class_table_has_the_metrics_of_scikit_learn():
    scores, images, labels = tables()
    given_answers = answers(scores.sample(frac=1, random_state=1), images, labels)
    report = class_report(given_answers, np.array([0.5, 0.4, 0.3])).set_index("class")
    assert report.index.tolist() == CLASSES
    for name, threshold in zip(CLASSES, (0.5, 0.4, 0.3), strict=True):
        truth, probabilities, row = labels[name], scores[name], report.loc[name]
        assert row.positives == truth.sum() and row.of == 200 and row.threshold == pytest.approx(threshold)
        assert row.roc_auc == pytest.approx(roc_auc_score(truth, probabilities))
        assert row.average_precision == pytest.approx(average_precision_score(truth, probabilities))
        assert row.precision == pytest.approx(precision_score(truth, probabilities >= threshold))
        assert row.recall == pytest.approx(recall_score(truth, probabilities >= threshold))
        assert row.f1 == pytest.approx(f1_score(truth, probabilities >= threshold))


def test_aggregates_are_macro_means_and_the_share_of_images_with_all_classes_right():
    scores, images, labels = tables()
    scores[CLASSES] = scores[CLASSES].round(1)  # some are equal to the thresholds
    given_answers = answers(scores, images, labels)
    figures = heidelberg_figures(given_answers, np.full(3, 0.4))
    # section 4.1 of the report
    assert figures.iloc[0].to_dict() == {"precision": 0.59, "recall": 0.12, "accuracy": 0.40, "f1": 0.16}
    for row, threshold in ((1, 0.5), (2, 0.4)):
        truth, called = labels[CLASSES], scores[CLASSES] >= threshold
        assert figures.precision.iloc[row] == pytest.approx(precision_score(truth, called, average="macro"))
        assert figures.recall.iloc[row] == pytest.approx(recall_score(truth, called, average="macro"))
        assert figures.f1.iloc[row] == pytest.approx(f1_score(truth, called, average="macro"))
        assert figures.accuracy.iloc[row] == pytest.approx(accuracy_score(truth.to_numpy(), called.to_numpy()))


def test_the_most_probable_of_exclusive_classes_is_predicted():
    scores, images, labels = tables(30)
    labels[CLASSES] = np.eye(3)[np.arange(30) % 3]
    figures = heidelberg_figures(answers(scores, images, labels), np.full(3, 0.5), exclusive=True)
    truth, called = np.arange(30) % 3, scores[CLASSES].to_numpy().argmax(axis=1)
    assert figures.index[1:].tolist() == ["here, most probable class"]
    assert figures.accuracy.iloc[1] == pytest.approx(accuracy_score(truth, called))
    assert figures.recall.iloc[1] == pytest.approx(recall_score(truth, called, average="macro"))


def test_unknown_labels_are_ignored():
    scores, images, labels = tables(unknown=0.3)
    report = class_report(answers(scores, images, labels), np.full(3, 0.5)).set_index("class")
    for name in CLASSES:
        known = labels[name].notna()
        assert report.of[name] == known.sum()
        assert report.roc_auc[name] == pytest.approx(roc_auc_score(labels[name][known], scores[name][known]))
    whole = labels[CLASSES].notna().all(axis=1)
    right = ((scores[CLASSES] >= 0.5) == (labels[CLASSES] == 1)).all(axis=1)
    figures = heidelberg_figures(answers(scores, images, labels), np.full(3, 0.5))
    assert figures.accuracy.iloc[1] == pytest.approx(right[whole].mean())


def of_one_class(truth, probabilities):
    ids = [f"i{number}" for number in range(len(truth))]
    scores = pd.DataFrame({"image_id": ids, "model": "m", "fold": 0, "Mass": probabilities})
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids})
    return answers(scores, images, pd.DataFrame({"id": ids, "Mass": np.array(truth, dtype=float)}))


@settings(max_examples=30, deadline=None)
@given(truth=st.lists(st.booleans(), min_size=2, max_size=12).filter(any), seed=st.integers(0, 99))
def test_no_threshold_has_a_better_f1(truth, seed):
    probabilities = np.random.default_rng(seed).integers(0, 5, len(truth)) / 4
    chosen = best_thresholds(of_one_class(truth, probabilities))[0]
    every = [f1_score(truth, probabilities >= threshold) for threshold in (0, 0.25, 0.5, 0.75, 1)]
    assert f1_score(truth, probabilities >= chosen) == pytest.approx(max(every))


def test_a_rare_class_that_is_hard_to_find_gets_the_threshold_with_the_best_f1():
    # At 0.9, one of two calls is right, of four positives: F1 2 / (2 + 4). At 0.1, four of 27: F1 8 / (27 + 4).
    assert best_thresholds(of_one_class([1, 0, 1, 1, 1] + [0] * 22, [0.9] * 2 + [0.1] * 25)).tolist() == [0.9]


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_a_threshold_does_not_change_with_the_truth_that_it_judges(folds):
    scores, images, labels = tables(120, folds)
    before = cross_fitted_thresholds(answers(scores, images, labels))
    patient = images.patient_id[10]
    own = (images.patient_id == patient).to_numpy()
    changed = labels.copy()
    changed.loc[own, CLASSES] = 1 - changed.loc[own, CLASSES]
    after = cross_fitted_thresholds(answers(scores, images, changed))
    assert np.array_equal(before[own], after[own])
    # The threshold does not depend on any other image of the same fold either.
    if folds > 1:
        others = answers(scores, images, labels)
        chosen = scores.fold.to_numpy() != scores.fold[10]
        alone = answers(scores[chosen], images, labels)
        assert np.array_equal(before[10], best_thresholds(alone)) and len(others.probabilities) == 120


def test_a_class_without_positives_is_not_judged():
    scores, images, labels = tables()
    labels["Nodule"] = 0.0
    given_answers = answers(scores, images, labels)
    thresholds = cross_fitted_thresholds(given_answers)
    assert (thresholds[:, 1] == 0.5).all()
    row = class_report(given_answers, thresholds).set_index("class").loc["Nodule"]
    assert row.positives == 0 and row[["roc_auc", "average_precision", "precision", "recall", "f1"]].isna().all()
    intervals = bootstrap_auc(given_answers, samples=5).set_index("name")
    assert intervals.loc["Nodule"].isna().all() and intervals.loc["mean"].notna().all()
    assert not any(title.startswith("Nodule") for title in roc_curves(given_answers))
    labels[CLASSES] = 0.0
    nothing = answers(scores, images, labels)
    assert bootstrap_auc(nothing, samples=5)[["value", "low", "high"]].isna().all(axis=None)
    assert roc_curves(nothing) == {} and class_report(nothing, np.full(3, 0.5)).f1.isna().all()
    assert heidelberg_figures(nothing, np.full(3, 0.5)).f1.isna().tolist() == [False, True, True]


def test_the_interval_holds_the_value_and_follows_patients_not_images():
    scores, images, labels = tables(400)
    given_answers = answers(scores, images, labels)
    intervals = bootstrap_auc(given_answers, samples=100).set_index("name")
    aucs = [roc_auc_score(labels[name], scores[name]) for name in CLASSES]
    assert intervals.value.tolist() == pytest.approx([np.mean(aucs), *aucs])
    drawn = auc_draws(given_answers, samples=100).iloc[1:]
    for level, tail in ((0.95, 0.025), (0.5, 0.25)):
        again = bootstrap_auc(given_answers, samples=100, level=level)
        assert again.low.tolist() == pytest.approx(drawn.quantile(tail).tolist())
        assert again.high.tolist() == pytest.approx(drawn.quantile(1 - tail).tolist())
    assert ((intervals.low < intervals.value) & (intervals.value < intervals.high)).all()
    # Ten copies of each image of a patient add no information.
    copies = range(10)
    many = pd.concat([scores.assign(image_id=scores.image_id + f"-{n}") for n in copies])
    of_many = pd.concat([images.assign(image_id=images.image_id + f"-{n}") for n in copies])
    again = bootstrap_auc(answers(many, of_many, labels), samples=100).set_index("name")
    pd.testing.assert_frame_equal(again, intervals, atol=1e-9, rtol=0)


def test_two_models_of_the_same_patients_get_the_same_draws():
    scores, images, labels = tables()
    other = scores.assign(Mass=0.5, model="other")[::-1]
    one, two = (auc_draws(answers(each, images, labels), samples=5) for each in (scores, other))
    assert list(one.columns) == ["mean", *CLASSES] and len(one) == 1 + 5
    # Equal predictions have equal draws, and a constant prediction has an area of 0.5.
    pd.testing.assert_frame_equal(one[CLASSES[1:]], two[CLASSES[1:]])
    assert two["Mass"].tolist() == pytest.approx([0.5] * 6)
    assert one["mean"].to_numpy() == pytest.approx(one[CLASSES].mean(axis=1).to_numpy())


def test_a_draw_has_the_areas_of_repeated_patients_and_curves_are_sorted_by_area():
    given_answers = answers(*tables(60, unknown=0.1))
    patients, codes = np.unique(given_answers.patient, return_inverse=True)
    count = np.random.default_rng(3).multinomial(len(patients), np.full(len(patients), 1 / len(patients)))
    rows = np.repeat(np.arange(60), count[codes])
    repeated = class_report(given_answers.rows(rows), np.full(3, 0.5)).roc_auc
    drawn = auc_draws(given_answers, samples=1, seed=3).iloc[1]
    assert drawn[CLASSES].tolist() == pytest.approx(repeated.tolist()) and drawn["mean"] == pytest.approx(repeated.mean())
    areas = class_report(given_answers, np.full(3, 0.5)).set_index("class").roc_auc.sort_values(ascending=False)
    curves = roc_curves(given_answers)
    assert list(curves) == [f"{name} (AUC {area:.3f})" for name, area in areas.items()]
    for curve, area in zip(curves.values(), areas, strict=True):
        x, y = curve.false_positives.to_numpy(), curve.recall.to_numpy()
        assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(area)


def test_the_halves_of_a_single_folds_patients_have_equal_numbers_and_choose_for_each_other():
    given_answers = answers(*tables(40, folds=1))
    chosen = cross_fitted_thresholds(given_answers)
    halves = [np.flatnonzero((chosen == value).all(axis=1)) for value in np.unique(chosen, axis=0)]
    assert sorted(map(len, halves)) == [20, 20]
    for half, other in (halves, halves[::-1]):
        assert set(given_answers.patient[half]).isdisjoint(given_answers.patient[other])
        assert np.array_equal(chosen[half[0]], best_thresholds(given_answers.rows(other)))


def test_labels_from_a_half_on_are_true_and_a_class_that_all_images_have_has_no_area():
    whole = of_one_class([0.5, 1, 0.9], [0.2, 0.4, 0.6])
    assert whole.truth.tolist() == [[1], [1], [1]] and roc_curves(whole) == {}
    row = class_report(whole, np.array([0.4])).iloc[0]
    assert np.isnan(row.roc_auc) and row.recall == pytest.approx(2 / 3) and row.average_precision == 1
    nothing = class_report(of_one_class([np.nan, np.nan], [0.2, 0.4]), np.array([0.4])).iloc[0]
    assert nothing.of == 0 and nothing[["roc_auc", "average_precision", "threshold", "f1"]].isna().all()
    assert auc_draws(of_one_class([np.nan, np.nan], [0.2, 0.4]), samples=1).isna().all(axis=None)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    # Two normal classes one deviation apart: the area is Phi(1 / sqrt 2) = 0.760. Of 60 intervals of 90 %, 54 are expected
    # to hold it; fewer than 44 has a probability of one in 10,000.
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = np.arange(120) % 2
        probabilities = 1 / (1 + np.exp(-(rng.normal(size=120) + truth)))
        ids = [f"i{number}" for number in range(120)]
        scores = pd.DataFrame({"image_id": ids, "model": "m", "fold": 0, "Mass": probabilities})
        images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids})
        given_answers = answers(scores, images, pd.DataFrame({"id": ids, "Mass": truth.astype(float)}))
        row = bootstrap_auc(given_answers, samples=100, level=0.9, seed=seed).iloc[0]
        held += row.low <= 0.7602 <= row.high
    assert held >= 44


def test_several_rows_an_image_are_refused_or_averaged():
    scores, images, labels = tables(20, folds=1)
    twice = pd.concat([scores, scores.assign(fold=1, Mass=0.0)])
    with pytest.raises(ValueError, match="20 images have several rows of scores; the first is i0"):
        answers(twice, images, labels)
    mean = mean_over_folds(twice)
    assert mean.image_id.tolist() == scores.image_id.tolist()
    assert mean.Mass.to_numpy() == pytest.approx(scores.Mass / 2) and (mean.fold == 0).all()
    answers(mean, images, labels)


def test_mismatched_tables_are_refused():
    scores, images, labels = tables(6)
    with pytest.raises(ValueError, match=r"labels lack the predicted classes \['Hernia'\]"):
        answers(scores.assign(Hernia=0.5), images, labels)
    with pytest.raises(ValueError, match=r"1 predicted images .* the first is i0"):
        answers(scores, images[1:], labels)
    with pytest.raises(ValueError, match="image i2 has a score that is NaN"):
        answers(scores.assign(Mass=scores.Mass.where(scores.image_id != "i2")), images, labels)


def test_uncertainty_is_the_entropy_in_bits():
    scores = pd.DataFrame({"image_id": list("abc"), "model": "m", "fold": 0, "x": [0.5, 1.0, 0.25], "y": [0.5, 0.0, 1.0]})
    # A probability of 0.5 has one bit, one of 0.25 has 2 - 3/4 log2 3 bits.
    entropy = uncertainty(scores.set_axis([7, 8, 9]))
    assert entropy.to_dict() == pytest.approx({7: 2, 8: 0, 9: 2 - 0.75 * np.log2(3)}) and entropy.name == "uncertainty"
