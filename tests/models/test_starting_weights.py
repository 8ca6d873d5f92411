"""Starting weights: which files are found and read, and which tensors are loaded."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kitlib.bundle import save_bundle
from kitlib.errors import BundleError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import load_starting_weights, read_starting_weights
from kitlib.paths import find_starting_weights
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
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
        with pytest.raises(BundleError, match=f"{name}.*[Pp]ickles are never loaded"):
            read_starting_weights(tmp_path / name)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path)
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    with pytest.raises(BundleError, match=r"missing\.safetensors.*nothing is downloaded"):
        read_starting_weights(tmp_path / "missing.safetensors")
    with pytest.raises(BundleError, match="'nih/fold0/bundle' are neither a file, a folder nor a finished run"):
        read_starting_weights("nih/fold0/bundle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"model\.json is missing"):
        read_starting_weights("empty")


def test_a_backbone_is_summed_for_grey_and_spread_for_colours(tmp_path):
    torch.manual_seed(0)
    colours, grey, again = Model(3), Model(1), Model(3)
    before = [each.weight.clone() for each in grey.head]
    save_file(backbone_of(colours) | {"fc.weight": torch.zeros(1000, 4)}, tmp_path / "timm.safetensors")
    report = load_starting_weights(grey, tmp_path / "timm.safetensors")
    assert report["loaded"] == [f"backbone.{name}" for name in ("0.bias", "0.weight", "1.bias", "1.weight")]
    assert report["random"] == [f"head.{name}" for name in ("0.bias", "0.weight", "1.bias", "1.weight")]
    assert report["unused"] == ["fc.weight"]
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
