"""RetinaNet: its maps and anchors, its predictions, its losses and its starting weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.ops import box_iou

from kitlib.device import computing_in
from kitlib.errors import BundleError
from kitlib.models.families import load_network
from kitlib.models.retinanet import RetinaNetDetector
from kitlib.recipes.fields import BOX_LOSSES, DetectorRecipe
from kitlib.settings import override

RECIPE = DetectorRecipe(
    family="retinanet", backbone="test_resnet", image_size=64, fpn_channels=16, proposals=20, max_detections=7
)
NOISE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return RetinaNetDetector(RECIPE).eval()


@pytest.mark.parametrize(
    ("side", "strides"), [(64, [4]), (96, [4]), (256, [4, 8, 16]), (512, [8, 16, 32]), (1024, [8, 16, 32, 64])]
)
def test_a_canvas_uses_the_maps_whose_anchors_fit_into_it(side, strides):
    model = RetinaNetDetector(override(RECIPE, image_size=side)).model
    # Lin et al. 2017, section 4: sides of 32 pixels on the map of stride 8, times 1, 2^(1/3) and 2^(2/3), in 3 shapes.
    expected = [tuple(4 * stride * 2 ** (step / 3) for step in range(3)) for stride in strides]
    np.testing.assert_allclose(model.anchor_generator.sizes, expected)
    assert model.head.regression_head.bbox_reg.out_channels == 9 * 4
    features = model.backbone(torch.zeros(1, 1, side, side))
    assert [side // each.shape[-1] for each in features.values()] == strides


def test_predictions_are_boxes_of_the_canvas_best_first_and_limited():
    torch.manual_seed(0)
    # Of 200 boxes, more than 7 remain after non-maximum suppression on every processor; of 20, not always.
    found = RetinaNetDetector(override(RECIPE, proposals=200)).eval().predict(NOISE)
    assert len(found) == 3
    for boxes in found:
        assert boxes.shape == (7, 6)  # an untrained network gives each anchor a score of about 0.01
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all() and (boxes[:, :2] < boxes[:, 2:4]).all()
        assert (np.diff(boxes[:, 4]) <= 0).all() and boxes[:, 4] == pytest.approx(0.01, abs=0.005)


def test_the_recipe_limits_the_boxes_before_and_after_their_suppression():
    torch.manual_seed(0)
    detector = RetinaNetDetector(override(RECIPE, image_size=128, proposals=9, nms_iou=1.0, max_detections=99)).eval()
    pixels = torch.randint(0, 256, (2, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Two maps; every anchor has a score above 0.001. No two boxes have an IoU above 1.
    assert [len(boxes) for boxes in detector.predict(pixels)] == [18, 18]
    strict = RetinaNetDetector(override(detector.recipe, proposals=99, nms_iou=0.2)).eval()
    for boxes in strict.predict(pixels):
        overlaps = box_iou(*[torch.from_numpy(boxes[:, :4])] * 2).fill_diagonal_(0)
        assert len(boxes) > 7 and overlaps.max() <= 0.2 + 1e-5


@pytest.mark.parametrize("box_loss", BOX_LOSSES["retinanet"])
def test_the_box_loss_is_the_recipes(box_loss):
    torch.manual_seed(0)
    chosen, plain = RetinaNetDetector(override(RECIPE, box_loss=box_loss)), RetinaNetDetector(RECIPE)
    plain.load_state_dict(chosen.state_dict())
    box = [torch.tensor([[8.0, 8, 40, 24]])] * 3
    loss, default = (each.train().losses(NOISE, box, [torch.tensor([0])] * 3) for each in (chosen, plain))
    assert loss["classification"].item() == pytest.approx(default["classification"].item(), rel=1e-5)
    is_default = box_loss == BOX_LOSSES["retinanet"][0]
    assert (loss["bbox_regression"].item() == pytest.approx(default["bbox_regression"].item(), rel=1e-5)) == is_default


def test_losses_fall_towards_a_perfect_box_and_accept_images_without_boxes(detector):
    detector.train()
    box, one, none = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([0]), torch.zeros(0, dtype=torch.int64)
    losses = detector.losses(NOISE, [box, torch.zeros(0, 4), box], [one, none, one])
    assert set(losses) == {"classification", "bbox_regression"} and all(torch.isfinite(loss) for loss in losses.values())
    without = detector.losses(NOISE, [torch.zeros(0, 4)] * 3, [none] * 3)
    assert without["bbox_regression"] == 0 and without["classification"] > 0
    detector.eval()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_moves_no_box_by_half_a_pixel(detector, precision):
    exact = detector.predict(NOISE)
    with computing_in(precision):
        half = detector.predict(NOISE)
    for boxes, same in zip(exact, half, strict=True):
        # Anchors of nearly the same score may change places.
        distances = np.abs(boxes[:, None, :4] - same[None, :, :4]).max(axis=2)
        assert np.median(distances.min(axis=1)) < 0.5


def test_a_bundles_weights_predict_the_same(detector):
    record = {"family": "retinanet", "recipe": {**vars(RECIPE)}, "classes": ["opacity"]}
    again = load_network(record, detector.state_dict(), torch.device("cpu"))
    for boxes, same in zip(detector.predict(NOISE), again.predict(NOISE), strict=True):
        np.testing.assert_array_equal(boxes, same)


def test_torchvisions_weights_of_coco_start_all_but_the_classes(tmp_path):
    torch.manual_seed(1)
    published = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    save_file(published.state_dict(), tmp_path / "coco.safetensors")
    recipe = DetectorRecipe(family="retinanet", backbone="resnet50", channels=3, image_size=512)
    detector = RetinaNetDetector(override(recipe, starting_weights=str(tmp_path / "coco.safetensors")))
    loaded = detector.state_dict()
    for name, tensor in published.state_dict().items():
        if name.startswith(("backbone.fpn.inner", "backbone.fpn.layer", "head.regression_head")):
            assert torch.equal(loaded[f"model.{name}"], tensor), name
    assert torch.equal(loaded["model.backbone.body.layer4.0.conv1.weight"], published.backbone.body.layer4[0].conv1.weight)
    assert detector.starting_weights.endswith("2 left random")  # 91 classes of COCO against one
    with pytest.raises(BundleError, match="random"):
        RetinaNetDetector(override(recipe, backbone="resnet18", starting_weights=str(tmp_path / "coco.safetensors")))
