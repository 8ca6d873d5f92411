"""SqueezeNet 1.1 under timm: published sizes, torchvision's own outputs, strides and stages."""

import pytest
import timm
import torch
import torchvision
from timm.models import group_parameters

import kitlib.models.squeezenet  # noqa: F401  registers the name


def count(model):
    return sum(each.numel() for each in model.parameters())


def test_it_has_the_published_size():
    assert count(timm.create_model("squeezenet1_1")) == 1_235_496  # torchvision's table of models
    assert count(timm.create_model("squeezenet1_1", num_classes=0)) == 722_496  # ../shared/data/weights/SOURCES.md


def test_it_computes_what_torchvisions_computes_from_the_same_names():
    torch.manual_seed(0)
    reference = torchvision.models.squeezenet1_1(weights=None).eval()
    model = timm.create_model("squeezenet1_1").eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    x = torch.rand(2, 3, 70, 96)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


@pytest.mark.parametrize("side", [64, 96, 224])
def test_features_come_at_strides_4_8_and_16(side):
    model = timm.create_model("squeezenet1_1", features_only=True, in_chans=1)
    assert model.feature_info.reduction() == [4, 8, 16] and model.feature_info.channels() == [128, 256, 512]
    maps = model(torch.zeros(1, 1, side, side))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (channels, side // stride - 1, side // stride - 1) for channels, stride in ((128, 4), (256, 8), (512, 16))
    ]


def test_intermediates_are_the_features_and_classes_can_be_replaced():
    torch.manual_seed(0)
    model = timm.create_model("squeezenet1_1", num_classes=0).eval()
    x = torch.rand(1, 3, 64, 64)
    last, (first, third) = model.forward_intermediates(x, indices=[0, 2])
    assert torch.equal(last, third) and torch.equal(last, model.forward_features(x))
    assert torch.equal(first, model.features[:5](x))
    torch.testing.assert_close(model(x), last.mean(dim=(2, 3)))
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)


def test_each_stride_is_a_stage_behind_the_stem():
    model = timm.create_model("squeezenet1_1", num_classes=0)
    stages = group_parameters(model, model.group_matcher(coarse=True))
    places = [sorted({int(name.split(".")[1]) for name in names}) for names in stages.values()]
    assert places == [[0], [3, 4], [6, 7], [9, 10, 11, 12]]
