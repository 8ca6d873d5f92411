"""Prediction with a patch model's bundle: equal to validation, independent of other images, missed lungs counted."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.bundle import save_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.inference.predict import load_predictor
from kitlib.lungs.finders import Lungs
from kitlib.models.patch_classifier import PatchClassifier
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override
from kitlib.tables import check_table
from kitlib.training.patch_dataset import PatchDataset, collate_canvases
from kitlib.training.xray_dataset import batches
from tests.small_xrays import SmallXrays

CPU = torch.device("cpu")
# Validation and prediction use the same number of patches, so that their results are equal.
RECIPE = PatchRecipe(
    backbone="test_resnet", channels=1, canvas=60, image_size=32, patches=5, validation_patches=5, patch_score="mean_softmax"
)
MISSED = ["image003", "image006"]


class Finder:
    """Finds lungs in the middle of every image except those in MISSED."""

    def find(self, xrays):
        return [Lungs(None) if xray.image_id in MISSED else Lungs(np.zeros(4), self.mask(xray)) for xray in xrays]

    def mask(self, xray):
        mask = np.zeros(xray.pixels.shape, bool)
        mask[8:32, 8:42] = True
        return mask


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = PatchClassifier(RECIPE, STUDY_CLASSES).eval()
    network.head[-1].weight.data *= 30
    return network


@pytest.fixture(scope="module")
def bundle(network, tmp_path_factory):
    record = {
        **{"family": "patches", "model": "small", "classes": STUDY_CLASSES, "recipe": dataclasses.asdict(RECIPE)},
        **{"architecture": {"segmenter": "ab"}, "longest_side": 50, "image_size": 32, "placement": "stretch"},
        **{
            "mean": network.mean,
            "std": network.std,
            "fold": 2,
            "data_fingerprint": "",
            "precision": "float32",
            "validation": {},
        },
    }
    record["recipe"]["views"] = list(record["recipe"]["views"])
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, network.state_dict(), record)
    return folder


@pytest.fixture(scope="module")
def found(bundle):
    predictor = load_predictor(bundle, CPU, 4, lungs=Finder())
    return pd.concat(predictor.predict(SmallXrays(8).stream()), ignore_index=True), predictor


def test_a_prediction_is_a_table_of_class_scores_and_images_without_lungs_are_counted(found):
    table, predictor = found
    assert list(check_table(table, "class_scores").columns) == ["image_id", "model", "fold", *STUDY_CLASSES]
    assert table.image_id.tolist() == SmallXrays(8).image_ids == predictor.seen and set(table.fold) == {2}
    assert table[list(STUDY_CLASSES)].sum(axis=1).to_numpy() == pytest.approx(np.ones(8), abs=1e-6)
    assert predictor.lungs_missed == 2
    assert predictor.wants_masks and predictor.segmenter == "ab"


def test_predictions_equal_those_of_validation(found, network):
    small = SmallXrays(8)
    examples = PatchDataset(small.images, small.labels, small.boxes, small, RECIPE, lungs=Finder())
    with torch.inference_mode():
        (batch,) = batches(examples, 8, collate_fn=collate_canvases)
        expected = network.image_probabilities(batch["canvases"], batch["where"])
    np.testing.assert_allclose(found[0][list(STUDY_CLASSES)], expected, atol=1e-6)
    assert examples.lungs_missed() == 2


def test_predictions_do_not_depend_on_order_and_batch(found, bundle):
    small = SmallXrays(8)
    backward = (small.read(image_id) for image_id in small.image_ids[::-1])
    again = pd.concat(load_predictor(bundle, CPU, 3, lungs=Finder()).predict(backward), ignore_index=True)
    np.testing.assert_allclose(again[list(STUDY_CLASSES)][::-1], found[0][list(STUDY_CLASSES)], atol=1e-6)


def test_without_a_segmenter_every_image_is_one_patch(bundle):
    predictor = load_predictor(bundle, CPU)
    list(predictor.predict(SmallXrays(8).stream()))
    assert predictor.lungs_missed == 8


def test_a_patch_model_has_one_view(bundle):
    with pytest.raises(ValueError, match="a patch model supports only the view 'full'"):
        load_predictor(bundle, CPU, views=("full", "flip"))


def test_votes_are_whole_patches(network):
    small = SmallXrays(2)
    examples = PatchDataset(
        small.images, small.labels, small.boxes, small, override(RECIPE, patch_score="votes"), lungs=Finder()
    )
    voting = PatchClassifier(override(RECIPE, patch_score="votes"), STUDY_CLASSES).eval()
    voting.load_state_dict(network.state_dict())
    (batch,) = batches(examples, 2, collate_fn=collate_canvases)
    with torch.inference_mode():
        counted = 5 * voting.image_probabilities(batch["canvases"], batch["where"])
    torch.testing.assert_close(counted, counted.round(), atol=1e-9, rtol=0)
