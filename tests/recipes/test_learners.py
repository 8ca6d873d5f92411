"""The papers' classifiers have their networks' published sizes, with their heads, and their papers' settings."""

from itertools import pairwise

import pytest
import torch

from kitlib.models.classifier import FindingsClassifier
from kitlib.recipes.fields import PatchRecipe
from kitlib.recipes.learners import FLANNEL_NETWORKS, LEARNERS
from kitlib.recipes.named import RECIPES
from kitlib.training.loop import learning_rate_factor

FOUR = ["COVID-19", "viral", "bacterial", "normal"]
THREE = ["normal", "pneumonia", "COVID-19"]
# facts/systems.md section 7, with ImageNet's thousand classes, and the width of the last layer's input.
SIZES = {
    **{"densenet161": (28_681_000, 2208), "inception_v3": (27_161_264, 2048), "resnet152": (60_192_808, 2048)},
    **{"resnext101_32x8d": (88_791_336, 2048), "vgg19_bn": (143_678_248, 4096), "vgg19": (143_667_240, 4096)},
    **{"densenet201": (20_013_928, 1920), "densenet121": (7_978_856, 1024), "efficientnet_b4": (19_341_616, 1792)},
    **{"hrnet_w18": (21_299_004, 2048), "hrnet_w32": (41_232_680, 2048), "hrnet_w48": (77_469_864, 2048)},
}


@pytest.mark.parametrize("name", [name for name in LEARNERS if not name.startswith("patched_")])
def test_a_learner_is_its_network_with_another_last_layer(name):
    recipe = LEARNERS[name]
    classes = ["COVID-19", "not COVID-19"] if recipe.one_logit else THREE if "ensemble" in name else FOUR
    with torch.device("meta"):
        model = FindingsClassifier(recipe, classes)
    whole, width = SIZES[recipe.backbone]
    outputs = 1 if recipe.one_logit else len(classes)
    hidden = recipe.hidden if isinstance(recipe.hidden, tuple) else filter(None, (recipe.hidden,))
    head = sum((units + 1) * following for units, following in pairwise((width, *hidden, outputs)))
    # Inception's auxiliary head has the same classes, from 768 features.
    auxiliary = 769 * (1000 - outputs) if recipe.auxiliary else 0
    assert sum(each.numel() for each in model.parameters()) == whole - (width + 1) * 1000 - auxiliary + head
    assert model.mean == [0.5] * 3 or recipe.normalisation == "backbone"


def test_flannel_has_five_networks_whole_and_patched():
    assert FLANNEL_NETWORKS == ("densenet161", "inception_v3", "resnet152", "resnext101_32x8d", "vgg19_bn")
    for name in FLANNEL_NETWORKS:
        whole, patched = RECIPES[f"flannel_{name}"], RECIPES[f"patched_{name}"]
        assert whole.backbone == patched.backbone == name and isinstance(patched, PatchRecipe)
        # systems.md sections 1 and 2: 224 of 336, inception 299; Adam 1e-3, 1e-4, batches of 10, a tenth at 150 of 200.
        assert (whole.image_size, whole.canvas) == ((299, 448) if name == "inception_v3" else (224, 336))
        assert (whole.resize, whole.placement) == ("bicubic", "stretch")
        assert patched.image_size == whole.image_size and (patched.canvas, patched.patches) == (1024, 100)
        assert (whole.optimizer, whole.learning_rate, whole.weight_decay, whole.batch_size) == ("adam", 1e-3, 1e-4, 10)
        assert [learning_rate_factor(epoch, 200, whole) for epoch in (0, 149, 150, 199)] == pytest.approx([1, 1, 0.1, 0.1])
        assert whole.epochs == whole.patience == patched.epochs == 200
        assert (patched.learning_rate, patched.l1, learning_rate_factor(199, 200, patched)) == (1e-5, 1e-5, 1)


def test_hrnets_and_their_baselines_differ_by_their_network_alone():
    # UNet + HRNet paper, Table 5.
    settings = {name: recipe for name, recipe in LEARNERS.items() if name.startswith("hrnet")}
    assert len(settings) == 6 and len({recipe.backbone for recipe in settings.values()}) == 6
    for recipe in settings.values():
        assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.01, 0.8, 1e-4, 8)
        assert (recipe.epochs, recipe.milestones, recipe.image_size, recipe.one_logit) == (25, (30, 60, 90), 512, True)
        lungs = RECIPES["unet_lungs"]
        augmented = ("rotate_degrees", "scale_x", "shear_degrees", "gamma_drawn", "salt_pepper", "blur_pixels", "noise")
        for field in (*augmented, "turn_p", "shear_p", "salt_pepper_p", "blur_p", "noise_p", "horizontal_flip"):
            assert getattr(recipe, field) == getattr(lungs, field), field


def test_the_ensembles_learners_begin_with_the_head_alone():
    for name, hidden in (("densenet201", 128), ("resnet152", 1024), ("vgg19", 4096)):
        recipe = LEARNERS[f"ensemble_{name}"]
        assert (recipe.hidden, recipe.dropout, recipe.batch_size) == (hidden, 0.1, 32)
        # "15 %": Keras' ImageDataGenerator takes rotation and shear in degrees, shift and zoom as shares.
        assert (recipe.rotate_degrees, recipe.shear_degrees, recipe.shift) == (15, 15, 0.15)
        assert recipe.scale_x == recipe.scale_y == (0.85, 1.15)
        steps = [recipe.learning_rate * learning_rate_factor(epoch, 60, recipe) for epoch in (0, 4, 5, 59)]
        assert steps == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])
        with torch.device("meta"):
            model = FindingsClassifier(recipe, THREE)
        assert model.rates() == {"backbone.": 1.0}
        model.unfreeze(4)
        assert not any(each.requires_grad for each in model.backbone.parameters())
        model.unfreeze(5)
        learning = {key for key, each in model.backbone.named_parameters() if each.requires_grad}
        assert learning == set(model.stages[-1]) and model.head[0].weight.requires_grad
        model.train()
        assert not any(module.training for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
