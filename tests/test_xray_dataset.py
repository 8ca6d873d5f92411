"""Examples: canvases, targets, boxes that move with the image, and augmentation that repeats exactly."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_xrays import BOX, COLUMNS, RECIPE, ROWS, SmallXrays

from kitlib.cache import CachedXray
from kitlib.recipes import override
from kitlib.xray_dataset import EpochSampler, XrayDataset, batches

STILL = override(RECIPE, horizontal_flip=0.0, rotate_degrees=0.0, brightness_contrast=0.0)


def dataset(small, recipe=RECIPE, **options):
    return XrayDataset(small.images, small.labels, small.boxes, small, recipe, **options)


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
    with pytest.raises(ValueError, match="'squash'; there are: letterbox, stretch"):
        dataset(small, override(RECIPE, placement="squash"))


def test_unknown_labels_are_nan():
    small = SmallXrays(8)
    small.labels = small.labels[small.labels.id != "study001"]
    assert dataset(small)[2]["label"].isnan().all() and not dataset(small)[0]["label"].isnan().any()


class Disc:
    """A cache of one picture: a white disc on black; the disc's frame is the box."""

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


def test_augmentation_leaves_the_kept_canvas_alone():
    small = SmallXrays(8)
    examples = dataset(small, augment=True)
    for epoch in range(20):
        examples[(epoch, 2)]
    assert np.array_equal(examples._canvas(2)[0], dataset(small)[2]["pixels"].numpy())


def read(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_workers_change_nothing():
    small = SmallXrays(8)
    alone = batches(dataset(small, augment=True), 4, shuffle=True)
    helped = batches(dataset(small, augment=True), 4, workers=1, shuffle=True)
    for epoch in (0, 1):
        for one, other in zip(read(alone, epoch), read(helped, epoch), strict=True):
            assert torch.equal(one["pixels"], other["pixels"]) and torch.equal(one["index"], other["index"])


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
    assert [len(each) for each in batch["boxes"]] == [0, 0, 1, 1, 1, 1]
    assert batch["none"].tolist() == [1, 1, 0, 0, 0, 0] and batch["index"].tolist() == list(range(6))


def test_training_leaves_out_the_last_smaller_batch_and_validation_does_not():
    small = SmallXrays(8)
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 3)] == [3, 3, 2]
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 3, shuffle=True)] == [3, 3]
    assert [len(batch["pixels"]) for batch in batches(dataset(small), 100, shuffle=True)] == [8]
