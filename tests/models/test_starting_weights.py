"""Starting weights: what is found and read, what is loaded, and SqueezeNet's rewritten first convolution."""

import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import kitlib.models.squeezenet  # noqa: F401  registers the name
from kitlib.bundle import BundleError, save_bundle
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import find_starting_weights, load_starting_weights, read_starting_weights, renormalised
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
from tests import REAL_DATA
from tests.test_bundle import RECORD, WEIGHTS

SQUEEZENET = REAL_DATA / "weights" / "squeezenet1_1_imagenet_features_fp32.npz"
real_weights = pytest.mark.skipif(not SQUEEZENET.is_file(), reason=f"no {SQUEEZENET}")


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


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.paths.runs_root", lambda: tmp_path)
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    with pytest.raises(BundleError, match=r"missing\.safetensors.*nothing is downloaded"):
        read_starting_weights(tmp_path / "missing.safetensors")
    with pytest.raises(BundleError, match="'nih/fold0/bundle' are no file, folder or finished run"):
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
    # the same grey picture in all three colours gives the same features as once
    picture = torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(grey.backbone[0](picture), colours.backbone[0](picture.expand(-1, 3, -1, -1)))
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    load_starting_weights(again, tmp_path / "grey.safetensors")
    torch.testing.assert_close(again.backbone[0](picture.expand(-1, 3, -1, -1)), grey.backbone[0](picture))


def test_a_head_is_taken_whole_or_not_at_all(tmp_path):
    torch.manual_seed(0)
    five, other_five, four = Model(), Model(), Model(classes=4)
    save_file(five.state_dict(), tmp_path / "whole.safetensors")
    assert load_starting_weights(other_five, tmp_path / "whole.safetensors")["random"] == []
    assert torch.equal(five.head[1].weight, other_five.head[1].weight)
    # the hidden layer would fit, yet it was made for five other classes
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
    with pytest.raises(BundleError, match="fits nowhere"):
        load_starting_weights(Model(1), tmp_path / "other.safetensors")


numbers = st.floats(0.1, 2)
pair = st.tuples(st.lists(numbers, min_size=3, max_size=3), st.lists(numbers, min_size=3, max_size=3))


@settings(max_examples=25, deadline=None)
@given(had=pair, wants=pair, seed=st.integers(0, 99))
def test_a_renormalised_convolution_answers_as_before(had, wants, seed):
    torch.manual_seed(seed)
    pixels, layer = torch.rand(2, 3, 6, 6).double(), nn.Conv2d(3, 4, 3).double()

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    weight, bias = renormalised(layer.weight, layer.bias, had, wants)
    # the means and spreads are float32 on one side and float64 on the other
    torch.testing.assert_close(torch.conv2d(normalised(*wants), weight, bias), layer(normalised(*had)), rtol=1e-4, atol=1e-3)


def test_a_caffe_squeezenet_is_rewritten_and_other_arrays_are_not(tmp_path):
    torch.manual_seed(0)
    arrays = {name: each.numpy() for name, each in timm.create_model("squeezenet1_1", num_classes=0).state_dict().items()}
    np.savez(tmp_path / "squeezenet.npz", **arrays)
    check_first_activation(tmp_path / "squeezenet.npz")
    del arrays["features.12.squeeze.weight"]
    np.savez(tmp_path / "other.npz", **arrays)
    other = read_starting_weights(tmp_path / "other.npz")
    assert all(np.array_equal(other[name], arrays[name]) for name in arrays)


@pytest.mark.real_data
@real_weights
def test_the_real_squeezenet_is_rewritten_exactly():
    check_first_activation(SQUEEZENET)


def check_first_activation(path):
    """The first layer's answers to grey pixels 0..255 against those of the untouched arrays to BGR less the mean."""
    arrays = np.load(path)
    pixels = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bgr = pixels[:, None].expand(-1, 3, -1, -1).double() - torch.tensor([103.939, 116.779, 123.68]).double().view(3, 1, 1)
    weight, bias = (torch.from_numpy(arrays[f"features.0.{part}"]).double() for part in ("weight", "bias"))
    expected = torch.conv2d(bgr, weight, bias, stride=2)
    for channels in (1, 3):
        model = StudyClassifier(StudyRecipe(backbone="squeezenet1_1", channels=channels, hidden=8)).eval()
        report = load_starting_weights(model, path)
        assert len(report["loaded"]) == 50 and not report["unused"]
        found = model.backbone.features[0](model.normalise(pixels).expand(-1, channels, -1, -1))
        # float32 weights for outputs up to a thousand
        torch.testing.assert_close(found.double() / 1000, expected / 1000, rtol=0, atol=1e-6)


@pytest.mark.real_data
@real_weights
def test_the_whole_backbone_gives_the_features_of_the_untouched_network():
    # Pools that round down, as Keras's do: the kit's round up, which is the same for sides that are multiples of 16.
    arrays = {name: torch.from_numpy(each) for name, each in np.load(SQUEEZENET).items()}
    model = timm.create_model("squeezenet1_1", num_classes=0).eval()
    model.load_state_dict(arrays)
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = False
    pixels = torch.randint(0, 256, (1, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    bgr = pixels[:, None].expand(-1, 3, -1, -1).float() - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    kit = StudyClassifier(StudyRecipe(backbone="squeezenet1_1", hidden=8)).eval()
    load_starting_weights(kit, SQUEEZENET)
    with torch.inference_mode():
        torch.testing.assert_close(kit.backbone(kit.normalise(pixels)), model(bgr), rtol=1e-4, atol=1e-4)
