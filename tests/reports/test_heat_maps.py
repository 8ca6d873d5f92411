"""Heat maps of a network that can be computed by hand and of real backbones, and the share of the heat inside the lungs."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kitlib.bundle import save_bundle
from kitlib.inference.predict import load_predictor
from kitlib.lungs.finders import Lungs
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.recipes.fields import FindingsRecipe, StudyRecipe
from kitlib.reports.heat_maps import Heat, compute_heat, heat_figure, heat_maps, heat_summary, inside_lungs
from kitlib.xrays.cache import CachedXray
from tests.small_lungs import FRAME, stored_lungs
from tests.small_xrays import SmallXrays

SMALL = {"image_size": 64, "hidden": 0, "channels": 1, "multi_label": False, "dropout": 0.0}


class BrightNetwork(FindingsClassifier):
    """Its last feature maps are the image's mean and its negative on an 8 x 8 grid; class a uses the first, b the second."""

    def __init__(self):
        super().__init__(FindingsRecipe(backbone="test_resnet", **SMALL), ["a", "b"])
        self.mean, self.std = [0.0], [1.0]

        class Backbone(torch.nn.Module):
            def forward_features(self, x):
                cells = torch.nn.functional.avg_pool2d(x, 8)
                return torch.cat([cells, 1 - cells], dim=1)

            def forward_head(self, maps):
                return maps.mean(dim=(2, 3))

        self.backbone, self.head = Backbone(), torch.nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.eye(2)


def test_the_heat_of_a_network_that_responds_to_brightness_is_the_brightness():
    pixels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    pixels[0, 16:32, 40:56] = 255
    heat = heat_maps(BrightNetwork(), pixels, [0, 1])
    assert heat.shape == (2, 64, 64) and heat.dtype == np.float32
    # By hand: each map's weight is the head's weight divided by the number of cells, so the heat is the resized cell value.
    assert heat[0][20:28, 44:52].min() == pytest.approx(1) and heat[0][:8].max() == 0 and heat[0][:, :32].max() == 0
    assert heat[1] == pytest.approx(1)  # class b responds to dark pixels, and all pixels are dark
    nothing = heat_maps(BrightNetwork(), torch.zeros(1, 64, 64), [0])
    assert (nothing == 0).all()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_heat_of_real_backbones_by_an_independent_gradient(backbone):
    torch.manual_seed(0)
    network = FindingsClassifier(FindingsRecipe(backbone=backbone, **SMALL), ["a", "b", "c"]).eval()
    network.requires_grad_(False)  # like a frozen backbone
    if backbone == "test_resnet":
        network.head[-1].weight.abs_()  # otherwise nothing raises an output
    pixels = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    maps = network.backbone.forward_features(network.normalise(pixels)).detach().requires_grad_()
    logits = network.head(network.backbone.forward_head(maps))
    (logits[0, 2] + logits[1, 0]).backward()
    cam = (maps.grad.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu().detach()
    heats = heat_maps(network, pixels, [2, 0])
    assert (cam.amax(dim=(1, 2)) > 0).all()
    for each, expected in zip(heats, cam, strict=True):
        resized = torch.nn.functional.interpolate(expected[None, None], 64, mode="bilinear", align_corners=False)[0, 0]
        assert each == pytest.approx((resized / resized.max()).numpy(), abs=1e-4)


def test_one_logit_has_opposite_heats_and_a_transformer_none():
    torch.manual_seed(0)
    network = FindingsClassifier(FindingsRecipe(backbone="test_resnet", one_logit=True, **SMALL), ["a", "b"]).eval()
    pixels = torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8)
    first, second = heat_maps(network, pixels.repeat(2, 1, 1), [0, 1])
    # Cells that are hot for one class are cold for the other, except where resizing mixes neighbouring cells.
    assert (first.max() == 1 or second.max() == 1) and (np.minimum(first, second) > 0.5).sum() == 0
    transformer = FindingsClassifier(FindingsRecipe(backbone="test_vit", **{**SMALL, "image_size": 160}), ["a", "b"])
    with pytest.raises(ValueError, match="test_vit has features of shape"):
        heat_maps(transformer.eval(), torch.zeros(1, 160, 160), [0])


def save(folder, network, family, classes, recipe):
    stated = {"family": family, "model": "m", "classes": classes, "recipe": dataclasses.asdict(recipe), "architecture": {}}
    stated |= {"longest_side": 50, "image_size": recipe.image_size, "placement": "letterbox", "mean": list(network.mean)}
    save_bundle(
        folder,
        network.state_dict(),
        {**stated, "std": list(network.std), "fold": 0, "data_fingerprint": "", "precision": "float32", "validation": {}},
    )


@pytest.mark.parametrize("family", ["findings", "study"])
def test_heat_of_a_bundle_has_the_pixels_of_the_decoded_copy(tmp_path, family):
    small = SmallXrays(6)
    torch.manual_seed(0)
    if family == "findings":
        recipe, classes = FindingsRecipe(backbone="test_resnet", **{**SMALL, "placement": "letterbox"}), ["a", "b"]
        network = FindingsClassifier(recipe, classes)
    else:
        recipe = StudyRecipe(backbone="test_resnet", image_size=64, hidden=8)
        network, classes = StudyClassifier(recipe), ["negative", "typical", "indeterminate", "atypical", "none"]
    save(tmp_path / "bundle", network, family, classes, recipe)
    predictor = load_predictor(tmp_path / "bundle", torch.device("cpu"), batch_size=4)
    xrays = [small.read(name) for name in small.image_ids]
    heats = compute_heat(predictor, xrays, [classes[n % 2] for n in range(6)])
    assert [each.xray.image_id for each in heats] == small.image_ids
    assert all(each.heat.shape == each.xray.pixels.shape and 0 <= each.heat.min() <= each.heat.max() <= 1 for each in heats)
    # A letterboxed model sees the whole image, resized.
    assert np.corrcoef(heats[0].seen.ravel(), xrays[0].pixels.ravel())[0, 1] > 0.9
    lungs = stored_lungs(tmp_path / "lungs", small, missed=["image001"])
    table = inside_lungs(heats, lungs)
    assert table.heat_inside.isna().tolist()[1]
    figure = heat_figure({"whole": heats, "segmented": heats}, lungs)
    assert len(figure.axes) == 18 and figure.axes[6].get_ylabel() == "whole" and figure.axes[0].get_title() == "image000"
    with pytest.raises(ValueError, match="m has no class 'Mass'; its classes: "):
        compute_heat(predictor, xrays[:1], ["Mass"])
    with pytest.raises(ValueError, match="have heat maps of different images"):
        heat_figure({"whole": heats, "segmented": heats[1:]})


def test_heat_needs_a_classifier_of_whole_images():
    detector = SimpleNamespace(model="m", family=SimpleNamespace(name="detector"))
    with pytest.raises(ValueError, match="m belongs to the family detector; heat maps need a classifier of whole images"):
        compute_heat(detector, [], [])


class Finder:
    def find(self, xrays):
        mask = np.zeros((10, 20), bool)
        mask[:5, :10] = True
        return [Lungs(np.array(FRAME), mask)] * len(xrays)


def test_heat_is_drawn_over_the_image_as_the_model_sees_it_with_the_outline_of_the_lungs():
    xray = CachedXray("i", np.full((10, 20), 7, np.uint8), 10, 20)
    heat, seen = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20), np.full((10, 20), 9, np.uint8)
    maps = [Heat(xray, "a", heat, seen)]
    figure = heat_figure({"runs/one": maps, "runs/two": maps}, Finder())
    image, first, _ = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["image", "one", "two"]
    assert [axis.get_title() for axis in figure.axes] == ["i", "heat for a", "heat for a"]
    (picture,) = image.images
    below, above = first.images
    assert (picture.get_array() == 7).all() and (below.get_array() == 9).all() and np.array_equal(above.get_array(), heat)
    for each in (picture, below):
        assert (each.get_cmap().name, each.get_clim()) == ("gray", (0, 255))
    assert (above.get_cmap().name, above.get_clim()) == ("jet", (0, 1))
    for axis in figure.axes:
        assert len(axis.collections) == 1 and len(axis.get_xticks()) == len(axis.get_yticks()) == 0
    # A whole name is at most two lines if the names end equally.
    long = ["a/" + "x" * 60 + "/run", "b/" + "y" * 60 + "/run"]
    labels = [axis.get_ylabel() for axis in heat_figure(dict.fromkeys(long, maps)).axes[1:]]
    assert len(set(labels)) == 2
    for label, name in zip(labels, long, strict=True):
        assert name.endswith(label.replace("\n", "")) and len(label.splitlines()) == 2
    for mask in (np.zeros((10, 20), bool), np.ones((10, 20), bool)):
        finder = SimpleNamespace(find=lambda xrays, mask=mask: [Lungs(np.array(FRAME), mask)])
        assert not any(axis.collections for axis in heat_figure({"m": maps}, finder).axes)
    assert [len(axis.images) for axis in heat_figure({"m": []}).axes] == [0, 0]


def test_the_share_of_heat_inside_the_lungs():
    xray = CachedXray("i", np.zeros((10, 20), np.uint8), 10, 20)
    even = np.ones((10, 20), np.float32)
    inside = np.zeros((10, 20), np.float32)
    inside[2, 3], inside[8, 15] = 0.9, 0.3
    table = inside_lungs([Heat(xray, "a", each, xray.pixels) for each in (even, inside, 0 * even)], Finder())
    assert table.heat_inside.tolist()[:2] == pytest.approx([0.25, 0.75])
    assert table.concentration.tolist()[:2] == pytest.approx([1, 3]) and np.isnan(table.heat_inside[2])
    assert table[["image_id", "class"]].to_numpy().tolist() == [["i", "a"]] * 3
    summary = heat_summary({"whole": table})
    assert summary.loc["whole"].to_dict() == pytest.approx(
        {"heat_inside": 0.5, "area_inside": 0.25, "concentration": 2, "images": 3, "not_judged": 1}
    )
