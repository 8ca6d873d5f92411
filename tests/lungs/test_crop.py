"""Lung crops: frames, boxes and masks on the canvas, and the choice of a finder."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.crop import (
    blacken_outside,
    check_finder,
    choose_finder,
    clip_boxes_to_canvas,
    crop,
    find_lungs,
    needs_lungs,
    needs_masks,
)
from kitlib.lungs.finders import DarkLungs, Lungs
from kitlib.settings import override
from tests.small_xrays import RECIPE, SmallXrays

ROWS, COLUMNS = 3001, 2003
sides = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
parts = st.tuples(sides, sides).filter(lambda each: all(high - low > 0.01 for low, high in each))
MASK = np.eye(40, 50) > 0


def box_of(part):
    (left, right), (top, bottom) = part
    return np.array([left * COLUMNS, top * ROWS, right * COLUMNS, bottom * ROWS])


def common(one, other):
    return np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])])


class FixedLungs:
    """A finder that returns the same lungs for every image."""

    def __init__(self, lungs):
        self.lungs = lungs

    def find(self, xrays):
        return [self.lungs] * len(xrays)


@given(st.sampled_from(sorted(PLACEMENTS)), parts, parts)
def test_boxes_return_exactly_from_a_crop_and_are_cut_at_its_edges(placement, frame, box):
    frame, box = box_of(frame), box_of(box)
    place = crop(PLACEMENTS[placement], frame, ROWS, COLUMNS, 512)
    # The part of the original that the canvas shows; a letterbox's black bars are outside of the frame.
    window = place.boxes_to_original(np.array([[0, 0, 512, 512]]))[0]
    cut = common(box, frame)
    shown = common(cut, window)
    found = clip_boxes_to_canvas(place, box)
    least = min((cut[2:] - cut[:2]).min(), ((shown[2:] - shown[:2]) * place.scale[:2]).min())
    assume(abs(least - 1) > 1e-6)
    if least < 1:
        assert len(found) == 0
    else:
        np.testing.assert_allclose(place.boxes_to_original(found), [shown], atol=1e-6)


def test_without_a_frame_the_whole_image_is_shown():
    for name, place in PLACEMENTS.items():
        assert crop(place, None, ROWS, COLUMNS, 512) == place(ROWS, COLUMNS, 512), name
        # The frame of the whole image gives the same.
        whole = crop(place, np.array([0.0, 0.0, COLUMNS, ROWS]), ROWS, COLUMNS, 512)
        np.testing.assert_array_equal(whole.offset, place(ROWS, COLUMNS, 512).offset)
        boxes = np.array([[-9, -9, COLUMNS + 9, ROWS + 9, 3.0], [-9, -9, -1, 50, 4.0], [100, 200, 900, 950, 5.0]])
        found = clip_boxes_to_canvas(place(ROWS, COLUMNS, 512), boxes)
        np.testing.assert_array_equal(found, clip_boxes_to_canvas(whole, boxes))
        assert found[:, 4].tolist() == [3, 5]  # of the boxes that are left


def test_outside_of_the_mask_all_is_black():
    pixels = np.full((40, 50), 200, np.uint8)
    seen = blacken_outside(pixels, MASK)
    assert seen.dtype == np.uint8 and (seen[MASK] == 200).all() and (seen[~MASK] == 0).all()
    assert blacken_outside(pixels, None) is pixels


def test_a_masked_model_takes_no_frame_without_a_mask_and_others_take_no_mask():
    small, frame = SmallXrays(8), np.array([10.0, 10, 60, 60])
    xrays = list(small.stream())[:2]
    both, bare = FixedLungs(Lungs(frame, MASK)), FixedLungs(Lungs(frame))
    assert [(lungs.frame is frame, lungs.mask is MASK) for lungs in find_lungs(both, xrays, masked=True)] == [
        (True, True)
    ] * 2
    assert [(lungs.frame, lungs.mask) for lungs in find_lungs(bare, xrays, masked=True)] == [(None, None)] * 2
    assert [(lungs.frame is frame, lungs.mask) for lungs in find_lungs(both, xrays, masked=False)] == [(True, None)] * 2


def test_a_recipe_chooses_the_finder():
    finder = FixedLungs(Lungs(None))
    assert choose_finder("masks", finder) is finder and isinstance(choose_finder("darkness", finder), DarkLungs)

    class Empty(FixedLungs):
        """A finder with len() == 0, which is falsy but not None."""

        def __len__(self):
            return 0

    assert isinstance(choose_finder("masks", Empty(Lungs(None))), Empty)
    xrays = list(SmallXrays(8).stream())
    assert [lungs.frame for lungs in choose_finder("masks", None).find(xrays)] == [None] * 8


@pytest.mark.parametrize(
    ("recipe", "looks", "masks"),
    [
        ({}, False, False),  # a bundle of an older kit without these fields
        ({"views": ["full", "lungs_flip"]}, True, False),
        ({"views": ["full", "flip"], "lungs": "masks"}, False, False),
        ({"views": ["lungs"], "lungs": "masks"}, True, True),
        ({"views": ["full"], "lungs": "masks", "masked": True}, True, True),
    ],
)
def test_a_record_tells_whether_the_model_looks_at_lungs_and_whose(recipe, looks, masks):
    assert (needs_lungs(recipe), needs_masks(recipe)) == (looks, masks)
    assert needs_lungs(recipe, ["lungs"]) and needs_masks(recipe, ["lungs"]) == (recipe.get("lungs") == "masks")


def test_masks_that_are_missing_or_unused_are_refused_with_what_to_set():
    masks = override(RECIPE, lungs="masks")
    check_finder(masks, FixedLungs(Lungs(None)), "study")
    check_finder(RECIPE, None, "study")
    with pytest.raises(ValueError, match=r'study: .*set lungs_run to a run of notebook 14, or .*\{"lungs": "darkness"\}'):
        check_finder(masks, None, "study")
    with pytest.raises(ValueError, match=r'ignores the masks of that run; set overrides \{"lungs": "masks"\}'):
        check_finder(RECIPE, FixedLungs(Lungs(None)), "study")
