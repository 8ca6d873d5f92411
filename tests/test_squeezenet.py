"""SqueezeNet 1.1 of benchmarks/real: published sizes, equality with torchvision, strides, stages, converted weights."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

from benchmarks.real.squeezenet_weights import LAYERS, keras, renormalise, yolo
from kitlib.errors import BundleError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.models.starting_weights import load_starting_weights
from kitlib.models.yolo import YoloDetector
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, StudyRecipe
from kitlib.settings import override
from tests import REAL_DATA

KERAS = REAL_DATA / "weights" / "squeezenet1_1_imagenet_features_fp32.npz"
real_weights = pytest.mark.skipif(not KERAS.is_file(), reason=f"no {KERAS}")
FASTER_RCNN = DetectorRecipe(backbone="squeezenet1_1", fpn_channels=16, box_hidden=16, proposals=20, box_samples=16)
YOLO = DetectorRecipe(family="yolo", backbone="squeezenet1_1", width=0.25, image_size=64, max_detections=7)
NOISE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_squeezenet_has_the_published_size():
    assert count(timm.create_model("squeezenet1_1")) == 1_235_496  # torchvision's table of models
    assert count(timm.create_model("squeezenet1_1", num_classes=0)) == 722_496  # ../shared/data/weights/SOURCES.md


def test_squeezenet_has_torchvisions_outputs_and_parameter_names():
    torch.manual_seed(0)
    reference = torchvision.models.squeezenet1_1(weights=None).eval()
    model = timm.create_model("squeezenet1_1").eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    x = torch.rand(2, 3, 70, 96)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


@pytest.mark.parametrize("side", [64, 96, 224])
def test_features_have_strides_4_8_and_16_and_one_cell_per_stride(side):
    model = timm.create_model("squeezenet1_1", features_only=True, in_chans=1)
    assert model.feature_info.reduction() == [4, 8, 16] and model.feature_info.channels() == [128, 256, 512]
    maps = model(torch.zeros(1, 1, side, side))
    assert [tuple(features.shape[1:]) for features in maps] == [
        (channels, side // stride, side // stride) for channels, stride in ((128, 4), (256, 8), (512, 16))
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
    layers = [sorted({int(name.split(".")[1]) for name in names}) for names in stages.values()]
    assert layers == [[0], [3, 4], [6, 7], [9, 10, 11, 12]]


numbers = st.floats(0.1, 2)
pair = st.tuples(st.lists(numbers, min_size=3, max_size=3), st.lists(numbers, min_size=3, max_size=3))


@settings(max_examples=25, deadline=None)
@given(old=pair, new=pair, seed=st.integers(0, 99))
def test_a_renormalised_convolution_has_the_same_outputs(old, new, seed):
    torch.manual_seed(seed)
    pixels, layer = torch.rand(2, 3, 6, 6).double(), nn.Conv2d(3, 4, 3).double()

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    weight, bias = renormalise(layer.weight, layer.bias, old, new)
    # mean and std are float32 on one side and float64 on the other
    torch.testing.assert_close(torch.conv2d(normalised(*new), weight, bias), layer(normalised(*old)), rtol=1e-4, atol=1e-3)


def test_keras_weights_are_converted_for_the_kits_input(tmp_path):
    torch.manual_seed(0)
    weights = timm.create_model("squeezenet1_1", num_classes=0).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    np.savez(tmp_path / "keras.npz", **arrays)
    check_first_activation(tmp_path / "keras.npz", tmp_path)


@pytest.mark.real_data
@real_weights
def test_the_real_weights_are_converted_exactly(tmp_path):
    check_first_activation(KERAS, tmp_path)


def check_first_activation(path, folder):
    """Assert that the first layer's outputs for grey pixels equal the original weights' outputs for BGR minus the mean."""
    keras(path, folder / "kit.safetensors")
    arrays = np.load(path)
    pixels = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bgr = pixels[:, None].expand(-1, 3, -1, -1).double() - torch.tensor([103.939, 116.779, 123.68]).double().view(3, 1, 1)
    weight, bias = (torch.from_numpy(arrays[f"features.0.{part}"]).double() for part in ("weight", "bias"))
    expected = torch.conv2d(bgr, weight, bias, stride=2)
    for channels in (1, 3):
        model = StudyClassifier(StudyRecipe(backbone="squeezenet1_1", channels=channels, hidden=8)).eval()
        report = load_starting_weights(model, folder / "kit.safetensors")
        assert len(report["loaded"]) == 50 and not report["unused"]
        outputs = model.backbone.features[0](model.normalise(pixels).expand(-1, channels, -1, -1))
        # Outputs are up to a thousand, and weights are float32.
        torch.testing.assert_close(outputs.double() / 1000, expected / 1000, rtol=0, atol=1e-6)


@pytest.mark.real_data
@real_weights
def test_the_converted_backbone_has_the_features_of_the_original_network(tmp_path):
    # Pooling that rounds down, as in Keras; the kit's rounds up, which is the same for sides that are multiples of 16.
    arrays = {name: torch.from_numpy(array) for name, array in np.load(KERAS).items()}
    model = timm.create_model("squeezenet1_1", num_classes=0).eval()
    model.load_state_dict(arrays)
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = False
    pixels = torch.randint(0, 256, (1, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    bgr = pixels[:, None].expand(-1, 3, -1, -1).float() - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    kit = StudyClassifier(StudyRecipe(backbone="squeezenet1_1", hidden=8)).eval()
    keras(KERAS, tmp_path / "kit.safetensors")
    load_starting_weights(kit, tmp_path / "kit.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(kit.backbone(kit.normalise(pixels)), model(bgr), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_faster_rcnns_maps_have_one_cell_per_stride(channels):
    detector = FasterRCNNDetector(override(FASTER_RCNN, image_size=512, channels=channels))
    maps = detector.model.backbone(torch.zeros(1, channels, 512, 512))
    # Strides 4, 8 and 16 of the backbone, 32 by pooling: with 512 / stride cells, torchvision places anchors correctly.
    assert [features.shape[-1] for features in maps.values()] == [128, 64, 32, 16]
    assert detector.model.backbone.strides == [4, 8, 16, 32]


def test_cells_are_centred_on_their_part_of_the_image():
    # The receptive field of cell (4, 4) with stride 16 is centred on the cell's middle, 4 * 16 + 8.
    pyramid = FasterRCNNDetector(override(FASTER_RCNN, image_size=256)).model.backbone.eval()
    for part in pyramid.body.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    pixels = torch.rand(1, 1, 256, 256, requires_grad=True)
    features = pyramid.body(pixels)[-1]
    features[0, 0, 4, 4].backward()
    rows = torch.nonzero(pixels.grad[0, 0].sum(dim=1))
    assert abs((rows.min() + rows.max() + 1).item() / 2 - (4 * 16 + 8)) <= 12


def yolo_detector(**changes):
    return YoloDetector(override(YOLO, **changes))


def test_yolos_head_has_strides_8_16_and_32():
    detector = yolo_detector(image_size=256)
    assert detector.model.stride.tolist() == [8, 16, 32]
    assert count(detector) < count(yolo_detector(width=1.0))
    assert all(len(boxes) <= 7 for boxes in detector.eval().predict(torch.zeros(2, 256, 256, dtype=torch.uint8)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_yolo_that_starts_from_a_classifier_has_the_same_features(tmp_path, channels):
    recipe = FindingsRecipe(backbone="squeezenet1_1", channels=channels, image_size=64, hidden=8)
    classifier = FindingsClassifier(recipe, ["Mass"]).eval()
    save_file(classifier.state_dict(), tmp_path / "findings.safetensors")
    yolo(tmp_path / "findings.safetensors", tmp_path / "yolo.safetensors")
    detector = yolo_detector(starting_weights=str(tmp_path / "yolo.safetensors")).eval()
    # Counters of batch norm do not count as random.
    random = len([name for name in detector.state_dict() if not name.endswith("num_batches_tracked")]) - 50
    assert detector.starting_weights.endswith(f"50 tensors, {random} left random")
    # The classifier takes normalised pixels, the detector plain pixels in three colours.
    expected = classifier.backbone.forward_features(classifier.normalise(NOISE))
    features = detector.model.model[1]((NOISE[:, None] / 255).repeat(1, 3, 1, 1))[-1]
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_a_yolo_refuses_weights_of_only_a_part_of_the_backbone(tmp_path):
    save_file(
        {f"{LAYERS}0.weight": torch.zeros(64, 3, 3, 3), f"{LAYERS}0.bias": torch.zeros(64)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(BundleError, match=r"lacks 48 tensors of squeezenet1_1, 36% .* random: model\.model\.1\."):
        yolo_detector(starting_weights=str(tmp_path / "a.safetensors"))
