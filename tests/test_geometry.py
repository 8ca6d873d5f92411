import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.geometry import PLACEMENTS, clip_boxes, flip_boxes, letterbox

sides = st.integers(16, 5000)


@given(
    sides, sides, st.sampled_from([64, 512, 1023, (384, 640)]), st.sampled_from(sorted(PLACEMENTS)), st.integers(0, 10**6)
)
def test_boxes_return_from_the_canvas_within_a_thousandth_of_a_pixel(rows, columns, size, placement, seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (20, 2, 2)) * [columns, rows]
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    place = PLACEMENTS[placement](rows, columns, size)
    on_canvas = place.boxes_to_canvas(boxes)
    assert np.abs(place.boxes_to_original(on_canvas) - boxes).max() < 1e-3
    assert (on_canvas[:, :2] >= -1e-9).all()
    assert (on_canvas[:, 2] <= place.canvas_columns + 1e-9).all()
    assert (on_canvas[:, 3] <= place.canvas_rows + 1e-9).all()


def test_letterbox_of_a_portrait_image():
    # 3028 x 2544 at 512: scale 512 / 3028, 430 columns inside, 41 of padding on the left (a common y' = y / 512 is the
    # Heidelberg project's fault).
    place = letterbox(3028, 2544, 512)
    assert (place.inner_rows, place.inner_columns, place.top, place.left) == (512, 430, 0, 41)
    assert place.boxes_to_canvas([[0, 0, 2544, 3028]]).tolist() == [[41, 0, 471, 512]]


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
@pytest.mark.parametrize("shape", [(300, 200), (150, 400)])
def test_pixels_and_boxes_land_in_the_same_place(placement, shape):
    # A white rectangle: the box found on the canvas must be the box sent there, to the pixel that resizing blurs.
    pixels = np.zeros(shape, np.uint8)
    pixels[40:120, 60:180] = 255
    place = PLACEMENTS[placement](*shape, 256)
    ys, xs = np.nonzero(place.image(pixels) > 127)
    sent = place.boxes_to_canvas([[60, 40, 180, 120]])[0]
    assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - sent).max() <= 1


def test_a_smaller_copy_of_the_image_lands_where_the_original_does():
    place = letterbox(2000, 1500, 256)
    pixels = np.tile(np.linspace(0, 255, 750, dtype=np.uint8), (1000, 1))
    assert place.image(pixels).shape == (256, 256)
    assert place.image(pixels)[:, : place.left].max() == 0
    assert place.image(pixels)[:, place.left + place.inner_columns - 1].min() > 250


@given(st.integers(0, 10**6), sides)
def test_flipping_twice_changes_nothing(seed, columns):
    boxes = np.random.default_rng(seed).uniform(0, columns, (5, 4))
    assert np.allclose(flip_boxes(flip_boxes(boxes, columns), columns), boxes)


def test_clipping_drops_what_is_left_of_no_pixel():
    boxes, kept = clip_boxes([[-5, -5, 10, 10], [90, 0, 100.5, 20], [99.5, 0, 130, 20]], rows=50, columns=100)
    assert boxes.tolist() == [[0, 0, 10, 10], [90, 0, 100, 20], [99.5, 0, 100, 20]]
    assert kept.tolist() == [True, True, False]


def test_an_image_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="read its size first"):
        letterbox(0, 100, 64)
