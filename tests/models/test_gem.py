"""GeM pooling, timm's options and the learning rates of a backbone's stages."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from kitlib.models.classifier import FindingsClassifier
from kitlib.models.gem import GeM
from kitlib.models.starting_weights import load_starting_weights
from kitlib.recipes.fields import FindingsRecipe
from kitlib.settings import override
from kitlib.training.loop import make_optimizer

RECIPE = FindingsRecipe(backbone="test_resnet", hidden=0, image_size=64)


def test_gem_is_the_mean_for_the_power_1_and_near_the_maximum_for_a_large_one():
    features = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    pool = GeM()
    with torch.no_grad():
        # Of 0 and 2, half each, the generalised mean of power 3 is (8 / 2) ** (1 / 3).
        halves = torch.tensor([0.0, 2.0]).expand(1, 1, 4, 2)
        assert pool(halves).item() == pytest.approx(4 ** (1 / 3), rel=1e-4)
        for power, expected in ((1.0, features.mean(dim=(2, 3))), (300.0, features.amax(dim=(2, 3)))):
            pool.gem_power.fill_(power)
            torch.testing.assert_close(pool(features), expected, rtol=0.02, atol=1e-5)


def test_features_in_half_precision_do_not_overflow_and_negative_ones_count_as_0():
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        # 100 ** 3 is above 65,504, the largest number in float16.
        assert GeM()(torch.full((1, 1, 2, 2), 100, dtype=torch.float16)).item() == pytest.approx(100, rel=1e-4)
        features = torch.tensor([-5.0, 3, 3, 3, 3, -1, 3, 3]).view(1, 1, 2, 4)
        found = GeM(flatten=False)(features)
    assert found.shape == (1, 1, 1, 1) and found.item() == pytest.approx((6 * 27 / 8) ** (1 / 3), rel=1e-4)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "convnext_atto", "densenet121"])
def test_a_network_with_gem_learns_the_power(backbone):
    model = FindingsClassifier(override(RECIPE, backbone=backbone, pooling="gem"), ["Mass"])
    plain = FindingsClassifier(override(RECIPE, backbone=backbone), ["Mass"])
    assert set(model.state_dict()) - set(plain.state_dict()) == {name for name in model.state_dict() if "gem_power" in name}
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    (power,) = (value for name, value in model.named_parameters() if name.endswith("gem_power"))
    assert power.item() == 3 and power.grad.abs() > 0


def test_weights_without_gem_start_the_whole_backbone(tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "plain.safetensors")
    model = FindingsClassifier(override(RECIPE, pooling="gem"), ["Mass"])
    report = load_starting_weights(model, tmp_path / "plain.safetensors")
    # The power has no random value: it starts at 3.
    assert report["random"] == ["head.1.bias", "head.1.weight"] and not report["unused"]


@pytest.mark.parametrize("backbone", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_a_transformer_has_no_maps_to_pool(backbone):
    with pytest.raises(ValueError, match='does not pool feature maps of a convolutional network; set pooling="backbone"'):
        FindingsClassifier(override(RECIPE, backbone=backbone, image_size=224, pooling="gem"), ["Mass"])


def test_options_reach_timms_network_and_others_are_refused():
    model = FindingsClassifier(
        override(RECIPE, backbone="test_convnext", backbone_options={"drop_path_rate": 0.3}), ["Mass"]
    )
    rates = [
        part.drop_prob for name, part in model.named_modules() if name.endswith("drop_path") and hasattr(part, "drop_prob")
    ]
    assert max(rates) == pytest.approx(0.3)
    for options, message in (
        ({"checkpoint_path": "x.pth"}, "remove checkpoint_path from `backbone_options`; valid options: drop_rate, drop_"),
        ({"window_size": 7}, r"change backbone_options .*: test_resnet.* raises "),
        ({"output_stride": 5}, r"change backbone_options .*: test_resnet.* raises "),
        ({"global_pool": "catavgmax"}, "remove global_pool from `backbone_options`"),
    ):
        with pytest.raises(ValueError, match=message):
            FindingsClassifier(override(RECIPE, backbone_options=options), ["Mass"])


def test_the_learning_rate_falls_from_stage_to_stage_towards_the_input():
    model = FindingsClassifier(override(RECIPE, layer_decay=0.5, learning_rate=1.0, optimizer="sgd"), ["Mass"])
    rate = {
        id(value): group["lr"] for group in make_optimizer(model, model.recipe).param_groups for value in group["params"]
    }
    found = [rate[id(model.backbone.get_parameter(names[0]))] for names in model.stages]
    assert found == [0.5 ** (len(found) - index) for index in range(len(found))]
    assert {rate[id(value)] for value in model.head.parameters()} == {1.0}
