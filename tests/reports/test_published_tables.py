"""The published metrics agree with themselves and with the counts behind them, and own results are listed under them."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given as drawn_by_hypothesis
from hypothesis import settings
from hypothesis import strategies as st

from kitlib.errors import SettingsError
from kitlib.paths import project_root
from kitlib.reports.classification_bootstrap import append_to_published, draws, fold_table, what_differs
from kitlib.reports.classification_report import class_table, count_metrics, judged
from kitlib.reports.published_tables import COUNTS, TABLES, check_counts, find_published, possible_counts
from tests.reports.test_classification_report import tables


def row(accuracy, sensitivity, specificity):
    return {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity}


@pytest.mark.parametrize("name", ["flannel", "patched_flannel"])
def test_a_published_macro_f1_is_the_mean_of_its_classes(name):
    rows = find_published(name).rows
    means = rows[["f1 COVID-19", "f1 viral", "f1 bacterial", "f1 normal"]].mean(axis=1)
    # Rounding may change the last two digits, because each value is the mean of five rounds.
    assert (means - rows["f1 macro"]).abs().max() < 2e-4
    assert rows.loc["FLANNEL", "f1 macro"] == {"flannel": 0.8385, "patched_flannel": 0.8180}[name]


def test_the_faults_of_the_hrnet_tables_are_those_that_the_checker_finds():
    checked = check_counts(find_published("hrnet_folds"))
    assert [name for name, consistent in checked.consistent.items() if not consistent] == [
        f"fold {number}" for number in (1, 3, 4, 8, 10)
    ]
    assert checked.loc["fold 10"].renamed == "specificity: npv"
    assert checked.loc["fold 1"].renamed == "accuracy: balanced accuracy; specificity: npv"
    # The printed means are the means of the columns, so the accuracy of 99.26 in the text is not.
    means = checked[["accuracy", "sensitivity", "specificity"]].mean()
    assert means.tolist() == pytest.approx([99.29, 98.53, 98.82], abs=0.011)
    assert check_counts(find_published("hrnet")).consistent.tolist() == [True, True, False]
    assert check_counts(find_published("flannel")).empty


def test_the_specificities_of_hrnets_folds_are_negative_predictive_values():
    # Each of the 10 folds has 41 of the 410 COVID-19 images and 50 of the 500 others.
    checked = check_counts(find_published("hrnet_folds"))
    # 40 of 41 and no false positive: 50 / 51 = 98.039 (truncated); the accuracy is (97.56 + 100) / 2, not 90 / 91 = 98.90.
    assert checked.loc["fold 1", ["true_positives", "true_negatives"]].tolist() == [40, 50]
    counts, renamed = possible_counts(41, 50, row(98.78, 97.56, 98.03))
    assert renamed == {"accuracy": ("balanced accuracy",), "specificity": ("npv",)}
    assert counts[["true_positives", "true_negatives"]].to_numpy().tolist() == [[40, 50]]
    # 39 of 41: 50 / 52 = 96.15; the accuracy 89 / 91 = 97.80 is correct.
    assert possible_counts(41, 50, row(97.80, 95.12, 96.15))[1] == {"specificity": ("npv",)}
    assert "impossible under these names. With 39 true positives, 2 false negatives" in checked.loc["fold 10"].says
    assert "specificity is the npv" in checked.loc["fold 10"].says
    # See facts: pooled over the folds.
    tp, fn, tn, fp = checked[list(COUNTS)].sum()
    assert [(tp, tp + fn), (tn, tn + fp), (tp + tn, tp + fn + tn + fp)] == [(404, 410), (500, 500), (904, 910)]


def test_one_of_the_three_hrnet_baselines_has_renamed_metrics():
    table_7 = find_published("hrnet").rows.mul(100).round(2)
    resnet, densenet, efficientnet = (possible_counts(41, 50, row(*table_7.iloc[place])) for place in range(3))
    assert resnet[0].true_negatives.tolist() == [47]  # 86 / 91 = 94.505, truncated
    assert densenet[0].true_positives.tolist() == [37]
    assert efficientnet[1] == {"accuracy": ("balanced accuracy",), "specificity": ("npv",)}


@drawn_by_hypothesis(st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_real_metrics_are_always_possible_and_their_counts_are_among_the_results(positives, negatives, data):
    tp, tn = data.draw(st.integers(0, positives)), data.draw(st.integers(0, negatives))
    figures = count_metrics(np.array([[tn, negatives - tn], [positives - tp, tp]]))
    printed = {name: np.round(100 * figures[name][1], 2) for name in ("sensitivity", "specificity", "accuracy")}
    counts, renamed = possible_counts(positives, negatives, printed)
    assert not renamed
    assert [tp, tn] in counts[["true_positives", "true_negatives"]].to_numpy().tolist()


def test_impossible_values_are_reported_and_invalid_input_is_refused():
    counts, renamed = possible_counts(3, 3, row(51.0, 49.0, 12.0))
    assert counts.empty and not renamed
    nonsense = replace(find_published("hrnet"), rows=find_published("hrnet").rows.head(1) * 0.5, counts=(3, 3))
    checked = check_counts(nonsense).iloc[0]
    assert not checked.consistent and "no counts result in these metrics" in checked.says
    with pytest.raises(ValueError, match=r"auc 50; expected .* for: accuracy, sensitivity, specificity"):
        possible_counts(3, 3, {"auc": 50})
    for value in (-0.5, 100.5):
        with pytest.raises(ValueError, match=f"accuracy {value}; expected .* percent"):
            possible_counts(3, 3, {"accuracy": value})
    for sizes in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="these invalid metrics: none; expected at least 1 positive and 1 negative"):
            possible_counts(*sizes, {"accuracy": 50})


@pytest.mark.parametrize(
    ("positives", "printed", "hits"),
    [
        (32, 3.11, []),
        (32, 3.12, [1]),
        (32, 3.13, [1]),
        (32, 3.14, []),
        (2, 49.99, []),
        (2, 50, [1]),
        (2, 0, [0]),
        (2, 100, [2]),
    ],
)
def test_a_printed_share_is_rounded_or_truncated(positives, printed, hits):
    """1 of 32 is 3.125 %."""
    counts, renamed = possible_counts(positives, 1, {"sensitivity": printed})
    assert not renamed and sorted(set(counts.true_positives)) == hits


def test_the_sensitivity_keeps_its_name_if_another_metric_can_be_renamed():
    """A ppv of 1/3 is impossible with a sensitivity of 0; 0 of 1 and 1 of 2 give an accuracy of 1/3."""
    counts, renamed = possible_counts(1, 2, {"sensitivity": 0, "ppv": 33.33})
    assert renamed == {"ppv": ("accuracy",)} and counts.to_numpy().tolist() == [[0, 1, 1, 1]]


def test_the_number_of_other_possibilities_is_told():
    half = replace(find_published("hrnet"), rows=pd.DataFrame({"accuracy": [0.5]}, index=["m"]), counts=(1, 1))
    checked = check_counts(half).loc["m"]
    expected = "possible, with 0 true positives, 1 false negatives, 1 true negatives, 0 false positives, or 1 other counts"
    assert checked.says == expected and checked[list(COUNTS)].tolist() == [0, 1, 1, 0]


def test_own_results_are_listed_under_the_published_rows():
    predictions = judged(*tables())
    drawn = draws(predictions, samples=20)
    by_fold = {"FLANNEL, out of fold": fold_table(predictions)}
    text = append_to_published(find_published("flannel"), {"FLANNEL, out of fold": drawn}, by_fold)
    assert text.loc[("published", "FLANNEL"), "f1 macro"] == "0.8385 (sd 0.01)"
    assert text.loc[("here", "FLANNEL, out of fold"), "f1 viral"].startswith(f"{drawn['f1 viral'].iloc[0]:.4f} [")
    assert text.loc[("here", "FLANNEL, out of fold"), "f1 bacterial"] == "-"  # not among our classes
    assert text.index[-2] == ("here", "FLANNEL, out of fold")
    folds = [class_table(predictions.rows(predictions.answers.fold == fold)).f1.iloc[-1] for fold in (0, 1)]
    assert text.index[-1] == ("here, mean of folds", "FLANNEL, out of fold")
    assert text["f1 macro"].iloc[-1] == f"{np.mean(folds):.4f} (sd {np.std(folds, ddof=1):.2f})"
    differences = what_differs(find_published("flannel"), predictions, "2 folds by patient")
    assert differences.loc["protocol", "here"] == "2 folds by patient"
    absent = what_differs(find_published("flannel"), predictions.rows(predictions.truth < 2), "").loc["data", "here"]
    assert ", 0 normal; from one, two" in absent
    assert (
        "240 images of 120 patients" in differences.loc["data", "here"]
        and "from one, two" in differences.loc["data", "here"]
    )
    assert "comparable to f1 bacterial" in differences.loc["data", "here"]


def test_a_published_table_of_folds_is_followed_by_our_folds():
    classes = ["COVID-19", "normal"]
    scores, images, labels = tables()
    labels = pd.DataFrame({"id": labels.id, "COVID-19": labels["COVID-19"], "normal": 1 - labels["COVID-19"]})
    scores = scores.assign(normal=1 - scores["COVID-19"])[["image_id", "model", "fold", *classes]]
    predictions = judged(scores, images, labels)
    folds = fold_table(predictions)
    text = append_to_published(find_published("hrnet_folds"), {"hrnet": draws(predictions, samples=5)}, {"hrnet": folds})
    ours = ["here", "here, fold 0", "here, fold 1", "here, mean of folds"]
    assert list(text.index)[-4:] == [(name, "hrnet") for name in ours] and len(text) == 11 + 4
    second = class_table(predictions.rows(predictions.answers.fold == 1)).set_index("class")
    assert text.loc[("here, fold 1", "hrnet"), "specificity COVID-19"] == f"{second.specificity['COVID-19']:.4f}"
    assert not find_published("hrnet").has_folds


def test_every_table_prints_and_an_unknown_name_lists_them():
    for table in TABLES.values():
        assert ((table.rows > 0) & (table.rows <= 1) | table.rows.isna()).all(axis=None)
        assert len(append_to_published(table, {})) == len(table.rows)
    with pytest.raises(
        SettingsError, match=r"'flanel' does not exist; available tables: flannel, patched_flannel, hrnet_folds"
    ):
        find_published("flanel")


def test_plans_name_existing_tables():
    plans = [path.read_text() for path in (project_root() / "submissions" / "plans").glob("*.yaml")]
    lists = [names for plan in plans for names in re.findall(r"\bpublished: *\[([\w, ]+)\]", plan)]
    named = {name.strip() for names in lists for name in names.split(",")}
    assert len(named) >= 4 and named <= set(TABLES)
