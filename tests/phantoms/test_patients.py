"""What is drawn at random for a phantom: anatomy, exposure and opacities are plausible, and are where the classes say."""

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
    for name, most in {"width": 0.1, "height": 0.1, "heart": 0.2, "bone": 0.35}.items():
        assert abs(found[name] - 1).max() < most and found[name].mean() == pytest.approx(1, abs=0.03), name
    assert abs(found["diaphragm"]).max() < 0.15 and abs(found["diaphragm"].mean()) < 0.05
    assert 0.5 < found["tissue"].min() < 0.6 < found["tissue"].max() < 0.7
    assert 0.25 < found["stomach_gas"].mean() < 0.45
    assert len(set(found["seed"])) == COUNT


def test_exposures_have_their_longer_side_and_small_displacements():
    found = drawn(draw_exposure, 200)
    sides = np.stack([found["rows"], found["columns"]])
    assert (sides.max(axis=0) == 200).all() and 155 < sides.min() < 165 < 190 < sides.min(axis=0).max() < 200
    assert 0.5 < (found["columns"] == 200).mean() < 0.7  # three in five are landscape
    for name, most in {"shift_u": 0.15, "shift_v": 0.11, "rotation": 12}.items():
        assert abs(found[name]).max() < most and abs(found[name].mean()) < most / 12, name
    assert found["rotation"].std() == pytest.approx(2.5, abs=0.5)
    for name, most in {"zoom": 0.12, "gamma": 0.21, "gain": 0.13}.items():
        assert abs(found[name] - 1).max() < most and found[name].mean() == pytest.approx(1, abs=0.05), name
    assert 0 < found["noise"].min() < found["noise"].max() < 0.017
    markers = Counter(found["marker"].tolist())
    assert set(markers) == {"L", "R", ""} and markers[""] < 0.22 * COUNT < min(markers["L"], markers["R"])
    assert 0.05 < found["marker_height"].min() < found["marker_height"].max() < 0.3
    assert 0.4 < (found["border"] == 0).mean() < 0.6 and found["border"].max() <= 0.02
    assert found["border"][found["border"] > 0].min() >= 0.005
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
    """Return 300 times the opacities of a study class or finding; their places and sizes must lie in the image."""
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        found.append(draw_finding(rng, kind, draw_patient(rng))[1] if kind in DRAWN_FINDINGS else draw_opacities(rng, kind))
    every = [opacity for opacities in found for opacity in opacities]
    for opacity in every:
        assert 0.4 < abs(opacity.u) < 0.96 and -0.7 < opacity.v < 1.06
        assert 0.07 < min(opacity.radius_u, opacity.radius_v) <= max(opacity.radius_u, opacity.radius_v) <= 0.6
        assert 0.5 <= opacity.density <= 1 and 0.15 <= opacity.softness <= 0.85
    assert len({opacity.seed for opacity in every}) == len(every)
    # Both sides are equally frequent.
    assert not every or 0.4 < np.mean([opacities[0].u < 0 for opacities in found]) < 0.6
    return found


def is_effusion(opacity):
    """Whether it is fluid in the lower corner of a lung, which has no box."""
    assert opacity.boxed == (abs(opacity.u) < 0.85) == (opacity.v < 0.9)
    return not opacity.boxed


def both_lungs(opacities):
    return {np.sign(opacity.u) for opacity in opacities} == {-1, 1}


def test_typical_opacities_are_ground_glass_low_in_both_lungs_and_seldom_higher_up():
    found = all_drawn("typical")
    for opacities in found:
        assert both_lungs(opacities[:2]) and all(0.2 <= opacity.v < 0.5 for opacity in opacities[:2])
        assert all(0.17 <= min(each.radius_u, each.radius_v) <= 0.4 for each in opacities)
        assert all(-0.5 <= opacity.v <= -0.4 and opacity.radius_u < 0.23 for opacity in opacities[2:])
        assert all(opacity.density <= 0.7 <= opacity.softness and opacity.boxed for opacity in opacities)
    assert set(map(len, found)) == {2, 3} and 0.06 < np.mean([len(each) == 3 for each in found]) < 0.18


def test_indeterminate_opacities_are_perihilar_in_one_lung_or_both():
    found = all_drawn("indeterminate")
    for opacities in found:
        assert len(opacities) == 1 or (len(opacities) == 2 and both_lungs(opacities))
        assert all(abs(opacity.u) <= 0.5 and abs(opacity.v) < 0.16 and opacity.boxed for opacity in opacities)
        assert all(0.2 < min(each.radius_u, each.radius_v) < 0.45 and each.density <= 0.65 for each in opacities)
        assert all(max(each.radius_u, each.radius_v) < 0.45 for each in opacities)
    assert 0.55 < np.mean([len(each) == 1 for each in found]) < 0.75


def test_atypical_opacities_are_a_consolidation_or_two_nodules_or_an_effusion():
    kinds = Counter()
    for opacities in all_drawn("atypical"):
        assert all(opacity.softness < 0.2 and opacity.density >= 0.9 for opacity in opacities)
        if len(opacities) == 2:
            kinds["nodules"] += 1
            assert both_lungs(opacities) and all(opacity.v < -0.1 and opacity.boxed for opacity in opacities)
            assert opacities[0].v <= -0.5 and max(abs(opacity.u) for opacity in opacities) < 0.67
            assert all(max(each.radius_u, each.radius_v) <= 0.19 for each in opacities)
        elif is_effusion(opacities[0]):
            kinds["effusion"] += 1
        else:
            kinds["consolidation"] += 1
            assert opacities[0].v < -0.45 and abs(opacities[0].u) < 0.6
            assert 0.2 < opacities[0].radius_v <= 0.3 and 0.25 < opacities[0].radius_u < 0.37
    shares = {kind: count / COUNT for kind, count in kinds.items()}
    assert shares == pytest.approx({"consolidation": 0.7, "nodules": 0.2, "effusion": 0.1}, abs=0.06)


# Finding -> ranges of the distance from the midline, of v, of the radii, of density and of softness.
PLACES = {
    "Infiltration": ((0.45, 0.7), (-0.15, 0.35), (0.2, 0.45), (0.45, 0.7), (0.6, 0.9)),  # ground glass in the middle zones
    "Pneumonia": ((0.5, 0.7), (0.2, 0.5), (0.15, 0.35), (0.7, 0.89), (0.3, 0.5)),  # half dense, half sharp, low
    "Consolidation": ((0.4, 0.6), (-0.65, -0.35), (0.2, 0.4), (0.9, 1), (0.1, 0.2)),  # dense, sharp, high
    "Mass": ((0.4, 0.7), (-0.52, 0.4), (0.15, 0.25), (0.9, 1), (0.1, 0.2)),
    "Nodule": ((0.4, 0.7), (-0.52, 0.4), (0.05, 0.13), (0.9, 1), (0.1, 0.2)),
    "Effusion": ((0.85, 1), (0.9, 1.1), (0.35, 0.65), (0.9, 1), (0.1, 0.2)),  # the lower corner
}


@pytest.mark.parametrize("finding", PLACES)
def test_opacities_of_a_finding_have_its_place_size_and_density(finding):
    found = all_drawn(finding)
    for opacities in found:
        for opacity in opacities:
            values = (abs(opacity.u), opacity.v, opacity.radius_u, opacity.density, opacity.softness)
            for value, (low, high) in zip(values, PLACES[finding], strict=True):
                assert low <= value <= high
            assert PLACES[finding][2][0] <= opacity.radius_v <= PLACES[finding][2][1]
            assert is_effusion(opacity) == (finding == "Effusion")
            assert finding not in ("Mass", "Nodule") or opacity.radius_u == opacity.radius_v  # round
        assert len(opacities) == 1 or (finding == "Infiltration" and both_lungs(opacities))
    if finding == "Infiltration":  # in both lungs in half of the images
        assert 0.4 < np.mean([len(opacities) == 2 for opacities in found]) < 0.6


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
