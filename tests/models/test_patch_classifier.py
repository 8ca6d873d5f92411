"""Patch classifier: batched prediction equals a loop over patches, memory, scores of images, and invalid settings."""

import dataclasses

import numpy as np
import pytest
import torch

from kitlib.errors import SettingsError
from kitlib.models.classifier import FindingsClassifier
from kitlib.models.families import load_network
from kitlib.models.patch_classifier import CHUNKS, PatchClassifier
from kitlib.models.patches import cut_patches, join_centres, mean_softmax
from kitlib.recipes.fields import PatchRecipe
from kitlib.settings import override

RECIPE = PatchRecipe(backbone="test_resnet", channels=1, canvas=64, image_size=32, patches=7)
CLASSES = ("COVID-19", "viral", "bacterial", "normal")


def model(**changes):
    torch.manual_seed(0)
    made = PatchClassifier(override(RECIPE, **changes), CLASSES)
    # With random weights all patches get nearly the same prediction; these weights make them differ.
    made.head[-1].weight.data *= 30
    return made.eval()


def drawn(images=3):
    """Return canvases of noise with different brightness and different numbers of centres, some at the border."""
    rng = np.random.default_rng(1)
    canvases = np.stack([rng.integers(0, 60 * image + 70, (64, 64)) for image in range(images)]).astype(np.uint8)
    where = join_centres([rng.integers(0, 64, (count, 2)) for count in (7, 1, 5)[:images]])
    where[0, 1:] = torch.tensor([0, 63])
    return torch.from_numpy(canvases), where


def one_after_another(network, canvases, where):
    """Return the logits of a loop, as published: cut one patch from a padded image, normalise it, predict it."""
    found = []
    for image, row, column in where.tolist():
        padded = np.pad(canvases[image].numpy(), 16)
        patch = torch.from_numpy(padded[row : row + 32, column : column + 32].copy())[None]
        found.append(network.probabilities(network(network.normalise(patch))))
    return torch.cat(found)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_batched_prediction_equals_a_loop_over_patches(backbone, chunk):
    network, (canvases, where) = model(backbone=backbone), drawn()
    network.chunk = chunk
    alone = one_after_another(network, canvases, where)
    assert alone.std(dim=0).max() > 0.01  # predictions differ between patches; otherwise equality would prove nothing
    together = network.probabilities(network.patch_logits(canvases, where))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    means = override(RECIPE, patch_score="mean_softmax")
    network.recipe = dataclasses.replace(means, backbone=backbone)
    expected = torch.stack([alone[where[:, 0] == image].double().mean(dim=0) for image in range(3)])
    torch.testing.assert_close(network.image_probabilities(canvases, where), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_votes_are_those_of_the_individual_patches():
    network, (canvases, where) = model(), drawn()
    assert network.recipe.patch_score == "votes"
    named = one_after_another(network, canvases, where).argmax(dim=1).numpy()
    expected = [np.bincount(named[where[:, 0].numpy() == image], minlength=4) / (7, 1, 5)[image] for image in range(3)]
    np.testing.assert_allclose(network.image_probabilities(canvases, where), expected, atol=1e-12)


@torch.inference_mode()
def test_an_images_prediction_does_not_depend_on_the_other_images():
    network, (canvases, where) = model(patch_score="mean_softmax"), drawn()
    together = network.image_probabilities(canvases, where)
    for image in range(3):
        own = where[where[:, 0] == image] * torch.tensor([0, 1, 1])
        torch.testing.assert_close(
            network.image_probabilities(canvases[[image]], own)[0], together[image], atol=1e-6, rtol=0
        )


@torch.inference_mode()
def test_two_classes_may_have_one_logit():
    torch.manual_seed(0)
    network = PatchClassifier(override(RECIPE, one_logit=True, patch_score="mean_softmax"), CLASSES[:2]).eval()
    canvases, where = drawn()
    logits = network.patch_logits(canvases, where)
    assert logits.shape == (13, 1)
    expected = mean_softmax(torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], dim=1), where[:, 0], 3)
    torch.testing.assert_close(network.image_probabilities(canvases, where), expected, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_batches_are_halved_if_memory_is_small(monkeypatch):
    network, (canvases, where), seen = model(), drawn(), []
    whole, forward = network.image_probabilities(canvases, where), FindingsClassifier.forward

    def small(self, x):
        seen.append(len(x))
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return forward(self, x)

    monkeypatch.setattr(FindingsClassifier, "forward", small)
    network.chunk = 13
    torch.testing.assert_close(network.image_probabilities(canvases, where), whole, atol=1e-12, rtol=0)
    assert network.chunk == 2 and seen == [13, 7, 4, 2, 2, 2, 2, 2, 2, 1]


@torch.inference_mode()
def test_a_smaller_chunk_moves_fewer_canvases_to_the_gpu(monkeypatch):
    network, (canvases, where), moved = model(), drawn(), []

    def small(shown, where, side):
        moved.append(len(shown))
        if len(shown) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return cut_patches(shown, where, side)

    whole = network.image_probabilities(canvases, where)
    monkeypatch.setattr("kitlib.models.patch_classifier.cut_patches", small)
    network.chunk = 13
    torch.testing.assert_close(network.image_probabilities(canvases, where), whole, atol=1e-12, rtol=0)
    # 7, 1 and 5 patches: 13 are of three canvases, the first 7 of one, the last 6 of two.
    assert moved == [3, 1, 2]


@torch.inference_mode()
@pytest.mark.parametrize(("pixels", "expected"), [(4 * 32**2, [4, 4, 4, 1]), (32**2 - 1, [1] * 13)])
def test_the_first_chunk_holds_the_devices_number_of_pixels_and_at_least_one_patch(monkeypatch, pixels, expected):
    monkeypatch.setitem(CHUNKS, "cpu", pixels)
    network, seen = model(), []
    network.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    network.patch_logits(*drawn())
    assert seen == expected


def test_a_loaded_model_is_the_same_and_ready_to_predict():
    made, (canvases, where) = model(), drawn()
    record = {"family": "patches", "recipe": dataclasses.asdict(made.recipe), "classes": list(CLASSES)}
    record["recipe"]["starting_weights"] = "/gone"
    loaded = load_network(record, made.state_dict(), torch.device("cpu"))
    assert not loaded.training and loaded.classes == CLASSES
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.image_probabilities(canvases, where), made.image_probabilities(canvases, where), atol=1e-12, rtol=0
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": False}, "masked is False; expected True"),
        ({"multi_label": True, "judged_by": "auc"}, "multi_label is True; expected False"),
        ({"trained_on": "either"}, "trained_on is 'either'; expected 'full'"),
        ({"views": ["full", "flip"]}, "views is .*; expected a list of 1 items: 'full'"),
        ({"probe": "border"}, "probe is 'border'; expected ''"),
        ({"canvas": 0}, "canvas is 0; expected a whole number of at least 8"),
        ({"canvas": 31}, "canvas is 31, smaller than the crop, whose image_size is 32"),
    ],
)
def test_settings_that_do_not_apply_to_patches_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        override(RECIPE, **changes)
