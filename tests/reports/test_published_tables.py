"""The published figures agree with themselves, and ours stand under them."""

import re

import pytest

from kitlib.paths import project_root
from kitlib.reports.classification_bootstrap import draws
from kitlib.reports.classification_report import judged
from kitlib.reports.published_tables import TABLES, UnknownTable, beside, check_counts, published, what_differs
from tests.reports.test_classification_report import tables


@pytest.mark.parametrize("name", ["flannel", "patched_flannel"])
def test_a_published_macro_f1_is_the_mean_of_its_classes(name):
    rows = published(name).rows
    means = rows[["f1 COVID-19", "f1 viral", "f1 bacterial", "f1 normal"]].mean(axis=1)
    # The two last digits may be lost by rounding: each is the mean of five rounds.
    assert (means - rows["f1 macro"]).abs().max() < 2e-4
    assert rows.loc["FLANNEL", "f1 macro"] == {"flannel": 0.8385, "patched_flannel": 0.8180}[name]


def test_the_faults_of_the_hrnet_tables_are_those_that_the_checker_finds():
    told = check_counts(published("hrnet_folds"))
    assert [name for name, consistent in told.consistent.items() if not consistent] == [
        f"fold {number}" for number in (1, 3, 4, 8, 10)
    ]
    assert told.loc["fold 10"].renamed == "specificity: npv"
    assert told.loc["fold 1"].renamed == "accuracy: balanced accuracy; specificity: npv"
    # Printed means: they are those of the columns, so the text's accuracy of 99.26 is not.
    means = told[["accuracy", "sensitivity", "specificity"]].mean()
    assert means.tolist() == pytest.approx([99.29, 98.53, 98.82], abs=0.011)
    assert check_counts(published("hrnet")).consistent.tolist() == [True, True, False]
    assert check_counts(published("flannel")).empty


def test_ours_stand_under_the_published_rows():
    given = judged(*tables())
    drawn = draws(given, samples=20)
    text = beside(published("flannel"), {"FLANNEL, out of fold": drawn})
    assert text.loc[("published", "FLANNEL"), "f1 macro"] == "0.8385 (sd 0.01)"
    assert text.loc[("here", "FLANNEL, out of fold"), "f1 viral"].startswith(f"{drawn['f1 viral'].iloc[0]:.4f} [")
    assert text.loc[("here", "FLANNEL, out of fold"), "f1 bacterial"] == "-"  # not among our classes
    assert text.index[-1] == ("here", "FLANNEL, out of fold")
    told = what_differs(published("flannel"), given, "2 folds by patient")
    assert told.loc["protocol", "here"] == "2 folds by patient"
    assert "240 images of 120 patients" in told.loc["data", "here"] and "from one, two" in told.loc["data", "here"]
    assert "comparable to f1 bacterial" in told.loc["data", "here"]


def test_every_table_prints_and_an_unknown_name_lists_them():
    for table in TABLES.values():
        assert ((table.rows > 0) & (table.rows <= 1) | table.rows.isna()).all(axis=None)
        assert len(beside(table, {})) == len(table.rows)
    with pytest.raises(UnknownTable, match=r"called 'flanel'; there are: flannel, patched_flannel, hrnet_folds"):
        published("flanel")


def test_plans_name_tables_that_there_are():
    plans = [path.read_text() for path in (project_root() / "submissions" / "plans").glob("*.yaml")]
    named = [name for plan in plans for name in re.findall(r"\bpublished: *(\w+)", plan)]
    assert len(named) >= 4 and set(named) <= set(TABLES)
