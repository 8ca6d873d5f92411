"""Patch examples: centres by seed, epoch and index, cached canvases, and whole images where no lungs are found."""

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.letterbox import PLACEMENTS
from kitlib.lungs.equalise import adjust_grey
from kitlib.lungs.finders import Lungs
from kitlib.models.patches import PatchCanvas, centres, cut_patches, image_seed
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override
from kitlib.training.patch_dataset import PatchCanvasCache, PatchDataset, collate_canvases
from kitlib.training.xray_dataset import batches
from kitlib.xrays.cache import CachedXray
from tests.small_xrays import COLUMNS, ROWS, SmallXrays, limit_kept

RECIPE = PatchRecipe(backbone="test_resnet", channels=1, canvas=60, image_size=15, validation_patches=3)


class Finder:
    """Finder of the right half of every image except those in `missed`; `asked` lists the image_ids it was called with."""

    def __init__(self, missed=()):
        self.missed, self.asked = missed, []

    def find(self, xrays):
        self.asked += [xray.image_id for xray in xrays]
        return [Lungs(None) if xray.image_id in self.missed else Lungs(np.zeros(4), self.mask(xray)) for xray in xrays]

    def mask(self, xray):
        mask = np.zeros(xray.pixels.shape, bool)
        mask[:, mask.shape[1] // 2 :] = True
        return mask


def dataset(small, recipe=RECIPE, lungs=None, **options):
    return PatchDataset(small.images, small.labels, small.boxes, small, recipe, lungs=lungs or Finder(), **options)


def canvas(small, image_id):
    """Return the expected 60 x 60 canvas: the image stretched and adjusted, with a black left half."""
    pixels = PLACEMENTS["stretch"](ROWS, COLUMNS, 60).image(adjust_grey(small.pixels[image_id], True, 0.5))
    return np.where(np.arange(60) < 30, 0, pixels).astype(np.uint8)


def test_a_validation_image_is_its_canvas_with_the_same_centres_each_time():
    small = SmallXrays(8)
    examples = dataset(small)
    assert (examples.example_bytes, dataset(small, augment=True).example_bytes) == (60**2, 15**2)
    for index, image_id in enumerate(small.image_ids):
        for _ in range(2):  # the second time from the cached canvas
            example = examples[index]
            np.testing.assert_array_equal(example["canvas"].numpy(), canvas(small, image_id))
            mask = np.broadcast_to(np.arange(60) >= 30, (60, 60))
            np.testing.assert_array_equal(example["centres"], centres(mask, 3, image_seed(image_id)))
        assert example["label"].tolist() == np.eye(4)[index // 2 % 4].tolist() and example["index"] == index


def test_a_training_patch_is_drawn_by_seed_epoch_and_index_alone():
    small = SmallXrays(8)
    examples, others = dataset(small, augment=True, seed=2), dataset(small, augment=True, seed=3)
    keys = [(epoch, index) for epoch in range(12) for index in range(8)]
    drawn = {key: examples[key]["pixels"].numpy() for key in keys}
    again = dataset(small, augment=True, seed=2)
    assert all(np.array_equal(again[key]["pixels"].numpy(), drawn[key]) for key in keys[::-1])
    assert any(not np.array_equal(others[key]["pixels"].numpy(), drawn[key]) for key in keys)
    for index, image_id in enumerate(small.image_ids):
        whole = torch.from_numpy(canvas(small, image_id))[None]
        every = torch.tensor([[0, row, column] for row in range(60) for column in range(30, 60)])
        possible = {patch.tobytes() for patch in cut_patches(whole, every, 15).numpy()}
        seen = {drawn[epoch, index].tobytes() for epoch in range(12)}
        # 12 of 1,800 positions: more than two equal ones have a probability of 1 in 10,000.
        assert seen <= possible and len(seen) >= 10


def test_patches_are_augmented_as_the_recipe_says():
    small = SmallXrays(4)
    plain = dataset(small, augment=True)
    mirrored = dataset(small, override(RECIPE, horizontal_flip=1.0), augment=True)
    for key in [(0, 0), (1, 3)]:
        assert torch.equal(mirrored[key]["pixels"], plain[key]["pixels"].flip(1))


def test_an_image_without_lungs_is_a_single_patch_and_counted():
    small, finder = SmallXrays(8), Finder(["image002", "image005"])
    training, validation = (dataset(small, lungs=finder, augment=augment) for augment in (True, False))
    for index, count in ((1, 3), (2, 1), (5, 1)):
        assert validation[index]["centres"].shape == (count, 2)
    whole = PLACEMENTS["stretch"](ROWS, COLUMNS, 15).image(adjust_grey(small.pixels["image005"], True, 0.5))
    assert all(np.array_equal(training[epoch, 5]["pixels"].numpy(), whole) for epoch in range(3))
    finder.asked.clear()
    assert (training.lungs_missed(), validation.lungs_missed()) == (2, 2)
    # Images that were not read before: seven of the training set, five of the validation set.
    assert sorted(finder.asked) == sorted(
        [name for name in small.image_ids if name != "image005"]
        + [name for name in small.image_ids if name not in ("image001", "image002", "image005")]
    )


def test_batches_hold_canvases_with_different_numbers_of_centres():
    small = SmallXrays(4)
    examples = dataset(small, lungs=Finder(["image001"]))
    (batch,) = batches(examples, 4, collate_fn=collate_canvases)
    assert batch["canvases"].shape == (4, 60, 60) and batch["canvases"].dtype == torch.uint8
    assert batch["where"][:, 0].tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3] and batch["where"][3].tolist() == [1, 7, 7]
    assert batch["label"].shape == (4, 4) and batch["index"].tolist() == [0, 1, 2, 3]
    training = dataset(small, augment=True)
    first = next(iter(batches(training, 4, shuffle=True)))
    assert first["pixels"].shape == (4, 15, 15) and first["none"].isnan().all()


@pytest.mark.parametrize("room", [0, 1, 3, 8])
def test_as_many_canvases_are_kept_as_fit(monkeypatch, room):
    small, finder = SmallXrays(8), Finder(["image001"])
    limit_kept(monkeypatch, room * (60**2 + 60**2 // 8))
    examples = dataset(small, lungs=finder, augment=True)
    keys = [(epoch, index) for epoch in range(3) for index in range(8)]
    first = [examples[key]["pixels"] for key in keys]
    assert finder.asked[8:] == small.image_ids[room:] * 2  # all in the first epoch, later those that do not fit
    monkeypatch.undo()
    assert all(
        torch.equal(dataset(small, lungs=Finder(["image001"]), augment=True)[key]["pixels"], each)
        for key, each in zip(keys, first, strict=True)
    )


def test_a_kept_mask_whose_pixels_do_not_fill_its_last_byte_comes_back_whole():
    mask = np.random.default_rng(0).random((13, 13)) < 0.5  # 169 bits in 22 bytes
    kept = PatchCanvasCache(2, override(RECIPE, canvas=13, image_size=8))
    kept.put(1, PatchCanvas(mask * np.uint8(200), mask, 8), CachedXray("a", np.zeros((3, 4), np.uint8), 30, 40))
    assert kept.get(0) is None and np.array_equal(kept.get(1).mask, mask) and kept.get(1).side == 8


def test_workers_share_the_canvases_and_change_nothing():
    small, finder = SmallXrays(8), Finder(["image003"])
    alone = dataset(small, lungs=Finder(["image003"]), augment=True)
    helped = dataset(small, lungs=finder, augment=True)
    ways = [batches(each, 4, workers=workers, shuffle=True) for each, workers in ((alone, 0), (helped, 2))]
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one["pixels"], other["pixels"]) and torch.equal(one["index"], other["index"])
    small.pixels.clear()
    assert finder.asked == [] and helped.lungs_missed() == 1 and finder.asked == []
    assert helped[0, 3]["pixels"].shape == (15, 15)


def test_unknown_labels_stay_unknown():
    small = SmallXrays(4)
    small.labels = pd.DataFrame({"id": ["study001"], "COVID-19": [1.0], "other": [0.0]})
    examples = dataset(small, augment=True)
    assert examples[0, 0]["label"].isnan().all() and examples[0, 2]["label"].tolist() == [1, 0]
