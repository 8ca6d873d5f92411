"""Custom backbones that are registered with timm work in training, as starting weights and in prediction, in any process."""

import os
import re
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.bundle import read_bundle
from kitlib.models.backbones import MODULES, check_backbone, import_own_backbones
from kitlib.models.families import FAMILIES
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, PatchRecipe, StudyRecipe
from kitlib.settings import override
from tests import PROJECT
from tests.small_tasks import train_small
from tests.small_xrays import RECIPE, SmallXrays

# A network of three convolutions with strides 4, 8 and 16, and the attributes that timm's own models have.
OWN_BACKBONE = """
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class ThreeLayers(nn.Module):
    def __init__(self, num_classes=0, in_chans=3):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(in_chans, 8, 4, 4), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 16, 2, 2)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, 16, 16
        strides = {"first": (8, 4), "second": (8, 8), "third": (16, 16)}
        self.feature_info = [{"num_chs": c, "reduction": stride, "module": m} for m, (c, stride) in strides.items()]

    def group_matcher(self, coarse=False):
        return {"stem": "^first", "blocks": [("^second", (0,)), ("^third", (1,))]}

    def forward_features(self, x):
        return self.third(self.second(self.first(x).relu()).relu()).relu()

    def forward_head(self, x):
        return x.mean(dim=(2, 3))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {"three_layers": {"mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": 0, "first_conv": "first", "classifier": None}}
)


@register_model
def three_layers(pretrained=False, **options):
    return build_model_with_cfg(
        ThreeLayers, "three_layers", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **options
    )
"""

PREDICTS = """
import os, sys
import pandas as pd
from kitlib.inference.predict import load_predictor
from tests.small_xrays import SmallXrays

module, study, detector, out = os.environ.pop("KIT_BACKBONES"), *sys.argv[1:]
try:
    load_predictor(study)
except ValueError as error:
    assert "no backbone 'three_layers'" in str(error) and "set KIT_BACKBONES" in str(error), error
else:
    raise AssertionError("this process has not been told of three_layers")
os.environ["KIT_BACKBONES"] = module
for name, folder in (("study", study), ("detector", detector)):
    pd.concat(load_predictor(folder).predict(SmallXrays(16).stream())).to_parquet(f"{out}/{name}.parquet")
"""


@pytest.fixture
def own_backbone(tmp_path, monkeypatch):
    """Folder with the module `own_backbone`, with PYTHONPATH and KIT_BACKBONES set as a user would set them."""
    (tmp_path / "own_backbone.py").write_text(OWN_BACKBONE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(MODULES, "own_backbone")
    return tmp_path


def test_a_backbone_registered_with_timm_trains_and_predicts_from_its_bundle(own_backbone):
    small, runs = SmallXrays(16), {}
    study_recipe = override(RECIPE, backbone="three_layers", epochs=1)
    runs["study"] = train_small(own_backbone / "study", small, study_recipe)
    started = DetectorRecipe(
        backbone="three_layers", image_size=64, starting_weights=str(own_backbone / "study"), epochs=1, batch_size=4,
        fpn_channels=8, box_hidden=8, box_samples=8, proposals=8, optimizer="adamw", schedule_every=0,
    )  # fmt: skip
    detector = FasterRCNNDetector(started)
    assert "6 tensors of the backbone; pyramid and heads left random" in detector.starting_weights
    weights = read_bundle(runs["study"].run_folder / "bundle")[1]
    for name, tensor in detector.model.backbone.body.state_dict().items():
        assert torch.equal(tensor, weights[f"backbone.{name}"]), name
    runs["detector"] = train_small(own_backbone / "detector", small, started)
    # In a new process, which learns of the backbone from the environment variable alone.
    paths = [str(run.run_folder / "bundle") for run in runs.values()]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{own_backbone}"}
    done = subprocess.run(
        [sys.executable, "-c", PREDICTS, *paths, str(own_backbone)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(own_backbone / "study.parquet").set_index("image_id")
    expected = runs["study"].tables["image_scores"].set_index("image_id")
    assert len(expected) == 8  # half of the images
    np.testing.assert_allclose(found.loc[expected.index, "none"], expected.none, atol=1e-5)
    best = pd.read_parquet(own_backbone / "detector.parquet").groupby("image_id").score.max()
    expected = runs["detector"].tables["detections"].groupby("image_id").score.max()
    assert len(expected) == 8  # a barely trained network finds some box in every image
    np.testing.assert_allclose(best.loc[expected.index], expected, atol=1e-4)


@pytest.mark.usefixtures("own_backbone")
def test_a_pyramid_over_strides_4_8_and_16_has_one_more_map_that_is_pooled():
    recipe = DetectorRecipe(backbone="three_layers", image_size=1024, fpn_channels=8, box_hidden=8)
    pyramid = FasterRCNNDetector(recipe).model.backbone
    assert pyramid.strides == [4, 8, 16, 32]
    with torch.inference_mode():
        maps = list(pyramid(torch.rand(1, 1, 128, 128)).values())
    assert [level.shape for level in maps] == [(1, 8, 128 // stride, 128 // stride) for stride in pyramid.strides]
    assert torch.equal(maps[3], maps[2][..., ::2, ::2])  # pooled with a window of one pixel, as in torchvision


def test_a_module_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv(MODULES, "os, no_such_module")
    with pytest.raises(ValueError, match=r"KIT_BACKBONES lists 'no_such_module', which cannot be imported: .*PYTHONPATH"):
        import_own_backbones()


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/tmp/model", "resnet19"])
def test_an_unregistered_name_is_refused(name):
    with pytest.raises(ValueError, match=f"no backbone '{name}'; similar names: "):
        check_backbone(name)


HOSTILE = ["hf-hub:evil/model", "https://evil.example/x", "../../tmp/evil", "/tmp/evil", "evil.yaml", "local-dir:/tmp/x"]
HOSTILE += ["resnet18\0", "resnet18/../x", "timm/resnet18", "", "yolov5lu.yaml", "yolov5lu\n", "C:\\evil"]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_backbone_is_a_name_and_never_a_path_or_an_address(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A file of that name in the current folder, whose activation ultralytics would evaluate.
    (tmp_path / "evil.yaml").write_text("nc: 1\nactivation: __import__('os').mkdir('ran')\nbackbone: []\nhead: []\n")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a network was asked"))
    recipes = {
        "study": StudyRecipe(backbone=name),
        "findings": FindingsRecipe(backbone=name),
        "patches": PatchRecipe(backbone=name),
        "faster_rcnn": DetectorRecipe(backbone=name),
        "yolo": DetectorRecipe(family="yolo", backbone=name),
    }
    for family, recipe in recipes.items():
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            FAMILIES[family].network(recipe, ["a", "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.yaml"]
