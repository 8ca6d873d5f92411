"""The random anatomy, exposure and opacities of phantoms have the places, sizes and shares that their functions promise."""

from collections import Counter

import numpy as np
import pytest

from kitlib.phantoms.patients import (
    DRAWN_FINDINGS,
    draw_exposure,
    draw_finding,
    draw_near_duplicate,
    draw_opacities,
    draw_patient,
)

COUNT = 300


def drawn(draw, *arguments):
    """Return the values of the fields, each an array, of 300 random objects."""
    rng = np.random.default_rng(0)
    objects = [draw(rng, *arguments) for _ in range(COUNT)]
    return {name: np.array([getattr(each, name) for each in objects]) for name in vars(objects[0])}


def test_patients_differ_around_the_mean_patient():
    found = drawn(draw_patient)
    for name in ("width", "height", "heart", "bone"):  # relative to the mean
        assert found[name].mean() == pytest.approx(1, abs=0.03) and 0.03 < found[name].std() < 0.2, name
    assert found["diaphragm"].mean() == pytest.approx(0, abs=0.05) and found["diaphragm"].std() > 0.03
    assert 0 < found["stomach_gas"].mean() < 1
    assert len(set(found["seed"])) == COUNT


def test_exposures_have_their_longer_side_and_small_displacements():
    found = drawn(draw_exposure, 200)
    sides = np.stack([found["rows"], found["columns"]])
    assert (sides.max(axis=0) == 200).all() and (sides.min(axis=0) < 200).all()
    assert 0.5 < (found["columns"] == 200).mean() < 0.7  # three in five are landscape
    for name, middle, most in (
        *(("shift_u", 0, 0.2), ("shift_v", 0, 0.2), ("rotation", 0, 15)),
        *(("zoom", 1, 0.2), ("gamma", 1, 0.3), ("gain", 1, 0.2)),
    ):
        off = found[name] - middle
        assert abs(off).max() < most and abs(off.mean()) < most / 4 and off.std() > most / 10, name
    assert 0 < found["noise"].min() < found["noise"].max() < 0.02  # opacities are visible through it
    assert set(found["marker"]) == {"L", "R", ""}
    assert 0.4 < (found["border"] == 0).mean() < 0.6 and 0 <= found["border"].min() < found["border"].max() < 0.05
    assert len(set(found["seed"])) == COUNT


def test_no_image_is_square_however_small_it_is():
    found = drawn(draw_exposure, 8)
    assert set(np.minimum(found["rows"], found["columns"])) == {6, 7}


@pytest.mark.parametrize("landscape", [True, False])
def test_a_near_duplicate_is_cropped_and_keeps_the_size_of_the_patient(landscape):
    rng = np.random.default_rng(1)
    exposure = next(
        each for each in (draw_exposure(rng, 500) for _ in range(99)) if (1.2 * each.rows < each.columns) == landscape
    )
    found = [draw_near_duplicate(rng, exposure) for _ in range(COUNT)]
    # The lungs fill a share of the width, or of 1.17 times the height (their aspect in SIIM's training set) if that is less.
    size = exposure.zoom * min(exposure.columns, 1.17 * exposure.rows)
    for each in found:
        assert 0.959 * exposure.rows <= each.rows <= exposure.rows
        assert 0.959 * exposure.columns <= each.columns <= exposure.columns
        assert each.zoom * min(each.columns, 1.17 * each.rows) == pytest.approx(size)
        assert each.gamma / exposure.gamma == pytest.approx(1, abs=0.08)
        assert each.gain / exposure.gain == pytest.approx(1, abs=0.06)
        assert (each.marker, each.rotation, each.shift_u) == (exposure.marker, exposure.rotation, exposure.shift_u)
    assert len({each.seed for each in found}) == COUNT
    assert np.mean([each.rows for each in found]) == pytest.approx(0.98 * exposure.rows, rel=0.003)


def all_drawn(kind):
    """Return what is drawn 300 times for a study class or finding: a list of tuples of opacities."""
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        found.append(draw_finding(rng, kind, draw_patient(rng))[1] if kind in DRAWN_FINDINGS else draw_opacities(rng, kind))
    every = [opacity for opacities in found for opacity in opacities]
    assert len({opacity.seed for opacity in every}) == len(every)
    assert 0.4 < np.mean([opacities[0].u < 0 for opacities in found]) < 0.6  # both sides are equally frequent
    return found


# The words of the docstrings in numbers: thorax units, and shares of density and of softness.
MEANINGS = {
    "peripheral": lambda each: 0.55 < abs(each.u) < 0.85,
    "perihilar": lambda each: 0.3 < abs(each.u) < 0.55 and abs(each.v) < 0.2,
    "high": lambda each: 0.3 < abs(each.u) < 0.7 and -0.7 < each.v < -0.1,
    "in the middle zones": lambda each: 0.3 < abs(each.u) < 0.7 and abs(each.v) < 0.4,
    "low": lambda each: 0.3 < abs(each.u) < 0.85 and 0.15 < each.v < 0.55,
    "in the lower corner": lambda each: 0.85 <= abs(each.u) < 1 and 0.9 < each.v < 1.1,
    "ground glass": lambda each: 0.4 < each.density <= 0.7 <= each.softness < 1,
    "half dense, half sharp": lambda each: 0.7 < each.density < 0.9 and 0.2 < each.softness < 0.6,
    "dense and sharp": lambda each: 0.9 <= each.density <= 1 and 0.1 < each.softness <= 0.2,
    "round": lambda each: each.radius_u == each.radius_v,
    "small": lambda each: max(each.radius_u, each.radius_v) < 0.13,
    "large": lambda each: 0.15 < min(each.radius_u, each.radius_v) <= max(each.radius_u, each.radius_v) < 0.65,
}


def are(opacities, *words):
    """Whether all opacities have these properties, and exactly those outside of the lower corner are boxed."""
    return all(
        all(MEANINGS[word](each) for word in words) and each.boxed != MEANINGS["in the lower corner"](each)
        for each in opacities
    )


def in_both_lungs(opacities):
    return {np.sign(opacity.u) for opacity in opacities} == {-1, 1}


def test_a_negative_study_has_no_opacities():
    assert draw_opacities(np.random.default_rng(0), "negative") == ()


def test_typical_opacities_are_ground_glass_low_in_both_lungs_and_seldom_higher_up():
    found = all_drawn("typical")
    for opacities in found:
        assert in_both_lungs(opacities[:2]) and are(opacities, "peripheral", "ground glass", "large")
        assert are(opacities[:2], "low") and are(opacities[2:], "high")
    assert set(map(len, found)) == {2, 3} and np.mean([len(each) == 3 for each in found]) < 0.2


def test_indeterminate_opacities_are_perihilar_in_one_lung_or_both():
    found = all_drawn("indeterminate")
    for opacities in found:
        assert len(opacities) == 1 or (len(opacities) == 2 and in_both_lungs(opacities))
        assert are(opacities, "perihilar", "ground glass", "large")
    assert 0.4 < np.mean([len(each) == 1 for each in found]) < 0.8


def test_atypical_opacities_are_a_consolidation_or_two_nodules_or_an_effusion():
    kinds = Counter()
    for opacities in all_drawn("atypical"):
        assert are(opacities, "dense and sharp")
        if len(opacities) == 2:
            kinds["nodules"] += 1
            assert in_both_lungs(opacities) and are(opacities, "high")
            assert max(max(each.radius_u, each.radius_v) for each in opacities) < 0.2
        else:
            kinds["consolidation" if opacities[0].boxed else "effusion"] += 1
            assert len(opacities) == 1 and are(opacities, "large", "high" if opacities[0].boxed else "in the lower corner")
    assert kinds["consolidation"] > kinds["nodules"] > kinds["effusion"] > 0


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        ("Infiltration", ("ground glass", "in the middle zones", "large")),
        ("Pneumonia", ("half dense, half sharp", "low", "large")),
        ("Consolidation", ("dense and sharp", "high", "large")),
        ("Mass", ("dense and sharp", "round", "large")),
        ("Nodule", ("dense and sharp", "round", "small")),
        ("Effusion", ("dense and sharp", "in the lower corner", "large")),
    ],
)
def test_opacities_of_a_finding_have_its_place_size_and_density(finding, words):
    found = all_drawn(finding)
    assert all(are(opacities, *words) for opacities in found)
    several = [opacities for opacities in found if len(opacities) > 1]
    assert all(len(opacities) == 2 and in_both_lungs(opacities) for opacities in several)
    if finding == "Infiltration":  # in both lungs in half of the images
        assert 0.4 < len(several) / COUNT < 0.6
    else:
        assert not several


def test_cardiomegaly_is_a_heart_larger_than_all_others():
    rng = np.random.default_rng(0)
    hearts = {finding: [] for finding in DRAWN_FINDINGS}
    for finding in DRAWN_FINDINGS:
        for _ in range(60):
            patient, opacities = draw_finding(rng, finding, draw_patient(rng))
            hearts[finding].append(patient.heart)
            assert bool(opacities) == (finding not in ("Cardiomegaly", "No Finding"))
    large = hearts.pop("Cardiomegaly")
    assert 1.15 * np.max(list(hearts.values())) < min(large) < max(large) < 1.5
