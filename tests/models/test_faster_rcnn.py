"""Faster R-CNN: its input, its predictions, its losses and its starting weights."""

from operator import attrgetter

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from kitlib.device import computing_in
from kitlib.errors import BundleError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.families import load_network
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, StudyRecipe
from kitlib.recipes.named import recipe
from kitlib.settings import override

RECIPE = DetectorRecipe(
    backbone="test_resnet", image_size=64, fpn_channels=16, box_hidden=16, proposals=20, box_samples=16, max_detections=7
)
NOISE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return FasterRCNNDetector(RECIPE).eval()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("side", "channels"), [(64, 1), (160, 3), (1024, 1), (100, 1)])
def test_the_network_sees_the_canvas_normalised_once_and_at_its_own_size(side, channels, training):
    detector = FasterRCNNDetector(override(RECIPE, backbone="test_efficientnet", image_size=side, channels=channels))
    canvas = torch.randint(0, 256, (1, side, side), dtype=torch.uint8)
    images, _ = detector.model.transform.train(training)(detector._images(canvas, side))
    assert images.image_sizes == [(side, side)]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, timm's configuration
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    expected = (canvas[:, None] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images.tensors[..., :side, :side], expected, rtol=0, atol=1e-5)
    padding = images.tensors.shape[-1] - side
    assert padding == (-side) % 32 and not images.tensors[..., side:].any()  # to the right and below: no coordinate moves


@pytest.mark.parametrize(("side", "strides"), [(64, [4]), (128, [4, 8]), (512, [4, 8, 16, 32]), (1024, [4, 8, 16, 32, 64])])
def test_a_canvas_uses_the_maps_whose_anchors_fit_into_it(side, strides):
    model = FasterRCNNDetector(override(RECIPE, image_size=side)).model
    # A map's largest square anchor is 8 strides wide: half of the canvas on the last map, at these sizes.
    squares = [max(sizes) for sizes in model.rpn.anchor_generator.sizes]
    assert squares == [8 * stride for stride in strides] and squares[-1] == side / 2
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * len(strides)
    features = model.backbone(torch.zeros(1, 1, side, side))
    assert [side // each.shape[-1] for each in features.values()] == strides


def test_the_largest_anchor_decides_whether_a_map_is_used():
    # On the map of stride 8 the largest square anchor has 64 pixels, above half of 96; the middle one has 45, below it.
    assert FasterRCNNDetector(override(RECIPE, image_size=96)).model.backbone.strides == [4]


def test_predictions_are_boxes_of_the_canvas_best_first_and_limited(detector):
    found = detector.predict(NOISE)
    assert len(found) == 3
    for boxes in found:
        assert boxes.shape == (7, 6)  # in an untrained network every proposal has a score above 0.001
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all() and (boxes[:, :2] < boxes[:, 2:4]).all()
        assert (np.diff(boxes[:, 4]) <= 0).all() and (boxes[:, 4] >= 0.001).all() and (boxes[:, 4] <= 1).all()


def test_a_pyramid_that_overflows_in_float16_is_computed_in_float32(detector):
    pyramid, overflows = detector.model.backbone, detector.overflows
    images = NOISE[:, None] / 255
    with torch.inference_mode():
        expected = pyramid(images)
        overflow = pyramid.fpn.register_forward_hook(
            lambda module, inputs, maps: {
                name: level * torch.inf if torch.is_autocast_enabled("cpu") else level for name, level in maps.items()
            }
        )
        with computing_in("16-mixed"):
            found = pyramid(images)
            boxes = detector.predict(NOISE)
        overflow.remove()
    assert detector.overflows == overflows + 2 and all(len(each) == 7 for each in boxes)
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level)


@pytest.mark.parametrize(("precision", "kind"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_training_keeps_its_precision_and_an_overflow_for_the_gradient_scaler(precision, kind):
    pyramid, kinds = FasterRCNNDetector(RECIPE).model.backbone.train(), []

    def overflow(module, inputs, maps):
        kinds.append(maps["0"].dtype)
        return {name: level * torch.inf for name, level in maps.items()}

    pyramid.fpn.register_forward_hook(overflow)
    with computing_in(precision):
        maps = pyramid(NOISE[:, None] / 255)
    assert kinds == [kind] and pyramid.overflows == 0
    assert all(level.dtype == torch.float32 and not level.isfinite().any() for level in maps.values())


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_moves_no_box_by_half_a_pixel(precision):
    torch.manual_seed(0)
    detector = FasterRCNNDetector(override(RECIPE, fpn_channels=64, box_hidden=64, nms_iou=1.0, max_detections=50)).eval()
    rpn, predictor = detector.model.rpn, detector.model.roi_heads.box_predictor.bbox_pred
    seen = []
    for layer in (rpn.head.conv, detector.model.roi_heads.box_head):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    # Random weights would hardly move a box.
    for layer, factor in ((rpn.head.bbox_pred, 30), (predictor, 100)):
        layer.weight.data *= factor
    boxes, offsets = [], []
    # The same regions for both, because regions of nearly the same score may change places.
    corner = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) * 32
    regions = torch.cat([corner, corner + 8 + corner.flip(0) / 2], dim=1)
    rpn.register_forward_hook(lambda module, inputs, output: ([regions] * len(NOISE), {}))
    rpn.head.register_forward_hook(lambda module, inputs, output: offsets.append(output[1][0]))
    for each in ("32-true", precision):
        with computing_in(each):
            boxes.append(detector.predict(NOISE))
    assert seen[2:] == [torch.float16, torch.float32]  # also on a GPU with bfloat16; the second head returns float32
    sides = torch.tensor(8.0 * 4)  # of the largest anchor
    assert (offsets[0] * sides).abs().max() > 8 and ((offsets[1] - offsets[0]) * sides).abs().max() < 0.5
    for exact, half in zip(*boxes, strict=True):
        assert len(exact) == len(half) == 40
        distances = np.abs(exact[:, None, :4] - half[None, :, :4]).max(axis=2)
        assert distances.min(axis=1).max() < 0.5
        moved = np.abs(exact[:, None, :4] - regions.numpy()[None]).max(axis=2).min(axis=1)
        assert moved.max() > 4


def test_boxes_below_the_score_threshold_are_dropped(detector):
    scores = np.concatenate([boxes[:, 4] for boxes in detector.predict(NOISE)])
    torch.manual_seed(0)
    strict = FasterRCNNDetector(override(RECIPE, min_score=float(np.median(scores)))).eval()
    kept = np.concatenate([boxes[:, 4] for boxes in strict.predict(NOISE)])
    assert sorted(kept) == sorted(scores[scores > np.median(scores)])


def test_images_without_boxes_train_the_background():
    torch.manual_seed(0)
    detector = FasterRCNNDetector(RECIPE).train()
    losses = detector.losses(NOISE, [torch.zeros(0, 4)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3)
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0  # no box to be placed
    sum(losses.values()).backward()
    # A step lowers the foreground score: the gradient of its bias is positive, that of the background's bias negative.
    background, opacity = detector.model.roi_heads.box_predictor.cls_score.bias.grad
    assert opacity > 0 > background


def test_a_canvas_of_another_size_or_type_is_refused(detector):
    with pytest.raises(ValueError, match=r"uint8 canvases \(n, 64, 64\), got torch.uint8 \(1, 64, 32\)"):
        detector.predict(torch.zeros(1, 64, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        detector.predict(torch.zeros(1, 64, 64))


def test_a_bundles_weights_give_the_same_predictions_and_no_other_file_is_read(detector):
    record = {
        "family": "faster_rcnn",
        "classes": ["opacity"],
        "recipe": {**vars(RECIPE), "starting_weights": "/gone/weights.safetensors"},
    }
    loaded = load_network(record, detector.state_dict(), torch.device("cpu"))
    for boxes, again in zip(detector.predict(NOISE), loaded.predict(NOISE), strict=True):
        np.testing.assert_allclose(again, boxes, rtol=1e-4, atol=1e-3)  # another memory format sums in another order
    with pytest.raises(RuntimeError, match="Missing key"):
        load_network(record, {}, torch.device("cpu"))


def test_unsuitable_backbones_are_refused():
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\].*needs 4, 8 and 16"):
        FasterRCNNDetector(override(RECIPE, backbone="test_vit"))
    with pytest.raises(ValueError, match=r"no backbone 'resnet19'; similar names: .*resnet18"):
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


def test_a_larger_canvas_at_prediction_is_not_resized():
    # The Heidelberg code predicted at 1,024 pixels, which torchvision resized back to 512.
    detector = FasterRCNNDetector(override(RECIPE, image_size=64, inference_size=128))
    seen = []
    detector.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    detector.train().losses(NOISE, [torch.tensor([[8.0, 8, 40, 40]])] * 3, [torch.tensor([0])] * 3)
    found = detector.predict(torch.randint(0, 256, (1, 128, 128), dtype=torch.uint8))[0]
    assert seen == [(3, 1, 64, 64), (1, 1, 128, 128)]
    assert found[:, :4].max() > 64
    with pytest.raises(ValueError, match=r"canvases \(n, 128, 128\)"):
        detector.predict(NOISE)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_findings_bundle_starts_a_detector(tmp_path, channels):
    grey = FindingsClassifier(
        FindingsRecipe(backbone="test_resnet", channels=1, image_size=64, hidden=8), ["Mass", "Edema"]
    ).eval()
    save_file(grey.state_dict(), tmp_path / "findings.safetensors")
    chosen = override(
        RECIPE, backbone="test_resnet", channels=channels, starting_weights=str(tmp_path / "findings.safetensors")
    )
    detector = FasterRCNNDetector(chosen).eval()
    tensors = len(grey.backbone.state_dict())
    assert f"{tensors} tensors of the backbone; pyramid and heads left random" in detector.starting_weights
    x = torch.rand(1, 1, 80, 80)
    expected = grey.backbone.forward_features(x)
    found = detector.model.backbone.body(x.expand(-1, channels, -1, -1))[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_trained_detector_is_a_complete_start_for_another(detector, tmp_path):
    save_file({name: value.contiguous() for name, value in detector.state_dict().items()}, tmp_path / "rsna.safetensors")
    started = FasterRCNNDetector(override(RECIPE, starting_weights=str(tmp_path / "rsna.safetensors")))
    assert all(torch.equal(started.state_dict()[name], value) for name, value in detector.state_dict().items())
    assert started.starting_weights.endswith(f"{len(detector.state_dict())} tensors, 0 left random")
    assert not [name for name in detector.state_dict() if ".transform." in name]  # mean and deviation follow from the recipe


def test_the_ciou_loss_is_that_of_the_decoded_boxes():
    torch.manual_seed(0)
    plain, complete = FasterRCNNDetector(RECIPE), FasterRCNNDetector(override(RECIPE, box_loss="ciou"))
    # With offsets of 0 the predicted box is the proposal itself.
    torch.nn.init.zeros_(plain.model.roi_heads.box_predictor.bbox_pred.weight)
    torch.nn.init.zeros_(plain.model.roi_heads.box_predictor.bbox_pred.bias)
    complete.load_state_dict(plain.state_dict())
    losses = []
    for heads in (plain.train().model.roi_heads, complete.train().model.roi_heads):
        # The true box is as wide as the region and half as high; a second region is background, whose offsets do
        # not count.
        regions, offsets = torch.tensor([[8.0, 8, 28, 28], [40, 40, 60, 60]]), torch.ones(2, 4)
        offsets[0] = heads.box_coder.encode_single(torch.tensor([[8.0, 8, 28, 18]]), regions[:1])
        heads.select_training_samples = lambda *_, given=(regions, offsets): (
            [given[0]], None, [torch.tensor([1, 0])], [given[1]]
        )  # fmt: skip
        losses.append(heads({"0": torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))}, [], [(64, 64)])[1])
    # Zheng et al. 2020: IoU 1/2; centres 5 apart in a hull of 20 x 20; v = 4 / pi^2 (atan 2 - atan 1)^2, weighted by
    # v / (1 - IoU + v). Over both regions.
    v = 4 / np.pi**2 * (np.arctan(2) - np.arctan(1)) ** 2
    expected = (0.5 + 25 / 800 + v**2 / (0.5 + v)) / 2
    assert losses[1]["loss_box_reg"].item() == pytest.approx(expected, abs=1e-5)
    assert losses[1]["loss_classifier"].item() == pytest.approx(losses[0]["loss_classifier"].item(), rel=1e-5)
    assert losses[0]["loss_box_reg"].item() != pytest.approx(expected, abs=1e-2)
    with pytest.raises(ValueError, match="valid for a faster_rcnn: smooth_l1, ciou"):
        FasterRCNNDetector(override(RECIPE, box_loss="giou"))


def test_the_ciou_loss_changes_nothing_else():
    settings = {"nms_iou": 0.2, "max_detections": 3, "min_score": 0.3, "box_samples": 6}
    plain, complete = (FasterRCNNDetector(override(RECIPE, box_loss=each, **settings)).eval() for each in ("", "ciou"))
    complete.load_state_dict(plain.state_dict())
    heads = plain.model.roi_heads
    chosen = (heads.nms_thresh, heads.detections_per_img, heads.score_thresh, heads.fg_bg_sampler.batch_size_per_image)
    assert chosen == tuple(settings.values())
    for boxes, same in zip(plain.predict(NOISE), complete.predict(NOISE), strict=True):
        np.testing.assert_array_equal(boxes, same)
    for path in (
        *("score_thresh", "nms_thresh", "detections_per_img", "proposal_matcher.high_threshold"),
        *("proposal_matcher.low_threshold", "fg_bg_sampler.batch_size_per_image", "fg_bg_sampler.positive_fraction"),
    ):
        found, expected = (attrgetter(path)(each.model.roi_heads) for each in (complete, plain))
        assert found == expected, path


def test_the_recipe_limits_the_regions_of_the_second_stage():
    torch.manual_seed(0)
    detector, regions, rows = FasterRCNNDetector(override(RECIPE, image_size=128, box_samples=6)), [], []
    detector.model.rpn.register_forward_hook(lambda _, given, out: regions.append([len(each) for each in out[0]]))
    detector.model.roi_heads.box_head.register_forward_hook(lambda _, given, out: rows.append(len(out)))
    pixels = torch.randint(0, 256, (2, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    detector.train().losses(pixels, [torch.tensor([[8.0, 8, 40, 40]])] * 2, [torch.tensor([0])] * 2)
    detector.predict(pixels)
    assert regions == [[20, 20]] * 2  # of the best 20 of each of two maps, or twice as many in training
    assert rows == [2 * 6, 2 * 20]  # 6 regions per image are drawn for the loss
    # As in torchvision: in training, twice as many regions enter non-maximum suppression.
    assert [detector.model.rpn.train(training).pre_nms_top_n() for training in (True, False)] == [40, 20]


@pytest.mark.parametrize(("side", "maps"), [(128, 2), (1024, 4)])
def test_boxes_are_pooled_from_all_maps_but_the_one_that_is_pooled_itself(side, maps):
    model = FasterRCNNDetector(override(RECIPE, image_size=side)).model
    pool = model.roi_heads.box_roi_pool
    assert pool.featmap_names == [str(number) for number in range(maps)]
    assert (pool.output_size, pool.sampling_ratio) == ((7, 7), 2)  # torchvision's
    # What takes part in no prediction is frozen: the convolutions of unused maps.
    unused = model.backbone.fpn.layer_blocks[maps:]
    assert len(unused) == 4 - maps and not any(each.requires_grad for each in unused.parameters())
    assert sum(not each.requires_grad for each in model.parameters()) == len(list(unused.parameters()))


@pytest.mark.parametrize("box_loss", ["", "ciou"])
def test_each_class_is_trained_with_its_own_offsets(box_loss):
    torch.manual_seed(0)
    detector = FasterRCNNDetector(override(RECIPE, box_loss=box_loss), ["Effusion", "Mass", "Nodule"]).train()
    box, mass = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1])
    sum(detector.losses(NOISE, [box] * 3, [mass] * 3).values()).backward()
    offsets = detector.model.roi_heads.box_predictor.bbox_pred.bias.grad.reshape(4, 4)  # background first
    assert offsets.abs().sum(dim=1).gt(0).tolist() == [False, False, True, False]
    optimizer = torch.optim.Adam(detector.parameters(), 3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        sum(detector.train().losses(NOISE, [box] * 3, [mass] * 3).values()).backward()
        optimizer.step()
    assert [boxes[0, 5] for boxes in detector.predict(NOISE)] == [1, 1, 1]  # the most confident box


def test_the_published_network_has_its_parameters():
    with torch.device("meta"):
        detector = FasterRCNNDetector(override(recipe("heidelberg_faster_rcnn", DetectorRecipe), channels=3))
    parts = {name: sum(each.numel() for each in part.parameters()) for name, part in detector.model.named_children()}
    body = sum(each.numel() for each in detector.model.backbone.body.parameters())
    # resnext101_32x8d without its classifier: 88,791,336 - 2,049,000. The pyramid: 1x1 convolutions of 256, 512, 1024 and
    # 2048 channels to 256 and four 3x3 ones, with biases. Two layers of 1,024 on 256 x 7 x 7, then 2 scores and 8 offsets.
    assert body == 88_791_336 - 2_049_000
    assert parts["backbone"] - body == (256 + 512 + 1024 + 2048) * 256 + 4 * 256 + 4 * (256 * 256 * 9 + 256)
    assert parts["roi_heads"] == (256 * 49 + 1) * 1024 + 1025 * 1024 + 1025 * 2 + 1025 * 8
