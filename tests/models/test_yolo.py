"""YOLO: its input, its predictions, its losses and starting weights; prediction never opens a connection."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.ops import box_convert

from kitlib.errors import BundleError
from kitlib.models.families import load_network
from kitlib.models.yolo import ARCHITECTURES, GeneralisedIoU, YoloDetector, read_architecture
from kitlib.recipes.fields import DetectorRecipe
from kitlib.settings import override
from tests import PROJECT

from ultralytics.cfg import get_cfg  # isort: skip
from ultralytics.nn.tasks import yaml_model_load  # isort: skip
from ultralytics.utils.nms import non_max_suppression  # isort: skip  (kitlib.models.yolo makes the import offline)

RECIPE = DetectorRecipe(family="yolo", backbone="yolov8n", width=0.25, image_size=64, max_detections=7)
NOISE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector():
    return varied(YoloDetector(RECIPE))


def varied(detector):
    """Give an untrained network large random last layers, so that its boxes and scores vary over the image."""
    generator = torch.Generator().manual_seed(0)
    head = detector.model.model[-1]
    for part in (head.cv2, head.cv3):
        for level in part:
            level[-1].weight.data.normal_(0, 3, generator=generator)
    return detector.eval()


def test_the_network_sees_the_canvas_scaled_once_in_three_equal_channels(detector):
    seen = []
    hook = detector.model.model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    detector.predict(NOISE)
    hook.remove()
    torch.testing.assert_close(seen[0], (NOISE[:, None] / 255).repeat(1, 3, 1, 1))
    assert (detector.mean, detector.std) == ([0.0] * 3, [1.0] * 3)  # not normalised
    # YOLOv8's 64 channels, times 0.25 in size n and times the recipe's 0.25, rounded up to a multiple of 8.
    assert detector.model.model[0].conv.out_channels == 8


class Fixed(torch.nn.Module):
    """A network that always returns the same output."""

    end2end = False

    def __init__(self, output):
        super().__init__()
        self.output = torch.nn.Parameter(output)

    def forward(self, _):
        return self.output, None


@pytest.mark.parametrize("classes", [["opacity"], ["Effusion", "Mass", "Nodule"]])
@pytest.mark.parametrize("iou", [0.2, 0.7])
def test_boxes_are_those_of_ultralytics_own_suppression(iou, classes):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(3, 2, 200, generator=generator) * 20 + 2
    centres = sizes / 2 + torch.rand(3, 2, 200, generator=generator) * (
        64 - sizes
    )  # inside, because ultralytics does not clip boxes
    raw = torch.cat([centres, sizes, torch.rand(3, len(classes), 200, generator=generator) ** 8], dim=1)
    theirs = non_max_suppression(raw, conf_thres=0.001, iou_thres=iou, max_det=50, multi_label=True)
    ours = YoloDetector(override(RECIPE, nms_iou=iou, max_detections=50), classes, Fixed(raw)).predict(NOISE)
    for found, expected in zip(ours, theirs, strict=True):
        assert 20 < len(expected) <= 50
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_the_best_candidates_enter_the_suppression(monkeypatch):
    monkeypatch.setattr("kitlib.models.yolo.CANDIDATES", 3)
    # Five boxes side by side, of which none would be suppressed.
    raw = torch.tensor([(8.0 + 12 * number, 20, 6, 6, 0.1 * (number + 1)) for number in range(5)]).T.expand(3, -1, -1)
    for found in YoloDetector(RECIPE, model=Fixed(raw)).predict(NOISE):
        np.testing.assert_allclose(found[:, 4], [0.5, 0.4, 0.3], rtol=1e-6)


def test_a_batch_that_overflows_in_float16_is_predicted_in_float32(monkeypatch):
    class Overflowing(Fixed):
        def forward(self, _):
            # In float16, a confidence that passed infinity is not a number.
            return (self.output * torch.nan if torch.is_autocast_enabled("cpu") else self.output), None

    monkeypatch.setattr("kitlib.models.yolo.precision", lambda _: "16-mixed")
    raw = torch.tensor([[20.0, 20, 10, 10, 0.5]]).T.expand(3, 5, 1)
    detector = YoloDetector(RECIPE, model=Overflowing(raw))
    found = detector.predict(NOISE)
    assert detector.overflows == 1
    np.testing.assert_allclose(np.concatenate(found), [[15, 15, 25, 25, 0.5, 0]] * 3)


@pytest.mark.parametrize("end2end", [False, True])
def test_boxes_are_clipped_to_the_canvas_and_kept_from_the_least_score_on(end2end):
    # Centre, size and score: at the border, a sliver, at a corner, outside, at the least score and below it.
    rows = [(0, 10, 20, 10, 0.9), (64, 40, 8, 8, 0.75), (70, 70, 16, 16, 0.5), (80, 30, 9, 9, 0.4), (20, 40, 8, 8, 0.25)]
    raw = torch.tensor([*rows, (40, 20, 8, 8, 0.2)])
    if end2end:  # corners, score and class
        raw = torch.cat([box_convert(raw[:, :4], "cxcywh", "xyxy"), raw[:, 4:], torch.zeros(len(raw), 1)], dim=1)
    network = Fixed((raw if end2end else raw.T).expand(3, -1, -1))
    network.end2end = end2end
    expected = [[0, 5, 10, 15, 0.9, 0], [60, 36, 64, 44, 0.75, 0], [62, 62, 64, 64, 0.5, 0], [16, 36, 24, 44, 0.25, 0]]
    for found in YoloDetector(override(RECIPE, min_score=0.25), model=network).predict(NOISE):
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("backbone", ["yolov5nu", "yolo11n", "yolov10n", "yolo26n"])  # the last two need no suppression
def test_every_generation_returns_boxes_of_the_canvas_best_first_and_limited(backbone):
    detector = YoloDetector(override(RECIPE, backbone=backbone, min_score=1e-9)).eval()
    for boxes in detector.predict(NOISE):
        assert boxes.shape[1] == 6 and 1 <= len(boxes) <= 7
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all() and (boxes[:, :2] < boxes[:, 2:4]).all()
        assert (np.diff(boxes[:, 4]) <= 0).all() and (boxes[:, 4] >= 0).all() and (boxes[:, 4] <= 1).all()


def test_invalid_settings_are_refused(detector):
    with pytest.raises(ValueError, match=r"image_size is 100, which is not a multiple of 32.*choose 96"):
        YoloDetector(override(RECIPE, image_size=100))
    with pytest.raises(ValueError, match=r"image_size is 8, which is not a multiple of 32.*choose 32"):
        YoloDetector(override(RECIPE, image_size=8))
    with pytest.raises(ValueError, match=r"inference_size is 136, which is not a multiple of 32.*choose 128"):
        YoloDetector(override(RECIPE, inference_size=136))
    with pytest.raises(ValueError, match="no model 'yolo99n'"):
        YoloDetector(override(RECIPE, backbone="yolo99n"))
    with pytest.raises(ValueError, match="'yolov9t' has a fixed width"):
        YoloDetector(override(RECIPE, backbone="yolov9t"))
    with pytest.raises(ValueError, match=r"uint8 canvases \(n, 64, 64\), got torch.uint8 \(1, 64, 32\)"):
        detector.predict(torch.zeros(1, 64, 32, dtype=torch.uint8))


def test_a_bundles_weights_give_the_same_predictions_and_no_other_file_is_read(detector):
    record = {
        "family": "yolo",
        "classes": ["opacity"],
        "recipe": {**vars(RECIPE), "starting_weights": "/gone/weights.safetensors"},
    }
    loaded = load_network(record, detector.state_dict(), torch.device("cpu"))
    for boxes, again in zip(detector.predict(NOISE), loaded.predict(NOISE), strict=True):
        np.testing.assert_array_equal(boxes, again)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_network(record, {}, torch.device("cpu"))


def test_starting_weights_are_a_bundle_s_or_ultralytics_own_names(detector, tmp_path):
    save_file(detector.state_dict(), tmp_path / "bundle.safetensors")
    # Named as in ultralytics, with eighty classes, so that the three last layers do not fit (their biases start equal).
    theirs = {name: value.contiguous() for name, value in detector.model.state_dict().items()}
    last = [name for name in theirs if ".cv3." in name and name.rsplit(".", 2)[1] == "2"]
    for name in last:
        theirs[name] = theirs[name].repeat_interleave(80, dim=0)
    save_file(theirs, tmp_path / "ultralytics.safetensors")
    for file, random in (("bundle", 0), ("ultralytics", 3)):
        started = YoloDetector(override(RECIPE, starting_weights=str(tmp_path / f"{file}.safetensors"))).state_dict()
        assert sum(not torch.equal(started[name], value) for name, value in detector.state_dict().items()) == random
    save_file({"model.0.conv.weight": theirs["model.0.conv.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(BundleError, match=r"other\.safetensors lacks .* tensors of yolov8n"):
        YoloDetector(override(RECIPE, starting_weights=str(tmp_path / "other.safetensors")))


def test_weights_of_the_whole_backbone_suffice(detector, tmp_path):
    # The first ten layers, 0 to 9, are YOLOv8's backbone.
    whole = detector.state_dict()
    backbone = {name: value for name, value in whole.items() if int(name.split(".")[2]) < 10}
    save_file(backbone, tmp_path / "backbone.safetensors")
    started = YoloDetector(override(RECIPE, starting_weights=str(tmp_path / "backbone.safetensors")))
    left = [name for name in whole if name not in backbone and not name.endswith("num_batches_tracked")]
    assert started.starting_weights.endswith(f"{len(backbone)} tensors, {len(left)} left random")
    assert all(torch.equal(started.state_dict()[name], value) for name, value in backbone.items())
    del backbone["model.model.9.cv2.conv.weight"]
    save_file(backbone, tmp_path / "less.safetensors")
    with pytest.raises(BundleError, match=r"less\.safetensors lacks 1 tensors of yolov8n, .* random: model\.model\.9"):
        YoloDetector(override(RECIPE, starting_weights=str(tmp_path / "less.safetensors")))


def test_a_description_in_a_file_is_never_evaluated(tmp_path):
    # ultralytics evaluates the activation, and the name of a backbone may come from an untrusted bundle.
    evil = {"nc": 1, "scales": {"n": [0.33, 0.25, 1024]}, "backbone": [[-1, 1, "Conv", [64, 3, 2]]]}
    evil |= {"head": [[[0], 1, "Detect", ["nc"]]], "activation": f"open({str(tmp_path / 'evaluated')!r}, 'w') and nn.SiLU()"}
    (tmp_path / "yolov8n.yaml").write_text(json.dumps(evil))
    with pytest.raises(ValueError, match=r"ultralytics has no model '.*yolov8n'"):
        YoloDetector(override(RECIPE, backbone=str(tmp_path / "yolov8n")))
    assert not (tmp_path / "evaluated").exists()


def test_prediction_imports_no_training_library_and_never_opens_a_connection(tmp_path):
    code = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from kitlib.recipes.fields import DetectorRecipe
from kitlib.models.yolo import YoloDetector
detector = YoloDetector(DetectorRecipe(family="yolo", backbone="yolo11n", image_size=64)).eval()
assert len(detector.predict(torch.zeros(2, 64, 64, dtype=torch.uint8))) == 2
heavy = {"pytorch_lightning", "albumentations", "polars", "matplotlib.pyplot"} & set(sys.modules)
assert not heavy, heavy
from ultralytics.utils import SETTINGS
assert not SETTINGS["sync"]  # ultralytics' telemetry
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("YOLO_")}
    clean |= {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)}
    (tmp_path / "here").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "here", env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list((tmp_path / "here").iterdir())


def test_a_larger_canvas_at_prediction():
    found = varied(YoloDetector(override(RECIPE, inference_size=128))).predict(
        torch.randint(0, 256, (1, 128, 128), dtype=torch.uint8)
    )
    assert found[0][:, :4].max() > 64


def box_losses(**changes):
    """Return ultralytics' loss parts (box, class, dfl) of one batch, with the gains in `changes`."""
    torch.manual_seed(0)
    detector = YoloDetector(override(RECIPE, **{name: value for name, value in changes.items() if name == "box_loss"}))
    gains = {"box": 7.5, "cls": 0.5, "dfl": 1.5} | {name: value for name, value in changes.items() if name != "box_loss"}
    detector.model.args = get_cfg(overrides=gains)
    batch = {
        "img": (NOISE[:, None] / 255).repeat(1, 3, 1, 1),
        "batch_idx": torch.tensor([0.0, 2.0]),
        "cls": torch.zeros(2, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.4, 0.3, 0.3]]),
    }
    return detector.model.train().loss(batch)[0].detach()


def test_gains_reach_the_loss():
    plain = box_losses()
    for place, name in enumerate(("box", "cls", "dfl")):
        doubled = box_losses(**{name: 2 * {"box": 7.5, "cls": 0.5, "dfl": 1.5}[name]})
        expected = plain.clone()
        expected[place] *= 2
        torch.testing.assert_close(doubled, expected)


def test_giou_replaces_ciou_in_the_box_loss_alone():
    complete, generalised = box_losses(box_loss="ciou"), box_losses(box_loss="giou")
    assert complete[0] != generalised[0]
    torch.testing.assert_close(complete[1:], generalised[1:])
    with pytest.raises(ValueError, match="valid for a yolo: ciou, giou"):
        box_losses(box_loss="smooth_l1")


def test_giou_is_the_box_loss_of_both_of_yolov10s_heads():
    for box_loss in ("giou", "ciou"):
        detector = YoloDetector(override(RECIPE, backbone="yolov10n", box_loss=box_loss))
        detector.model.args = get_cfg()
        criterion = detector.model.init_criterion()
        heads = [criterion.one2many, criterion.one2one]
        assert [isinstance(head.bbox_loss, GeneralisedIoU) for head in heads] == [box_loss == "giou"] * 2


def test_the_generalised_iou_equals_torchvisions():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 20, 20]]), torch.tensor([[0.0, 0, 10, 5], [30.0, 30, 40, 40]])
    weight = torch.tensor([[0.5], [1.0]])
    loss, _ = GeneralisedIoU(1)(
        torch.zeros(2, 4), boxes[0], torch.ones(2, 2), boxes[1], weight, weight.sum(), torch.ones(2, dtype=torch.bool),
        torch.tensor([64.0, 64.0]), torch.ones(2, 1),
    )  # fmt: skip
    # IoU 1/2, hull equal to the larger box: 1/2. Disjoint areas of 225 and 100, hull 35 x 35: -(1225 - 325) / 1225.
    assert loss.item() == pytest.approx((0.5 * (1 - 0.5) + 1.0 * (1 + 900 / 1225)) / 1.5, abs=1e-5)


NAMES = [f"yolo{version}{scale}" for version in ("v8", "11", "12") for scale in "nsmlx"]
NAMES += [
    "yolov5nu",
    "yolov5lu",
    "yolov5n",
    "yolov5n6",
    "yolov3u",
    "yolov3-tinyu",
    "yolov6s",
    "yolov9c",
    "yolov10b",
    "yolov8s-p2",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_name_gives_the_configuration_that_ultralytics_gives(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_architecture(name) == yaml_model_load(f"{name}.yaml")


@pytest.mark.parametrize("name", ["yolo11n", "yolo11", "yolov5nu", "yolov5n", "yolov5"])
def test_a_file_in_the_current_folder_is_not_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("yolo11n", "yolo11", "yolov5nu", "yolov5u", "yolov5n", "yolov5"):
        (tmp_path / f"{file}.yaml").write_text("nc: 1\nactivation: __import__('os').mkdir('ran')\nbackbone: []\nhead: []\n")
    assert "activation" not in read_architecture(name)
    YoloDetector(DetectorRecipe(family="yolo", backbone=name))
    assert not (tmp_path / "ran").exists()


def test_a_custom_architecture_can_be_built_for_different_classes(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "custom", read_architecture("yolov8n"))
    for classes in (["a", "b", "c"], ["a"]):
        YoloDetector(override(RECIPE, backbone="custom", width=1.0), classes)
        assert ARCHITECTURES["custom"] == read_architecture("yolov8n")


@pytest.mark.parametrize("name", ["rtdetr-l", "yolov8-rtdetr", "yolo11n-seg", "yolov8n-cls", "yoloe-11s"])
def test_a_model_whose_output_is_not_boxes_in_pixels_is_refused(name):
    with pytest.raises(ValueError, match=rf"the last layer of '{name}' is \w+, but the kit supports only Detect and"):
        YoloDetector(override(RECIPE, backbone=name))


@pytest.mark.parametrize("name", ["yolov5n6u", "yolov5n-p6u", "yolov5n6", "yolov8n6", "yolov10n"])
def test_ultralytics_names_of_larger_inputs_are_known(name):
    assert YoloDetector(override(RECIPE, backbone=name)).predict(torch.zeros(1, *[RECIPE.image_size] * 2, dtype=torch.uint8))
