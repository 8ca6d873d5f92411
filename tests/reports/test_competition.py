"""Report tables of the competition score: reliability, curves, and bootstrap draws of score and opacity AP."""

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import SCORED_CLASSES, STUDY_CLASSES
from kitlib.reports import competition as reports
from kitlib.reports.competition import bootstrap, detection_draws, interval
from kitlib.scoring.score import SCORE_KEYS, Truth, score_tables, truth_of
from kitlib.tables import BOX

N = 80


@pytest.fixture(scope="module")
def case():
    """Truth, fused tables and images: 80 studies of one image, 40 patients; boxes on three quarters of the images."""
    rng = np.random.default_rng(1)
    names, classes = [f"i{n}" for n in range(N)], np.arange(N) % 4
    labels = pd.DataFrame(np.eye(4)[classes], columns=list(STUDY_CLASSES))
    labels.insert(0, "id", [f"s{n}" for n in range(N)])
    drawn = [(name, 10.0, 10.0, 60.0, 90.0) for name, c in zip(names, classes, strict=True) if c]
    boxes = pd.DataFrame(drawn, columns=["image_id", *BOX])
    truth = Truth(labels, tuple(names), boxes)
    probabilities = rng.dirichlet(np.ones(4), N) * 0.7 + 0.3 * np.eye(4)[classes]
    studies = pd.DataFrame(probabilities, columns=list(STUDY_CLASSES)).assign(study_id=labels["id"])
    nones = pd.DataFrame({"image_id": names, "none": np.clip((classes == 0) * 0.3 + rng.random(N) * 0.7, 0, 1)})
    shift = rng.normal(0, 12, (N, 4))
    detections = pd.DataFrame(np.array([10, 10, 60, 90]) + shift, columns=list(BOX)).assign(
        image_id=names, score=rng.random(N)
    )
    images = pd.DataFrame({"image_id": names, "study_id": labels["id"], "patient_id": [f"p{n // 2}" for n in range(N)]})
    return truth, studies, nones, detections, images


def test_confusion_counts_most_probable_classes():
    labels = pd.DataFrame(np.eye(4)[[0, 0, 1, 3]], columns=list(STUDY_CLASSES)).assign(id=list("abcd"))
    studies = pd.DataFrame(np.eye(4)[[0, 1, 1, 1]], columns=list(STUDY_CLASSES)).assign(study_id=list("abcd"))
    matrix = reports.confusion(Truth(labels, (), pd.DataFrame(columns=["image_id", *BOX])), studies.iloc[::-1])
    assert matrix.to_numpy().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert list(matrix.index) == list(matrix.columns) == list(STUDY_CLASSES)


def test_class_report_has_the_average_precisions_of_the_score(case):
    truth, studies, nones, detections, _ = case
    table = reports.class_report(truth, studies, nones).set_index("class")
    expected = score_tables(truth, studies, nones, detections)
    assert table["average_precision"].to_dict() == pytest.approx({name: expected[name] for name in (*STUDY_CLASSES, "none")})
    assert table.loc["none", ["positives", "of"]].tolist() == [20, 80]
    predicted, true = studies["negative"].to_numpy(), truth.labels["negative"].to_numpy()
    # The bins' gaps, weighted by their numbers of studies, are the sums of differences.
    gaps = [abs((predicted - true)[np.floor(predicted * 10) == number].sum()) for number in range(10)]
    assert table.calibration_error["negative"] == pytest.approx(sum(gaps) / 80)


def test_calibration_of_known_answers():
    # Ten studies have 0.85 for negative, eight are negative: gap 0.05; Brier (8 * 0.15^2 + 2 * 0.85^2) / 10.
    labels = pd.DataFrame(np.eye(4)[[0] * 8 + [1] * 2], columns=list(STUDY_CLASSES)).assign(id=[f"s{n}" for n in range(10)])
    studies = pd.DataFrame([[0.85, 0.05, 0.05, 0.05]] * 10, columns=list(STUDY_CLASSES)).assign(study_id=labels["id"])
    truth = Truth(labels, ("i", "j", "k"), pd.DataFrame([("i", 0, 0, 9, 9)], columns=["image_id", *BOX]))
    nones = pd.DataFrame({"image_id": ["i", "j", "k"], "none": [0.0, 1.0, 0.9]})
    negative = reports.class_report(truth, studies, nones).iloc[0]
    assert negative["calibration_error"] == pytest.approx(0.05)
    assert negative["brier"] == pytest.approx((8 * 0.15**2 + 2 * 0.85**2) / 10)
    assert negative["roc_auc"] == pytest.approx(0.5)
    # No study is indeterminate or atypical.
    undefined = reports.class_report(truth, studies, nones).set_index("class").loc[["indeterminate", "atypical"]]
    assert undefined[["average_precision", "roc_auc"]].isna().all(axis=None) and undefined["brier"].notna().all()
    found = pd.DataFrame(columns=["image_id", "score", *BOX])
    curves = reports.precision_recall_curves(truth, studies, nones, found)
    assert list(curves) == ["negative (AP 0.800)", "typical (AP 0.200)", "none (AP 1.000)", "opacity (AP 0.000)"]
    assert curves["opacity (AP 0.000)"].to_numpy().tolist() == [[0, 0]]
    bins = reports.reliability(truth, studies, nones)
    assert bins.index.is_unique
    assert bins.iloc[0].tolist() == ["negative", pytest.approx(0.85), pytest.approx(0.8), 10]
    # A probability of 1 belongs to the last bin.
    of_none = bins[bins["class"] == "none"][["predicted", "observed", "count"]]
    assert of_none.to_numpy().tolist() == [[0, 0, 1], [pytest.approx(0.95), 1, 2]]
    assert bins.groupby("class")["count"].sum().to_dict() == {**dict.fromkeys(STUDY_CLASSES, 10), "none": 3}


def test_area_under_the_curves_is_the_average_precision(case):
    truth, studies, nones, detections, _ = case
    curves = reports.precision_recall_curves(truth, studies, nones, detections)
    expected = score_tables(truth, studies, nones, detections)
    for (title, curve), name in zip(curves.items(), SCORED_CLASSES, strict=True):
        area = (curve["recall"].diff() * curve["precision"]).sum()
        assert area == pytest.approx(expected[name]) and title == f"{name} (AP {expected[name]:.3f})"
        assert (curve["precision"].diff().dropna() <= 0).all()


def test_boxes_on_images_outside_the_truth_do_not_count(case):
    truth, studies, nones, detections, _ = case
    other = pd.concat([detections, detections.assign(image_id="elsewhere", score=1.0)])
    curves, expected = (reports.precision_recall_curves(truth, studies, nones, boxes) for boxes in (other, detections))
    assert list(curves) == list(expected)


def test_bootstrap_brackets_the_score(case):
    truth, studies, nones, detections, images = case
    table = reports.bootstrap(truth, studies, nones, detections, images, samples=50).set_index("name")
    expected = score_tables(truth, studies, nones, detections)
    assert list(table.index) == list(SCORE_KEYS)
    assert table["value"].to_dict() == pytest.approx(expected)
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    half = reports.bootstrap(truth, studies, nones, detections, images, samples=50, level=0.5).set_index("name")
    draws = reports.score_draws(truth, studies, nones, detections, images, samples=50).iloc[1:]
    for intervals, tail in ((table, 0.025), (half, 0.25)):
        assert intervals["low"].to_dict() == pytest.approx(draws.quantile(tail).to_dict())
        assert intervals["high"].to_dict() == pytest.approx(draws.quantile(1 - tail).to_dict())


def test_a_draw_has_the_score_of_repeated_patients(case):
    truth, studies, nones, detections, images = case
    elsewhere = pd.concat([detections.assign(image_id="elsewhere", score=1.0), detections])
    draws = reports.score_draws(truth, studies, nones, elsewhere, images, samples=3, seed=5)
    rng = np.random.default_rng(5)
    for number in range(3):
        # Patient k has the images and studies 2 k and 2 k + 1.
        copies = np.repeat(rng.multinomial(40, np.full(40, 1 / 40)), 2)
        rows = np.repeat(np.arange(N), copies)
        image_ids, study_ids = ([f"{kind}{row}-{place}" for place, row in enumerate(rows)] for kind in "is")
        boxes = [(image_ids[place], 10.0, 10.0, 60.0, 90.0) for place, row in enumerate(rows) if row % 4]
        labels, boxes = truth.labels.iloc[rows].assign(id=study_ids), pd.DataFrame(boxes, columns=["image_id", *BOX])
        repeated = (table.iloc[rows].assign(image_id=image_ids) for table in (nones, detections))
        repeated_studies = studies.iloc[rows].assign(study_id=study_ids)
        expected = score_tables(Truth(labels, tuple(image_ids), boxes), repeated_studies, *repeated)
        assert draws.iloc[1 + number].to_dict() == pytest.approx(expected)


def test_bootstrap_draws_whole_patients(case):
    truth, studies, nones, detections, images = case
    one = reports.bootstrap(truth, studies, nones, detections, images.assign(patient_id="same"), samples=5)
    # With a single patient all draws are equal.
    assert one["low"].tolist() == pytest.approx(one["value"].tolist()) == one["high"].tolist()
    wide = reports.bootstrap(truth, studies, nones, detections, images, samples=100).set_index("name")
    narrow = reports.bootstrap(truth, studies, nones, detections, images.assign(patient_id=images["image_id"]), samples=100)
    assert (wide["high"] - wide["low"])["score"] > 0 and (narrow["high"] - narrow["low"]).gt(0).all()


def test_missing_rows_are_named(case):
    truth, studies, nones, detections, images = case
    with pytest.raises(ValueError, match="study_id s3 of the ground truth"):
        reports.confusion(truth, studies.drop(3))
    with pytest.raises(ValueError, match="`images` table; the first is i5"):
        reports.bootstrap(truth, studies, nones, detections, images.drop(5))


def test_the_score_of_some_parts_is_their_mean_and_has_paired_draws(case):
    truth, studies, nones, detections, images = case
    whole = reports.score_draws(truth, studies, nones, detections, images, 5)
    expected = score_tables(truth, studies, nones, detections)
    assert whole.iloc[0].to_dict() == pytest.approx(expected) and len(whole) == 1 + 5
    parts = reports.score_draws(truth, studies, nones, None, images, 5)
    assert parts["score"].iloc[0] == pytest.approx(np.mean([expected[name] for name in (*STUDY_CLASSES, "none")]))
    assert parts[["opacity", "opacity_boxed"]].isna().all(axis=None)
    # The draws do not depend on which parts are predicted.
    pd.testing.assert_frame_equal(parts[["atypical", "none"]], whole[["atypical", "none"]])
    boxes = reports.score_draws(truth, None, None, detections, images, 5)
    pd.testing.assert_series_equal(boxes["score"], whole["opacity"], check_names=False)


@pytest.fixture
def tables():
    rng = np.random.default_rng(0)
    image_ids = [f"i{number:02d}" for number in range(40)]
    images = pd.DataFrame({"image_id": image_ids, "study_id": image_ids, "patient_id": [name[:2] for name in image_ids]})
    corner = rng.uniform(0, 50, (20, 2))
    boxes = pd.DataFrame(np.hstack([corner, corner + 40]), columns=["xmin", "ymin", "xmax", "ymax"])
    boxes.insert(0, "image_id", image_ids[:20])
    moved = boxes.assign(xmin=boxes.xmin + rng.uniform(0, 25, 20), score=rng.uniform(size=20))
    false = moved.assign(image_id=image_ids[20:], score=rng.uniform(size=20))
    detections = pd.concat([moved, false], ignore_index=True)
    return detections, pd.DataFrame({"image_id": image_ids}), images, boxes


def test_detection_draws_start_with_the_opacity_ap_of_the_report(tables):
    detections, coverage, images, boxes = tables
    labels = pd.DataFrame({"id": images.study_id, "negative": 1.0, "typical": 0.0, "indeterminate": 0.0, "atypical": 0.0})
    studies, nones = labels.rename(columns={"id": "study_id"}), images[["image_id"]].assign(none=0.5)
    whole = bootstrap(truth_of(images, labels, boxes), studies, nones, detections, images, samples=2)
    draws = detection_draws(detections, coverage, images, boxes, samples=2)
    assert draws[0] == pytest.approx(whole.set_index("name").value["opacity"])


@pytest.fixture
def findings():
    """Two images: mass has two boxes, effusion one, nodule one; the detections of mass are a hit, a false one, a hit.

    The false one is the second by score; it lies on a box of effusion. Nodule is not detected, and hernia not annotated.
    """
    places = {"left": (0, 0, 10, 10), "right": (20, 0, 30, 10), "shifted": (20, 0, 30, 8)}  # shifted: IoU 0.8 with right
    true = [("i0", "mass", "left"), ("i1", "mass", "right"), ("i0", "effusion", "right"), ("i1", "nodule", "left")]
    found = [
        *(("i0", "mass", "left", 0.9), ("i0", "mass", "right", 0.8), ("i1", "mass", "shifted", 0.7)),
        *(("i0", "effusion", "right", 0.3), ("i0", "hernia", "left", 1.0), ("elsewhere", "mass", "left", 1.0)),
    ]
    boxes = pd.DataFrame(
        [(image, name, *places[place]) for image, name, place in true], columns=["image_id", "finding", *BOX]
    )
    detections = pd.DataFrame(
        [(image, name, *places[place], score) for image, name, place, score in found],
        columns=["image_id", "finding", *BOX, "score"],
    )
    images = pd.DataFrame({"image_id": ["i0", "i1"], "patient_id": ["p0", "p1"]})
    return boxes, detections, images


def test_each_finding_has_its_own_row_and_curve(findings):
    table = reports.detection_by_finding(*findings)
    assert table.index.is_unique
    table = table.set_index("finding")
    assert list(table.index) == ["effusion", "mass", "nodule", "all findings"]
    assert table[["images", "boxes"]].to_numpy().tolist() == [[1, 1], [2, 2], [1, 1], [2, 4]]
    # Mass: precision 1 at recall 1/2, 2/3 at recall 1: AP 1/2 + 1/2 * 2/3. The best F1 is 4/5, of all three.
    mass = [5 / 6, 1, 2 / 3, 0.7]
    assert table.loc["mass"].tolist()[2:] == pytest.approx(mass) and table.loc["effusion"].tolist()[2:] == [1, 1, 1, 0.3]
    assert table.loc["nodule", "average_precision"] == 0 and table.loc["nodule"].isna().sum() == 3
    # Means over the findings that are detected; there is no common confidence.
    assert table.loc["all findings"].tolist()[2:5] == pytest.approx([(1 + 5 / 6 + 0) / 3, 1, (1 + 2 / 3) / 2])
    assert np.isnan(table.loc["all findings", "confidence"])
    # With an IoU above 0.8, the third detection of mass is not a hit.
    assert reports.detection_by_finding(*findings, overlap=0.8).average_precision[1] == 0.5
    curves = reports.finding_curves(*findings)
    assert list(curves) == ["effusion (AP 1.000)", "mass (AP 0.833)", "nodule (AP 0.000)"]
    areas = [(curve.recall.diff() * curve.precision).sum() for curve in curves.values()]
    assert areas == pytest.approx([1, 5 / 6, 0])


def test_draws_of_several_findings_are_the_mean_of_those_that_occur(findings):
    boxes, detections, images = findings
    draws = detection_draws(detections, images[["image_id"]], images, boxes, 50)
    assert draws[0] == pytest.approx((1 + 5 / 6) / 3)
    # Drawn: i0 twice (mass 1, effusion 1), i1 twice (mass 1, nodule 0), or one of each.
    assert {round(draw, 6) for draw in draws} == {1.0, 0.5, round((1 + 5 / 6) / 3, 6)}


def test_false_positives_on_images_without_a_box_lower_the_ap(tables):
    detections, coverage, images, boxes = tables
    assert np.isnan(detection_draws(detections, coverage, images, boxes[:0], 2)).tolist() == [True] * 3
    boxed = coverage[coverage.image_id.isin(boxes.image_id)]
    assert (
        detection_draws(detections, coverage, images, boxes, 0)[0] < detection_draws(detections, boxed, images, boxes, 0)[0]
    )


def test_one_seed_draws_the_same_patients_for_every_detector(tables):
    detections, coverage, images, boxes = tables
    once = detection_draws(detections, coverage, images, boxes, 50)
    again = detection_draws(detections.sample(frac=1, random_state=1), coverage.iloc[::-1], images, boxes, 50)
    assert interval(once - again) == {"value": 0.0, "low": 0.0, "high": 0.0}
    spread = interval(once)
    assert spread["low"] < spread["value"] < spread["high"]


def test_an_interval_has_the_percentiles_of_the_draws_without_the_first():
    draws = np.array([7.0, *range(101), np.nan])
    assert interval(draws) == pytest.approx({"value": 7, "low": 2.5, "high": 97.5})
    assert interval(draws, level=0.5) == pytest.approx({"value": 7, "low": 25, "high": 75})


def test_an_image_that_occurs_twice_in_the_coverage_is_refused(tables):
    detections, coverage, images, boxes = tables
    with pytest.raises(ValueError, match="occurs twice in the coverage"):
        detection_draws(detections, pd.concat([coverage, coverage]), images, boxes)


def test_an_image_of_the_coverage_that_the_images_lack_is_named(tables):
    detections, coverage, images, boxes = tables
    first = sorted(coverage.image_id)[0]
    with pytest.raises(ValueError, match=f"image {first} of the coverage is not in the `images` table"):
        detection_draws(detections, coverage, images[images.image_id != first], boxes)
