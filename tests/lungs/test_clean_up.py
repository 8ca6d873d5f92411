"""The clean-up of lung masks: verdicts at their boundaries, the frame's margin, and probabilities near one half."""

import numpy as np
import pytest

from kitlib.classes import MASK_CODES
from kitlib.letterbox import letterbox
from kitlib.lungs.clean_up import BLANK, FOUND, NARROW, clean_up_mask, decode_maps, lung_frame, remove_islands
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.settings import override
from kitlib.xrays.cache import CachedXray

SIDE = 512  # at which the clean-up works, so that a pixel of the image is one of its canvas
PLAIN = SegmenterRecipe(least_island=0.0, least_width=0.0, margin=0.0)


def image(spread=100):
    """Return an image whose grey levels differ by `spread`."""
    pixels = np.full((SIDE, SIDE), 90, np.uint8)
    pixels[0, 0] += np.uint8(spread)
    return CachedXray("a", pixels, SIDE, SIDE)


def block(width, height):
    """Return the codes of lungs that are one rectangle at the upper edge."""
    codes = np.zeros((SIDE, SIDE), np.uint8)
    codes[:height, 100 : 100 + width] = MASK_CODES["lungs"]
    return codes


@pytest.mark.parametrize(("spread", "verdict"), [(7, BLANK), (8, FOUND)])
def test_an_image_is_blank_if_its_grey_levels_differ_by_less_than_8(spread, verdict):
    # If 8 changes, the version of the clean-up, 2, must change too.
    assert clean_up_mask(image(spread), block(100, 200), PLAIN).verdict == verdict


@pytest.mark.parametrize(("least_width", "verdict"), [(0.5, FOUND), (0.51, NARROW)])
def test_the_width_of_the_lungs_is_compared_with_their_height_without_a_margin(least_width, verdict):
    # The mask is 100 x 200 pixels at the upper edge; a margin would be cut off there, and change the ratio.
    found = clean_up_mask(image(), block(100, 200), override(PLAIN, least_width=least_width, margin=0.2))
    assert found.verdict == verdict
    assert found.frame.tolist() == ([80, 0, 220, 240] if verdict == FOUND else [0, 0, SIDE, SIDE])


@pytest.mark.parametrize(("dilations", "closings", "area"), [(1, 0, 102 * 201), (0, 1, 100 * 200), (0, 0, 100 * 200 + 1)])
def test_either_step_of_the_clean_up_replaces_the_predicted_mask(dilations, closings, area):
    codes = block(100, 200)
    codes[400, 400] = MASK_CODES["lungs"]  # one more pixel, which only the clean-up removes
    recipe = override(PLAIN, least_island=0.01, dilations=dilations, closings=closings)
    assert clean_up_mask(image(), codes, recipe).mask.sum() == area


def test_a_margin_is_a_share_of_the_frame_and_ends_at_the_image():
    mask = np.zeros((50, 100), bool)
    mask[20:30, 40:61] = True  # 21 columns, 10 rows
    # 0.1 of them are 2.1 columns and 1 row; the frame grows to whole pixels.
    assert lung_frame(mask, 0.1).tolist() == [37, 19, 64, 31]
    assert lung_frame(mask, 3.0).tolist() == [0, 0, 100, 50]


def test_an_empty_mask_has_no_islands_to_keep():
    assert not remove_islands(np.zeros((4, 6), bool), 0.0).any()


def decoded(levels, recipe):
    """Return the code of an image whose maps have one level each."""
    maps = np.array(levels, np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    (code,) = np.unique(decode_maps(maps, letterbox(8, 8, 8), (8, 8), recipe))
    return code


def test_a_pixel_belongs_to_the_most_probable_structure_and_if_in_doubt_to_the_first():
    # 127 of 255 is below one half, 128 above.
    assert [decoded([level], PLAIN) for level in (127, 128)] == [0, MASK_CODES["lungs"]]
    sides = override(PLAIN, structures=["left_lung", "right_lung"])
    left, right = MASK_CODES["left_lung"], MASK_CODES["right_lung"]
    assert [decoded(levels, sides) for levels in ((100, 101), (101, 100), (100, 100))] == [right, left, left]
    assert decoded((90, 75), sides) == 0  # as probable as the background, 90
    assert decoded((128, 128), sides) == left  # rounded maps may add up to 256


def test_the_least_area_of_a_sparse_structure_is_a_share_of_the_image():
    recipe = SparseSegmenterRecipe(top=0.7, bottom=0.4, least_area=0.01)
    for count, found in ((19, 0), (20, 20)):  # of 40 x 50 pixels
        maps = np.zeros((1, 40, 50), np.uint8)
        maps[0, 10, 10 : 10 + count] = 255
        assert np.count_nonzero(decode_maps(maps, letterbox(40, 50, (40, 50)), (40, 50), recipe)) == found


def test_a_pixel_of_the_canvas_that_is_half_lung_is_lung():
    # At 1024 pixels, two columns are one of the canvas; of its first column, the lungs cover the right half.
    codes = np.zeros((1024, 1024), np.uint8)
    codes[:400, 201:400] = MASK_CODES["lungs"]
    xray = CachedXray("a", image().pixels.repeat(2, axis=0).repeat(2, axis=1), 1024, 1024)
    assert clean_up_mask(xray, codes, PLAIN).area == 200 * 100 / SIDE**2
