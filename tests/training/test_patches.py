"""A patch model's run: outputs, score, learning, exact resume, and errors."""

import numpy as np
import pandas as pd
import pytest

from kitlib.bundle import read_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.recipes.fields import PatchRecipe
from kitlib.scoring.metrics import exclusive_scores
from kitlib.settings import override
from kitlib.tables import read_table
from kitlib.training.findings import PatchTraining
from tests.small_lungs import stored_lungs
from tests.small_tasks import train_small
from tests.small_xrays import SmallXrays

TIMES = ["seconds", "images_per_s"]
CLASSES = list(STUDY_CLASSES)
# The classes are grey levels, which equalisation would remove.
RECIPE = PatchRecipe(
    backbone="test_resnet",
    channels=1,
    canvas=64,
    image_size=32,
    equalise=False,
    gamma=1.0,
    patches=4,
    validation_patches=4,
    epochs=2,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    l1=0.0,
)
MISSED = ["image003", "image010"]


def train(folder, lungs, recipe=RECIPE, small=None, **options):
    return train_small(folder, small or SmallXrays(32), recipe, **{"model_name": "patched", "lungs": lungs} | options)


@pytest.fixture(scope="module")
def lungs(tmp_path_factory):
    return stored_lungs(tmp_path_factory.mktemp("lungs"), SmallXrays(32), missed=MISSED)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, lungs):
    return train(tmp_path_factory.mktemp("run"), lungs, in_sample=True)


@pytest.mark.gpu
def test_a_run_leaves_a_bundle_of_patches_and_scores_of_images(uninterrupted):
    small, folder, metrics = SmallXrays(32), uninterrupted.run_folder, uninterrupted.metrics
    scores = read_table("class_scores", folder / "tables" / "class_scores.parquet")
    assert set(scores.image_id) == set(small.fold_table.id[small.fold_table.fold == 1]) and len(scores) == 16
    # Votes of four patches are multiples of a quarter.
    np.testing.assert_array_equal(4 * scores[CLASSES], (4 * scores[CLASSES]).round())
    assert scores[CLASSES].sum(axis=1).tolist() == [1.0] * 16
    record, weights = read_bundle(folder / "bundle")
    assert record["family"] == "patches" and record["classes"] == CLASSES and weights["head.1.weight"].shape[0] == 4
    assert metrics["recipe"]["patch_score"] == record["recipe"]["patch_score"] == "votes"
    # image003 is a training image, image010 is not; with `in_sample` both are predicted.
    assert metrics["lungs_missed"] == {"training": 1, "predicted": 2}
    assert set(uninterrupted.tables["training_scores"].image_id) == set(small.fold_table.id[small.fold_table.fold == 0])


def test_the_out_of_fold_table_has_the_score_that_chose_the_epoch(uninterrupted):
    # Validation and prediction use the same patches; prediction loads the bundle and draws its own canvases.
    small, scores = SmallXrays(32), uninterrupted.tables["class_scores"]
    studies = small.images.set_index("image_id").study_id[scores.image_id]
    truth = small.labels.set_index("id").loc[studies, CLASSES].to_numpy()
    found = exclusive_scores(truth, scores[CLASSES].to_numpy(), CLASSES, "macro_f1")
    assert found == pytest.approx({name: uninterrupted.metrics["best"][name] for name in found}, abs=1e-6)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, lungs, uninterrupted):
    step = PatchTraining.training_step

    def dying(self, batch, number):
        if (self.current_epoch, number) == (1, 1):
            raise ConnectionError("the session ended")
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PatchTraining, "training_step", dying)
        with pytest.raises(ConnectionError):
            train(tmp_path, lungs)
    resumed = train(tmp_path, lungs)
    pd.testing.assert_frame_equal(resumed.tables["class_scores"], uninterrupted.tables["class_scores"], check_exact=True)
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=TIMES), uninterrupted.history.drop(columns=TIMES), check_exact=True
    )


@pytest.mark.gpu
def test_a_patch_classifier_learns_with_an_l1_penalty(tmp_path, lungs):
    # Batches of four and no early stopping: some random starts predict only three of the classes for ten epochs. The score
    # changes from epoch to epoch; that of a moving average rises sooner.
    longer = override(RECIPE, epochs=24, patience=24, batch_size=4, learning_rate=1e-2, ema_decay=0.9)
    learnt = train(tmp_path, lungs, override(longer, patch_score="mean_softmax", l1=1e-5, normalisation="half"))
    assert learnt.metrics["best"]["score"] > 0.7  # macro F1 of four classes, chance is 0.25
    assert learnt.tables["class_scores"][CLASSES].sum(axis=1).to_numpy() == pytest.approx(np.ones(16), abs=1e-6)


def test_recipes_and_tasks_without_lung_masks_are_refused_before_anything_is_written(tmp_path, lungs):
    with pytest.raises(ValueError, match="masked is False; expected True"):
        train(tmp_path / "run", lungs, override(RECIPE, masked=False))
    with pytest.raises(ValueError, match=r"patched: .*set lungs_run"):
        train(tmp_path / "run", None)
    assert not list(tmp_path.iterdir())
