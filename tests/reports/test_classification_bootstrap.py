"""Bootstrap of classification metrics: the first row is the report, draws equal an explicit loop, differences are paired."""

import numpy as np
import pandas as pd
import pytest

from kitlib.reports.classification_bootstrap import draws, intervals, paired_differences
from kitlib.reports.classification_report import CLASS_METRICS, class_table, judged, overall
from tests.reports.test_classification_report import CLASSES, tables


def test_the_first_row_has_the_metrics_of_all_images():
    predictions = judged(*tables())
    drawn = draws(predictions, samples=1)
    assert drawn.index.tolist() == [0, 1]
    first, table = drawn.iloc[0], class_table(predictions).set_index("class")
    for name, value in overall(predictions).items():
        assert first[name] == pytest.approx(value)
    for figure in CLASS_METRICS:
        for name in (*CLASSES, "macro"):
            assert first[f"{figure} {name}"] == pytest.approx(table.loc[name, figure]), figure
    assert len(first) == len(overall(predictions)) + len(CLASS_METRICS) * 4


def test_draws_equal_the_metrics_of_repeated_images():
    scores, images, labels = tables(40)
    scores[CLASSES] = scores[CLASSES].round(1)  # equal scores
    scores[CLASSES] = scores[CLASSES].div(scores[CLASSES].sum(axis=1), axis=0)
    predictions = judged(scores, images, labels)
    drawn = draws(predictions, samples=67, seed=3)
    assert drawn.index.tolist() == list(range(68))
    patients, codes = np.unique(predictions.answers.patient, return_inverse=True)
    # Repeats the documented draw: as many patients as in the data, each with all their images.
    chosen = np.random.default_rng(3).integers(len(patients), size=(67, len(patients)))
    for number in (0, 1, 63, 64, 66):  # draws are computed in batches
        row, picked = drawn.loc[1 + number], chosen[number]
        repeated = predictions.rows(np.concatenate([np.flatnonzero(codes == patient) for patient in picked]))
        table = class_table(repeated).set_index("class")
        assert row["pr_auc viral"] == pytest.approx(table.pr_auc["viral"])
        assert row["roc_auc macro"] == pytest.approx(table.roc_auc["macro"])
        assert row["f1 macro"] == pytest.approx(table.f1["macro"])
        assert {name: row[name] for name in overall(repeated)} == pytest.approx(overall(repeated))


def test_the_interval_of_accuracy_is_that_of_the_binomial_distribution():
    # 400 patients of one image, 3 of 4 right: normal approximation 0.75 +- 1.96 sqrt(0.75 0.25 / 400) = 0.0424.
    ids = [f"i{number}" for number in range(400)]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids}).assign(
        path="", rows=1, columns=1, source="", view=""
    )
    labels = pd.DataFrame({"id": ids, "a": 1.0, "b": 0.0})
    right = np.arange(400) % 4 > 0
    scores = pd.DataFrame({"image_id": ids, "model": "m", "fold": 0, "a": np.where(right, 0.9, 0.1)})
    predictions = judged(scores.assign(b=1 - scores.a), images, labels)
    single = intervals(draws(predictions, 2000)).set_index("name").loc["accuracy"]
    assert single.value == 0.75
    assert single.low == pytest.approx(0.75 - 0.0424, abs=0.006) and single.high == pytest.approx(0.75 + 0.0424, abs=0.006)
    # Four identical images per patient: a quarter of the information, so the interval is twice as wide.
    grouped = images.assign(patient_id=[f"p{number // 4}" for number in range(400)])
    blocks = scores.assign(a=np.where(np.arange(400) // 4 % 4 > 0, 0.9, 0.1))
    wider = intervals(draws(judged(blocks.assign(b=1 - blocks.a), grouped, labels), 2000)).set_index("name").loc["accuracy"]
    assert (wider.high - wider.low) / (single.high - single.low) == pytest.approx(2, abs=0.25)


def test_a_model_against_itself_and_a_better_one():
    scores, images, labels = tables(200)
    better = scores.assign(model="better")
    better[CLASSES] = 0.5 * scores[CLASSES].to_numpy() + 0.5 * labels[CLASSES].to_numpy()
    models = {
        name: judged(rows, images, labels)
        for name, rows in {"mean": scores, "same": scores, "better": better.iloc[20:]}.items()
    }
    table = paired_differences(models, "mean", samples=200).set_index(["model", "name"])
    same = table.loc["same"]
    assert (same[["value", "low", "high"]] == 0).all(axis=None) and (same.sides == 1).all() and (same.images == 180).all()
    assert table.loc[("better", "f1 macro")].low > 0 and table.loc[("better", "f1 macro")].sides == 0
    assert table.loc[("better", "log_loss")].high < 0
    with pytest.raises(ValueError, match=r"reference model 'flannel' does not exist; available models: mean, same, better"):
        paired_differences(models, "flannel")


def test_precomputed_draws_give_the_same_differences():
    scores, images, labels = tables(40)
    models = {"mean": judged(scores, images, labels)}
    other = scores.assign(**dict(zip(CLASSES, scores[CLASSES].to_numpy()[:, ::-1].T, strict=True)))
    models["turned"] = judged(other, images, labels)
    drawn = {name: draws(each, 10, seed=3) for name, each in models.items()}
    pd.testing.assert_frame_equal(
        paired_differences(models, "mean", drawn=drawn), paired_differences(models, "mean", 10, seed=3)
    )
    with pytest.raises(
        ValueError, match="`drawn` has 11 rows for mean; each of these models needs the same number of rows: mean, turned"
    ):
        paired_differences(models, "mean", drawn={"mean": drawn["mean"]})
    models["turned"] = judged(other[1:], images, labels)
    with pytest.raises(ValueError, match="predictions of mean include images that not all models have predicted"):
        paired_differences(models, "mean", drawn=drawn)


def test_differences_are_those_of_the_same_draw_and_sides_is_twice_the_smaller_share():
    predictions = judged(*tables(20))
    columns = {"better": [0.5, 0.1, 0.2, 0.3, -0.1], "worse": [-0.5, -0.1, 0.0, -0.3, np.nan], "equal": [0.0] * 5}
    columns["undefined"] = [0.25, *[np.nan] * 4]
    drawn = {"zero": pd.DataFrame(dict.fromkeys(columns, 1.0), index=range(5)), "mine": 1 + pd.DataFrame(columns)}
    table = paired_differences(dict.fromkeys(drawn, predictions), "zero", level=0.5, drawn=drawn)
    assert table["model"].tolist() == ["mine"] * 4 and table["reference"].tolist() == ["zero"] * 4
    assert table["name"].tolist() == list(columns) and table["images"].tolist() == [20] * 4
    # Of the draws, one of four is at most zero; one of three is at least zero; all are both.
    assert table["sides"].tolist() == pytest.approx([2 / 4, 2 / 3, 1, np.nan], nan_ok=True)
    assert table["value"].tolist() == pytest.approx([0.5, -0.5, 0, 0.25])
    assert table["low"].tolist() == pytest.approx([0.05, -0.2, 0, np.nan], nan_ok=True)
    assert table["high"].tolist() == pytest.approx([0.225, -0.05, 0, np.nan], nan_ok=True)
    alone = paired_differences({"zero": predictions}, "zero", drawn={"zero": drawn["zero"]})
    assert alone.empty and list(alone) == list(table)


def test_a_class_that_does_not_occur_has_no_interval():
    scores, images, labels = tables(30, shares=(0.5, 0.5, 0))
    table = intervals(draws(judged(scores, images, labels), 20)).set_index("name")
    assert table.loc["f1 normal"].isna().all() and table.loc["f1 macro"].notna().all()
    for metric in ("accuracy", "brier"):  # are defined for such a class, but not in the mean
        occurring = table.value[[f"{metric} COVID-19", f"{metric} viral"]]
        assert table.value[f"{metric} macro"] == pytest.approx(occurring.mean()) and table.value[f"{metric} normal"] >= 0
    with pytest.raises(ValueError, match="`samples` is 0"):
        draws(judged(scores, images, labels), 0)
