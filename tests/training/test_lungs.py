"""A segmenter's run: its outputs, exact resume, scores recomputed from its masks, and errors."""

import numpy as np
import pandas as pd
import pytest

from kitlib.bundle import read_bundle
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.deadline import SessionOver
from kitlib.errors import BundleError, MaskError, TrainingError
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.settings import override
from kitlib.training.driver import train_fold
from kitlib.training.lungs import score_masks
from kitlib.training.task import Task
from kitlib.xrays.mask_store import MaskStore
from tests.small_masks import RECIPE, SmallMasks
from tests.small_tasks import train_small
from tests.training.test_sessions import EndsAfter

TIMES = ["seconds", "images_per_s"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("masks"))


def train(small, folder, recipe=RECIPE, **options):
    return train_small(folder, small, recipe, **{"fold": 0, "masks": small.masks, "model_name": "m"} | options)


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return train(small, tmp_path_factory.mktemp("run"), override(RECIPE, epochs=12))


@pytest.mark.gpu
def test_it_learns_two_dark_ellipses(run):
    # The heart, the brightest structure, cuts into both lungs; a box around the lungs would have a Dice below 0.75.
    assert run.tables["mask_scores"].dice.min() > 0.85


@pytest.mark.gpu
def test_scores_are_those_of_the_masks_that_lie_in_the_run(run, small):
    assert set(run.tables["mask_scores"].image_id) == set(small.fold_table.id[small.fold_table.fold == 0])
    for row in run.tables["mask_scores"].itertuples():
        found, drawn = (np.isin(store.read(row.image_id), LUNG_CODES) for store in (run.masks, small.masks))
        assert row.dice == pytest.approx(2 * (found & drawn).sum() / (found.sum() + drawn.sum()))
        assert row.jaccard == pytest.approx((found & drawn).sum() / (found | drawn).sum())


@pytest.mark.gpu
def test_the_bundle_segments_as_the_run_did(run, small):
    segmenter = load_segmenter(run.run_folder / "bundle", batch_size=3)
    again = score_masks(segmenter, small, small.masks, run.tables["mask_scores"].image_id)
    pd.testing.assert_series_equal(again.dice, run.tables["mask_scores"].dice, atol=0.02)
    record, _ = read_bundle(run.run_folder / "bundle")
    assert record["family"] == "segmenter" and record["classes"] == ["lungs"]


@pytest.mark.gpu
def test_sides_and_heart_are_judged_each_and_the_lungs_together(tmp_path):
    small = SmallMasks(tmp_path / "masks", sides=True)
    structures = ("heart", "left_lung", "right_lung")
    recipe = override(RECIPE, structures=structures, loss="cross_entropy", background_weight=0.5, epochs=12)
    run = train(small, tmp_path / "run", recipe)
    dice = run.tables["mask_scores"].pivot_table("dice", "image_id", "structure")
    assert set(dice) == {*structures, "lungs"}
    assert dice.mean().min() > 0.6
    for image_id in dice.index:
        found, drawn = run.masks.read(image_id), small.masks.read(image_id)
        left = found == MASK_CODES["left_lung"], drawn == MASK_CODES["left_lung"]
        assert dice.left_lung[image_id] == pytest.approx(2 * (left[0] & left[1]).sum() / (left[0].sum() + left[1].sum()))


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_a_training_that_sessions_interrupt_ends_bit_for_bit_alike(small, tmp_path, schedule):
    # With plateau_epochs 0 the rate falls after each epoch without a better score.
    recipe = override(RECIPE, epochs=4, schedule=schedule, plateau_epochs=0, learning_rate=0.03)
    whole = train(small, tmp_path / "whole", recipe)
    with pytest.raises(SessionOver):
        train(small, tmp_path / "parts", recipe, deadline=EndsAfter(1))
    with pytest.raises(SessionOver):
        train(small, tmp_path / "parts", recipe, deadline=EndsAfter(2))
    parts = train(small, tmp_path / "parts", recipe)
    pd.testing.assert_frame_equal(parts.history.drop(columns=TIMES), whole.history.drop(columns=TIMES), check_exact=True)
    weights = [read_bundle(run.run_folder / "bundle")[0]["weights_sha256"] for run in (whole, parts)]
    assert weights[0] == weights[1]
    pd.testing.assert_frame_equal(parts.tables["mask_scores"], whole.tables["mask_scores"], check_exact=True)


def test_another_set_of_masks_is_another_run(small, tmp_path):
    train(small, tmp_path / "run", override(RECIPE, epochs=1))
    other = SmallMasks(tmp_path / "others")
    assert other.masks.fingerprint() == small.masks.fingerprint()
    assert train(other, tmp_path / "run", override(RECIPE, epochs=1)).metrics["epochs"] == 1
    changed = {image_id: np.roll(small.masks.read(image_id), 1, axis=0) for image_id in small.image_ids}
    other.masks = MaskStore.create_empty(tmp_path / "others")
    other.masks.add(changed)
    with pytest.raises(TrainingError, match="masks_fingerprint"):
        train(other, tmp_path / "run", override(RECIPE, epochs=1))


def test_images_without_a_mask_are_left_out_and_none_at_all_is_an_error(small, tmp_path):
    some = MaskStore(tmp_path / "some")
    some.add({image_id: small.masks.read(image_id) for image_id in small.image_ids[2:]})
    run = train(small, tmp_path / "run", override(RECIPE, epochs=1), masks=some)
    assert run.metrics["train_images"] + run.metrics["validation_images"] == len(small.image_ids) - 2
    with pytest.raises(MaskError, match="none of the 16 images has a mask"):
        train(small, tmp_path / "no", masks=MaskStore(tmp_path / "none"))


def test_masks_of_two_conventions_are_never_learnt_as_one(small, tmp_path):
    images = small.images.assign(convention=["lung_fields", "with_heart"] * 8)
    task = Task({**small.tables(), "images": images}, small, RECIPE, "m", masks=small.masks)
    with pytest.raises(MaskError, match="follow 2 conventions \\(lung_fields, with_heart\\)"):
        train_fold(task, 0, tmp_path)


@pytest.mark.gpu
def test_weights_of_another_network_are_refused_and_its_own_are_taken(run, small, tmp_path):
    bundle = str(run.run_folder / "bundle")
    with pytest.raises(BundleError, match="does not fit the network unet"):
        train(small, tmp_path / "a", override(RECIPE, network="unet", starting_weights=bundle))
    going_on = train(small, tmp_path / "b", override(RECIPE, epochs=1, starting_weights=bundle, learning_rate=1e-6))
    assert going_on.tables["mask_scores"].dice.mean() == pytest.approx(run.tables["mask_scores"].dice.mean(), abs=0.05)
