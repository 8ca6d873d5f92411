"""Equalised and powered grey against plain numpy and closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.lungs.equalise import adjust_grey


def equalised(pixels):
    """As Oh et al.'s published code and OpenCV's tutorial equalise: the masked cumulative histogram, cut to integers."""
    counts, _ = np.histogram(pixels.ravel(), 256, [0, 256])
    risen = np.ma.masked_equal(counts.cumsum(), 0)
    risen = (risen - risen.min()) * 255 / (risen.max() - risen.min())
    return np.ma.filled(risen, 0).astype(np.uint8)[pixels]


@given(st.integers(0, 2**31), st.integers(1, 256), st.sampled_from([(1, 3), (40, 1), (23, 31), (2, 9, 7)]))
def test_equalisation_is_the_plain_recipe(seed, greys, shape):
    rng = np.random.default_rng(seed)
    pixels = rng.choice(rng.choice(256, greys, replace=False), shape).astype(np.uint8)
    before = pixels.copy()
    found = adjust_grey(pixels, True, 1.0)
    assert found.dtype == np.uint8 and found.shape == shape and np.array_equal(pixels, before)
    if pixels.min() < pixels.max():
        assert np.array_equal(found, equalised(pixels))
        assert found.min() == 0 and found.max() == 255
    else:
        assert not found.any()


def test_greys_that_are_even_stay_and_those_in_a_narrow_band_are_spread():
    even = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(adjust_grey(even, True, 1.0), even)
    # Four greys, a quarter each: 0, 1, 2 and 3 thirds of 255.
    assert adjust_grey(np.array([[100, 101], [102, 103]], np.uint8), True, 1.0).tolist() == [[0, 85], [170, 255]]


@pytest.mark.parametrize("grey", [0, 7, 255])
def test_a_blank_image_is_black_where_it_is_equalised_and_stays_where_not(grey):
    blank = np.full((5, 4), grey, np.uint8)
    assert not adjust_grey(blank, True, 0.5).any()
    assert np.array_equal(adjust_grey(blank, False, 1.0), blank)


def test_a_power_is_taken_of_grey_from_0_to_1():
    every = np.arange(256, dtype=np.uint8)
    # 255 sqrt(x / 255) = sqrt(255 x)
    assert np.array_equal(adjust_grey(every, False, 0.5), np.rint(np.sqrt(255.0 * every)))
    assert adjust_grey(np.array([64], np.uint8), False, 0.5).tolist() == [128]  # sqrt(16320) = 127.7
    assert adjust_grey(np.array([0, 128, 255], np.uint8), False, 2.0).tolist() == [0, 64, 255]  # 128^2 / 255 = 64.25


def test_the_power_comes_after_the_equalisation():
    pixels = np.random.default_rng(0).integers(30, 90, (20, 30)).astype(np.uint8)
    wanted = np.rint(255 * (equalised(pixels) / 255) ** 0.5)
    assert np.array_equal(adjust_grey(pixels, True, 0.5), wanted)


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_no_power_that_is_not_positive(gamma):
    with pytest.raises(ValueError, match=rf"gamma is {gamma}; expected a positive number, such as 0\.5"):
        adjust_grey(np.zeros((2, 2), np.uint8), False, gamma)
