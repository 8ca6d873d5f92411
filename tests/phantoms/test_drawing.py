"""Where a phantom's lungs, marker, border and pneumothorax are drawn, and how they follow the exposure."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from kitlib.phantoms.drawing import draw_masks, draw_pneumothorax, render
from kitlib.phantoms.patients import Exposure, Opacity, Patient, Pneumothorax, Tube

PATIENT = Patient(width=1, height=1, heart=1, diaphragm=0, tissue=0.6, bone=1, stomach_gas=False, seed=3)
EXPOSURE = Exposure(
    rows=240, columns=200, shift_u=0, shift_v=0, zoom=1, rotation=0, gamma=1, gain=1, noise=0, marker="", marker_height=0.2,
    border=0, seed=1,
)  # fmt: skip
UNIT = 0.74 * 200 / 2  # pixels: the lungs fill 0.74 of the width, the median of SIIM's images


def lungs(exposure=EXPOSURE, patient=PATIENT):
    masks = draw_masks(patient, exposure)
    return masks["right_lung"] | masks["left_lung"]


def centre(mask):
    return np.array([place.mean() for place in np.nonzero(mask)[::-1]])


def extent(mask):
    return np.array([np.ptp(place) + 1 for place in np.nonzero(mask)[::-1]])


def test_the_lungs_of_the_mean_patient_have_siims_size_and_aspect():
    width, height = extent(lungs())
    assert width == pytest.approx(2 * UNIT, rel=0.04) and width / height == pytest.approx(1.17, rel=0.08)
    wide = lungs(replace(EXPOSURE, rows=150, columns=250))  # now the height limits the lungs
    assert extent(wide)[0] == pytest.approx(0.74 * 150 * 1.17, rel=0.04)
    assert centre(lungs()) == pytest.approx([100, 0.48 * 240], abs=6)


def test_zoom_size_and_shift_change_the_lungs_in_proportion():
    plain = lungs()
    assert extent(lungs(replace(EXPOSURE, zoom=1.2))) == pytest.approx(1.2 * extent(plain), rel=0.02)
    assert extent(lungs(patient=replace(PATIENT, width=0.8))) == pytest.approx(extent(plain) * (0.8, 1), rel=0.02)
    assert extent(lungs(patient=replace(PATIENT, height=0.8))) == pytest.approx(extent(plain) * (1, 0.8), rel=0.02)
    moved = centre(lungs(replace(EXPOSURE, shift_u=0.1, shift_v=-0.2))) - centre(plain)
    assert moved == pytest.approx([0.1 * UNIT, -0.2 * UNIT], abs=0.5)
    large = lungs(replace(EXPOSURE, rows=960, columns=800))  # drawn at 512 pixels and enlarged
    assert extent(large) == pytest.approx(4 * extent(plain), rel=0.02)


def test_a_rotation_turns_the_lungs_about_their_middle():
    angles, distances = [], []
    for degrees in (0, 20):
        masks = draw_masks(PATIENT, replace(EXPOSURE, rotation=degrees))
        across, down = centre(masks["left_lung"]) - centre(masks["right_lung"])
        angles.append(np.rad2deg(np.arctan2(down, across)))
        distances.append(np.hypot(across, down))
    assert angles[1] - angles[0] == pytest.approx(20, abs=1) and distances[1] == pytest.approx(distances[0], rel=0.01)


def test_the_border_is_black_and_has_its_share_of_the_longer_side():
    plain, framed = (render(PATIENT, replace(EXPOSURE, border=share))[0] for share in (0, 0.05))
    inside = np.s_[12:-12, 12:-12]  # 0.05 of 240 pixels
    assert np.array_equal(framed[inside], plain[inside])
    framed[inside] = 0.01
    assert (framed == np.float32(0.01)).all()


@pytest.mark.parametrize(("marker", "columns"), [("R", slice(0, 60)), ("L", slice(140, 200))])
def test_a_marker_is_white_and_on_its_side_of_the_patient(marker, columns):
    plain, marked = (render(PATIENT, replace(EXPOSURE, marker=text))[0] for text in ("", marker))
    changed = plain != marked
    rows, places = np.nonzero(changed)
    # The patient's right is on the image's left; the marker stands on its height, 0.2 of 240 rows.
    assert places.min() >= columns.start and places.max() < columns.stop
    assert 48 - 20 < rows.min() < rows.max() <= 48 + 2 and marked[changed].max() > 0.99
    assert 10 < changed.sum() < 300


def test_noise_has_its_standard_deviation_and_depends_on_the_seed_of_the_exposure():
    plain = render(PATIENT, replace(EXPOSURE, gain=0.8))[0]
    noisy = [render(PATIENT, replace(EXPOSURE, gain=0.8, noise=0.01, seed=seed))[0] for seed in (1, 2)]
    grey = (plain > 0.1) & (plain < 0.9)
    assert [(each - plain)[grey].std() for each in noisy] == pytest.approx([0.01] * 2, rel=0.05)
    assert not np.array_equal(*noisy)


def test_gain_and_gamma_make_brighter_and_darker_images():
    plain = render(PATIENT, replace(EXPOSURE, gain=0.8))[0]
    assert render(PATIENT, replace(EXPOSURE, gain=0.4))[0] == pytest.approx(plain / 2, abs=1e-5)
    assert render(PATIENT, replace(EXPOSURE, gain=0.8, gamma=2))[0] == pytest.approx(plain**2, abs=1e-5)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_pneumothorax_is_one_region_of_its_lung_that_grows_with_the_collapse(side):
    masks = draw_masks(PATIENT, EXPOSURE)
    own = masks["left_lung" if side == 1 else "right_lung"]
    areas = []
    for collapse in (0.1, 0.3):
        mask = draw_pneumothorax(PATIENT, EXPOSURE, Pneumothorax(side, collapse))
        assert mask.shape == (240, 200) and mask.dtype == bool and (mask & own).sum() == mask.sum()
        assert cv2.connectedComponents(mask.astype(np.uint8))[0] == 2  # the background and one region
        # Most of the air is above the lung, which collapses to its lower inner end.
        assert centre(mask)[1] < centre(own)[1] - 5
        areas.append(mask.sum() / own.sum())
        darker = render(PATIENT, EXPOSURE)[0] - render(PATIENT, EXPOSURE, pneumothoraces=(Pneumothorax(side, collapse),))[0]
        assert darker[mask].mean() > 0.03 and abs(darker[~own]).mean() < 0.005
    assert 0.05 < areas[0] < 0.35 and 1.5 < areas[1] / areas[0] < 3.5


def test_only_boxed_opacities_have_boxes_in_their_order():
    places = ((0.5, -0.4), (-0.5, 0.2), (-0.5, -0.4))
    opacities = [Opacity(u, v, 0.15, 0.2, 0.9, 0.15, seed) for seed, (u, v) in enumerate(places)]
    opacities[1] = replace(opacities[1], boxed=False)
    boxes = render(PATIENT, EXPOSURE, tuple(opacities))[1]
    # The image's middle is at u = 0 and, at 0.48 of the rows, v = 0.
    middles = [(100 + u * UNIT, 0.48 * 240 + v * UNIT / 1.17) for u, v in (places[0], places[2])]
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, middles, atol=4)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], [[0.3 * UNIT, 0.4 * UNIT / 1.17]] * 2, rtol=0.3)


def test_an_opacity_outside_of_the_lungs_changes_nothing_and_has_a_box_of_one_pixel():
    outside = Opacity(0, 1.4, 0.1, 0.1, 0.9, 0.15, 1)
    grey, boxes = render(PATIENT, EXPOSURE, (outside,))
    assert np.array_equal(grey, render(PATIENT, EXPOSURE)[0])
    np.testing.assert_allclose(boxes[0, :2], [100, 0.48 * 240 + 1.4 * UNIT / 1.17], atol=1)
    np.testing.assert_allclose(boxes[0, 2:] - boxes[0, :2], [1, 1])


def test_a_tube_adds_its_density_along_a_curve_of_its_width():
    tube = Tube(np.array([(-0.5, -0.6), (-0.5, 0.6)]), 0.05, 0.2)
    exposure = replace(EXPOSURE, gain=0.6)
    added = render(PATIENT, exposure, tubes=(tube,))[0] - render(PATIENT, exposure)[0]
    assert added.max() == pytest.approx(0.6 * 0.2, rel=0.1) and added.min() > -1e-5
    rows, columns = np.nonzero(added > 0.06)
    assert columns.mean() == pytest.approx(100 - 0.5 * UNIT, abs=1.5) and np.ptp(columns) + 1 <= 0.05 * UNIT + 3
    length = [0.48 * 240 + v * UNIT / 1.17 for v in (-0.6, 0.6)]
    assert [rows.min(), rows.max()] == pytest.approx(length, abs=4)
