"""The plan of a phantom competition: its shares are SIIM's, and odd or damaged images are spread over it."""

from collections import Counter

import numpy as np
import pytest

from kitlib.phantoms.plan import CLASS_SHARES, DAMAGES, ODDITIES, apportion, draw_patient_numbers, plan_split


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (10, {"a": 0.24, "b": 0.36, "c": 0.4}, "aabbbbcccc"),  # 2.4, 3.6 and 4: the largest remainder is rounded up
        (11, {"a": 0.24, "b": 0.36, "c": 0.4}, "aaabbbbcccc"),  # 2.64, 3.96 and 4.4
        (4, {"a": 0.9, "b": 0.05, "c": 0.05}, "aabc"),  # each at least once, at the expense of the most frequent
        (4, {"c": 0.05, "a": 0.9, "b": 0.05}, "caab"),
    ],
)
def test_names_are_apportioned_by_largest_remainder_and_at_least_once(count, shares, expected):
    assert apportion(count, shares) == list(expected)


def test_six_patients_in_ten_have_one_study_and_the_others_up_to_four():
    numbers = draw_patient_numbers(1000, np.random.default_rng(0))
    assert len(numbers) == 1000 and numbers == sorted(numbers)
    studies = Counter(numbers)
    assert sorted(studies) == list(range(len(studies)))  # from 0, none is left out
    counts = Counter(studies.values())
    assert set(counts) == {1, 2, 3, 4} and 0.55 < counts[1] / len(studies) < 0.7
    assert counts[2] > counts[3] and counts[2] > counts[4]


def test_a_split_has_siims_shares_of_classes_near_duplicates_and_further_images():
    assert sum(CLASS_SHARES.values()) == pytest.approx(1)
    plan = plan_split("train", 400, 0, 6)
    assert Counter(study.study_class for study in plan) == {
        "negative": 112, "typical": 188, "indeterminate": 68, "atypical": 32  # 28, 47, 17 and 8 % of 400
    }  # fmt: skip
    duplicated = [study for study in plan if any(image.duplicate for image in study.images)]
    assert len(duplicated) == 20  # 5 %
    assert all([image.duplicate for image in study.images] == [False, True] for study in duplicated)
    others = [len(study.images) for study in plan if study not in duplicated]
    counts = Counter(others)
    assert counts[2] + counts[3] == 12 and counts[2] and counts[3] and len(counts) == 3  # 3 % have one or two more
    images = [image for study in plan for image in study.images]
    damages, oddities = Counter(image.damage for image in images), Counter(image.oddity for image in images)
    assert {name: damages[name] for name in DAMAGES} == dict.fromkeys(DAMAGES, 2)
    # One image in a hundred has each oddity, and a damaged image has none.
    assert sum(oddities[name] for name in ODDITIES) == round(0.03 * len(images))
    assert {oddities[name] for name in ODDITIES} <= {4, 5} and not any(image.damage and image.oddity for image in images)
    assert len({study.seed for study in plan}) == 400
    pairs = {(study.patient_id, study.patient_seed) for study in plan}
    assert len(pairs) == len(dict(pairs)) == len({seed for _, seed in pairs}) < 400  # a seed for each patient


@pytest.mark.parametrize("seed", range(10))
def test_of_four_studies_one_has_a_near_duplicate_and_another_one_further_images(seed):
    plan = plan_split("test", 4, seed, 0)
    several = [study for study in plan if len(study.images) > 1]
    assert sorted(any(image.duplicate for image in study.images) for study in several) == [False, True]
    images = sum(len(study.images) for study in plan)
    # At most half of the images may be damaged.
    damaged = [image for study in plan_split("test", 4, seed, images // 2) for image in study.images if image.damage]
    assert len(damaged) == images // 2
    with pytest.raises(ValueError, match="at most half"):
        plan_split("test", 4, seed, images // 2 + 1)
