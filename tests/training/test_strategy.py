"""What all families' strategies do alike before training: they augment the training images by the seed, and no others."""

import dataclasses

import numpy as np
import pytest
import torch

from kitlib.errors import DatasetError
from kitlib.letterbox import stretch, within
from kitlib.settings import override
from kitlib.training.driver import _strategies
from kitlib.training.strategy import without_images
from kitlib.training.task import Task
from tests.small_lungs import FRAME, stored_lungs
from tests.small_masks import RECIPE as MASKS_RECIPE
from tests.small_masks import SmallMasks
from tests.small_tasks import small_task
from tests.small_xrays import COLUMNS, ROWS, SmallXrays
from tests.small_xrays import RECIPE as STUDY_RECIPE
from tests.training.test_detector import FASTER_RCNN
from tests.training.test_findings import RECIPE as FINDINGS_RECIPE
from tests.training.test_findings import SmallFindings

# Each recipe has at least one augmentation that changes every image.
SHIFTED = {"rotate_degrees": 20.0}
RECIPES = {
    "study": override(STUDY_RECIPE, **SHIFTED),
    "findings": override(FINDINGS_RECIPE, **SHIFTED),
    "faster_rcnn": override(FASTER_RCNN, **SHIFTED),
    "segmenter": override(MASKS_RECIPE, **SHIFTED),
}


def make_strategy(family, folder, seed):
    options = {"seed": seed}
    if family == "segmenter":
        small = SmallMasks(folder / "masks")
        options["masks"] = small.masks
    else:
        small = SmallFindings() if family == "findings" else SmallXrays()
    strategy = _strategies()[family](small_task(small, RECIPES[family], **options).checked(), 1, folder / "run")
    strategy.make_examples()
    return strategy


@pytest.mark.parametrize("family", RECIPES)
def test_training_images_are_augmented_by_the_seed_and_validation_images_never(family, tmp_path):
    first, again, other = (make_strategy(family, tmp_path / str(number), seed) for number, seed in enumerate((3, 3, 4)))

    def pixels(strategy, part, epoch):
        return torch.stack([getattr(strategy, part)[epoch, index]["pixels"] for index in range(4)])

    assert torch.equal(pixels(first, "train", 1), pixels(again, "train", 1))
    assert not torch.equal(pixels(first, "train", 1), pixels(other, "train", 1))
    assert not torch.equal(pixels(first, "train", 1), pixels(first, "train", 2))
    assert torch.equal(pixels(first, "validation", 1), pixels(other, "validation", 2))
    orders = [list(strategy.training_batches().batch_sampler) for strategy in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("family", ["study", "findings", "faster_rcnn"])
def test_validation_images_are_cropped_to_their_lungs(family, tmp_path):
    small = SmallFindings() if family == "findings" else SmallXrays()
    crops = {"lungs": "masks", "trained_on": "lungs", "views": ["lungs"], "placement": "stretch"}
    recipe = override(RECIPES[family], **crops)
    task = small_task(small, recipe, lungs=stored_lungs(tmp_path / "lungs", small)).checked()
    strategy = _strategies()[family](task, 1, tmp_path / "run")
    strategy.make_examples()
    crop = within(stretch, FRAME, ROWS, COLUMNS, recipe.image_size)
    for index, image_id in enumerate(strategy.validation_images.image_id[:4]):
        pixels = strategy.validation[1, index]["pixels"].numpy()
        np.testing.assert_array_equal(pixels, crop.image(small.pixels[image_id]))


def test_an_input_that_a_family_does_not_use_is_refused(tmp_path):
    masks = SmallMasks(tmp_path / "masks").masks
    with pytest.raises(ValueError, match="small: a StudyRecipe cannot use the task's 'masks', 'in_sample'; remove these"):
        _strategies()["study"](small_task(SmallXrays(), STUDY_RECIPE, masks=masks, in_sample=True), 1, tmp_path)


def test_a_validation_batch_has_at_least_one_image(tmp_path):
    # With 16 times as many pixels as in training, two times one image would be an eighth.
    recipe = override(FASTER_RCNN, batch_size=1, inference_size=128)
    assert _strategies()["faster_rcnn"](small_task(SmallXrays(), recipe).checked(), 1, tmp_path).validation_batch == 1


def test_only_the_outputs_that_are_trained_need_labels_that_differ(tmp_path):
    def make(labels, outputs):
        small = SmallXrays()
        small.labels[small.labels.columns[1:]] = labels
        return _strategies()["study"](
            small_task(small, override(STUDY_RECIPE, outputs=outputs)).checked(), 1, tmp_path
        ).classes

    same, unknown = [0.0, 1.0, 0.0, 0.0], [np.nan] * 4
    assert make(same, "none") == make(unknown, "both")
    with pytest.raises(DatasetError, match=r"have the same labels \(typical\), so there is nothing to learn"):
        make(same, "both")


@pytest.mark.parametrize(("changes", "message"), [({}, "keys of `tables` are"), ({"workers": -2}, "`workers` is -2")])
def test_a_task_without_a_table_or_with_impossible_workers_is_refused(changes, message):
    task = dataclasses.replace(small_task(SmallXrays(), STUDY_RECIPE), **changes)
    if not changes:
        task = dataclasses.replace(task, tables={name: task.tables[name] for name in ("images", "labels", "boxes")})
    with pytest.raises(ValueError, match=message):
        task.checked()


def test_a_task_continues_and_chooses_its_workers_unless_told_otherwise():
    small = SmallXrays()
    task = Task(small.tables(), small, STUDY_RECIPE, "small")
    assert (task.seed, task.workers, task.in_sample, task.resume) == (0, -1, False, True)  # as documented


def test_a_class_has_images_if_a_label_is_at_least_one_half():
    label = np.array([[0, 0.5, np.nan, 0.4], [1, 0, np.nan, 0.49]])
    assert without_images(label, ["a", "b", "c", "d"]) == ["c", "d"]
