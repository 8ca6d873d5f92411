"""Starting weights: which files are found and read, and which tensors are loaded."""

import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from kitlib.bundle import save_bundle
from kitlib.errors import BundleError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.families import family_of
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.models.published_names import without_prefixes
from kitlib.models.starting_weights import differ_in_classes, load_starting_weights, read_starting_weights
from kitlib.paths import find_starting_weights
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, StudyRecipe
from kitlib.settings import override
from tests.test_bundle import RECORD, WEIGHTS


class Model(nn.Module):
    def __init__(self, channels=1, classes=5):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Linear(4, 4))
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, classes))


def backbone_of(model):
    return {name.removeprefix("backbone."): each for name, each in model.state_dict().items() if name.startswith("back")}


def test_weights_are_read_from_a_bundle_a_run_a_name_and_both_kinds_of_file(tmp_path, monkeypatch):
    save_bundle(tmp_path / "nih" / "fold0" / "bundle", WEIGHTS, RECORD)
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: each.numpy() for name, each in WEIGHTS.items()})
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path)
    for path in (
        tmp_path / "nih" / "fold0" / "bundle",
        tmp_path / "nih" / "fold0",
        "nih/fold0/bundle",
        "nih/fold0",
        tmp_path / "a.safetensors",
        tmp_path / "a.npz",
    ):
        found = read_starting_weights(path)
        assert found.keys() == WEIGHTS.keys() and torch.equal(found["a"], WEIGHTS["a"]), path
    assert find_starting_weights("nih/fold0") == tmp_path / "nih" / "fold0" / "bundle"


SMALL = DetectorRecipe(backbone="test_resnet", image_size=64, fpn_channels=16, box_hidden=16)


# Layers of the classes: two in Faster R-CNN, one in RetinaNet, one for each of three maps in YOLOv8, two in YOLOv10. Each
# has a weight and a bias.
@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, 4),
        ({"family": "retinanet", "box_hidden": 1024}, 2),
        ({"family": "yolo", "backbone": "yolov8n", "fpn_channels": 256, "box_hidden": 1024}, 6),
        ({"family": "yolo", "backbone": "yolov10n", "fpn_channels": 256, "box_hidden": 1024}, 12),
    ],
)
def test_a_detector_for_other_classes_starts_all_but_the_layers_of_the_classes(tmp_path, changes, left):
    recipe = override(SMALL, **changes)
    network = family_of(recipe).network
    save_bundle(tmp_path, network(recipe, ["opacity"]).state_dict(), RECORD | {"classes": ["opacity"]})
    started = override(recipe, starting_weights=str(tmp_path))
    assert network(started, ["opacity"]).starting_weights.endswith(" tensors, 0 left random")
    # As many classes would fit, but they are others.
    for classes in (["Mass"], ["Mass", "opacity"]):
        assert network(started, classes).starting_weights.endswith(f" tensors, {left} left random")


def test_classes_in_another_order_are_other_classes(tmp_path):
    save_bundle(tmp_path / "bundle", WEIGHTS, RECORD | {"classes": ["Mass", "Nodule"]})
    save_file(WEIGHTS, tmp_path / "file.safetensors")
    for classes, expected in ((["Mass", "Nodule"], False), (["Nodule", "Mass"], True), (["Mass"], True)):
        assert differ_in_classes(tmp_path / "bundle", classes) == expected
        assert not differ_in_classes(tmp_path / "file.safetensors", classes)  # which does not name its classes


def test_a_damaged_bundle_is_noticed(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    content = bytearray((tmp_path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        read_starting_weights(tmp_path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "inside.npz", a=np.array([Bomb()], dtype=object))
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bare.npz", "inside.npz", "weights.pt"):
        with pytest.raises(BundleError, match=f"{name}.*pickled objects.* are never loaded"):
            read_starting_weights(tmp_path / name)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path)
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    with pytest.raises(BundleError, match=r"missing\.safetensors.*nothing is downloaded"):
        read_starting_weights(tmp_path / "missing.safetensors")
    with pytest.raises(BundleError, match="'nih/fold0/bundle' are neither a file, a folder nor a finished run"):
        read_starting_weights("nih/fold0/bundle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"model\.json is missing.*it has 0: none"):
        read_starting_weights("empty")


def test_a_backbone_is_summed_for_grey_and_spread_for_colours(tmp_path):
    torch.manual_seed(0)
    colours, grey, again = Model(3), Model(1), Model(3)
    before = [each.weight.clone() for each in grey.head]
    save_file(backbone_of(colours) | {"fc.weight": torch.zeros(1000, 4)}, tmp_path / "timm.safetensors")
    report = load_starting_weights(grey, tmp_path / "timm.safetensors")
    assert report["loaded"] == [f"backbone.{name}" for name in ("0.bias", "0.weight", "1.bias", "1.weight")]
    assert report["random"] == [f"head.{name}" for name in ("0.bias", "0.weight", "1.bias", "1.weight")]
    assert report["unused"] == ["backbone.fc.weight"]
    assert all(torch.equal(each.weight, old) for each, old in zip(grey.head, before, strict=True))
    # a grey image in all three colours gives the same features as a single grey channel
    picture = torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(grey.backbone[0](picture), colours.backbone[0](picture.expand(-1, 3, -1, -1)))
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    load_starting_weights(again, tmp_path / "grey.safetensors")
    torch.testing.assert_close(again.backbone[0](picture.expand(-1, 3, -1, -1)), grey.backbone[0](picture))


def test_a_head_is_loaded_whole_or_not_at_all(tmp_path):
    torch.manual_seed(0)
    five, other_five, four = Model(), Model(), Model(classes=4)
    save_file(five.state_dict(), tmp_path / "whole.safetensors")
    assert load_starting_weights(other_five, tmp_path / "whole.safetensors")["random"] == []
    assert torch.equal(five.head[1].weight, other_five.head[1].weight)
    # the hidden layer would fit, but it was trained for five other classes
    report = load_starting_weights(four, tmp_path / "whole.safetensors")
    assert report["random"] == report["unused"] == ["head.0.bias", "head.0.weight", "head.1.bias", "head.1.weight"]
    assert not torch.equal(five.head[0].weight, four.head[0].weight)


def test_a_findings_backbone_starts_a_study_classifier(tmp_path):
    torch.manual_seed(0)
    recipe = FindingsRecipe(backbone="test_resnet", channels=3, hidden=8)
    findings = FindingsClassifier(recipe, ["Mass", "Nodule"])
    save_bundle(tmp_path, findings.state_dict(), RECORD | {"family": "findings"})
    study = StudyClassifier(StudyRecipe(backbone="test_resnet", channels=3, hidden=8))
    report = load_starting_weights(study, tmp_path)
    assert {name.split(".")[0] for name in report["loaded"]} == {"backbone"}
    assert {name.split(".")[0] for name in report["random"]} == {"head"}
    for name, each in findings.backbone.state_dict().items():
        assert torch.equal(study.backbone.state_dict()[name], each)


def test_weights_that_fit_nowhere_are_an_error(tmp_path):
    save_file({"0.weight": torch.zeros(7, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(BundleError, match=r"no tensor of .* fits the model"):
        load_starting_weights(Model(1), tmp_path / "other.safetensors")


def published_forms(folder, network, tensors):
    """Write `tensors`, those of `network`, in the forms in which others publish weights; return name -> path."""
    hub = folder / "hub"
    hub.mkdir()
    save_file(tensors, hub / "model.safetensors")
    (hub / "config.json").write_text("{}")
    torch.save(tensors, hub / "pytorch_model.bin")
    torch.save(tensors, folder / "plain.pth")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}, folder / "dp.pth.tar.pt"
    )
    lightning = {"state_dict": {f"model.{name}": value for name, value in tensors.items()}, "hyper_parameters": {"lr": 0.1}}
    torch.save(lightning, folder / "lightning.ckpt")
    torch.save({"model": tensors, "model_ema": {name: value + 0 for name, value in tensors.items()}}, folder / "script.pt")
    np.savez(folder / "arrays.npz", **{name: value.numpy() for name, value in tensors.items()})
    return {path.name: path for path in (hub, *folder.glob("*.*"))}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_every_published_form_of_a_backbone_loads_wholly(tmp_path, backbone):
    torch.manual_seed(0)
    published = timm.create_model(backbone, num_classes=1000)
    forms = published_forms(tmp_path, published, published.state_dict())
    assert len(forms) == 6
    for name, path in forms.items():
        model = FindingsClassifier(FindingsRecipe(backbone=backbone, channels=3, hidden=8, image_size=160), ["Mass"])
        assert all(part.startswith("head.") for part in load_starting_weights(model, path)["random"]), name
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, published.state_dict()[key]) or key.endswith("num_batches_tracked"), (name, key)


def test_a_position_embedding_of_another_size_is_resized_and_never_left_random(tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("test_vit", num_classes=10, img_size=160)  # patches of 16 pixels: 10 x 10 of them
    torch.nn.init.normal_(published.pos_embed)
    torch.save(published.state_dict(), tmp_path / "vit.pth")
    model = FindingsClassifier(FindingsRecipe(backbone="test_vit", channels=3, hidden=8, image_size=224), ["Mass"])
    report = load_starting_weights(model, tmp_path / "vit.pth")
    assert "backbone.pos_embed" in report["loaded"] and {name.split(".")[0] for name in report["random"]} == {"head"}
    expected = resample_abs_pos_embed(published.pos_embed.detach(), [14, 14], num_prefix_tokens=1, interpolation="bicubic")
    torch.testing.assert_close(model.backbone.pos_embed.detach(), expected)


def test_chexnets_names_and_torchvisions_are_timms(tmp_path):
    """CheXNet's published checkpoint: `module.densenet121.features...denselayer1.norm.1.weight`, a classifier of 14."""
    torch.manual_seed(0)
    published = torchvision.models.densenet121(num_classes=14)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value
        for name, value in published.state_dict().items()
    }
    torch.save(
        {"state_dict": {f"module.densenet121.{name}": value for name, value in old.items()}}, tmp_path / "chexnet.pth.tar.pt"
    )
    torch.save(published.state_dict(), tmp_path / "torchvision.pth")
    for name in ("chexnet.pth.tar.pt", "torchvision.pth"):
        model = FindingsClassifier(FindingsRecipe(backbone="densenet121", channels=1, hidden=0), ["Mass"])
        report = load_starting_weights(model, tmp_path / name)
        assert all(part.startswith("head.") for part in report["random"])
        weight = model.backbone.features.denseblock4.denselayer16.conv2.weight
        assert torch.equal(weight, published.features.denseblock4.denselayer16.conv2.weight)


def test_torchvisions_coco_faster_rcnn_starts_a_detector_but_for_its_class_layers(tmp_path):
    torch.manual_seed(0)
    pyramid = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    published = torchvision.models.detection.FasterRCNN(pyramid, num_classes=91)  # as fasterrcnn_resnet50_fpn, but smaller
    torch.save(published.state_dict(), tmp_path / "coco.pth")
    recipe = DetectorRecipe(family="faster_rcnn", backbone="resnet18", channels=3, image_size=512)
    detector = FasterRCNNDetector(override(recipe, starting_weights=str(tmp_path / "coco.pth")))
    assert torch.equal(detector.model.roi_heads.box_head.fc6.weight, published.roi_heads.box_head.fc6.weight)
    assert torch.equal(
        detector.model.backbone.fpn.inner_blocks[0][0].weight, published.backbone.fpn.inner_blocks[0][0].weight
    )
    # Scores and boxes of 2 classes in place of 91, and of 9 anchors a cell in place of 3.
    assert detector.starting_weights.endswith("8 left random")
    with pytest.raises(BundleError, match=r"would stay random: model\.backbone\.fpn, model\.roi_heads\.box_head"):
        FasterRCNNDetector(override(detector.recipe, fpn_channels=128))


def test_weights_that_are_not_finite_or_not_weights_are_refused(tmp_path):
    torch.save({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "nan.pth")
    torch.save({"epoch": 3, "optimizer": [1]}, tmp_path / "none.pth")
    torch.save({"ema": {"decay": 0.99}, "state_dict": WEIGHTS}, tmp_path / "second.pth")
    assert read_starting_weights(tmp_path / "second.pth").keys() == WEIGHTS.keys()
    (tmp_path / "hostile.pth").write_bytes(b"\x80\x02)R.")
    torch.save(nn.Linear(2, 2), tmp_path / "object.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    endless = {"epoch": 3}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    for name, message in {
        "nan.pth": r"NaN or infinite values in 1 tensors, such as 'a'\. ",
        "none.pth": r"no dictionary of tensors in a known place, only the keys \['epoch', 'optimizer'\]",
        "list.pth": "in a known place, only a list",
        "tensor.pth": "in a known place, only a Tensor",
        "endless.pth": r"in a known place, only the keys \['epoch', 'state_dict'\]",
        "hostile.pth": r"cannot be read as weights \(\w+Error\)",
        "object.pth": "cannot be read as weights .* pickled objects, which are never loaded",
    }.items():
        with pytest.raises(BundleError, match=message):
            read_starting_weights(tmp_path / name)


def test_weights_are_found_in_a_checkpoint_and_the_moving_average_comes_first(tmp_path):
    trained, average, loss = {"a": torch.zeros(2)}, {"a": torch.ones(2)}, torch.tensor(0.3)
    for name, (content, expected) in {
        "only": (trained, trained),
        "entry": ({"best_loss": loss, "state_dict": trained}, trained),
        "inner": ({"model": {"step": loss, "state_dict": trained}}, trained),
        "timm": ({"state_dict": trained, "state_dict_ema": average}, average),
        "script": ({"model": trained, "model_ema": average}, average),
        "empty": ({"model": {"depth": 3}, "a": average["a"]}, average),
        "counts": ({"weights": {"a": average["a"], "steps": torch.tensor([7])}}, average | {"steps": torch.tensor([7])}),
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = read_starting_weights(tmp_path / f"{name}.pth")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), name


def test_prefixes_are_removed_one_by_one_and_never_merge_two_tensors():
    def variants(*names):
        return [sorted(each) for each in without_prefixes(dict.fromkeys(names, torch.ones(1)))]

    # A name without the prefix stays.
    assert variants("module.model.a", "b") == [["b", "module.model.a"], ["b", "model.a"], ["a", "b"]]
    assert variants("module.a", "a") == [["a", "module.a"]]
    assert variants("features.a") == [["features.a"]]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "vgg11", "densenet121"])
def test_weights_of_another_network_fit_nowhere(tmp_path, backbone):
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    with torch.device("meta"):
        model = FindingsClassifier(FindingsRecipe(backbone=backbone, channels=3, hidden=8), ["Mass"])
    with pytest.raises(BundleError, match=r"no tensor of .* fits the model"):
        load_starting_weights(model, tmp_path / "vit.safetensors")


@pytest.mark.parametrize("mount", ["weights", "datasets/me/weights", "models/me/weights/pytorch/small/1"])
def test_weights_are_attached_by_name(tmp_path, monkeypatch, mount):
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path / "runs")
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    (tmp_path / mount).mkdir(parents=True)
    save_file(WEIGHTS, tmp_path / mount / "a.safetensors")
    inner = mount.partition("weights")[2]
    for name in (
        f"weights{inner}",
        f"weights{inner}/a.safetensors",
        f"me/weights{inner}",
        f"me/weights{inner}/a.safetensors",
    ):
        assert find_starting_weights(name) == tmp_path / mount / "a.safetensors"
    torch.save(WEIGHTS, tmp_path / mount / "b.pth")
    assert find_starting_weights(f"weights{inner}") == tmp_path / mount / "a.safetensors"
    save_file(WEIGHTS, tmp_path / mount / "c.safetensors")
    with pytest.raises(BundleError, match=r"must hold one weights file, but it has 2: a\.safetensors, c\.safetensors"):
        find_starting_weights(f"weights{inner}")
    with pytest.raises(BundleError, match=r"weights/d\.pth' does not exist"):
        find_starting_weights("weights/d.pth")
