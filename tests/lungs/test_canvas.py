"""A model's input: central squares, grey before masks, probes, and equal inputs in validation and prediction."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kitlib.errors import SettingsError
from kitlib.inference.predict import Predictor
from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.canvas import keep_border, read_canvas
from kitlib.lungs.equalise import adjust_grey
from kitlib.lungs.finders import Lungs
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
from kitlib.settings import override
from kitlib.training.augmentation import Augmentation
from kitlib.training.xray_dataset import XrayDataset
from kitlib.xrays.cache import CachedXray
from tests.inference.test_predict import CPU, RECORD
from tests.small_xrays import BOX, RECIPE, SmallXrays

STILL = override(RECIPE, horizontal_flip=0.0, rotate_degrees=0.0, brightness_contrast=0.0)
LARGER = override(STILL, image_size=24, canvas=36)


class Finder:
    """A finder that returns one frame and mask for every image except those in `missed`."""

    def __init__(self, missed=()):
        self.missed = missed

    def find(self, xrays):
        found = [Lungs(np.array([10.0, 6.0, 71.0, 67.0]), self.mask(xray)) for xray in xrays]
        return [Lungs(None) if xray.image_id in self.missed else lungs for xray, lungs in zip(xrays, found, strict=True)]

    def mask(self, xray):
        mask = np.zeros(xray.pixels.shape, bool)
        mask[4:30, 6:20] = True
        return mask


def dataset(small, recipe, **options):
    return XrayDataset(small.images, small.labels, small.boxes, small, recipe, **options)


@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.tuples(st.integers(8, 60), st.integers(0, 30)),
)
def test_the_middle_of_a_canvas_is_a_placement_of_its_own(name, shape, sides):
    image_size, more = sides
    canvas = read_canvas(override(STILL, image_size=image_size, canvas=image_size + more))
    pixels = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    place = PLACEMENTS[name](*shape, canvas.whole)
    middle, cut = canvas.middle(place), (image_size + more - image_size) // 2
    assert np.array_equal(middle.image(pixels), canvas.crop_middle(place.image(pixels)))
    # Points of the original lie as far from the square's corner as the square's corner lies inside.
    box = np.array([[1.0, 2.0, 15.0, 18.0]])
    np.testing.assert_allclose(middle.boxes_to_canvas(box), place.boxes_to_canvas(box) - cut)
    np.testing.assert_allclose(middle.boxes_to_original(middle.boxes_to_canvas(box)), box)


def test_a_training_sees_every_square_of_the_canvas_equally_often():
    ramp = np.random.default_rng(0).integers(0, 256, (36, 36)).astype(np.uint8)
    ramp[:13, :13] = np.arange(169).reshape(13, 13)  # a square is known by its first pixel
    cut, corners = Augmentation(LARGER), []
    for seed in range(1300):
        seen = cut(ramp, np.zeros((0, 4)), seed)[0]
        assert seen.shape == (24, 24)
        row, column = divmod(int(seen[0, 0]), 13)
        assert np.array_equal(seen, ramp[row : row + 24, column : column + 24])
        corners.append((row, column))
    # Thirteen places an axis, a hundred draws each: chi-square of 12 degrees has 1e-6 of its mass beyond 53.
    for axis in np.array(corners).T:
        counts = np.bincount(axis, minlength=13)
        assert len(counts) == 13 and ((counts - 100) ** 2 / 100).sum() < 53


def test_boxes_move_with_the_square_that_is_seen():
    small = SmallXrays(8)
    recipe = override(LARGER, placement="stretch")
    x, y = 36 / 100, 36 / 80
    expected = np.array([BOX[0] * x - 6, BOX[1] * y - 6, BOX[2] * x - 6, BOX[3] * y - 6]).clip(0, 24)
    np.testing.assert_allclose(dataset(small, recipe)[2]["boxes"][0], expected, atol=1e-4)
    for epoch in range(20):
        example = dataset(small, recipe, augment=True)[epoch, 2]
        # The white block stays under its box, within a pixel of resampling.
        ys, xs = np.nonzero(example["pixels"].numpy() > 200)
        frame = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(example["boxes"][0].numpy() - frame).max() <= 1


def test_the_cache_holds_whole_canvases_and_not_random_squares():
    small = SmallXrays(8)
    examples = dataset(small, LARGER, augment=True)
    first, again = examples[3, 2]["pixels"], examples[3, 2]["pixels"]
    assert torch.equal(first, again) and examples.canvas_cache.pixels.shape == (8, 36, 36) and first.shape == (24, 24)
    assert torch.equal(dataset(small, LARGER)[2]["pixels"], torch.from_numpy(examples.canvas_cache.get(2)[0][6:30, 6:30]))


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_grey_is_adjusted_before_a_mask_blackens_it(seed, equalise, gamma):
    rng = np.random.default_rng(seed)
    pixels, mask = rng.integers(0, 256, (20, 30)).astype(np.uint8), rng.random((20, 30)) < 0.5
    told = {"equalise": equalise, "gamma": gamma, "lungs": "masks"}
    masked, probe = (override(STILL, **told, **each) for each in ({"masked": True}, {"probe": "outside_lungs"}))
    grey = adjust_grey(pixels, equalise, gamma)
    inside, outside = (read_canvas(recipe).grey(pixels, mask) for recipe in (masked, probe))
    # Each pixel is visible to exactly one of the two.
    assert np.array_equal(inside, np.where(mask, grey, 0)) and np.array_equal(outside, np.where(mask, 0, grey))
    assert np.array_equal(read_canvas(probe).grey(pixels, None), grey)


def test_a_recipe_chooses_how_an_image_is_reduced():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70)).astype(np.uint8)
    place = PLACEMENTS["letterbox"](90, 70, 32)
    area, bicubic = (read_canvas({"image_size": 32, "resize": resize}).lay(pixels, place) for resize in ("area", "bicubic"))
    assert np.array_equal(area, place.image(pixels)) and np.array_equal(bicubic, place.image(pixels, bicubic=True))
    assert not np.array_equal(area, bicubic)


@pytest.mark.parametrize(("side", "edge"), [(224, 22), (32, 3), (4, 1)])
def test_a_border_is_a_tenth_of_the_side(side, edge):
    shown = keep_border(np.full((side, side), 200, np.uint8))
    assert (shown == 200).sum() == side**2 - (side - 2 * edge) ** 2
    assert (shown[edge:-edge, edge:-edge] == 0).all() and (shown[:edge] == 200).all()


def test_the_border_of_a_wide_image_is_a_tenth_of_either_side():
    shown = keep_border(np.full((40, 100), 200, np.uint8))
    assert (shown[4:-4, 10:-10] == 0).all() and (shown == 0).sum() == 32 * 80


def test_no_pixel_of_the_lungs_reaches_a_probe_that_does_not_look_at_them():
    small, other = SmallXrays(8), SmallXrays(8)
    finder, recipe = Finder(["image003"]), override(STILL, lungs="masks", probe="outside_lungs", placement="stretch")
    for name, pixels in other.pixels.items():
        pixels[finder.mask(CachedXray(name, pixels, 80, 100))] = 255
    examples = dataset(small, recipe, lungs=finder)
    painted = dataset(other, recipe, lungs=finder)
    same = [torch.equal(examples[index]["pixels"], painted[index]["pixels"]) for index in range(8)]
    # An image without lungs is used whole, and counted.
    assert same == [index != 3 for index in range(8)] and examples.lungs_missed() == 1
    border = override(STILL, probe="border", placement="stretch")
    middle = [cv2.rectangle(pixels.copy(), (8, 8), (40, 30), 0, -1) for pixels in small.pixels.values()]
    other.pixels = dict(zip(small.pixels, middle, strict=True))
    assert all(
        torch.equal(dataset(small, border)[index]["pixels"], dataset(other, border)[index]["pixels"]) for index in range(8)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 24, "canvas": 36},
        {"image_size": 25, "canvas": 36, "placement": "stretch", "equalise": True, "gamma": 0.5},
        {"probe": "border", "placement": "stretch"},
        {"probe": "outside_lungs", "lungs": "masks"},
        {"masked": True, "lungs": "masks", "canvas": 40, "trained_on": "lungs", "views": ["lungs"]},
    ],
    ids=["canvas", "equalised", "border", "outside_lungs", "masked"],
)
def test_prediction_sees_what_training_is_judged_on(changes):
    small, recipe = SmallXrays(8), override(STILL, **changes)
    finder = Finder(["image003"]) if recipe.lungs == "masks" else None
    seen = []

    class Network:
        def normalise(self, pixels):
            seen.append(pixels)
            return pixels

        def __call__(self, pixels):
            return torch.zeros(len(pixels), 5)

        probabilities = staticmethod(torch.sigmoid)

    fields = {name: getattr(recipe, name) for name in ("image_size", "canvas", *changes)}
    record = RECORD | {"image_size": recipe.image_size, "placement": recipe.placement, "recipe": fields}
    predictor = Predictor(record, Network(), CPU, 3, lungs=finder)
    list(predictor.predict(small.stream()))
    examples = dataset(small, recipe, lungs=finder)
    assert torch.equal(torch.cat(seen), torch.stack([examples[index]["pixels"] for index in range(8)]))
    assert predictor.lungs_missed == examples.lungs_missed() == (1 if finder else 0)
    assert predictor.wants_masks == (recipe.lungs == "masks")


def test_a_border_probe_is_refused_if_the_canvas_or_mask_hides_the_border():
    with pytest.raises(SettingsError, match="crops away the border: canvas is 336 and image_size is 224; set canvas=0"):
        override(FindingsRecipe(), probe="border", canvas=336)
    with pytest.raises(SettingsError, match="masked=True blackens everything outside the lungs; set masked=False"):
        override(FindingsRecipe(), probe="border", lungs="masks", masked=True)
    assert read_canvas({"image_size": 32}, 64) == read_canvas(override(StudyRecipe(), image_size=64))
