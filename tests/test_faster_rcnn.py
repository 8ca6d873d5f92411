"""What the network is shown, what it returns, and where its weights may come from."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from kitlib.bundle import BundleError
from kitlib.classifier import StudyClassifier
from kitlib.faster_rcnn import FasterRCNNDetector, load
from kitlib.recipes import DetectorRecipe, StudyRecipe, override

RECIPE = DetectorRecipe(
    backbone="test_resnet", image_size=64, fpn_channels=16, box_hidden=16, proposals=20, box_samples=16, max_detections=7
)
NOISE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return FasterRCNNDetector(RECIPE).eval()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("side", "channels"), [(64, 1), (160, 3), (1024, 1), (100, 1)])
def test_the_network_sees_the_canvas_normalised_once_and_at_its_own_size(side, channels, training):
    detector = FasterRCNNDetector(override(RECIPE, backbone="test_efficientnet", image_size=side, channels=channels))
    canvas = torch.randint(0, 256, (1, side, side), dtype=torch.uint8)
    images, _ = detector.model.transform.train(training)(detector._images(canvas))
    assert images.image_sizes == [(side, side)]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, timm's configuration
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    expected = (canvas[:, None] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images.tensors[..., :side, :side], expected, rtol=0, atol=1e-5)
    padding = images.tensors.shape[-1] - side
    assert padding == (-side) % 32 and not images.tensors[..., side:].any()  # to the right and below: no coordinate moves


@pytest.mark.parametrize(("side", "strides"), [(64, [4]), (128, [4, 8]), (512, [4, 8, 16, 32]), (1024, [4, 8, 16, 32, 64])])
def test_a_canvas_uses_the_maps_whose_anchors_it_holds(side, strides):
    model = FasterRCNNDetector(override(RECIPE, image_size=side)).model
    # A map's largest square anchor is 8 strides wide, which is half of the canvas on the last map of these sizes.
    squares = [max(sizes) for sizes in model.rpn.anchor_generator.sizes]
    assert squares == [8 * stride for stride in strides] and squares[-1] == side / 2
    features = model.backbone(torch.zeros(1, 1, side, side))
    assert [side // each.shape[-1] for each in features.values()] == strides


def test_predictions_are_boxes_of_the_canvas_best_first_and_limited(detector):
    found = detector.predict(NOISE)
    assert len(found) == 3
    for boxes in found:
        assert boxes.shape == (7, 5)  # an untrained network is sure of nothing, and every proposal passes 0.001
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all() and (boxes[:, :2] < boxes[:, 2:4]).all()
        assert (np.diff(boxes[:, 4]) <= 0).all() and (boxes[:, 4] >= 0.001).all() and (boxes[:, 4] <= 1).all()


def test_a_score_threshold_drops_what_is_below(detector):
    scores = np.concatenate([boxes[:, 4] for boxes in detector.predict(NOISE)])
    torch.manual_seed(0)
    strict = FasterRCNNDetector(override(RECIPE, min_score=float(np.median(scores)))).eval()
    kept = np.concatenate([boxes[:, 4] for boxes in strict.predict(NOISE)])
    assert sorted(kept) == sorted(scores[scores > np.median(scores)])


def test_images_without_boxes_train_the_background():
    torch.manual_seed(0)
    detector = FasterRCNNDetector(RECIPE).train()
    losses = detector.losses(NOISE, [torch.zeros(0, 4)] * 3)
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0  # no box to be placed
    sum(losses.values()).backward()
    # Descending lowers the score of foreground: the gradient of its bias is positive, of the background's negative.
    background, opacity = detector.model.roi_heads.box_predictor.cls_score.bias.grad
    assert opacity > 0 > background


def test_a_canvas_of_another_size_or_type_is_refused(detector):
    with pytest.raises(ValueError, match=r"uint8 canvases \(n, 64, 64\), got torch.uint8 \(1, 64, 32\)"):
        detector.predict(torch.zeros(1, 64, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        detector.predict(torch.zeros(1, 64, 64))


def test_a_bundle_s_weights_predict_alike_and_nothing_else_is_read(detector):
    record = {"recipe": {**vars(RECIPE), "starting_weights": "/gone/weights.safetensors"}}
    loaded = load(record, detector.state_dict(), torch.device("cpu"))
    for boxes, again in zip(detector.predict(NOISE), loaded.predict(NOISE), strict=True):
        np.testing.assert_allclose(again, boxes, rtol=1e-4, atol=1e-3)  # another memory order adds up in another order
    with pytest.raises(RuntimeError, match="Missing key"):
        load(record, {}, torch.device("cpu"))


def test_backbones_that_cannot_serve_are_named():
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\].*needs \(4, 8, 16, 32\)"):
        FasterRCNNDetector(override(RECIPE, backbone="test_vit"))
    with pytest.raises(ValueError, match=r"no backbone 'resnet19'; near: .*resnet18"):
        FasterRCNNDetector(override(RECIPE, backbone="resnet19"))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])  # timm renames the latter's stages for features
def test_starting_weights_come_from_timm_s_file_or_a_study_classifier(tmp_path, backbone):
    study = StudyClassifier(StudyRecipe(backbone=backbone, image_size=64, channels=3, hidden=8)).eval()
    save_file(study.state_dict(), tmp_path / "study.safetensors")
    save_file(study.backbone.state_dict(), tmp_path / "timm.safetensors")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = study.backbone.forward_features(x)
    for name in ("study", "timm"):
        recipe = override(RECIPE, backbone=backbone, channels=3, starting_weights=str(tmp_path / f"{name}.safetensors"))
        found = FasterRCNNDetector(recipe).eval().model.backbone.body(x)[-1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_grey_network_sums_the_first_convolution(tmp_path):
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    grey = FasterRCNNDetector(override(RECIPE, starting_weights=str(tmp_path / "timm.safetensors")))
    first = next(iter(grey.model.backbone.body.parameters()))
    torch.testing.assert_close(first, next(iter(model.parameters())).sum(dim=1, keepdim=True))


def test_weights_of_another_backbone_are_refused(tmp_path):
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BundleError, match=r"other.safetensors lacks \d+ of the \d+ tensors of 'test_resnet'"):
        FasterRCNNDetector(override(RECIPE, starting_weights=str(tmp_path / "other.safetensors")))
