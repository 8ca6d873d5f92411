import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kitlib.letterbox import PLACEMENTS, centre_crop, clip_boxes, flip_boxes, letterbox, stretch, within

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
    if placement == "centre_crop":
        return
    assert (on_canvas[:, :2] >= -1e-9).all()
    assert (on_canvas[:, 2] <= place.canvas_columns + 1e-9).all()
    assert (on_canvas[:, 3] <= place.canvas_rows + 1e-9).all()


def test_letterbox_of_a_portrait_image():
    # 3028 x 2544 at 512: scale 512 / 3028, 430 columns inside, 41 columns of padding on the left. (The Heidelberg project
    # wrongly divided y by 512.)
    place = letterbox(3028, 2544, 512)
    assert (place.inner_rows, place.inner_columns, place.top, place.left) == (512, 430, 0, 41)
    assert place.boxes_to_canvas([[0, 0, 2544, 3028]]).tolist() == [[41, 0, 471, 512]]


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
@pytest.mark.parametrize("shape", [(300, 200), (150, 400)])
def test_pixels_and_boxes_have_the_same_position_on_the_canvas(placement, shape):
    # The outline of a white rectangle on the canvas must equal its mapped box, up to the pixel that resizing blurs.
    pixels = np.zeros(shape, np.uint8)
    pixels[40:120, 60:180] = 255
    place = PLACEMENTS[placement](*shape, 256)
    ys, xs = np.nonzero(place.image(pixels) > 127)
    mapped = place.boxes_to_canvas([[60, 40, 180, 120]])[0].clip(0, 256)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - mapped).max() <= 1


def test_a_smaller_copy_has_the_same_position_as_the_original():
    place = letterbox(2000, 1500, 256)
    pixels = np.tile(np.linspace(0, 255, 750, dtype=np.uint8), (1000, 1))
    assert place.image(pixels).shape == (256, 256)
    assert place.image(pixels)[:, : place.left].max() == 0
    assert place.image(pixels)[:, place.left + place.inner_columns - 1].min() > 250


@given(st.integers(0, 10**6), sides)
def test_flipping_twice_changes_nothing(seed, columns):
    boxes = np.random.default_rng(seed).uniform(0, columns, (5, 4))
    assert np.allclose(flip_boxes(flip_boxes(boxes, columns), columns), boxes)


def test_clipping_drops_boxes_with_less_than_a_pixel_inside():
    boxes, kept = clip_boxes([[-5, -5, 10, 10], [90, 0, 100.5, 20], [99.5, 0, 130, 20]], rows=50, columns=100)
    assert boxes.tolist() == [[0, 0, 10, 10], [90, 0, 100, 20], [99.5, 0, 100, 20]]
    assert kept.tolist() == [True, True, False]
    # A whole pixel is enough; rows count like columns.
    boxes, kept = clip_boxes([[99, 49, 130, 60], [0, 49.5, 20, 60], [-9, -9, 1, 1]], rows=50, columns=100)
    assert boxes.tolist() == [[99, 49, 100, 50], [0, 49.5, 20, 50], [0, 0, 1, 1]]
    assert kept.tolist() == [True, False, True]


@pytest.mark.parametrize("place", PLACEMENTS.values())
@pytest.mark.parametrize(("rows", "columns"), [(0, 100), (100, 0)])
def test_an_image_of_unknown_size_is_an_error(place, rows, columns):
    with pytest.raises(ValueError, match="read its size from the file first"):
        place(rows, columns, 64)
    assert place(1, 1, 64).boxes_to_original([[0, 0, 64, 64]]).shape == (1, 4)


def test_a_centre_crop_equals_heidelbergs_256_to_224():
    # 3028 x 2544 at 224: the shorter side becomes 256, the longer one 256 * 3028 / 2544 = 304.7.
    place = centre_crop(3028, 2544, 224)
    assert (place.inner_rows, place.inner_columns, place.top, place.left) == (305, 256, -41, -16)
    assert place.image(np.zeros((303, 254), np.uint8)).shape == (224, 224)


@given(sides, sides, st.sampled_from(sorted(PLACEMENTS)), st.integers(0, 10**6))
def test_boxes_return_from_a_crop_of_the_image(rows, columns, placement, seed):
    rng = np.random.default_rng(seed)
    frame = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [columns, rows]
    if (frame[1] - frame[0]).min() < 1:
        return
    place = within(PLACEMENTS[placement], frame.ravel(), rows, columns, 512)
    boxes = rng.uniform(0, 1, (20, 4)) * [columns, rows, columns, rows]
    assert np.abs(place.boxes_to_original(place.boxes_to_canvas(boxes)) - boxes).max() < 1e-3
    corners = place.boxes_to_canvas(frame.ravel())[0]
    inner = [place.left, place.top, place.left + place.inner_columns, place.top + place.inner_rows]
    assert corners == pytest.approx(inner, abs=1e-6)


def test_a_crop_of_a_reduced_copy_shows_the_right_pixels():
    # The copy is 4 times smaller; a block on its pixels 30..50, 20..40 is at 120..200, 80..160 of the original.
    pixels = np.zeros((100, 80), np.uint8)
    pixels[20:40, 30:50] = 255
    place = within(letterbox, np.array([40.0, 20.0, 280.0, 380.0]), 400, 320, 360)
    ys, xs = np.nonzero(place.image(pixels) > 127)
    block = place.boxes_to_original([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]])[0]
    assert np.abs(block - [120, 80, 200, 160]).max() <= 4 / 2


@pytest.mark.parametrize(
    "frame", [[0, 0, 0, 10], [0, 9, 10, 9], [-1, 0, 10, 10], [0, -1, 10, 10], [0, 0, 321, 10], [0, 0, 10, 401]]
)
def test_a_frame_outside_the_image_or_without_area_is_refused(frame):
    with pytest.raises(ValueError, match="lie in the 400 x 320 pixel image"):
        within(letterbox, np.array(frame), 400, 320, 64)
    assert within(letterbox, np.array([0, 0, 320, 400]), 400, 320, 64).frame == (0, 0, 320, 400)


@given(sides, sides, st.sampled_from(sorted(PLACEMENTS)), st.integers(0, 10**6))
def test_any_crop_of_any_copy_fills_its_canvas(rows, columns, placement, seed):
    # Also crops smaller than a pixel of the copy: every crop of a white image must be white.
    rng = np.random.default_rng(seed)
    side = rng.uniform(1 / 16, 1, 2) * [columns, rows]
    corner = rng.uniform(0, 1, 2) * ([columns, rows] - side)
    if side.min() < 1:
        return
    place = within(PLACEMENTS[placement], np.r_[corner, corner + side], rows, columns, 32)
    canvas = place.image(np.full((max(1, rows // 20), max(1, columns // 20)), 255, np.uint8))
    top, left = max(0, place.top), max(0, place.left)
    inner = canvas[top : top + place.inner_rows, left : left + place.inner_columns]
    assert canvas.shape == (32, 32) and inner.min() == 255


def middles(place, rows, columns):
    """Return the canvas coordinates of the pixel centres of a copy of `rows` x `columns`: y (rows,) and x (columns,)."""
    y, x = (np.arange(rows) + 0.5) * place.rows / rows, (np.arange(columns) + 0.5) * place.columns / columns
    return y * place.scale[1] + place.offset[1], x * place.scale[0] + place.offset[0]


@given(
    st.integers(16, 500),
    st.integers(16, 500),
    st.floats(0.1, 1.5),
    st.sampled_from(sorted(PLACEMENTS)),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_a_canvas_is_mapped_back_like_its_boxes(rows, columns, share, placement, part, seed):
    # On a linear gradient, the grey level of a pixel of the copy tells the position of its centre on the canvas.
    rng = np.random.default_rng(seed)
    copy_rows, copy_columns = max(1, round(share * rows)), max(1, round(share * columns))
    place = PLACEMENTS[placement](rows, columns, 120)
    if part:
        low, high = rng.uniform(0, 0.4, 2) * [columns, rows], rng.uniform(0.6, 1, 2) * [columns, rows]
        place = within(PLACEMENTS[placement], np.r_[low, high], rows, columns, 120)
    y, x = middles(place, copy_rows, copy_columns)
    inside = ((y >= 0.5) & (y <= 119.5))[:, None] & ((x >= 0.5) & (x <= 119.5))
    beyond = ((y < -0.6) | (y > 120.6))[:, None] | ((x < -0.6) | (x > 120.6))
    for down, right in ((2, 0), (0, 2), (1, 1)):
        gradient = (down * np.arange(120)[:, None] + right * np.arange(120)).astype(np.uint8)
        back = place.back(gradient, copy_rows, copy_columns)
        assert back.shape == (copy_rows, copy_columns) and back.dtype == np.uint8
        expected = down * (y[:, None] - 0.5) + right * (x - 0.5)
        # Half a grey level by rounding, and 1/32 pixel per axis by OpenCV.
        assert np.abs(back - expected)[inside].max(initial=0) <= 0.5 + 2 / 32
        assert not back[beyond].any()


def test_an_image_on_a_canvas_of_its_own_size_returns_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120)).astype(np.uint8)
    for place in (letterbox(90, 120, 120), letterbox(900, 1200, 120), stretch(90, 120, (90, 120))):
        assert np.array_equal(place.back(place.image(pixels), 90, 120), pixels)
    # Border pixels extend to the edge of the canvas, also if the copy has a finer resolution.
    white = np.full((30, 30), 255, np.uint8)
    assert (letterbox(90, 90, 30).back(white, 90, 90) == 255).all()
    # A centre crop returns its middle, with black around it; at the same scale, 224 of 256 rows are unchanged.
    place = centre_crop(256, 320, 224)
    back = place.back(np.full((224, 224), 255, np.uint8), 256, 320)
    expected = np.zeros((256, 320), np.uint8)
    expected[16:240, 48:272] = 255
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("placement", ["letterbox", "stretch"])
@pytest.mark.parametrize("shape", [(300, 200), (151, 397), (64, 64)])
def test_a_mask_returns_to_its_position_on_a_smaller_copy(placement, shape):
    mask = np.zeros(shape, np.uint8)
    rows, columns = shape
    mask[rows // 4 : rows // 2, columns // 5 : columns // 2] = 255
    place = PLACEMENTS[placement](10 * rows, 10 * columns, 256)
    back = place.back(place.image(mask), rows, columns) > 127
    ys, xs = np.nonzero(back)
    edges = [ys.min(), ys.max() + 1, xs.min(), xs.max() + 1]
    # A pixel of the canvas covers up to 1.6 pixels of the copy: an edge moves by at most half of that.
    assert np.abs(np.array(edges) - [rows // 4, rows // 2, columns // 5, columns // 2]).max() <= 1


def test_bicubic_resizing_is_pillows():
    # Unlike the mean over areas, a bicubic filter has negative weights, so it overshoots beside an edge.
    pixels = np.repeat(np.array([100, 200], np.uint8), 32)[None].repeat(64, axis=0)
    place = stretch(64, 64, 16)
    assert set(place.image(pixels)[0]) == {100, 200}
    resized = place.image(pixels, bicubic=True)
    np.testing.assert_array_equal(resized, np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)))
    assert resized.min() < 100 and resized.max() > 200


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (31, 77), (50, 50)])
def test_what_a_canvas_shows_is_the_image_without_the_padding(rows, columns):
    pixels = np.full((rows, columns), 200, np.uint8)
    place = letterbox(rows, columns, 64)
    shown = place.shown(place.image(pixels))
    assert shown.shape == (place.inner_rows, place.inner_columns) and (shown == 200).all()
