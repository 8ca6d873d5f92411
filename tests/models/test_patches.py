"""Lung patches: uniform centres, patches as slices of a padded array, votes and their ties, and unusable masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.equalise import adjust_grey
from kitlib.lungs.finders import Lungs
from kitlib.models.patches import centres, cut_patches, image_seed, join_centres, mean_softmax, patch_canvas, votes
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override
from kitlib.xrays.cache import CachedXray

RECIPE = PatchRecipe(canvas=64, image_size=16)


def test_centres_are_uniform_over_the_masks_pixels():
    # Two lungs of different size and a single pixel. Rows and columns drawn independently, as in the published code, would
    # also fall between them.
    mask = np.zeros((24, 30), bool)
    mask[4:20, 3:10] = mask[6:14, 18:27] = mask[22, 28] = True
    drawn = centres(mask, 40_000, seed=5)
    assert drawn.shape == (40_000, 2) and drawn.dtype == np.int64 and mask[tuple(drawn.T)].all()
    counts = np.zeros(mask.shape, int)
    np.add.at(counts, tuple(drawn.T), 1)
    assert chisquare(counts[mask]).pvalue > 0.001  # 215 pixels, 186 draws each
    # Draws are independent: the frequencies of pairs of lungs are the products of their shares.
    left = drawn[:, 1] < 15
    pairs = np.bincount(2 * left[::2] + left[1::2], minlength=4)
    share = mask[:, :15].sum() / mask.sum()
    expected = 20_000 * np.outer([1 - share, share], [1 - share, share]).ravel()
    assert chisquare(pairs, expected).pvalue > 0.001


def test_centres_depend_on_the_seed_alone():
    mask = np.eye(50, dtype=bool)
    assert np.array_equal(centres(mask, 9, 3), centres(mask.copy(), 9, 3))
    assert not np.array_equal(centres(mask, 9, 3), centres(mask, 9, 4))
    with pytest.raises(ValueError, match="no pixel of the mask is True"):
        centres(np.zeros((4, 4), bool), 3, 0)
    # `printf a | sha256sum` begins with ca978112.
    assert image_seed("a") == 0xCA978112 and image_seed("b") != image_seed("a")


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(5, 12), st.integers(5, 12), st.integers(1, 15), st.integers(0, 999))
def test_a_patch_is_a_slice_of_the_padded_canvas(count, rows, columns, side, seed):
    rng = np.random.default_rng(seed)
    canvases = rng.integers(1, 256, (count, rows, columns)).astype(np.uint8)
    where = np.stack([rng.integers(size, size=7) for size in (count, rows, columns)], axis=1)
    found = cut_patches(torch.from_numpy(canvases), torch.from_numpy(where), side)
    assert found.shape == (7, side, side) and found.dtype == torch.uint8
    # The padding is larger than necessary; the patch begins side // 2 before its centre.
    padded = np.pad(canvases, ((0, 0), (20, 20), (20, 20)))
    for patch, (image, row, column) in zip(found.numpy(), where, strict=True):
        top, left = row + 20 - side // 2, column + 20 - side // 2
        np.testing.assert_array_equal(patch, padded[image, top : top + side, left : left + side])
        assert patch[side // 2, side // 2] == canvases[image, row, column]


def test_centres_outside_of_the_canvas_are_refused():
    with pytest.raises(IndexError):
        cut_patches(torch.zeros(1, 8, 8, dtype=torch.uint8), torch.tensor([[0, 8, 3]]), 4)


def test_votes_are_shares_and_a_tie_goes_to_the_first_class():
    found = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [1 / 3] * 3, [0.0, 0.1, 0.9]])
    which = torch.tensor([0, 0, 0, 0, 2])
    # The first image's patches vote for 1 (tied with 2), 0 (tied with 1), 2, and 0 (all three tied).
    shares = votes(found, which, 3)
    assert shares[0].tolist() == [0.5, 0.25, 0.25] and shares[2].tolist() == [0, 0, 1] and shares[1].isnan().all()
    expected = found[:4].double().mean(dim=0)
    torch.testing.assert_close(mean_softmax(found, which, 3)[0], expected, atol=1e-12, rtol=0)
    found[3, 1] = torch.nan
    assert votes(found, which, 3)[0].isnan().all() and votes(found, which, 3)[2].tolist() == [0, 0, 1]


@settings(max_examples=50)
@given(st.integers(0, 9999), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(2, 5))
def test_shares_sum_to_one_do_not_depend_on_the_patches_order_and_are_nan_without_patches(seed, patches, classes):
    rng = np.random.default_rng(seed)
    which = torch.from_numpy(np.repeat(np.arange(len(patches)), patches))
    found = torch.from_numpy(rng.dirichlet(np.ones(classes), len(which))).float()
    order = torch.from_numpy(rng.permutation(len(which)))
    for score in (votes, mean_softmax):
        rows = score(found, which, len(patches))
        has_patches = torch.tensor(patches) > 0
        assert rows[~has_patches].isnan().all()
        sums = rows[has_patches].sum(dim=1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
        again = score(found[order], which[order], len(patches))
        torch.testing.assert_close(again, rows, atol=1e-12, rtol=0, equal_nan=True)
    # Each share times the number of patches is a whole number.
    counted = votes(found, which, len(patches)) * torch.tensor(patches)[:, None]
    torch.testing.assert_close(counted, counted.round(), atol=1e-9, rtol=0, equal_nan=True)


def test_joined_centres_name_their_canvas():
    found = join_centres([np.array([[5, 6]]), np.array([[1, 2], [3, 4]])])
    assert found.tolist() == [[0, 5, 6], [1, 1, 2], [1, 3, 4]] and found.dtype == torch.int64


def placed(image, changes, side):
    """Return the image with adjusted grey levels on a canvas of `side` pixels."""
    grey = adjust_grey(image.pixels, changes.get("equalise", True), changes.get("gamma", 0.5))
    place = PLACEMENTS[changes.get("placement", "stretch")](image.rows, image.columns, side)
    return place.image(grey, bicubic=changes.get("resize") == "bicubic")


def xray(rows=128, columns=96):
    """Return an X-ray whose cached copy has half of the original's size, and lungs that fill its left half."""
    pixels = np.random.default_rng(0).integers(1, 256, (rows // 2, columns // 2)).astype(np.uint8)
    mask = np.zeros(pixels.shape, bool)
    mask[:, : columns // 4] = True
    return CachedXray("a", pixels, rows, columns), mask


OTHER = {"placement": "letterbox", "resize": "bicubic", "equalise": False, "gamma": 2.0}


@pytest.mark.parametrize("changes", [{}, OTHER])
def test_the_canvas_is_the_adjusted_image_and_black_outside_of_the_mask(changes):
    image, mask = xray()
    found = patch_canvas(image, Lungs(np.zeros(4), mask), override(RECIPE, canvas=48, **changes))
    np.testing.assert_array_equal(found.pixels, np.where(found.mask, placed(image, changes, 48), 0))
    if not changes:
        assert found.mask[:, :24].all() and not found.mask[:, 24:].any()  # half of 48 columns
    else:  # 128 x 96 pixels become 48 x 36, between margins of 6 columns
        assert found.mask[:, 6:24].all() and found.mask.sum() == 48 * 18
    assert found.centres(5, 0).shape == (5, 2) and found.mask[tuple(found.centres(50, 0).T)].all()


@pytest.mark.parametrize("changes", [{}, OTHER])
@pytest.mark.parametrize("case", ["not found", "empty", "tiny", "small image"])
def test_an_image_without_usable_lungs_is_a_single_patch(case, changes):
    image, mask = xray(*(14, 90) if case == "small image" else ())
    if case in ("empty", "tiny"):
        mask[:] = False
        mask[:4, :4] = case == "tiny"  # 16 of 64 x 48 pixels are 0.5 %; at least 1 % is required
    recipe = override(RECIPE, **changes)
    found = patch_canvas(image, Lungs(None) if case == "not found" else Lungs(np.zeros(4), mask), recipe)
    assert found.mask is None and found.pixels.shape == (64, 64)
    (patch,) = cut_patches(torch.from_numpy(found.pixels)[None], join_centres([found.centres(9, 0)]), 16)
    np.testing.assert_array_equal(patch.numpy(), placed(image, changes, 16))


def test_a_mask_of_just_enough_lungs_is_used():
    image, mask = xray()
    mask[:] = False
    mask[:9, :4] = True  # on the canvas 9 x 5 of 64 x 64 pixels, 1.1 %
    assert patch_canvas(image, Lungs(np.zeros(4), mask), RECIPE).mask is not None


def test_lungs_of_exactly_the_least_share_and_an_image_as_large_as_a_patch_are_used():
    image, mask = xray()  # the lungs fill half of the canvas
    for least, used in ((0.5, True), (0.51, False)):
        found = patch_canvas(image, Lungs(np.zeros(4), mask), override(RECIPE, least_lungs=least))
        assert (found.mask is not None) == used
    image, mask = xray(90, 16)
    assert patch_canvas(image, Lungs(np.zeros(4), mask), RECIPE).mask is not None
