"""Examples: canvases, targets, boxes that move with the image, and reproducible augmentation."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.errors import SettingsError
from kitlib.letterbox import PLACEMENTS, within
from kitlib.lungs.finders import Lungs
from kitlib.settings import override
from kitlib.training.augmentation import Augmentation
from kitlib.training.xray_dataset import EpochSampler, XrayDataset, batches
from kitlib.xrays.cache import CachedXray
from tests.small_xrays import BOX, COLUMNS, RECIPE, ROWS, SmallXrays, TwoFindings, limit_kept

STILL = override(RECIPE, horizontal_flip=0.0, rotate_degrees=0.0, brightness_contrast=0.0)


def dataset(small, recipe=RECIPE, images=None, **options):
    return XrayDataset(small.images if images is None else images, small.labels, small.boxes, small, recipe, **options)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("pixels", "label", "none", "boxes"))


def test_an_example_holds_canvas_targets_and_boxes():
    small = SmallXrays(8)
    examples = dataset(small)
    healthy, sick = examples[0], examples[2]
    assert sick["pixels"].dtype == torch.uint8 and sick["pixels"].shape == (32, 32)
    assert healthy["label"].tolist() == [1, 0, 0, 0] and sick["label"].tolist() == [0, 1, 0, 0]
    assert healthy["none"] == 1 and healthy["boxes"].shape == (0, 4)
    assert sick["none"] == 0
    # 80 x 100 on 32 x 32: 0.32 along x; rows become round(25.6) = 26, three black ones above and below
    xmin, ymin, xmax, ymax = BOX
    expected = [[xmin * 0.32, ymin * 26 / 80 + 3, xmax * 0.32, ymax * 26 / 80 + 3]]
    torch.testing.assert_close(sick["boxes"], torch.tensor(expected))
    assert (sick["pixels"][:3] == 0).all() and (sick["pixels"][8:18, 8:18] > 200).all()


def test_stretching_fills_the_canvas():
    small = SmallXrays(8)
    example = dataset(small, override(RECIPE, placement="stretch"))[2]
    torch.testing.assert_close(example["boxes"], torch.tensor([BOX]) * torch.tensor([0.32, 0.4, 0.32, 0.4]))
    assert (example["pixels"][0] > 0).all()


def test_unknown_labels_are_nan():
    small = SmallXrays(8)
    small.labels = small.labels[small.labels.id != "study001"]
    assert dataset(small)[2]["label"].isnan().all() and not dataset(small)[0]["label"].isnan().any()


class Disc:
    """Cache with one image, a white disc on black, whose box is the bounding box of the disc."""

    image_ids = ("disc",)
    images = pd.DataFrame({"image_id": ["disc"], "study_id": ["study"]})
    labels = pd.DataFrame({"id": ["study"], "negative": [0.0], "typical": [1.0], "indeterminate": [0.0], "atypical": [0.0]})
    boxes = pd.DataFrame({"image_id": ["disc"], "xmin": [40.0], "ymin": [60.0], "xmax": [80.0], "ymax": [100.0]})

    def read(self, image_id):
        # cv2 draws around pixel centres, half a pixel right and down of the box's coordinates
        pixels = cv2.circle(np.zeros((160, 160), np.uint8), (60, 80), 20, 255, -1)
        return CachedXray(image_id=image_id, pixels=pixels, rows=160, columns=160)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000))
def test_the_box_moves_with_the_image(epoch):
    recipe = override(RECIPE, image_size=160, horizontal_flip=0.5, rotate_degrees=30.0)
    example = dataset(Disc(), recipe, augment=True)[(epoch, 0)]
    ys, xs = np.nonzero(example["pixels"].numpy() > example["pixels"].numpy().max() / 2)
    seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert len(example["boxes"]) == 1
    assert np.abs(example["boxes"][0].numpy() - seen).max() < 2.5


def test_a_box_keeps_its_finding_however_it_moves():
    small, seen = TwoFindings(16), []
    recipe = override(
        STILL, image_size=64, canvas=80, horizontal_flip=0.5, vertical_flip=0.5, rotate_degrees=30.0, shift=0.2
    )
    for augment in (False, True):
        examples = dataset(small, recipe, augment=augment, classes=small.CLASSES)
        for key in ((epoch, index) for epoch in range(3) for index in range(16)):
            example = examples[key]
            for box, code in zip(example["boxes"], example["findings"].tolist(), strict=True):
                if box.min() > 0 and box.max() < 64:  # the middle of a box that is cut need not belong to it
                    x, y = ((box[:2] + box[2:]) / 2).int().tolist()
                    assert example["pixels"][y, x] == (0, 255)[code]  # discs are black, squares are white
                    seen.append(code)
    assert min(seen.count(0), seen.count(1)) > 20
    assert not torch.cat([dataset(small)[index]["findings"] for index in range(16)]).any()  # without classes


def test_flipping_mirrors_the_box_exactly():
    recipe = override(STILL, image_size=160, horizontal_flip=1.0)
    assert dataset(Disc(), recipe, augment=True)[0]["boxes"].tolist() == [[80.0, 60.0, 120.0, 100.0]]


def test_a_box_beyond_the_image_is_cut_at_its_edge():
    small = SmallXrays(8)
    small.boxes.loc[0, ["xmin", "ymax"]] = -5.0, ROWS + 30.0
    for augment in (False, True):
        box = dataset(small, override(STILL, image_size=COLUMNS), augment=augment)[2]["boxes"][0]
        assert box.tolist() == pytest.approx([0.0, 10 + 10.0, 60.0, ROWS + 10.0])  # ten black rows above


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    small = SmallXrays(8)
    keys = [(epoch, index) for epoch in range(3) for index in range(8)]
    first, second = dataset(small, augment=True, seed=5), dataset(small, augment=True, seed=5)
    forward = {key: first[key] for key in keys}
    backward = {key: second[key] for key in reversed(keys)}
    assert all(same(forward[key], backward[key]) for key in keys)
    other = dataset(small, augment=True, seed=6)
    assert not all(same(forward[key], other[key]) for key in keys)
    assert not all(same(forward[(0, index)], forward[(1, index)]) for index in range(8))
    assert all(same(dataset(small)[(0, index)], dataset(small)[(1, index)]) for index in range(8))


def test_augmentation_does_not_change_the_cached_canvas():
    small = SmallXrays(8)
    examples = dataset(small, augment=True)
    for epoch in range(20):
        examples[(epoch, 2)]
    assert np.array_equal(examples.canvas_cache.get(2)[0], dataset(small)[2]["pixels"].numpy())


def test_a_soft_none_counts_where_it_is_known():
    small = SmallXrays(8)
    small.images = small.images.assign(none=[np.nan, 0.25, np.nan, 0.75, 0.0, 1.0, np.nan, np.nan])
    assert dataset(small).none.tolist() == [1, 0.25, 0, 0.75, 0, 1, 0, 0]
    # Without an annotator's look at it, an image without a box may have an opacity.
    unknown = small.images.assign(boxes_known=[False, False, True, *[None] * 5])
    np.testing.assert_array_equal(dataset(small, images=unknown.drop(columns="none")).none, [np.nan] * 2 + [0] * 6)
    with pytest.raises(ValueError, match=r"column 'none' of `images` has values from 0\.25 to 1\.5; valid"):
        dataset(SmallXrays(8), images=small.images.assign(none=[0.25, 1.5, *[np.nan] * 6]))
    with pytest.raises(ValueError, match=r"column 'none' of `images` has values from -0\.5 to 0\.25; valid"):
        dataset(SmallXrays(8), images=small.images.assign(none=[0.25, -0.5, *[np.nan] * 6]))


class Ellipse:
    """Cache with one image, 160 x 160: a white ellipse on grey, with this centre, half axes and its bounding box."""

    image_ids = ("ellipse",)
    images, labels = Disc.images.assign(image_id="ellipse"), Disc.labels

    def __init__(self, x, y, wide, high):
        grid_y, grid_x = np.mgrid[:160, :160] + 0.5
        self.white = ((grid_x - x) / wide) ** 2 + ((grid_y - y) / high) ** 2 <= 1
        corners = {"xmin": [x - wide], "ymin": [y - high], "xmax": [x + wide], "ymax": [y + high]}
        self.boxes = pd.DataFrame({"image_id": ["ellipse"]} | corners)

    def read(self, image_id):
        return CachedXray(image_id, np.where(self.white, 255, 60).astype(np.uint8), rows=160, columns=160)


EVERYTHING = override(
    RECIPE,
    image_size=160,
    horizontal_flip=0.5,
    vertical_flip=0.5,
    rotate_degrees=30.0,
    shift=0.0625,
    turn_p=0.8,
    brightness_contrast=0.2,
    brightness_contrast_p=0.8,
    sharpen_p=0.5,
    blur_p=0.5,
    cutouts=6,
    cutouts_p=0.8,
    erase_p=0.5,
)
inside = st.floats(60, 100)
half = st.floats(12, 30)


@settings(max_examples=60)
@given(inside, inside, half, half, st.integers(0, 1000))
def test_a_white_spot_stays_under_its_box_through_every_augmentation(x, y, wide, high, epoch):
    spot = Ellipse(x, y, wide, high)
    moved_only = override(EVERYTHING, brightness_contrast=0.0, sharpen_p=0.0, blur_p=0.0, cutouts=0, erase_p=0.0)
    moved = dataset(spot, moved_only, augment=True)[(epoch, 0)]
    changed = dataset(spot, EVERYTHING, augment=True)[(epoch, 0)]
    # Pixel transforms do not move or drop a box; the box bounds the moved disc or ellipse up to resampling.
    assert torch.equal(moved["boxes"], changed["boxes"]) and len(moved["boxes"]) == 1
    ys, xs = np.nonzero(moved["pixels"].numpy() > 157)
    seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert np.abs(moved["boxes"][0].numpy() - seen).max() < 2.5


def share(recipe, changed, draws=400):
    """Return the share of augmentations of a grey image with a few bright pixels for which `changed` is true."""
    canvas = np.full((160, 160), 120, np.uint8)
    canvas[::8, ::8] = 160
    augmentation = Augmentation(override(STILL, image_size=160, **recipe))
    return np.mean([changed(canvas, augmentation(canvas, np.zeros((0, 4)), seed)[0]) for seed in range(draws)])


def differs(before, after):
    return not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("recipe", "probability"),
    [
        ({"brightness_contrast": 0.3, "brightness_contrast_p": 0.3}, 0.3),
        ({"sharpen_p": 0.5}, 0.5),
        ({"blur_p": 0.3}, 0.3),
        ({"sharpen_p": 0.5, "blur_p": 0.25}, 0.75),
        ({"cutouts": 6, "cutouts_p": 0.3}, 0.3),
        ({"erase_p": 0.3}, 0.3),
        ({"horizontal_flip": 0.3}, 0.3),
        ({"vertical_flip": 0.1}, 0.1),
        ({"shift": 0.0625, "turn_p": 0.3}, 0.3),
    ],
)
def test_each_augmentation_meets_the_share_of_images_that_its_recipe_says(recipe, probability):
    # 400 draws: four standard deviations are at most 0.1.
    assert share(recipe, differs) == pytest.approx(probability, abs=0.1)


def test_sharpening_and_blurring_exclude_each_other():
    # Single pixels stand out by 40: less when blurred over nine pixels or more, more when sharpened.
    for sharpened, blurred in ((0.1, 0.6), (0.6, 0.1)):
        recipe = {"sharpen_p": sharpened, "blur_p": blurred}
        assert share(recipe, lambda _, after: np.ptp(after.astype(int)) < 20) == pytest.approx(blurred, abs=0.1)
        assert share(recipe, lambda _, after: np.ptp(after.astype(int)) > 40) == pytest.approx(sharpened, abs=0.1)
    with pytest.raises(SettingsError, match=r"sharpen_p 0\.7 and blur_p 0\.5 add up to more than 1"):
        override(RECIPE, sharpen_p=0.7, blur_p=0.5)


def test_cutouts_are_squares_of_a_sixteenth_and_one_erased_rectangle_has_the_published_area():
    white = np.full((160, 160), 255, np.uint8)
    none = np.zeros((0, 4))
    cut = Augmentation(override(STILL, image_size=160, cutouts=6, cutouts_p=1.0))
    erase = Augmentation(override(STILL, image_size=160, erase_p=1.0))
    counts = set()
    for seed in range(60):
        holes, sizes = cv2.connectedComponentsWithStats(np.uint8(cut(white, none, seed)[0] == 0))[1:3]
        area = (holes > 0).sum()
        counts.add(len(sizes) - 1)
        assert area <= 6 * 10 * 10 and all(size[cv2.CC_STAT_WIDTH] >= 10 <= size[cv2.CC_STAT_HEIGHT] for size in sizes[1:])
        if len(sizes) == 2:
            assert area == 100 or sizes[1][cv2.CC_STAT_AREA] > 100
        erased = (erase(white, none, seed)[0] == 0).mean()
        assert 0.009 < erased < 0.105  # 1 to 10 %, in whole pixels
    assert counts >= {1, 2, 3, 4, 5}


def test_boxes_are_cut_at_the_canvas_and_dropped_below_a_pixel():
    boxes = np.array([[-5, 3, 10, 200, 1], [3, 3, 3.9, 9, 2], [3, 3, 9, 3.9, 3], [3, 3, 4.1, 9, 4], [3, 3, 9, 4.1, 5.0]])
    seen = Augmentation(override(STILL, image_size=160))(np.zeros((160, 160), np.uint8), boxes, 0)[1]
    np.testing.assert_allclose(seen, [[0, 3, 10, 160, 1], [3, 3, 4.1, 9, 4], [3, 3, 9, 4.1, 5]], rtol=1e-5)


def test_a_box_cut_off_by_the_canvas_is_cut_at_its_edge():
    # The crop shows the middle of the image, which the box covers.
    small = SmallXrays(8)
    small.boxes.loc[0, ["xmin", "ymin", "xmax", "ymax"]] = 0.0, 0.0, float(COLUMNS), float(ROWS)
    box = dataset(small, override(STILL, placement="centre_crop"))[2]["boxes"][0]
    assert box.tolist() == [0, 0, 32, 32]


def test_workers_share_the_canvases_and_a_second_epoch_reads_nothing():
    small = SmallXrays(8)
    examples = dataset(small)
    loader = batches(examples, 4, workers=2)
    first = [batch["pixels"] for batch in loader]
    assert (examples.canvas_cache.sizes == [COLUMNS, ROWS]).all()  # filled by the workers, seen here
    small.pixels.clear()
    assert all(torch.equal(examples[index]["pixels"], torch.cat(first)[index]) for index in range(8))


def test_as_many_canvases_are_kept_as_fit_over_all_data_sets(monkeypatch, caplog):
    small, expected = SmallXrays(8), dataset(SmallXrays(8))
    limit_kept(monkeypatch, 13 * 32 * 32 + 1)
    examples, others = dataset(small), dataset(small)
    assert len(examples.canvas_cache.pixels) == 8 and len(others.canvas_cache.pixels) == 5
    assert caplog.text.count("canvases (resized images)") == 1
    assert "5 of 8 canvases (resized images) fit into the memory" in caplog.text
    assert all(same(each[index], expected[index]) for each in (examples, others) for index in [*range(8)] * 2)
    del examples
    assert len(dataset(small).canvas_cache.pixels) == 8  # a data set that no longer exists has given its memory back


def read(loader, epoch):
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader)


def test_workers_change_nothing():
    small = SmallXrays(8)
    alone = batches(dataset(small, augment=True), 4, shuffle=True)
    helped = batches(dataset(small, augment=True), 4, workers=1, shuffle=True)
    for epoch in (0, 1):
        for one, other in zip(read(alone, epoch), read(helped, epoch), strict=True):
            assert torch.equal(one["pixels"], other["pixels"]) and torch.equal(one["index"], other["index"])
    assert alone.timeout == 0 < helped.timeout  # only workers can fail to deliver a batch


def test_reading_batches_draws_no_random_number_that_training_would_draw():
    state = torch.get_rng_state()
    list(batches(dataset(SmallXrays(8)), 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_processes_read_every_other_image_of_a_batch_or_of_the_data_set(monkeypatch):
    training, validation = (batches(dataset(SmallXrays(8)), 4, shuffle=shuffle) for shuffle in (True, False))
    whole = [batch["index"].tolist() for batch in training]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert [batch["index"].tolist() for batch in training] == [indices[rank::2] for indices in whole]
        loader = batches(dataset(SmallXrays(8)), 4)
        assert [batch["index"].tolist() for batch in loader] == [[rank, rank + 2], [rank + 4, rank + 6]]
        assert [len(batch["index"]) for batch in batches(dataset(SmallXrays(8)), 1)] == [1] * 4
    assert len(training) == 2 and len(validation) == 2


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_visits_every_image_once(length, seed, epoch):
    sampler = EpochSampler(length, seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert keys == list(sampler)
    assert sorted(keys) == [(epoch, index) for index in range(length)]


def test_batches_stack_images_and_list_boxes():
    small = SmallXrays(8)
    batch = next(iter(batches(dataset(small), 6)))
    assert batch["pixels"].shape == (6, 32, 32) and batch["label"].shape == (6, 4)
    assert [len(each) for each in batch["boxes"]] == [len(each) for each in batch["findings"]] == [0, 0, 1, 1, 1, 1]
    assert batch["none"].tolist() == [1, 1, 0, 0, 0, 0] and batch["index"].tolist() == list(range(6))


def test_training_leaves_out_the_last_smaller_batch_and_validation_does_not():
    small = SmallXrays(8)
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 3)] == [3, 3, 2]
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 3, shuffle=True)] == [3, 3]
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 100, shuffle=True)] == [8]


FRAME = np.array([10.0, 6.0, 71.0, 67.0])  # original pixels: half the cached copy's 5, 3, 35.5, 33.5
CROPS = override(STILL, lungs="masks", trained_on="lungs", views=["lungs"])
EITHER = override(STILL, lungs="masks", trained_on="either")


class Finder:
    """Finder of a frame and a mask in every image except those in `missed`; `asked` lists the requested image_ids."""

    def __init__(self, missed=(), frame=FRAME):
        self.missed, self.frame, self.asked = missed, frame, []

    def find(self, xrays):
        self.asked += [xray.image_id for xray in xrays]
        return [Lungs(None) if xray.image_id in self.missed else Lungs(self.frame, self.mask(xray)) for xray in xrays]

    def mask(self, xray):
        mask = np.zeros(xray.pixels.shape, bool)
        mask[4:30, 6:20] = True
        return mask


def pixels_of(examples, keys):
    return [examples[key]["pixels"].numpy() for key in keys]


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_a_training_on_lungs_sees_their_frame(placement):
    small, place = SmallXrays(8), PLACEMENTS[placement]
    examples = dataset(small, override(CROPS, placement=placement), lungs=Finder())
    canvas = within(place, FRAME, ROWS, COLUMNS, 32)
    for keys in (range(8), [(3, index) for index in range(8)]):
        for index, pixels in enumerate(pixels_of(examples, keys)):
            np.testing.assert_array_equal(pixels, canvas.image(small.pixels[f"image{index:03d}"]))


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.lists(st.floats(0, 30), min_size=2, max_size=2),
    st.lists(st.floats(35, 80), min_size=2, max_size=2),
    st.booleans(),
)
def test_boxes_are_clipped_to_the_crop_and_map_back_to_the_original(placement, low, high, kept):
    small, frame = SmallXrays(4), np.array([*low, *high])
    examples = dataset(small, override(CROPS, placement=placement, image_size=64), lungs=Finder(frame=frame))
    place = within(PLACEMENTS[placement], frame, ROWS, COLUMNS, 64)
    if kept:
        examples[2]
        small.pixels.clear()
    window = place.boxes_to_original(np.array([[0, 0, 64, 64]]))[0]
    low, high = (pick(frame[half], window[half]) for pick, half in ((np.maximum, slice(2)), (np.minimum, slice(2, 4))))
    expected = np.concatenate([np.maximum(BOX[:2], low), np.minimum(BOX[2:], high)])
    found = examples[2]["boxes"].numpy().astype(float)
    if (expected[2:] - expected[:2]).min() > 2:
        # float32 canvases: 64 / 2^24 of a pixel, at a scale of at least 0.64
        np.testing.assert_allclose(place.boxes_to_original(found), [expected], atol=3e-5)


def test_a_box_outside_of_the_frame_is_gone_and_the_image_keeps_its_label():
    example = dataset(SmallXrays(8), CROPS, lungs=Finder(frame=np.array([61.0, 51.0, 100.0, 80.0])))[2]
    assert example["boxes"].shape == (0, 4) and example["none"] == 0 and example["label"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "changes", [{"trained_on": "lungs", "views": ["lungs"]}, {"trained_on": "either"}, {"masked": True}]
)
@pytest.mark.parametrize("finder", [None, Finder(SmallXrays(8).image_ids)], ids=["nobody", "finds none"])
def test_images_without_lungs_are_used_whole_and_counted(changes, finder):
    small, keys = SmallXrays(8), [*range(8), *((1, index) for index in range(8))]
    plain = dataset(small, RECIPE, augment=True, seed=4)
    whole = dataset(small, override(RECIPE, lungs="masks", **changes), augment=True, seed=4, lungs=finder)
    assert all(same(plain[key], whole[key]) for key in keys)
    assert (plain.lungs_missed(), whole.lungs_missed()) == (0, 8)


def test_missed_lungs_are_counted_for_all_images():
    finder = Finder(["image001", "image006"])
    examples = dataset(SmallXrays(8), CROPS, lungs=finder)
    list(batches(examples, 4, workers=2))  # found by the workers, known here
    assert finder.asked == [] and examples.lungs_missed() == 2
    fresh, names = dataset(SmallXrays(8), CROPS, lungs=finder), SmallXrays(8).image_ids
    fresh[1]
    assert fresh.lungs_missed() == 2
    assert finder.asked == ["image001", *(name for name in names if name != "image001")]


@given(st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=20)
def test_either_draws_by_seed_epoch_and_index_alone(seed, epoch):
    small = SmallXrays(16)
    keys = [(epoch, index) for index in range(16)]
    whole, crops = (pixels_of(dataset(small, recipe, lungs=Finder()), range(16)) for recipe in (STILL, CROPS))
    drawn = pixels_of(dataset(small, EITHER, seed=seed, lungs=Finder()), keys)
    for one, full, cropped in zip(drawn, whole, crops, strict=True):
        assert np.array_equal(one, full) != np.array_equal(one, cropped)
    again = dataset(small, EITHER, seed=seed, lungs=Finder())
    assert all(np.array_equal(*each) for each in zip(pixels_of(again, keys[::-1])[::-1], drawn, strict=True))


def test_either_shows_half_of_the_images_as_crops_and_validation_the_whole():
    small = SmallXrays(8)
    examples, whole = dataset(small, EITHER, lungs=Finder()), pixels_of(dataset(small, STILL), range(8))
    # 400 draws: four standard deviations of a half are 0.1.
    crops = [
        not np.array_equal(pixels, whole[index])
        for epoch in range(50)
        for index, pixels in enumerate(pixels_of(examples, [(epoch, index) for index in range(8)]))
    ]
    assert np.mean(crops) == pytest.approx(0.5, abs=0.1)
    # Every image is drawn both cropped and whole, and another seed gives other choices.
    assert all(0 < sum(crops[index::8]) < 50 for index in range(8))
    other = pixels_of(dataset(small, EITHER, seed=1, lungs=Finder()), [(epoch, 0) for epoch in range(50)])
    assert [not np.array_equal(pixels, whole[0]) for pixels in other] != crops[::8]
    assert all(np.array_equal(*each) for each in zip(pixels_of(examples, range(8)), whole, strict=True))


@pytest.mark.parametrize("trained_on", ["full", "lungs"])
def test_a_masked_training_sees_black_outside_of_the_mask(trained_on):
    small, finder = SmallXrays(8), Finder(["image003"])
    recipe = override(STILL, lungs="masks", masked=True, trained_on=trained_on, views=["lungs"], placement="stretch")
    examples = dataset(small, override(recipe, image_size=61), lungs=finder)
    frame = FRAME if trained_on == "lungs" else np.array([0.0, 0.0, COLUMNS, ROWS])
    place = within(PLACEMENTS["stretch"], frame, ROWS, COLUMNS, 61)
    mask = np.array([[12.0, 8.0, 40.0, 60.0]])  # the mask's 6..20, 4..30 in original pixels
    xmin, ymin, xmax, ymax = place.boxes_to_canvas(mask)[0].clip(0, 61)
    for _ in range(2):  # the second time from the cached canvas
        pixels = examples[2]["pixels"].numpy()
        inside = np.zeros((61, 61), bool)
        inside[int(ymin) : int(np.ceil(ymax)), int(xmin) : int(np.ceil(xmax))] = True
        # Resizing blurs the edge over two pixels of the copy.
        near = cv2.dilate(inside.astype(np.uint8), np.ones((11, 11))) > 0
        assert (pixels[~near] == 0).all() and (pixels[cv2.erode(inside.astype(np.uint8), np.ones((11, 11))) > 0] > 40).all()
    whole = dataset(small, override(STILL, placement="stretch", image_size=61))[3]["pixels"]
    assert torch.equal(examples[3]["pixels"], whole) and examples.lungs_missed() == 1


def test_cached_crops_and_whole_images_do_not_mix(monkeypatch):
    small = SmallXrays(8)
    keys = [*range(8), *((epoch, index) for epoch in range(4) for index in range(8))]
    fresh = [dataset(small, EITHER, lungs=Finder())[key] for key in keys]
    for room in (0, 5, 8, 11, 16):  # nothing kept, some or all whole images alone, some or all crops too
        limit_kept(monkeypatch, room * 32 * 32)
        finder = Finder()
        examples = dataset(small, EITHER, lungs=finder)
        assert len(examples.canvas_cache.pixels) == room
        assert all(same(examples[key], example) for _ in range(2) for key, example in zip(keys, fresh, strict=True))
        assert len(finder.asked) == len(set(finder.asked))  # a frame is found once


def test_darkness_finds_the_lungs_of_recipes_that_say_so(monkeypatch):
    monkeypatch.setattr("kitlib.lungs.finders.lung_box", lambda pixels: np.array([5.0, 3.0, 35.0, 33.0]))
    small = SmallXrays(8)
    dark = dataset(small, override(CROPS, lungs="darkness"))
    expected = dataset(small, CROPS, lungs=Finder(frame=np.array([10.0, 6.0, 70.0, 66.0])))
    assert all(same(dark[index], expected[index]) for index in range(8))
