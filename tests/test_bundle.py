"""Bundles return from disk unchanged, and damaged ones are refused; starting weights; fingerprints."""

import hashlib
import json
import pickle

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kitlib.bundle import data_fingerprint, read_bundle, read_record, read_weights, record_digest, save_bundle
from kitlib.errors import BundleError
from tests.small_bundles import edit_record
from tests.small_xrays import SmallXrays

RECORD = {
    "family": "study",
    "model": "small",
    "classes": ("negative", "typical"),
    "recipe": {"backbone": "test_resnet"},
    "architecture": {},
    "longest_side": 50,
    "image_size": 32,
    "placement": "letterbox",
    "mean": [0.5],
    "std": [0.25],
    "fold": 1,
    "data_fingerprint": "f",
    "precision": "float32",
    "validation": {"score": 0.5},
}
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3)}


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
def test_weights_and_record_come_back(tmp_path_factory, shapes, dtype):
    folder = tmp_path_factory.mktemp("bundle")
    weights = {f"layer.{number}": torch.randint(0, 2, shape).to(dtype) for number, shape in enumerate(shapes)}
    save_bundle(folder, weights, RECORD)
    record, loaded = read_bundle(folder)
    assert {key: record[key] for key in RECORD} == RECORD | {"classes": ["negative", "typical"]}
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_a_bundle_has_two_files_and_records_versions(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "weights.safetensors"]
    assert read_bundle(tmp_path)[0]["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_tied_and_overlapping_tensors_come_back(tmp_path):
    layer = nn.Linear(8, 8, bias=False)
    whole = torch.arange(10.0)
    weights = {"a.weight": layer.weight, "b.weight": layer.weight, "half": whole[:5], "turned": whole.reshape(2, 5).T}
    save_bundle(tmp_path, weights, RECORD)
    record, loaded = read_bundle(tmp_path)
    assert record["tied"] == {"b.weight": "a.weight"}
    # 64 + 5 + 10 float32 numbers, each stored once, and a header
    assert (tmp_path / "weights.safetensors").stat().st_size < 4 * 79 + 512
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor)


def test_one_changed_byte_is_detected(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    path = tmp_path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors has SHA-256 .* copy both again"):
        read_bundle(tmp_path)


def test_a_bundle_whose_writing_was_interrupted_cannot_be_read(tmp_path, monkeypatch):
    save_bundle(tmp_path, WEIGHTS, RECORD)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kitlib.bundle.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(tmp_path, {"a": torch.zeros(3)}, RECORD)
    with pytest.raises(BundleError, match=r"model\.json is missing"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"classes": ["typical", "negative"]}, {"image_size": 64}, {"recipe": {}}, {"mean": [0]}]
)
def test_a_record_that_was_changed_by_hand_is_refused(tmp_path, changes):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for read in (read_record, read_bundle):
        with pytest.raises(BundleError, match=r"model\.json was changed after it was written"):
            read(tmp_path)


def test_the_order_of_a_records_keys_and_its_layout_do_not_matter(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert read_record(tmp_path)["fold"] == 1


def test_a_record_of_an_older_version_is_named_as_such(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    path = tmp_path / "model.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "record_sha256"})
    )
    with pytest.raises(BundleError, match="no key 'record_sha256', because an older kitlib wrote it"):
        read_record(tmp_path)


def test_a_record_with_integer_keys_comes_back(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD | {"validation": {10: 0.5, 2: 0.25}})
    assert read_record(tmp_path)["validation"] == {"10": 0.5, "2": 0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save_bundle(tmp_path, WEIGHTS | {"head.bias": torch.tensor([0.0, value])}, RECORD)
    with pytest.raises(BundleError, match=r"'head\.bias' has NaN or infinite values; train the model 'small'"):
        read_bundle(tmp_path)


def test_a_record_nested_too_deep_is_refused(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    (tmp_path / "model.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is not valid JSON"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": None}, r"model\.json: missing keys \['fold'\]"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"precision": "half"}, "the value of 'precision' is 'half'; valid: float16, bfloat16, float32"),
        ({"fold": "one"}, r"the value of 'fold' is 'one'; its type must be int"),
        ({"tied": {"b": "c"}}, r"the tensor 'b' is the same as 'c', but .* has no tensor 'c'"),
    ],
)
def test_an_invalid_record_is_refused(tmp_path, changes, message):
    save_bundle(tmp_path, WEIGHTS, RECORD)
    edit_record(tmp_path, **changes)
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_an_invalid_record_is_not_written(tmp_path):
    with pytest.raises(BundleError, match=r"missing keys \['fold'\]"):
        save_bundle(tmp_path, WEIGHTS, {key: value for key, value in RECORD.items() if key != "fold"})
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_invalid_json_are_named(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        read_bundle(tmp_path / "nowhere")
    save_bundle(tmp_path, WEIGHTS, RECORD)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(BundleError, match="is not valid JSON"):
        read_bundle(tmp_path)


def test_a_bundle_of_an_older_kitlib_without_a_precision_is_refused(tmp_path):
    save_bundle(tmp_path, WEIGHTS, RECORD | {"precision": "bfloat16"})
    assert read_record(tmp_path)["precision"] == "bfloat16"
    edit_record(tmp_path, precision=None)
    with pytest.raises(BundleError, match="no key 'precision', because an older kitlib wrote it; train the model again"):
        read_record(tmp_path)


def test_digests_stay_the_same_from_version_to_version():
    record = {"b": 1, "record_sha256": "x", "a": [1, 2]}
    assert record_digest(record) == hashlib.sha256(b'{"a": [1, 2], "b": 1}').hexdigest()
    folds = pd.DataFrame({"id": ["b", "a"], "fold": [1, 0]})
    boxes = pd.DataFrame({"image_id": ["i"], "xmin": [1.0], "ymin": [2.0], "xmax": [3.0], "ymax": [4.5]})
    text = b"boxes\nimage_id,xmax,xmin,ymax,ymin\ni,3.000000,1.000000,4.500000,2.000000\nfolds\nfold,id\n0,a\n1,b\n"
    assert data_fingerprint(folds=folds, boxes=boxes) == hashlib.sha256(text).hexdigest()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_pickle_is_never_loaded(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BundleError, match=r"Pickles are never loaded.*save_file"):
        read_weights(tmp_path / name)


class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Linear(4, 4))
        self.head = nn.Linear(4, 5)


def test_a_fingerprint_depends_on_the_data_but_not_on_order_or_path():
    small = SmallXrays(8)
    tables = {"images": small.images, "labels": small.labels, "boxes": small.boxes, "folds": small.fold_table}
    reference = data_fingerprint(**tables)
    shuffled = {name: table.sample(frac=1, random_state=1) for name, table in tables.items()}
    assert data_fingerprint(**shuffled | {"images": shuffled["images"].assign(path="/elsewhere", rows=0)}) == reference
    assert data_fingerprint(**tables | {"folds": tables["folds"].assign(fold=1)}) != reference
    assert data_fingerprint(**tables | {"boxes": tables["boxes"].assign(xmax=61.0)}) != reference
    assert data_fingerprint(**tables | {"labels": tables["labels"].assign(typical=0.5)}) != reference
    assert data_fingerprint(**tables | {"images": tables["images"].iloc[1:]}) != reference
