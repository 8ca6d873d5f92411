"""Lung metrics on handmade tables, and intervals compared with an explicit bootstrap."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.lungs.clean_up import FOUND
from kitlib.reports.lungs_report import (
    classes_of_images,
    clustered_interval,
    dice_draws,
    examples,
    overlap_report,
    verdicts,
)
from kitlib.tables import BOX
from kitlib.xrays.mask_store import MaskStore

# Six images of four patients; p1 has three of them. Study s5 has no label.
IMAGES = pd.DataFrame(
    {
        "image_id": [f"i{number}" for number in range(6)],
        "study_id": [f"s{number}" for number in range(6)],
        "patient_id": ["p0", "p1", "p1", "p1", "p2", "p3"],
    }
)
LABELS = pd.DataFrame(
    {"id": [f"s{number}" for number in range(5)], "ill": [1.0, 1.0, 0.0, 0.0, 0.5], "well": [0.0, 0.0, 1.0, 1.0, np.nan]}
)
DICE = np.array([0.9, 0.8, 0.7, 1.0, 0.5, 0.6])


def scores(dice=DICE, structure="lungs", ids=None):
    dice = np.asarray(dice, dtype=float)
    table = pd.DataFrame({"image_id": IMAGES.image_id if ids is None else ids, "dice": dice, "jaccard": dice / (2 - dice)})
    return table.assign(model="m", fold=0, structure=structure)


def test_the_metrics_of_each_class_are_those_of_its_images():
    report = overlap_report(scores(), IMAGES, LABELS).set_index("class")
    assert report.index.tolist() == ["all", "ill", "well"] and set(report.structure) == {"lungs"}
    assert report.images.tolist() == [6, 3, 2] and report.patients.tolist() == [4, 3, 1]
    assert report.dice.tolist() == pytest.approx([4.5 / 6, 2.2 / 3, 0.85])
    assert report.dice_median.tolist() == pytest.approx([0.75, 0.8, 0.85])
    assert report.dice_min.tolist() == pytest.approx([0.5, 0.5, 0.7])
    # Jaccard is d / (2 - d): 0.9 is 9/11, 0.8 is 2/3, 0.5 is 1/3.
    assert report.jaccard.ill == pytest.approx((9 / 11 + 2 / 3 + 1 / 3) / 3)
    assert report.jaccard_median.ill == pytest.approx(2 / 3) and report.jaccard_min.ill == pytest.approx(1 / 3)
    # All images of `well` are of one patient, so every draw has the same mean.
    assert report.dice_low.well == report.dice_high.well == pytest.approx(0.85)
    assert report.dice_low["all"] < report.dice["all"] < report.dice_high["all"]
    # The class `all` comes first whatever the classes are called.
    named = overlap_report(scores(), IMAGES, LABELS.rename(columns={"ill": "Ill"}))
    assert named["class"].tolist() == ["all", "Ill", "well"]


def test_structures_have_their_own_rows_and_get_the_same_draws():
    both = pd.concat([scores(), scores(DICE - 0.25, "heart")], ignore_index=True)
    report = overlap_report(both.sample(frac=1, random_state=0), IMAGES, LABELS).set_index(["structure", "class"])
    assert len(report) == 6
    lungs, heart = (report.loc[name].loc[["all", "ill", "well"]] for name in ("lungs", "heart"))
    for column in ("dice", "dice_low", "dice_high", "dice_median", "dice_min"):
        assert (lungs[column] - heart[column]).to_numpy() == pytest.approx(0.25)


def drawn_means(values, patients, samples, rng):
    """Draw patients with replacement one by one, as the docstring of the bootstrap describes."""
    of_patient = [values[patients == patient] for patient in sorted(set(patients))]
    means = []
    for _ in range(samples):
        drawn = rng.integers(0, len(of_patient), len(of_patient))
        means.append(np.concatenate([of_patient[number] for number in drawn]).mean())
    return np.array(means)


def test_the_interval_is_that_of_patients_drawn_with_replacement():
    # 40 patients of one to nine images each, that agree within a patient.
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{number}" for number in range(40)], rng.integers(1, 10, 40))
    own = dict(zip(sorted(set(patients)), rng.normal(0.9, 0.05, 40), strict=True))
    values = np.array([own[patient] for patient in patients]) + rng.normal(0, 0.01, len(patients))
    means = drawn_means(values, patients, 4000, np.random.default_rng(1))
    # The 2.5 % quantile of 4,000 draws has an error of 0.04 standard deviations, the difference of two 0.06; allow 4 times.
    allowed = 0.25 * means.std()
    for level in (0.95, 0.5):
        interval = clustered_interval(values, patients, 4000, seed=2, level=level)
        assert interval == pytest.approx(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]), abs=allowed)
    low, high = clustered_interval(values, patients, 4000)
    # Drawing images instead of patients would give too narrow an interval.
    single = clustered_interval(values, np.arange(len(values)), 4000)
    assert high - low > 1.5 * (single[1] - single[0])


def test_single_images_have_the_normal_interval():
    values = np.random.default_rng(0).normal(0.9, 0.02, 1000)
    half = 1.96 * values.std() / np.sqrt(1000)
    expected = [values.mean() - half, values.mean() + half]
    assert clustered_interval(values, np.arange(1000), 4000) == pytest.approx(expected, abs=0.15 * half)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(2, 5))
def test_copies_of_a_patients_images_are_no_evidence_and_one_patient_has_no_width(seed, count, copies):
    values = np.random.default_rng(seed).random(count)
    patients = np.arange(count)
    once = clustered_interval(values, patients, 50, seed)
    again = clustered_interval(np.repeat(values, copies), np.repeat(patients, copies), 50, seed)
    assert again == pytest.approx(once) and once == clustered_interval(values, patients, 50, seed)
    assert values.min() - 1e-12 <= once[0] <= once[1] <= values.max() + 1e-12
    low, high = clustered_interval(values, np.zeros(count), 50, seed)
    assert low == pytest.approx(values.mean()) and high == pytest.approx(low)


def test_draws_of_two_models_are_paired():
    table = scores()
    one, two = (dice_draws(each, IMAGES, samples=30, seed=4) for each in (table[::-1], table.assign(dice=DICE - 0.125)))
    assert one.score[0] == pytest.approx(DICE.mean()) and len(one) == 1 + 30
    assert (one.score - two.score).to_numpy() == pytest.approx(0.125)
    assert one.score.nunique() > 5


def test_unknown_images_and_images_with_several_rows_are_refused():
    stranger = scores([0.9, 0.8], ids=["i1", "elsewhere"])
    with pytest.raises(ValueError, match="1 images are not in the `images` table; the first is elsewhere"):
        overlap_report(stranger, IMAGES, LABELS)
    twice = pd.concat([scores(), scores().assign(model="other")])
    with pytest.raises(ValueError, match=r"6 images have several rows of scores; the first image is 'i0'\. Pass the rows"):
        overlap_report(twice, IMAGES, LABELS)
    with pytest.raises(ValueError, match="1 images are not in the `images` table; the first is elsewhere"):
        verdicts(lungs([FOUND] * 2, ["i1", "elsewhere"]), IMAGES, LABELS)


def lungs(verdict, ids=None):
    table = pd.DataFrame({"image_id": IMAGES.image_id if ids is None else ids, "verdict": verdict, "area": 0.2})
    return table.assign(**dict(zip(BOX, (0.0, 0.0, 10.0, 10.0), strict=True)))


def test_verdicts_are_counted_by_class():
    counts = verdicts(lungs([FOUND, "too small", FOUND, FOUND, "no lung found", "too small"]), IMAGES, LABELS)
    assert counts.columns.tolist() == ["class", "images", FOUND, "no lung found", "too small", "not_found"]
    assert counts["class"].tolist() == ["all", "ill", "well"]
    assert counts.images.tolist() == [6, 3, 2]
    assert counts[FOUND].tolist() == [3, 1, 2]
    assert counts["too small"].tolist() == [2, 1, 0]
    assert counts["no lung found"].tolist() == [1, 1, 0]
    assert counts.not_found.tolist() == pytest.approx([1 / 2, 2 / 3, 0])


@pytest.mark.parametrize(("verdict", "share"), [(FOUND, 0.0), ("blank image", 1.0)])
def test_one_verdict_for_all_is_counted_too(verdict, share):
    counts = verdicts(lungs([verdict] * 6), IMAGES, LABELS)
    assert counts[verdict].tolist() == [6, 3, 2] and counts.not_found.tolist() == [share] * 3
    assert counts[FOUND].tolist() == ([6, 3, 2] if verdict == FOUND else [0, 0, 0])


def test_a_structure_that_most_images_lack_is_judged_with_and_without_it(tmp_path):
    masks, empty = MaskStore(tmp_path), np.zeros((4, 4), np.uint8)
    masks.add({f"i{number}": empty + 5 * (number in (0, 4)) for number in range(5)})  # i5 has no mask
    images, labels = classes_of_images(IMAGES, LABELS, masks, ("pneumothorax",))
    part = scores().iloc[:5].assign(structure="pneumothorax")
    report = overlap_report(part, images, labels).set_index("class")
    assert report.images.to_dict() == {"all": 5, "with pneumothorax": 2, "without pneumothorax": 3}
    assert report.dice.to_dict() == pytest.approx(
        {"all": 3.9 / 5, "with pneumothorax": 0.7, "without pneumothorax": 2.5 / 3}
    )
    assert classes_of_images(IMAGES, LABELS, masks, ("lungs",))[1] is LABELS
    # The worst and the best image with it, then the images without it in which it was predicted (i3 has a Dice of 1).
    assert examples(part, masks, 1).image_id.tolist() == ["i4", "i0", "i1"]
    assert examples(part, masks).image_id.tolist() == ["i4", "i0", "i1", "i2"]
