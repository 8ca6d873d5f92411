"""Classification metrics compared with scikit-learn and by hand, temperature scaling, refused tables, counted failures."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from kitlib.errors import DatasetError
from kitlib.reports.classification_report import (
    at_prevalence,
    by_model,
    calibrated,
    calibration_table,
    check_one_class,
    class_table,
    confidence_bins,
    confusion,
    count_metrics,
    ece,
    failures,
    judged,
    on_shared_images,
    overall,
    source_table,
)

CLASSES = ["COVID-19", "viral", "normal"]


def tables(count=240, seed=0, shares=(0.2, 0.3, 0.5)):
    """Two images per patient and two sources; the probabilities lean towards the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, count, p=shares)
    probabilities = rng.dirichlet(np.ones(3), count) + 0.6 * np.eye(3)[truth]
    ids = [f"i{number:03d}" for number in range(count)]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": [f"p{n // 2}" for n in range(count)]})
    images = images.assign(path="", rows=1, columns=1, source=np.where(np.arange(count) % 3, "one", "two"), view="")
    labels = pd.DataFrame(np.eye(3)[truth], columns=CLASSES).assign(id=ids)
    scores = pd.DataFrame(probabilities / probabilities.sum(axis=1, keepdims=True), columns=CLASSES)
    return scores.assign(image_id=ids, model="m", fold=np.arange(count) // 2 % 2), images, labels


def test_metrics_equal_those_of_scikit_learn():
    predictions = judged(*tables())
    table, matrix = class_table(predictions).set_index("class"), confusion(predictions)
    truth, called, probabilities = predictions.truth, predictions.predicted, predictions.probabilities
    assert (matrix.to_numpy() == metrics.confusion_matrix(truth, called)).all()
    assert (matrix.index.name, matrix.columns.name) == ("truth", "called")
    assert table.support["macro"] == 240
    for index, name in enumerate(CLASSES):
        true, calls, row = truth == index, called == index, table.loc[name]
        assert row.support == true.sum()
        assert row.accuracy == pytest.approx(metrics.accuracy_score(true, calls))
        assert row.sensitivity == pytest.approx(metrics.recall_score(true, calls))
        assert row.specificity == pytest.approx(metrics.recall_score(~true, ~calls))
        assert row.ppv == pytest.approx(metrics.precision_score(true, calls))
        assert row.npv == pytest.approx(metrics.precision_score(~true, ~calls))
        assert row.f1 == pytest.approx(metrics.f1_score(true, calls))
        assert row.roc_auc == pytest.approx(metrics.roc_auc_score(true, probabilities[:, index]))
        assert row.pr_auc == pytest.approx(metrics.average_precision_score(true, probabilities[:, index]))
        assert row.brier == pytest.approx(metrics.brier_score_loss(true, probabilities[:, index]))
    assert table.loc["macro"].f1 == pytest.approx(metrics.f1_score(truth, called, average="macro"))
    assert table.loc["macro"].roc_auc == pytest.approx(metrics.roc_auc_score(truth, probabilities, multi_class="ovr"))
    values = overall(predictions)
    assert values["micro_f1"] == pytest.approx(metrics.f1_score(truth, called, average="micro")) == values["accuracy"]
    assert values["log_loss"] == pytest.approx(metrics.log_loss(truth, probabilities))
    precision, recall = (
        function(truth, called, average="macro") for function in (metrics.precision_score, metrics.recall_score)
    )
    assert values["papers_micro_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert values["brier"] == pytest.approx(sum(table.brier[CLASSES]))


def test_the_papers_micro_f1_is_not_micro_f1():
    # By hand: 90 of 90 and 5 of 10 images are predicted correctly; precisions 90/95 and 1, recalls 1 and 1/2.
    matrix = np.array([[90, 0], [5, 5]])
    figures = count_metrics(matrix)
    precision, recall = (90 / 95 + 1) / 2, 0.75
    assert figures["ppv"].mean() == pytest.approx(precision) and figures["sensitivity"].mean() == recall
    assert 2 * precision * recall / (precision + recall) == pytest.approx(0.84733, abs=1e-5)  # the true one is 0.95


def test_a_class_that_is_never_predicted_has_precision_0_and_an_absent_class_is_nan():
    figures = count_metrics(np.array([[4, 0, 2], [0, 0, 0], [4, 0, 0]]))
    assert figures["ppv"].tolist()[::2] == [0.5, 0.0] and figures["f1"][2] == 0
    assert all(np.isnan(figures[name][1]) for name in ("sensitivity", "specificity", "ppv", "npv", "f1"))
    always = count_metrics(np.array([[6, 0], [4, 0]]))
    assert always["npv"].tolist() == [0.0, 0.6] and always["specificity"].tolist() == [0.0, 1.0]


def test_metrics_of_many_matrices_equal_those_of_each_matrix():
    matrices = np.random.default_rng(1).integers(0, 9, (5, 3, 3))
    together = count_metrics(matrices)
    for name, values in together.items():
        assert np.array_equal(values, [count_metrics(matrix)[name] for matrix in matrices], equal_nan=True)


def test_calibration_error_of_bins_known_by_hand():
    # 0.8 is the upper edge of a bin with two images, one correct; 0.6 is in another bin, correct.
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]])
    assert ece(probabilities, np.array([0, 1, 1]), bins=5) == pytest.approx((2 * 0.3 + 0.4) / 3)
    assert ece(np.array([[1.0, 0.0]] * 4), np.zeros(4, int)) == 0


def test_there_are_15_bins_of_confidence_which_include_their_upper_edges():
    """As in Guo et al. 2017. Of 15 bins, 0.66 and 0.67 are in different ones; of 16, in the same."""
    highest = np.array([1 + 1e-7, 1.0, 0.93, 0.8, 0.67, 0.66])  # means in single precision may exceed 1
    assert confidence_bins(np.stack([highest, 1 - highest], axis=1)).tolist() == [14, 14, 13, 11, 10, 9]
    assert ece(np.array([[0.66, 0.34], [0.67, 0.33]]), np.array([0, 1])) == pytest.approx((0.34 + 0.67) / 2)
    scores, images, labels = tables(2)
    scores[CLASSES] = 0.0
    scores[CLASSES[0]], scores[CLASSES[1]] = [0.66, 0.67], [0.34, 0.33]
    labels[CLASSES] = np.eye(3)[:2]
    assert overall(judged(scores, images, labels))["ece"] == pytest.approx((0.34 + 0.67) / 2)


def test_a_probability_of_0_costs_16_nats_not_infinity():
    scores, images, labels = tables(6)
    scores[CLASSES] = 1 - labels[CLASSES]
    scores[CLASSES] /= 2
    values = overall(judged(scores, images, labels))
    assert values["log_loss"] == pytest.approx(7 * np.log(10))
    assert values["accuracy"] == values["papers_micro_f1"] == 0


def test_predictive_values_at_a_prevalence():
    predictions = judged(*tables(600))
    table = class_table(predictions).set_index("class")
    prevalence = table.support["viral"] / 600
    same = at_prevalence(predictions, [prevalence]).set_index("class").loc["viral"]
    # At the prevalence of the data set, the predictive values are those of the data set.
    assert same.ppv == pytest.approx(table.ppv["viral"]) and same.npv == pytest.approx(table.npv["viral"])
    sensitivity, specificity = table.sensitivity["viral"], table.specificity["viral"]
    rare = at_prevalence(predictions, [0.01]).set_index("class").loc["viral"]
    assert rare.ppv == pytest.approx(0.01 * sensitivity / (0.01 * sensitivity + 0.99 * (1 - specificity)))
    for impossible in (0, 1, 5):
        with pytest.raises(ValueError, match=r"above 0 and below 1"):
            at_prevalence(predictions, [impossible])


def test_the_source_table_has_all_sources_pooled_and_each_source_alone():
    scores, images, labels = tables()
    images["source"] = np.where(labels["COVID-19"] == 1, "ieee8023", "kermany")
    pooled = source_table(judged(scores, images, labels))
    assert pooled.index.is_unique
    pooled = pooled.set_index(["source", "class"])
    assert pooled.loc[("ieee8023", "COVID-19")].of == pooled.loc[("pooled", "COVID-19")].support
    # The source has no other class, so these metrics are undefined.
    assert np.isnan(pooled.loc[("ieee8023", "COVID-19")].specificity)
    assert np.isnan(pooled.loc[("ieee8023", "COVID-19")].roc_auc)
    # Classes without images of a source and means over classes are left out.
    of_sources = {"pooled": CLASSES, "ieee8023": CLASSES[:1], "kermany": CLASSES[1:]}
    assert pooled.index.tolist() == [(source, name) for source, names in of_sources.items() for name in names]
    alone = judged(scores, images, labels, source="kermany")
    assert len(alone.truth) == pooled.loc[("kermany", "viral")].of
    assert set(judged(scores, images, labels, source="not kermany").source) == {"ieee8023"}
    for absent in ("not nih", "ieee8023"):
        with pytest.raises(ValueError, match=f"no predicted image is from source '{absent}'; available sources: ieee8023"):
            judged(scores[(labels["COVID-19"] == 0).to_numpy()], images, labels, source=absent)
    with pytest.raises(ValueError, match=r"no predicted image is from source 'nih'; available sources: ieee8023, kermany"):
        judged(scores, images, labels, source="nih")


def test_failures_by_class():
    scores, images, labels = tables(12)
    folds = pd.DataFrame({"id": images.image_id[:10], "fold": 0})
    lungs = pd.DataFrame({"image_id": images.image_id, "verdict": ["too_small", *["found"] * 10, "too_small"]})
    table = failures(scores.iloc[2:10], images, labels, folds, lungs).set_index("class")
    assert table.images.tolist() == labels[CLASSES].sum().tolist()
    assert table[["outside_folds", "unanswered", "answered"]].sum().tolist() == [2, 2, 8]
    first = labels[CLASSES].iloc[0].idxmax()
    assert table.lungs_not_found[first] == 1 == table.lungs_not_found.sum()
    in_folds = labels[CLASSES][:10].sum()
    assert table.unanswered_share[first] == table.unanswered[first] / in_folds[first]
    assert table.lungs_not_found_share.to_dict() == (table.lungs_not_found / in_folds).to_dict()
    assert "lungs_not_found" not in failures(scores, images, labels, folds)


def test_folds_are_averaged_and_models_are_split():
    scores, images, labels = tables(20)
    other = scores.assign(fold=1 - scores.fold)
    other[CLASSES] = other[CLASSES].to_numpy()[:, [1, 2, 0]]
    both = judged(pd.concat([scores, other]), images, labels)
    mean = (scores[CLASSES].to_numpy() + other[CLASSES].to_numpy()) / 2
    assert np.allclose(pd.DataFrame(both.probabilities, both.image_id).loc[scores.image_id], mean)
    parted = by_model(pd.concat([scores.assign(model="n").iloc[5:], scores]))
    assert list(parted) == ["n", "m"] and parted["m"].index.tolist() == list(range(20))
    shared = on_shared_images({name: judged(rows, images, labels) for name, rows in parted.items()})
    assert len(shared["m"].truth) == 15 and (shared["m"].image_id == shared["n"].image_id).all()
    assert (shared["m"].probabilities == shared["n"].probabilities).all()


def test_several_or_unknown_classes_are_refused_before_training():
    _, images, labels = tables(10)
    prepared = {"images": images, "labels": labels, "folds": pd.DataFrame({"id": images.image_id.iloc[:8], "fold": 0})}
    check_one_class(prepared, multi_label=False)
    several = labels.assign(**{CLASSES[0]: 1.0, CLASSES[1]: np.nan})
    unknown = labels.assign(**{name: labels[name].where(labels[name] == 1) for name in CLASSES})
    with pytest.raises(DatasetError, match=r"8 images have more, fewer or unknown ones"):
        check_one_class(prepared | {"labels": unknown}, multi_label=False)
    none = labels[["id"]]  # training raises its own error
    check_one_class(prepared | {"labels": none}, multi_label=True)
    # Images without a fold are not judged, unless they are in the split for testing.
    tested = images.assign(split=["train"] * 9 + ["test"])
    with pytest.raises(DatasetError, match=r"9 images have more, fewer or unknown ones"):
        check_one_class(prepared | {"labels": several, "images": tested}, multi_label=False)
    partly = labels.where(labels.id.isin(images.study_id.iloc[:8]), several)
    check_one_class(prepared | {"labels": partly}, multi_label=False)
    with pytest.raises(DatasetError, match=r"8 images have more, fewer or unknown ones; the first is i000\. Use notebook"):
        check_one_class(prepared | {"labels": several}, multi_label=False)
    with pytest.raises(DatasetError, match=r"but multi_label is true in overrides\. Use notebook 20"):
        check_one_class(prepared, multi_label=True)


def test_inconsistent_scores_and_labels_are_refused():
    scores, images, labels = tables(10)
    with pytest.raises(ValueError, match=r"do not sum to 1; the first is i000 .*multi_label"):
        judged(scores.assign(viral=0.9), images, labels)
    with pytest.raises(ValueError, match=r"10 images do not have exactly one true class"):
        judged(scores, images, labels.assign(**dict.fromkeys(CLASSES, 1.0)))
    unknown = labels.assign(**{name: labels[name].where(labels[name] == 1) for name in CLASSES})
    with pytest.raises(ValueError, match=r"10 images do not have exactly one true class"):
        judged(scores, images, unknown)
    with pytest.raises(ValueError, match="the `class_scores` table is empty"):
        judged(scores[:0], images, labels)
    other = judged(scores[["image_id", "model", "fold", *CLASSES[::-1]]], images, labels)
    with pytest.raises(
        ValueError, match=r"different classes or class orders .*a: COVID-19, viral, normal; b: normal, viral"
    ):
        on_shared_images({"a": judged(scores, images, labels), "b": other})
    with pytest.raises(ValueError, match=r"no image was predicted by all of these models: none given"):
        on_shared_images({})
    with pytest.raises(ValueError, match=r"classes that the scores lack: \['normal'\]"):
        judged(scores.drop(columns="normal"), images, labels)
    with pytest.raises(ValueError, match=r"from several models \(m, n\); pass one of the tables from `by_model`"):
        judged(pd.concat([scores, scores.assign(model="n")]), images, labels)
    with pytest.raises(ValueError, match=r"no image was predicted by all of these models: a, b"):
        halves = {"a": scores[:5], "b": scores[5:]}
        on_shared_images({name: judged(rows, images, labels) for name, rows in halves.items()})


def soft_model(count=3000, temperature=4.0):
    """Truth drawn from probabilities p, and a model that predicts p^(1/T), whose correct temperature is 1/T."""
    scores, images, labels = tables(count)
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(3, 0.3), count)
    truth = (rng.random((count, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    soft = p.clip(1e-6) ** (1 / temperature)
    scores[CLASSES] = soft / soft.sum(axis=1, keepdims=True)
    labels[CLASSES] = np.eye(3)[truth]
    return judged(scores, images, labels)


def test_an_underconfident_model_is_scaled_to_the_probabilities_that_the_truth_was_drawn_from():
    predictions = soft_model()
    after, temperatures = calibrated(predictions)
    assert sorted(temperatures.index) == [0, 1] and temperatures.to_numpy() == pytest.approx(0.25, abs=0.03)
    assert (after.predicted == predictions.predicted).all()
    row = calibration_table({"flannel": predictions}).loc["flannel"]
    assert row["ece before"] > 0.2 and row["ece after"] < 0.03
    assert row["log_loss after"] < row["log_loss before"] and row["brier after"] < row["brier before"]
    assert row.temperature == pytest.approx(temperatures.mean())


def test_a_temperature_of_one_changes_no_figure_of_votes(monkeypatch):
    scores, images, labels = tables(60)
    scores[CLASSES] = np.eye(3)[scores[CLASSES].to_numpy().argmax(axis=1)]
    monkeypatch.setattr("kitlib.scoring.temperature.fit_temperature", lambda found, truth: 1.0)
    row = calibration_table({"vote": judged(scores, images, labels)}).loc["vote"]
    for figure in ("ece", "brier", "log_loss"):
        assert row[f"{figure} after"] == pytest.approx(row[f"{figure} before"], abs=1e-6)


def test_a_single_fold_cannot_be_scaled():
    scores, images, labels = tables(20)
    with pytest.raises(ValueError, match=r"scores are from a single fold \(0\)"):
        calibration_table({"m": judged(scores[scores.fold == 0], images, labels)})
    assert calibration_table({}).empty and isinstance(calibration_table({}), pd.DataFrame)
