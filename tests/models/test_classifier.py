"""Classifiers: the head's size, freezing, probabilities, the loss, and different kinds of backbones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kitlib.errors import SettingsError
from kitlib.models.classifier import (
    OUTPUTS,
    FindingsClassifier,
    StudyClassifier,
    make_head,
    probabilities,
    study_loss,
)
from kitlib.models.families import load_network
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
from kitlib.settings import override
from tests.small_xrays import RECIPE


def size(module):
    return sum(each.numel() for each in module.parameters())


def test_the_heads_have_the_published_sizes():
    # Published by the Heidelberg project: 2048-1024-ReLU-15 for the NIH backbone, 2048-1024-ReLU-4 for the study model
    assert size(make_head(2048, 1024, 0.5, outputs=15)) == 2_113_551
    several = make_head(2048, (1024, 256), 0.5, outputs=1)
    assert [type(layer).__name__ for layer in several] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert size(several) == (2048 + 1) * 1024 + (1024 + 1) * 256 + 256 + 1
    assert size(make_head(2048, 1024, 0.5, outputs=4)) == 2_102_276
    # The kit's fifth output, none, adds a row of weights and a bias.
    assert size(make_head(2048, 1024, 0.5)) == 2_102_276 + 1025


def test_the_head_starts_with_xaviers_weights():
    # Glorot and Bengio 2010, eq. 16: uniform within sqrt(6 / (inputs + outputs)), of variance 2 / (inputs + outputs)
    torch.manual_seed(0)
    head = make_head(300, 200, 0.5)
    for layer in (head[0], head[3]):
        spread = 6 / sum(layer.weight.shape)
        assert layer.weight.abs().max() <= spread**0.5 and not layer.bias.any()
        assert layer.weight.var().item() == pytest.approx(spread / 3, rel=0.1)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_the_heads_size_in_closed_form(features, hidden, outputs):
    assert size(make_head(features, hidden, 0.0, outputs)) == (features + 1) * hidden + (hidden + 1) * outputs


def test_a_head_without_hidden_units_is_dropout_and_one_layer():
    plain = make_head(2208, 0, 0.25, outputs=4)
    assert [type(layer).__name__ for layer in plain] == ["Dropout", "Linear"] and plain[0].p == 0.25
    assert size(plain) == 2209 * 4


def test_the_heidelberg_backbone_gives_the_head_2048_features():
    with torch.device("meta"):
        model = StudyClassifier(StudyRecipe())
    assert size(model.head) == 2049 * 1024 + 1025 * 5
    # torchvision's resnext101_32x8d has 88,791,336, its last layer 2049 * 1000; one colour instead of three at the stem
    assert size(model.backbone) == 88_791_336 - 2049 * 1000 - 64 * 2 * 7 * 7
    with torch.device("meta"):
        colours = StudyClassifier(override(StudyRecipe(), channels=3))
    assert size(colours.backbone) + 2049 * 1000 == 88_791_336


# A residual net, a ConvNeXt, an EfficientNet whose head is wider than its features, a transformer built for one side.
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "mobilenetv3_small_050", "test_vit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_backbone_has_five_logits(backbone, channels):
    model = StudyClassifier(override(RECIPE, backbone=backbone, channels=channels, image_size=64)).eval()
    x = model.normalise(torch.zeros(2, 64, 64, dtype=torch.uint8))
    assert x.shape == (2, channels, 64, 64)
    assert model(x).shape == (2, 5)


def test_the_error_for_an_unknown_backbone_suggests_similar_names():
    with pytest.raises(ValueError, match=r"no backbone 'resnet19'.*resnet18"):
        StudyClassifier(override(RECIPE, backbone="resnet19"))


def test_grey_is_normalised_by_the_mean_over_the_colours():
    model = StudyClassifier(override(RECIPE, backbone="resnet18"))
    # ImageNet: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225
    assert model.mean == pytest.approx([0.449]) and model.std == pytest.approx([0.226])
    assert model.normalise(torch.full((1, 32, 32), 255, dtype=torch.uint8))[0, 0, 0, 0] == pytest.approx(0.551 / 0.226)


def test_normalisation_half_subtracts_and_divides_by_a_half():
    model = StudyClassifier(override(RECIPE, normalisation="half", channels=3))
    assert model.mean == model.std == [0.5] * 3
    x = model.normalise(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3).expand(1, 32, 3))
    # (0 - 1/2) / (1/2), (1/5 - 1/2) / (1/2), (1 - 1/2) / (1/2), alike in the three channels
    assert torch.allclose(x[0, :, 5], torch.tensor([-1.0, -0.6, 1.0]).expand(3, 3))


def test_normalisation_by_batch_gives_each_batch_a_mean_of_0_and_a_standard_deviation_of_1():
    model = StudyClassifier(override(RECIPE, normalisation="batch", channels=3))
    # Grey levels 0, 0, 0 and 4/255: mean 1/255, standard deviation sqrt(3)/255.
    x = model.normalise(torch.tensor([0, 0, 0, 4], dtype=torch.uint8).view(2, 1, 2))
    assert torch.allclose(x, torch.tensor([-1.0, -1, -1, 3]).div(3**0.5).view(2, 1, 1, 2).expand(2, 3, 1, 2))
    assert model.normalise(torch.full((2, 8, 8), 7, dtype=torch.uint8)).abs().max() == 0


class Copies(TorchDispatchMode):
    """Counts tensors that are made from Python numbers, which on a GPU are copies that a training step waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (torch.ops.aten.lift_fresh.default, torch.ops.aten._to_copy.default)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("normalisation", ["backbone", "half", "batch"])
def test_mean_and_deviation_lie_on_the_model_s_device_and_in_no_file(normalisation):
    model = StudyClassifier(override(RECIPE, channels=3, normalisation=normalisation))
    with Copies() as copies:
        model.normalise(torch.zeros(2, 64, 64, dtype=torch.uint8))
    assert copies.count == 1  # uint8 to float32
    assert not [name for name in model.state_dict() if "of_channels" in name]
    assert model.to("meta").normalise(torch.zeros(2, 64, 64, dtype=torch.uint8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_keeps_its_batch_norm_statistics(frozen):
    assert parts_changed_by_a_step(override(RECIPE, frozen_backbone=frozen)) == (
        {"head"} if frozen else {"backbone", "head"}
    )


def test_a_frozen_backbone_can_update_its_statistics_as_heidelbergs_did():
    torch.manual_seed(0)
    model = StudyClassifier(override(RECIPE, frozen_backbone=True, frozen_statistics=False))
    changed = changed_by_a_step(model)
    running = {name for name in model.state_dict() if "running_" in name or "num_batches" in name}
    assert running and {name for name in changed if name.startswith("backbone")} == running


def changed_by_a_step(model):
    """Return the names of the tensors that one training step changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    pixels = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    study_loss(model(model.normalise(pixels)), torch.eye(4), torch.zeros(4), 0.5).backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def parts_changed_by_a_step(recipe, epoch=0):
    """Return the parts (head, stages of test_resnet) whose weights or statistics one training step of `epoch` changes."""
    torch.manual_seed(0)
    model = StudyClassifier(recipe).train()
    model.unfreeze(epoch)
    parts = set()
    for name in changed_by_a_step(model):
        owner, _, rest = name.partition(".")
        layered = recipe.unfreeze_every and owner == "backbone"
        parts.add((rest.partition(".")[0] if rest.startswith("layer") else "stem") if layered else owner)
    return parts


def test_stages_are_unfrozen_from_the_last():
    recipe = override(RECIPE, frozen_backbone=True, unfreeze_every=2)
    stages = ["layer4", "layer3", "layer2", "layer1", "stem"]
    for epoch in (0, 1, 2, 3, 4, 6, 8, 10, 90):
        expected = {"head", *stages[: epoch // 2]}
        assert parts_changed_by_a_step(recipe, epoch) == expected, epoch


@pytest.mark.parametrize(
    ("backbone", "last_first"),
    [
        ("resnet152", ["layer4", "layer3", "layer2", "layer1", "conv1 bn1"]),
        (
            "densenet201",
            ["features.denseblock4 features.norm5"]
            + [f"features.denseblock{number} features.transition{number}" for number in (3, 2, 1)]
            + ["features.conv0 features.norm0"],
        ),
        # Its two large layers, then one convolution after the other.
        ("vgg19", ["pre_logits", "features.34", "features.32", "features.30", "features.28", "features.25"]),
    ],
)
def test_after_each_unfreezing_exactly_the_last_stages_are_trainable(backbone, last_first):
    recipe = FindingsRecipe(backbone=backbone, frozen_backbone=True, unfreeze_every=5, multi_label=False)
    with torch.device("meta"):
        model = FindingsClassifier(recipe, ["normal", "pneumonia", "COVID-19"])
    for epoch in (0, 4, 5, 9, 10, 15, 20, 25):
        model.unfreeze(epoch)
        starts = tuple(f"{part}." for stage in last_first[: epoch // 5] for part in stage.split())
        learning = {name for name, each in model.backbone.named_parameters() if each.requires_grad}
        expected = {name for name, _ in model.backbone.named_parameters() if name.startswith(starts)}
        assert learning == expected, epoch
        assert all(each.requires_grad for each in model.head.parameters())


def test_thawed_stages_keep_their_statistics_if_the_recipe_says_so():
    torch.manual_seed(0)
    recipe = override(RECIPE, frozen_backbone=True, unfreeze_every=1, thawed_statistics=False)
    model = StudyClassifier(recipe).train()
    for epoch in (2, 5):  # two of the five stages, all of them
        model.unfreeze(epoch)
        changed = changed_by_a_step(model)
        assert not any("running_" in name or "num_batches" in name for name in changed)
        stages = {name.split(".")[1] for name in changed if name.startswith("backbone.layer")}
        assert stages == ({"layer4", "layer3"} if epoch == 2 else {"layer4", "layer3", "layer2", "layer1"})
        # The weights of the norms are trained nevertheless.
        assert "backbone.layer4.0.bn2.weight" in changed
        dropout = [module for module in model.head if isinstance(module, torch.nn.Dropout)]
        assert dropout[0].training


@pytest.mark.parametrize(
    "backbone", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "densenet121", "vgg11_bn"]
)
def test_stages_hold_each_parameter_once_in_the_networks_order(backbone):
    with torch.device("meta"):
        model = StudyClassifier(override(RECIPE, backbone=backbone, image_size=64))
    names = [name for name, _ in model.backbone.named_parameters()]
    assert sorted(name for stage in model.stages for name in stage) == sorted(names)
    # Unfreezing a stage that consists of norms alone would have hardly any effect.
    assert all(any(model.backbone.get_parameter(name).ndim > 1 for name in stage) for stage in model.stages)
    assert names[0] in model.stages[0] and len(model.stages) >= 5


def test_unfrozen_stages_have_their_own_learning_rate():
    frozen = override(RECIPE, frozen_backbone=True)
    assert StudyClassifier(override(frozen, unfreeze_every=1, unfrozen_rate=0.2)).rates() == {"backbone.": 0.2}
    assert StudyClassifier(frozen).rates() == StudyClassifier(RECIPE).rates() == {}
    # Halved per stage from the head towards the input, five stages, and multiplied by the rate of unfrozen stages.
    model = StudyClassifier(override(frozen, unfreeze_every=1, unfrozen_rate=0.2, layer_decay=0.5))
    for index, names in enumerate(model.stages):
        expected = 0.2 * 0.5 ** (5 - index)
        assert [model.rates()[f"backbone.{name}"] for name in names] == [pytest.approx(expected)] * len(names)
    assert sum(map(len, model.stages)) == len(model.rates())


def test_frozen_stages_drop_nothing_in_training_and_unfreezing_keeps_the_mode():
    options = {"drop_path_rate": 0.9}
    model = StudyClassifier(
        override(RECIPE, backbone="test_convnext", frozen_backbone=True, unfreeze_every=1, backbone_options=options)
    )
    drops = {name: part for name, part in model.backbone.named_modules() if isinstance(part, DropPath)}
    assert {name[:8] for name in drops} == {"stages.1", "stages.2", "stages.3"}
    for epoch, dropping in ((0, set()), (1, {"stages.3"}), (2, {"stages.2", "stages.3"})):
        model.train().unfreeze(epoch)
        assert {name[:8] for name, part in drops.items() if part.training} == dropping
        assert model.training and model.head[2].training
        model.eval().unfreeze(epoch)
        assert not any(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfreeze_every": 1}, "unfreeze_every is 1, but the backbone is not frozen; set frozen_backbone=True"),
        ({"thawed_statistics": False}, "thawed_statistics is False, but no batch norm statistics are frozen; set"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        override(RECIPE, **changes)


EXCLUSIVE = FindingsRecipe(backbone="test_resnet", channels=1, image_size=32, hidden=0, multi_label=False)
COVID = ["COVID-19", "not COVID-19"]


def test_one_logit_equals_the_softmax_of_the_logit_and_0():
    torch.manual_seed(0)
    model = FindingsClassifier(override(EXCLUSIVE, one_logit=True), COVID).eval()
    logits = model(model.normalise(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)))
    assert logits.shape == (3, 1) and model.head[-1].out_features == 1 and model.answers == 2
    found = model.probabilities(logits)
    assert torch.allclose(found[:, 0], logits[:, 0].sigmoid()) and torch.allclose(found.sum(dim=1), torch.ones(3))
    assert torch.allclose(found, torch.stack([logits[:, 0], torch.zeros(3)], dim=1).softmax(dim=1))
    # The cross entropy over both classes equals the binary cross entropy of the first class.
    label = torch.eye(2)[[0, 1, 0]]
    binary = functional.binary_cross_entropy_with_logits(logits[:, 0], label[:, 0])
    assert torch.allclose(functional.cross_entropy(model.class_logits(logits), label), binary)


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        (
            {"one_logit": True},
            ["a", "b", "c"],
            "one_logit needs 2 classes, but there are 3: a, b, c; set one_logit to False",
        ),
        (
            {"one_logit": True, "class_weights": True, "multi_label": True},
            COVID,
            "one_logit=True and class_weights=True can be used only if exactly one class is true; set multi_label=False",
        ),
        ({"judged_by": "macro_f1", "multi_label": True}, COVID, "judged_by='macro_f1' can be used only if"),
        ({"auxiliary": 0.4}, COVID, "auxiliary is 0.4, but test_resnet has no .* trainable inception_v3"),
        ({"auxiliary": 0.4, "backbone": "inception_v3", "frozen_backbone": True}, COVID, "but a frozen inception_v3 has no"),
        ({"auxiliary": 0.4, "backbone": "inception_v3", "pooling": "gem"}, COVID, "needs the pooling of inception_v3"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_refused(changes, classes, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        FindingsClassifier(override(EXCLUSIVE, **changes), classes)


def test_inceptions_auxiliary_head_has_the_same_classes_and_prediction_does_not_run_it():
    torch.manual_seed(0)
    recipe = override(EXCLUSIVE, backbone="inception_v3", channels=3, image_size=299, auxiliary=0.4)
    model = FindingsClassifier(recipe, ["a", "b", "c"]).eval()
    x = model.normalise(torch.randint(0, 256, (1, 299, 299), dtype=torch.uint8))
    with torch.inference_mode():
        logits, auxiliary_logits = model.with_auxiliary(x)
        assert logits.shape == auxiliary_logits.shape == (1, 3) and not torch.allclose(logits, auxiliary_logits)
        model.backbone.AuxLogits.register_forward_hook(lambda *_: pytest.fail("the auxiliary head was computed"))
        assert torch.allclose(model(x), logits, atol=1e-5)
    assert size(model.backbone.AuxLogits) == 27_161_264 - 23_834_568 - 769 * (1000 - 3)  # timm's with and without it


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_the_mask_decoder_does_not_change_the_logits_and_prediction_does_not_run_it(backbone):
    torch.manual_seed(0)
    recipe = override(RECIPE, backbone=backbone, image_size=64, segmentation=1.0)
    model = StudyClassifier(recipe).eval()
    x = model.normalise(torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8))
    logits, mask = model.with_mask(x)
    stride = 16 if backbone == "test_vit" else 8  # all maps of a vision transformer have the same size
    assert mask.shape == (2, 64 // stride, 64 // stride) and model.mask_decoder.stride == stride
    # Of the maps, all of strides 8, 16 and 32; of the six maps of stride 16 of the transformer, the deepest.
    strides = [info["reduction"] for info in model.backbone.feature_info]
    assert [strides[index] for index in model.mask_decoder.indices] == ([16] if backbone == "test_vit" else [8, 16, 32])
    assert model.mask_decoder.indices[-1] == len(strides) - 1
    model.mask_decoder.register_forward_hook(lambda *_: pytest.fail("the decoder was computed"))
    assert torch.allclose(model(x), logits, atol=1e-5)


def test_segmentation_refuses_unsuitable_sizes_and_backbones():
    with pytest.raises(ValueError, match=r"image_size is 44.*multiple of 8, such as 40"):
        StudyClassifier(override(RECIPE, image_size=44, segmentation=1.0))
    with (
        pytest.raises(ValueError, match=r"intermediate feature maps.* for densenet121; .*segmentation=0"),
        torch.device("meta"),
    ):
        StudyClassifier(override(RECIPE, backbone="densenet121", segmentation=1.0))


def test_outputs_that_are_not_trained_are_nan():
    logits = torch.randn(3, 5)
    both = StudyClassifier(RECIPE).probabilities(logits)
    assert torch.equal(both, probabilities(logits))
    study = StudyClassifier(override(RECIPE, outputs="study")).probabilities(logits)
    none = StudyClassifier(override(RECIPE, outputs="none")).probabilities(logits)
    assert torch.equal(study[:, :4], both[:, :4]) and study[:, 4].isnan().all()
    assert torch.equal(none[:, 4], both[:, 4]) and none[:, :4].isnan().all()
    # float32 also for the logits of half precision
    assert StudyClassifier(RECIPE).probabilities(logits.bfloat16()).dtype == torch.float32


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-50, 50), min_size=5, max_size=5), min_size=1, max_size=4))
def test_four_classes_sum_to_one_and_none_is_independent(rows):
    found = probabilities(torch.tensor(rows)).numpy()
    assert found[:, :4].sum(axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-5)
    assert found[:, 4] == pytest.approx(1 / (1 + np.exp(-np.array(rows)[:, 4])), abs=1e-6)


def test_the_loss_is_its_formula():
    logits = torch.tensor([[2.0, 0, 0, 0, 1], [0, 1, 0, 3, -2]])
    study, none = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0.5, 0.5]]), torch.tensor([1.0, 0])
    x = logits.numpy().astype(float)
    log_p = x[:, :4] - np.log(np.exp(x[:, :4]).sum(axis=1, keepdims=True))
    entropy = -(study.numpy() * log_p).sum(axis=1).mean()
    binary = (np.log1p(np.exp(-1)) + np.log1p(np.exp(-2))) / 2
    assert study_loss(logits, study, none, 0.3).item() == pytest.approx(entropy + 0.3 * binary, abs=1e-6)


def test_the_loss_of_one_output_is_its_part_of_the_formula():
    torch.manual_seed(0)
    logits, study, none = torch.randn(3, 5), torch.eye(4)[:3], torch.tensor([1.0, 0, 1])
    parts = [study_loss(logits, study, none, 0.3, outputs).item() for outputs in ("study", "none")]
    assert study_loss(logits, study, none, 0.3).item() == pytest.approx(parts[0] + 0.3 * parts[1], abs=1e-6)


def test_smoothing_spreads_a_share_of_the_truth_evenly():
    torch.manual_seed(0)
    logits, study, none = torch.randn(3, 5), torch.eye(4)[:3], torch.tensor([1.0, 0, 0.5])
    # A share of 0.2 gives 0.05 to each of four classes; none becomes 0.9 or 0.1, or stays at 0.5.
    by_hand = study_loss(logits, study * 0.8 + 0.05, torch.tensor([0.9, 0.1, 0.5]), 0.5)
    assert study_loss(logits, study, none, 0.5, smoothing=0.2).item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_unknown_labels_do_not_count():
    torch.manual_seed(1)
    logits = torch.randn(3, 5, requires_grad=True)
    study = torch.tensor([[0, 1.0, 0, 0], [torch.nan] * 4, [1.0, 0, 0, 0]])
    none = torch.tensor([torch.nan, 1.0, 0.0])
    loss = study_loss(logits, study, none, 0.5)
    study_part = study_loss(logits[[0, 2]], study[[0, 2]], torch.full((2,), torch.nan), 0.5)
    none_part = study_loss(logits[1:], torch.full((2, 4), torch.nan), none[1:], 0.5)
    assert loss.item() == pytest.approx((study_part + none_part).item(), abs=1e-6)
    loss.backward()
    assert logits.grad[0, 4] == 0 and (logits.grad[1, :4] == 0).all()


def test_a_batch_without_any_label_costs_nothing_and_still_has_gradients():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = study_loss(logits, torch.full((2, 4), torch.nan), torch.full((2,), torch.nan), 0.5)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_a_loaded_model_needs_all_of_its_weights_and_no_starting_weights():
    recipe = override(RECIPE, starting_weights="/gone/imagenet.safetensors")
    weights = StudyClassifier(recipe).state_dict()
    record = {
        "family": "study",
        "classes": OUTPUTS,
        "recipe": {
            "backbone": "test_resnet",
            "image_size": 32,
            "hidden": 16,
            "starting_weights": "/gone",
            "random_parts": ["backbone.layer4"],
        },
    }
    model = load_network(record, weights, torch.device("cpu"))
    assert not model.training
    del weights["head.3.bias"]
    with pytest.raises(RuntimeError, match=r"head\.3\.bias"):
        load_network(record, weights, torch.device("cpu"))
