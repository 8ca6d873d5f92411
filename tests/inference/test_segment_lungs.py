"""Lung masks: verdict, clean-up, frame and conversion to the image's pixels; batches of a segmenter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kitlib.bundle import save_bundle
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.errors import BundleError
from kitlib.inference.segment_lungs import LungSegmenter, MaskPredictor, load_segmenter
from kitlib.letterbox import letterbox
from kitlib.lungs.clean_up import (
    BLANK,
    EMPTY,
    FOUND,
    NARROW,
    SMALL,
    clean_up_mask,
    decode_maps,
    dilate_and_close,
    lung_frame,
    remove_islands,
)
from kitlib.lungs.finders import segmenter_digest
from kitlib.models.segmenter import Segmenter
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.recipes.named import RECIPES
from kitlib.settings import override
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import decode_grey
from tests.small_masks import RECIPE, SmallMasks

CPU = torch.device("cpu")
PUBLISHED = RECIPES["unet_lungs"]
PLAIN = override(PUBLISHED, dilations=0, closings=0, margin=0.0, least_area=0.01, image_size=128)


def xray(rows=1000, columns=800, height=500, width=400):
    return CachedXray("a", np.tile(np.arange(width, dtype=np.uint8), (height, 1)), rows, columns)


def maps_of(mask, image, recipe, structures=1):
    """Return probability maps on the recipe's canvas that are certain of `mask` (bool, the cached pixels' shape)."""
    place = letterbox(image.rows, image.columns, recipe.image_size)
    canvas = place.image(mask.astype(np.uint8) * 255)
    return np.stack([canvas] * structures), place


def cleaned(mask, image, recipe):
    """Return the clean-up of a mask (bool, the cached pixels' shape) that a network drew."""
    return clean_up_mask(image, mask.astype(np.uint8), recipe)


def two_lungs(image, top=0.2, bottom=0.8, inner=0.08, outer=0.4):
    height, width = image.pixels.shape
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return (y > top) & (y < bottom) & (np.abs(x - 0.5) > inner) & (np.abs(x - 0.5) < outer)


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(0, 3))
def test_the_clean_up_applies_the_given_dilations_and_closings(seed, dilations, closings):
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(60, 50)), 3) > 0.1
    square = np.ones((3, 3))
    wanted = ndimage.binary_dilation(mask, square, dilations) if dilations else mask
    if closings:
        # The outside of the image does not erode the mask.
        wanted = ndimage.binary_erosion(ndimage.binary_dilation(wanted, square, closings), square, closings, border_value=1)
    assert np.array_equal(dilate_and_close(mask, dilations, closings), wanted)


def test_small_islands_are_removed_and_large_parts_stay():
    mask = np.zeros((100, 100), bool)
    mask[10:50, 10:40], mask[60:69, 60:70], mask[90:92, 90:92] = True, True, True
    assert remove_islands(mask, 0.01).sum() == 40 * 30
    assert remove_islands(mask, 0.009).sum() == 40 * 30 + 90
    assert not remove_islands(np.zeros((5, 5), bool), 0.01).any()


@given(st.integers(2, 40), st.integers(2, 40), st.data())
def test_a_frame_contains_the_mask_and_is_tight_without_a_margin(rows, columns, data):
    mask = np.zeros((rows, columns), bool)
    assert lung_frame(mask, 0.1) is None
    for _ in range(data.draw(st.integers(1, 5))):
        mask[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] = True
    xmin, ymin, xmax, ymax = lung_frame(mask, 0.0).astype(int)
    assert mask[ymin:ymax, xmin:xmax].sum() == mask.sum()
    assert mask[ymin].any() and mask[ymax - 1].any() and mask[:, xmin].any() and mask[:, xmax - 1].any()
    wide = lung_frame(mask, 0.5)
    assert (wide[:2] <= [xmin, ymin]).all() and (wide[2:] >= [xmax, ymax]).all()
    assert wide.min() >= 0 and wide[2] <= columns and wide[3] <= rows


@pytest.mark.parametrize("size", [(1000, 800, 500, 400), (811, 1303, 300, 482), (512, 512, 512, 512), (2001, 700, 999, 349)])
def test_a_mask_on_the_canvas_converts_back_to_its_position(size):
    image = xray(*size)
    mask = two_lungs(image)
    maps, place = maps_of(mask, image, override(PLAIN, image_size=256))
    back = decode_maps(maps, place, image.pixels.shape, PLAIN) > 0
    # A canvas pixel is up to four pixels of the copy, so the edges of lungs are off by less than half a canvas pixel.
    edge = ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_erosion(mask, iterations=3)
    assert not ((back != mask) & ~edge).any()
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.98


def test_a_frame_is_in_original_pixels_and_on_the_copys_grid():
    image = xray(rows=1500, columns=1000, height=300, width=200)
    mask = np.zeros((300, 200), bool)
    mask[60:240, 20:90], mask[60:240, 110:180] = True, True
    found = cleaned(mask, image, PLAIN)
    assert found.verdict == FOUND
    # A pixel of the copy is five original pixels; the canvas is finer than the copy, so the error is at most one of these.
    assert np.abs(found.frame - np.array([20, 60, 180, 240]) * 5.0).max() <= 5
    assert (found.frame % 5 == 0).all()


def test_the_published_rule_counts_pixels_at_512():
    image = xray(512, 512, 512, 512)
    recipe = override(PUBLISHED, dilations=0, closings=0, margin=0.0, least_island=0.0, least_width=0.0)
    for rows, verdict in ((99, SMALL), (100, FOUND)):
        # 500 columns: 49,500 and 50,000 pixels.
        mask = np.zeros((512, 512), bool)
        mask[100 : 100 + rows, 5:505] = True
        found = cleaned(mask, image, recipe)
        assert found.area == pytest.approx(rows * 500 / 512**2)
        assert found.verdict == verdict, rows
        assert found.frame.tolist() == ([5, 100, 505, 200] if verdict == FOUND else [0, 0, 512, 512])


def test_only_unet_hrnets_recipe_grows_masks_and_others_have_the_mask_that_was_drawn():
    image = xray(512, 512, 512, 512)
    mask = two_lungs(image)
    mask[500:505, 5:10] = True  # a speck that the network drew
    grown = cleaned(mask, image, override(PUBLISHED, margin=0.0))
    tight = lung_frame(two_lungs(image), 0.0)
    assert (grown.frame - tight).tolist() == [-8, -8, 8, 8]  # 8 dilations by 3 x 3 pixels at 512
    assert np.array_equal(grown.mask, dilate_and_close(two_lungs(image), 8, 2)) and not grown.mask[500, 5]
    for name in ("resunet_lungs", "fc_densenet103_lungs", "small_lungs"):
        drawn = cleaned(mask, image, override(RECIPES[name], margin=0.0))
        assert np.array_equal(drawn.mask, mask) and drawn.frame.tolist() == tight.tolist(), name


def test_a_pixel_has_the_structure_of_the_largest_probability():
    image, recipe = xray(512, 512, 512, 512), override(RECIPES["fc_densenet103_lungs"], image_size=512)
    shares = {"heart": 0.0, "left_lung": 0.45, "right_lung": 0.39}  # the background has 0.16
    maps = np.stack([two_lungs(image) * np.uint8(255 * shares[name]) for name in recipe.structures])
    codes = decode_maps(maps, letterbox(512, 512, 512), image.pixels.shape, recipe)
    assert np.array_equal(codes, two_lungs(image) * MASK_CODES["left_lung"])


def test_of_a_sparse_segmenter_pixels_above_both_thresholds_have_the_structures_code():
    """`top` decides whether the image has the structure, `bottom` which pixels belong to it."""
    image, recipe = xray(64, 64, 64, 64), SparseSegmenterRecipe(top=0.7, bottom=0.4, least_area=0.001)
    maps = np.full((1, 64, 64), 20, np.uint8)
    maps[0, 10:30, 10:30] = 150  # 0.59
    place = letterbox(64, 64, 64)
    assert not decode_maps(maps, place, (64, 64), recipe).any()
    maps[0, 15:25, 15:25] = 230  # 0.90
    codes = decode_maps(maps, place, image.pixels.shape, recipe)
    assert codes.dtype == np.uint8 and set(np.unique(codes)) == {0, MASK_CODES["pneumothorax"]}
    assert (codes[11:29, 11:29] > 0).all() and np.count_nonzero(codes) == 400


def test_empty_masks_single_lungs_specks_and_blank_images_are_not_plausible():
    image = xray()
    lungs = two_lungs(image)
    one = lungs.copy()
    one[:, image.pixels.shape[1] // 2 :] = False
    specks = np.zeros_like(lungs)
    specks[::40, ::40] = True
    blank = CachedXray("b", np.full_like(image.pixels, 100), image.rows, image.columns)
    assert cleaned(lungs, blank, PLAIN).verdict == BLANK
    for mask, verdict in ((lungs, FOUND), (one, NARROW), (specks, EMPTY), (lungs & False, EMPTY)):
        found = cleaned(mask, image, PLAIN)
        assert found.verdict == verdict
        if verdict != FOUND:
            assert found.frame.tolist() == [0, 0, image.columns, image.rows]


def test_the_heart_is_no_lung():
    image = xray(512, 512, 512, 512)
    codes = two_lungs(image).astype(np.uint8) * MASK_CODES["left_lung"]
    codes[300:340, 225:287] = MASK_CODES["heart"]
    assert np.array_equal(clean_up_mask(image, codes, PLAIN).mask, two_lungs(image))


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(1)
    return LungSegmenter({"model": "m", "precision": "float32"}, Segmenter(RECIPE).eval(), CPU, batch_size=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("masks"), count=10)


def test_batches_give_the_same_result_as_single_images(segmenter, small):
    one_by_one = LungSegmenter({"model": "m", "precision": "float32"}, segmenter.network, CPU, batch_size=1)
    for (image, maps, place), (alone, other, _) in zip(
        segmenter.maps(small.stream()), one_by_one.maps(small.stream()), strict=True
    ):
        assert image.image_id == alone.image_id and place.canvas_rows == RECIPE.image_size
        # Sums in another order can differ by one of 255 levels.
        assert np.abs(maps.astype(int) - other).max() <= 1


def test_a_finder_returns_frames_and_masks_and_counts_missed_images(small):
    class Says(torch.nn.Module):
        recipe = override(RECIPE, image_size=64, least_width=0.0, least_area=0.05, dilations=1)

        def normalise(self, pixels):
            return pixels[:, None].float()

        def forward(self, x):
            return x

        def probabilities(self, x):
            # Dark pixels are lung, except the canvas's black padding; the second image has no dark pixels.
            inside = ((x > 0) & (x < 100)).float()
            inside[1:2] = 0
            return torch.cat([1 - inside, inside], dim=1)

    segmenter = LungSegmenter({"model": "m", "precision": "float32"}, Says(), CPU, batch_size=16)
    xrays = list(small.stream())
    found = segmenter.find(xrays)
    assert segmenter.missed == 1 and found[1].frame is None and found[1].mask is None
    for image, lungs in zip(xrays, found, strict=True):
        if lungs.frame is not None:
            drawn = np.isin(small.masks.read(image.image_id), LUNG_CODES)
            assert lungs.mask.shape == image.pixels.shape and (lungs.mask | ~drawn).mean() > 0.98
            tight = lung_frame(drawn, 0.0) * 2  # the copy has half the pixels
            assert (lungs.frame[:2] <= tight[:2] + 2).all() and (lungs.frame[2:] >= tight[2:] - 2).all()


class Marks(torch.nn.Module):
    """Finds the structure in bright pixels of the left half."""

    recipe = SparseSegmenterRecipe(image_size=32, views=("full", "flip"))

    def normalise(self, pixels):
        return pixels[:, None].float()

    def forward(self, x):
        return x

    def probabilities(self, x):
        found = (x > 100).float()
        found[..., 16:] = 0
        return torch.cat([1 - found, found], dim=1)


def test_mirrored_views_are_mirrored_back_and_averaged(monkeypatch):
    left = np.tile(np.where(np.arange(32) < 16, 200, 0).astype(np.uint8), (32, 1))
    images = [CachedXray("left", left, 32, 32), CachedXray("all", np.full((32, 32), 200, np.uint8), 32, 32)]
    record = {"family": "sparse_segmenter", "model": "m", "classes": ["pneumothorax"], "precision": "float32", "fold": 3}
    segmenter = MaskPredictor(record, Marks(), CPU, batch_size=2)
    assert (segmenter.lungs_missed, segmenter.wants_masks, segmenter.overflowed) == (0, False, 0)
    (table,) = segmenter.predict(images)
    maps = [decode_grey(png) for png in table["map"]]
    # Each half is found in one of two views, the left half of the first image in the whole view.
    assert [np.unique(each[:, :16]).tolist() for each in maps] == [[128], [128]]
    assert [np.unique(each[:, 16:]).tolist() for each in maps] == [[0], [128]]
    assert table[["image_id", "model", "fold", "finding"]].to_numpy().tolist() == [
        [name, "m", 3, "pneumothorax"] for name in ("left", "all")
    ]
    assert (segmenter.seen, segmenter.overflowed) == (["left", "all"], 0)
    monkeypatch.setattr("kitlib.inference.segment_lungs.finite_or_float32", lambda network, _: (network(), True))
    list(segmenter.predict([*images, images[0]]))
    assert (segmenter.seen, segmenter.overflowed) == (["left", "all", "left"], 3)


def test_a_lung_segmenters_digest_is_that_of_its_record():
    record = {"model": "m", "precision": "float32", "recipe": {}, "weights_sha256": "ab"}
    assert LungSegmenter(record, Marks(), CPU).segmenter == segmenter_digest(record)
    del record["weights_sha256"]  # of a network that is being trained
    assert LungSegmenter(record, Marks(), CPU).segmenter == ""


def test_equalisation_ignores_the_padding_of_the_canvas(small):
    seen = []

    class Looks(torch.nn.Module):
        recipe = override(RECIPE, image_size=64, equalise=True, gamma=0.5)

        def normalise(self, pixels):
            seen.append(pixels)
            return pixels[:, None].float()

        def forward(self, x):
            return x

        def probabilities(self, x):
            return torch.cat([torch.ones_like(x), torch.zeros_like(x)], dim=1)

    LungSegmenter({"model": "m", "precision": "float32"}, Looks(), CPU).find(list(small.stream()))
    canvas = seen[0].numpy()
    # 60 x 50 pixels on 64: black padding of 5 or 6 columns on either side; the image's darkest grey is black, too.
    assert (canvas[:, :, :5] == 0).all() and (canvas[:, :, -5:] == 0).all()
    # Equalised greys x are uniform over 0..255, so the mean of sqrt(x / 255) is 2/3.
    assert canvas[:, 2:-2, 8:-8].mean() == pytest.approx(255 * 2 / 3, abs=12)


def test_a_bundle_of_another_kind_is_refused(tmp_path):
    record = {
        **{"family": "study", "model": "m", "classes": ["a"], "recipe": {}, "architecture": {}, "longest_side": 64},
        **{"image_size": 64, "placement": "letterbox", "mean": [0.5], "std": [0.25], "fold": 0},
        **{"data_fingerprint": "", "precision": "float32", "validation": {}},
    }
    save_bundle(tmp_path / "bundle", {"a": torch.zeros(1)}, record)
    with pytest.raises(BundleError, match="contains a study model; choose the bundle of a segmenter's run"):
        load_segmenter(tmp_path / "bundle")


def test_all_recipes_of_segmenters_can_be_built():
    for recipe in RECIPES.values():
        if isinstance(recipe, SegmenterRecipe):
            assert Segmenter(override(recipe, width=0.1)).network is not None
