"""Conversion of pickled models: the tensors come out, and nothing of the file is run."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.errors import BundleError
from kitlib.models.convert_weights import convert_weights


def test_the_tensors_of_an_ultralytics_checkpoint_are_its_state_dict(tmp_path):
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", ch=3, nc=80, verbose=False)
    torch.save({"epoch": -1, "ema": None, "model": model.half(), "train_args": {"lr0": 0.01}}, tmp_path / "yolov8n.pt")
    done = CliRunner().invoke(app, ["convert-weights", str(tmp_path / "yolov8n.pt"), str(tmp_path / "y.safetensors")])
    assert done.exit_code == 0 and "ultralytics.nn.tasks.DetectionModel" in done.output
    tensors, expected = load_file(tmp_path / "y.safetensors"), model.float().state_dict()
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


class Whole(nn.Module):
    """As torchxrayvision's models: pickled whole, with a constructor that must not run."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.register_buffer("window", torch.ones(2), persistent=False)
        self.loaded = 0

    def __setstate__(self, state):
        pytest.fail("the file's class was used")


def test_a_model_pickled_whole_is_read_without_its_class(tmp_path):
    model = Whole()
    torch.save(model, tmp_path / "whole.pt")
    names = convert_weights(tmp_path / "whole.pt", tmp_path / "w.safetensors")
    assert any(name.endswith("Whole") for name in names)
    assert load_file(tmp_path / "w.safetensors").keys() == model.state_dict().keys()


def test_the_moving_average_comes_first_and_whole_numbers_stay_whole(tmp_path):
    models = {name: nn.Sequential(nn.BatchNorm1d(2)).half() for name in ("model", "ema")}
    models["ema"][0].bias.data += 0.5
    models["ema"][0].num_batches_tracked += 7
    torch.save(models, tmp_path / "both.pt")
    convert_weights(tmp_path / "both.pt", tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    assert tensors["0.bias"].tolist() == [0.5, 0.5] and tensors["0.bias"].dtype == torch.float32
    assert tensors["0.num_batches_tracked"].item() == 7 and tensors["0.num_batches_tracked"].dtype == torch.int64


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("old_format", [False, True])
def test_a_hostile_file_runs_nothing_and_is_refused(tmp_path, old_format):
    for number, call in enumerate([(os.system, (f"touch {tmp_path}/run",)), (eval, ("1/0",)), (pytest.fail, ("was run",))]):
        path = tmp_path / f"{number}.pt"
        torch.save({"model": Bomb(*call)}, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(BundleError):
            convert_weights(path, tmp_path / "out.safetensors")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(os.system, (f"touch {tmp_path}/run",))))
    with pytest.raises(BundleError, match=r"raw\.pt"):
        convert_weights(tmp_path / "raw.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.safetensors").exists()


def test_a_file_without_a_model_is_an_error(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "plain.pth")
    with pytest.raises(BundleError, match="a state dictionary needs no conversion"):
        convert_weights(tmp_path / "plain.pth", tmp_path / "out.safetensors")
    for content in (b"\x80\x02", b"\x80\x02)R.", b"\x80\x02\x93."):
        with zipfile.ZipFile(tmp_path / "pickle.pt", "w") as archive:
            archive.writestr("pickle/data.pkl", content)
            archive.writestr("pickle/version", "3")
        with pytest.raises(BundleError, match=r"pickle\.pt cannot be read"):
            convert_weights(tmp_path / "pickle.pt", tmp_path / "out.safetensors")
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4" + bytes(99))
    with pytest.raises(BundleError, match=r"damaged\.pt cannot be read as a PyTorch file \(\w+Error: "):
        convert_weights(tmp_path / "damaged.pt", tmp_path / "out.safetensors")
