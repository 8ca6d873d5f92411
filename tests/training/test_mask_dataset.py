"""Examples of images with masks: masks on the canvas, and augmentation that moves both alike and is reproducible."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.errors import MaskError
from kitlib.letterbox import PLACEMENTS, letterbox
from kitlib.lungs.equalise import adjust_grey
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.recipes.named import RECIPES
from kitlib.settings import override
from kitlib.training.augmentation import MaskAugmentation
from kitlib.training.mask_dataset import MaskDataset, PositivesSampler, collate_masks, truth_on_canvas
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import MaskStore
from tests.small_masks import COLUMNS, ROWS, SPARSE, SmallMasks
from tests.small_xrays import limit_kept

# Recipe without augmentation.
STILL = SegmenterRecipe(
    image_size=64,
    rotate_degrees=0.0,
    scale_x=(1.0, 1.0),
    shear_p=0.0,
    gamma_drawn=(1.0, 1.0),
    salt_pepper_p=0.0,
    blur_p=0.0,
    noise_p=0.0,
)
# Recipe with all geometric transforms, but without changes of grey levels.
MOVING = override(
    STILL,
    horizontal_flip=0.5,
    vertical_flip=0.5,
    rotate_degrees=45.0,
    shift=0.2,
    scale_x=(0.8, 1.2),
    scale_y=(0.8, 1.2),
    shear_p=0.7,
    image_size=96,
)
GREY = override(
    STILL,
    brightness_contrast=0.2,
    gamma_drawn=(0.5, 3.0),
    salt_pepper_p=1.0,
    blur_p=0.5,
    noise_p=0.5,
)
SIDES = {"structures": ["heart", "left_lung", "right_lung"]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("masks"), count=6)


@pytest.fixture(scope="module")
def sided(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("sides"), count=6, sides=True)


def of(small, recipe, **options):
    return MaskDataset(small.images, small, small.masks, recipe, **options)


def canvas(seed, side=96):
    """Return an image and its mask: three ellipses, structure k with grey level 80 k, on black."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((side, side), np.uint8)
    for structure in (1, 2, 3):
        centre = tuple(map(int, rng.uniform(0.3, 0.7, 2) * side))
        axes = tuple(map(int, rng.uniform(0.1, 0.25, 2) * side))
        cv2.ellipse(truth, centre, axes, float(rng.uniform(0, 180)), 0, 360, structure, -1)
    return truth * 80, truth


def borders(truth, reach=3):
    """Return a mask of pixels within `reach` of another label or of the canvas edge, where resampling blurs."""
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    edged = np.pad(truth, reach, constant_values=9)
    return (cv2.dilate(edged, square) != cv2.erode(edged, square))[reach:-reach, reach:-reach]


@settings(max_examples=60)
@given(st.integers(0, 2**31))
def test_masks_move_with_their_image_and_stay_whole(seed):
    pixels, truth = canvas(seed)
    moved, places = MaskAugmentation(MOVING)(pixels, truth, seed)
    assert moved.shape == places.shape == pixels.shape and moved.dtype == places.dtype == np.uint8
    assert set(np.unique(places)) <= {0, 1, 2, 3}
    inside = ~borders(places)
    assert (moved[inside] == 80 * places[inside]).all() and inside.mean() > 0.3
    assert places.any()


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_a_moved_image_is_surrounded_by_black_and_by_background(seed):
    moved, places = MaskAugmentation(MOVING)(np.full((96, 96), 255, np.uint8), np.ones((96, 96), np.uint8), seed)
    inside = ~borders(places)
    assert set(np.unique(places)) <= {0, 1} and np.array_equal(moved[inside] == 255, places[inside] == 1)
    assert set(np.unique(moved[inside])) <= {0, 255}


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_a_change_of_grey_leaves_the_mask_alone(seed):
    pixels, truth = canvas(seed)
    changed, places = MaskAugmentation(GREY)(pixels, truth, seed)
    assert np.array_equal(places, truth) and not np.array_equal(changed, pixels)


@pytest.mark.parametrize("name", [name for name, each in RECIPES.items() if isinstance(each, SegmenterRecipe)])
def test_a_seed_decides_all_and_the_arguments_stay(name):
    pixels, truth = canvas(5)
    before = pixels.copy(), truth.copy()
    augmentation, other = (MaskAugmentation(RECIPES[name]) for _ in range(2))
    first = [augmentation(pixels, truth, seed) for seed in range(4)]
    # Read from another object, in another order.
    again = [other(pixels, truth, seed) for seed in reversed(range(4))][::-1]
    for (one, its), (two, theirs) in zip(first, again, strict=True):
        assert np.array_equal(one, two) and np.array_equal(its, theirs)
    assert np.array_equal(pixels, before[0]) and np.array_equal(truth, before[1])
    # Patched FLANNEL's segmenter has no augmentation.
    kinds = len({one.tobytes() + its.tobytes() for one, its in first})
    assert kinds == (1 if name == "fc_densenet103_lungs" else 4)


def test_a_recipe_without_augmentation_changes_nothing():
    pixels, truth = canvas(0)
    for seed in range(5):
        same = MaskAugmentation(STILL)(pixels, truth, seed)
        assert np.array_equal(same[0], pixels) and np.array_equal(same[1], truth)


def block(side=100):
    truth = np.zeros((side, side), np.uint8)
    truth[40:60, 30:70] = 1
    return truth * 200, truth


def frame(truth):
    ys, xs = np.nonzero(truth)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"scale_x": (0.8, 0.8)}, [34, 40, 66, 60]),  # 40 columns become 32, around the middle; rows stay
        ({"scale_y": (1.5, 1.5)}, [30, 35, 70, 65]),
        ({"horizontal_flip": 1.0}, [30, 40, 70, 60]),
        ({"rotate_degrees": 0.0, "shift": 0.0}, [30, 40, 70, 60]),
    ],
    ids=["narrower", "higher", "mirrored", "still"],
)
def test_known_moves_have_known_frames(fields, expected):
    moved, places = MaskAugmentation(override(STILL, **fields))(*block(), seed=0)
    assert np.abs(frame(places) - expected).max() <= 1 and np.abs(frame(moved > 100) - expected).max() <= 1


def test_turns_shears_and_shifts_reach_as_far_as_the_recipe_says():
    angles, leans, shifts = [], [], []
    line = np.zeros((101, 101), np.uint8)
    line[:, 48:53] = 1  # upright, through the middle
    turning, shearing, shifting = (
        MaskAugmentation(override(STILL, **fields))
        for fields in ({"rotate_degrees": 45.0}, {"shear_degrees": 11.3, "shear_p": 1.0}, {"shift": 0.2})
    )
    for seed in range(120):
        for found, augmentation in ((angles, turning), (leans, shearing)):
            ys, xs = np.nonzero(augmentation(line, line, seed)[1][30:71])
            found.append(np.polyfit(ys, xs, 1)[0])
        shifts.append(frame(shifting(*block(), seed)[1])[:2] - [30, 40])
        assert frame(shearing(*block(), seed)[1])[[1, 3]].tolist() == [40, 60]  # a shear along x leaves rows where they are
    # Of 120 even draws the largest is in the last tenth but for a probability of 0.9^120, 3 in a million; either sign.
    assert 40 < np.degrees(np.arctan(max(angles))) < 46.5 and -46.5 < np.degrees(np.arctan(min(angles))) < -40
    assert 0.17 < max(leans) < 0.22 and -0.22 < min(leans) < -0.17  # tan 11.3 degrees is 0.2
    shifts = np.array(shifts)
    assert (shifts.max(axis=0) > 15).all() and (shifts.min(axis=0) < -15).all() and np.abs(shifts).max() <= 20


def test_known_changes_of_grey_have_known_sizes():
    even = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    empty = np.zeros_like(even)
    for seed in range(8):
        squared, _ = MaskAugmentation(override(STILL, gamma_drawn=(2.0, 2.0)))(even, empty, seed)
        assert np.abs(squared - 255 * (even / 255.0) ** 2).max() <= 1
    grey = np.full((256, 256), 128, np.uint8)
    speckled, _ = MaskAugmentation(override(STILL, salt_pepper_p=1.0, salt_pepper=0.01))(grey, empty, 0)
    assert set(np.unique(speckled)) == {0, 128, 255}
    assert (speckled != 128).mean() == pytest.approx(0.01, abs=0.002)  # five standard deviations of 65,536 draws
    noisy, _ = MaskAugmentation(override(STILL, noise_p=1.0, noise=0.05))(grey, empty, 0)
    assert noisy.std() == pytest.approx(0.05 * 255, rel=0.05) and noisy.mean() == pytest.approx(128, abs=1)
    step = np.where(np.arange(256) < 128, 0, 200).astype(np.uint8) * np.ones((256, 1), np.uint8)
    blurred, _ = MaskAugmentation(override(STILL, blur_p=1.0))(step, empty, 0)
    # A Gaussian of sigma 0.5: weights 0.107, 0.786, 0.107 on three pixels.
    assert np.abs(blurred[128, 126:130].astype(int) - [0, 21, 179, 200]).max() <= 1


@pytest.mark.parametrize(
    ("field", "probability"), [("salt_pepper_p", 0.3), ("blur_p", 0.5), ("noise_p", 0.3), ("vertical_flip", 0.5)]
)
def test_an_augmentation_meets_its_share_of_images(field, probability):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    augmentation = MaskAugmentation(override(STILL, **{field: probability}))
    met = np.mean([not np.array_equal(augmentation(pixels, pixels, seed)[0], pixels) for seed in range(300)])
    assert met == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / 300))


def test_an_example_is_the_image_and_its_mask_on_the_canvas(small, sided):
    recipe = override(STILL, equalise=True, gamma=0.5)
    place = letterbox(ROWS, COLUMNS, 64)
    assert of(small, recipe).example_bytes == 2 * 64 * 64  # of image and mask
    for index, example in enumerate(of(small, recipe)):
        image_id = small.image_ids[index]
        assert example["index"] == index and example["pixels"].dtype == example["truth"].dtype == torch.uint8
        expected = place.image(adjust_grey(small.pixels[image_id], True, 0.5))
        assert np.array_equal(example["pixels"].numpy(), expected)
        # 60 x 50 pixels are enlarged to 64: no pixel moves by more than half a pixel.
        drawn = cv2.resize((small.masks.read(image_id) == 1).astype(np.uint8), (place.inner_columns, 64)) > 0
        truth = example["truth"].numpy()[:, place.left : place.left + place.inner_columns]
        assert set(np.unique(truth)) == {0, 1} and (truth == drawn).mean() > 0.97
    for index, example in enumerate(of(sided, override(STILL, **SIDES))):
        codes, truth = sided.masks.read(sided.image_ids[index]), example["truth"].numpy()
        for number, name in enumerate(SIDES["structures"], start=1):
            share = (codes == MASK_CODES[name]).mean() * place.inner_columns / 64
            assert (truth == number).mean() == pytest.approx(share, rel=0.1)


def test_validation_is_never_augmented_and_training_never_twice_the_same(small):
    still, validation = of(small, STILL), of(small, override(MOVING, image_size=64))
    train = of(small, override(MOVING, image_size=64), augment=True, seed=3)
    for index in range(len(small.image_ids)):
        for key in (index, (0, index), (7, index)):
            assert torch.equal(validation[key]["pixels"], still[index]["pixels"])
            assert torch.equal(validation[key]["truth"], still[index]["truth"])
        assert not torch.equal(train[1, index]["pixels"], train[2, index]["pixels"])


@pytest.mark.parametrize("kept", [0, 2, 6])
def test_an_example_depends_on_seed_and_key_alone(small, kept, monkeypatch):
    limit_kept(monkeypatch, kept * 2 * 64**2)
    recipe = override(MOVING, image_size=64, noise_p=1.0)
    train, again, other = (of(small, recipe, augment=True, seed=seed) for seed in (3, 3, 4))
    assert [len(cache.pixels) for cache in train.canvas_caches] == [kept, kept]
    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    first = {key: train[key] for key in keys}
    for key in reversed(keys):
        for name in ("pixels", "truth"):
            # Each key is read twice; the second time from memory, if canvases are kept.
            assert torch.equal(again[key][name], first[key][name]) and torch.equal(train[key][name], first[key][name])
        assert not torch.equal(other[key]["pixels"], first[key]["pixels"])


def test_workers_give_what_the_process_itself_gives(small):
    train = of(small, override(MOVING, image_size=64), augment=True, seed=3)
    keys = [(2, index) for index in range(6)]
    (batch,) = DataLoader(train, batch_size=6, sampler=keys, num_workers=1, collate_fn=collate_masks)
    assert batch["index"].tolist() == list(range(6)) and batch["truth"].shape == (6, 64, 64)
    for row, key in enumerate(keys):
        assert torch.equal(batch["pixels"][row], train[key]["pixels"])
        assert torch.equal(batch["truth"][row], train[key]["truth"])


def test_images_without_a_mask_are_an_error_before_training_begins(small, tmp_path):
    some = MaskStore(tmp_path)
    some.add({image_id: small.masks.read(image_id) for image_id in small.image_ids[:4]})
    with pytest.raises(MaskError, match=f"2 of 6 images have no mask in {tmp_path}; the first is chest004"):
        MaskDataset(small.images, small, some, STILL)
    assert len(MaskDataset(pd.DataFrame({"image_id": small.image_ids[:4]}), small, some, STILL)) == 4


def xray(rows=60, columns=40):
    return CachedXray("a", np.zeros((rows, columns), np.uint8), 10 * rows, 10 * columns)


def on(codes, recipe, size=64, placement="letterbox"):
    image = xray(*codes.shape)
    return truth_on_canvas(codes, PLACEMENTS[placement](image.rows, image.columns, size), recipe, image)


def test_lungs_are_either_side_or_both_as_one():
    codes = np.zeros((60, 40), np.uint8)
    for index, code in enumerate(MASK_CODES.values()):
        codes[10:50, 8 * index : 8 * index + 8] = code
    truth = on(codes, STILL, 60)
    assert np.array_equal(truth[:, 10:50], np.isin(codes, LUNG_CODES))


def test_masks_without_sides_are_refused_by_a_recipe_with_sides():
    codes = np.zeros((60, 40), np.uint8)
    codes[10:20, 10:20] = MASK_CODES["lungs"]
    with pytest.raises(
        MaskError, match=r"mask of a does not distinguish left .* heart, left_lung, right_lung do; .*\[\"lungs\"\]"
    ):
        on(codes, override(STILL, **SIDES))
    # An empty mask is valid, because it has no lungs that left and right would have to be known for.
    assert not on(codes * 0, override(STILL, **SIDES)).any()


def test_a_mask_of_another_size_is_refused():
    image = xray()
    with pytest.raises(
        MaskError, match=r"mask of a has \(60, 41\) pixels, but its image has \(60, 40\); prepare the data again"
    ):
        truth_on_canvas(np.zeros((60, 41), np.uint8), letterbox(600, 400, 64), STILL, image)


def test_places_are_numbered_as_the_recipe_lists_them_and_the_later_one_lies_on_top():
    codes = np.zeros((61, 61), np.uint8)
    codes[:, :31], codes[:, 31:] = MASK_CODES["left_lung"], MASK_CODES["right_lung"]
    both = override(STILL, structures=["left_lung", "right_lung"])
    assert set(np.unique(on(codes, both, 61))) == {1, 2} and (on(codes, both, 61)[:, :31] == 1).all()
    turned = on(codes, override(STILL, structures=["right_lung", "left_lung"]), 61)
    assert np.array_equal(turned, 3 - on(codes, both, 61))
    # Enlarged to 2 n - 1 pixels, the column between the two belongs half to each: the later structure gets it.
    for names in (["left_lung", "right_lung"], ["right_lung", "left_lung"]):
        wide = on(codes, override(STILL, structures=names), 121)
        assert set(np.unique(wide)) == {1, 2}  # no gap between them


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (31, 77)])
def test_the_bars_of_a_letterbox_are_background(rows, columns):
    codes = np.full((rows, columns), MASK_CODES["lungs"], np.uint8)
    place = letterbox(10 * rows, 10 * columns, 64)
    truth = on(codes, STILL)
    expected = np.zeros((64, 64), np.uint8)
    expected[place.top : place.top + place.inner_rows, place.left : place.left + place.inner_columns] = 1
    assert np.array_equal(truth, expected)


def test_a_shrunk_mask_is_cut_at_one_half_of_its_area():
    # Blocks of 4 x 4 pixels, of which 7, 8 and 9 are lung: 7 / 16 is less than one half, 8 / 16 rounds up to 128 of 255.
    codes = np.zeros((4, 12), np.uint8)
    for block_number, count in enumerate((7, 8, 9)):
        codes.ravel()[[12 * (n // 4) + 4 * block_number + n % 4 for n in range(count)]] = 1
    image = CachedXray("a", codes, 4, 12)
    truth = truth_on_canvas(codes, PLACEMENTS["stretch"](4, 12, (1, 3)), STILL, image)
    assert truth.tolist() == [[0, 1, 1]]


def test_the_share_of_images_with_a_structure_changes_from_the_first_to_the_last_epoch():
    has = np.arange(100) % 5 == 0  # 20 images of 100
    sampler = PositivesSampler(has, (0.8, 0.4), 5, seed=3)
    assert len(sampler) == 50  # of which 40 % are the 20 images
    for epoch, count in enumerate((40, 35, 30, 25, 20)):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch} and len(keys) == 50 and keys == list(sampler)
        times = np.bincount([index for _, index in keys], minlength=100)
        assert times[has].sum() == count and np.ptp(times[has]) <= 1 and times[~has].max() == 1
    in_two = PositivesSampler(has, (0.8, 0.4), 2, seed=3)
    in_two.set_epoch(1)
    assert sum(has[index] for _, index in in_two) == 20  # the second epoch is the last
    # With a share of 0.1 an epoch has 200 images: 180 draws of the 80 others.
    times = np.bincount([index for _, index in PositivesSampler(has, (0.1, 0.1), 1, seed=3)])
    assert times[has].tolist() == [1] * 20 and sorted(times[~has]) == [2] * 60 + [3] * 20


def test_training_on_a_sparse_structure_needs_images_of_both_kinds(tmp_path):
    small = SmallMasks(tmp_path, count=8, sparse=True)  # images 1 and 3 have a pneumothorax
    dataset = MaskDataset(small.images, small, small.masks, SPARSE)
    sampler = dataset.sampler(0)
    assert isinstance(sampler, PositivesSampler) and len(sampler) == 10 and sampler.with_structure.tolist() == [1, 3]
    assert [int(dataset[index]["truth"].any()) for index in range(8)] == [0, 1, 0, 1, 0, 0, 0, 0]
    for rows, which in ((slice(4, 8), "none"), ([1, 3], "all")):
        part = MaskDataset(small.images.iloc[rows], small, small.masks, SPARSE)
        with pytest.raises(MaskError, match=f"{which} of the . training images show a pneumothorax; prepare images with"):
            part.sampler(0)
        everything = MaskDataset(small.images.iloc[rows], small, small.masks, override(SPARSE, positives=[]))
        assert len(everything.sampler(0)) == len(part)
