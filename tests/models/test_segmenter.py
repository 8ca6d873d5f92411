"""Segmenters: the networks agree with their papers' tables, the losses with numpy; images may have any size."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet34

from kitlib.models.albunet import AlbuNet
from kitlib.models.families import load_network
from kitlib.models.fc_densenet import FCDenseNet103
from kitlib.models.resunet import ResUNet
from kitlib.models.segmenter import Segmenter, segmentation_loss
from kitlib.models.unet import UNet
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.recipes.named import RECIPES
from kitlib.settings import override

NARROW = {name: SegmenterRecipe(network=name, width=0.0625) for name in ("unet", "resunet", "fc_densenet103")}
TWO = {"structures": ("left_lung", "right_lung")}


def parameters(network):
    return sum(each.numel() for each in network.parameters() if each.requires_grad)


def outputs_of(network, kind, x):
    """Return the output shape (channels, sides) of each module of a kind, in the order in which they run."""
    seen, hooks = [], []
    for module in network.modules():
        if isinstance(module, kind):
            hooks.append(module.register_forward_hook(lambda _, given, out: seen.append((*out.shape[1:],))))
    with torch.inference_mode():
        out = network.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen, out


def test_unet_has_the_papers_parameters_and_levels():
    network = UNet(1)
    assert parameters(network) == 7_759_521  # UNet + HRNet paper, table 4
    seen, out = outputs_of(network, nn.Conv2d, torch.zeros(1, 1, 64, 32))
    down = [(c, 64 // s, 32 // s) for c, s in ((32, 1), (64, 2), (128, 4), (256, 8), (512, 16)) for _ in range(2)]
    up = [(c, 64 // s, 32 // s) for c, s in ((256, 8), (128, 4), (64, 2), (32, 1)) for _ in range(2)]
    assert seen == [*down, *up, (1, 64, 32)] and out.shape == (1, 1, 64, 32)
    larger, _ = outputs_of(network, nn.ConvTranspose2d, torch.zeros(1, 1, 64, 32))
    assert larger == [(256, 8, 4), (128, 16, 8), (64, 32, 16), (32, 64, 32)]
    assert [each.in_channels for each in network.modules() if isinstance(each, nn.ConvTranspose2d)] == [512, 256, 128, 64]


def test_resunet_has_the_closed_forms_parameters_and_zhangs_strides():
    # Units of Zhang et al., table I, as (channels in, channels out): the encoder, the bridge, and the decoder, whose input
    # is the up-sampled and the skipped map.
    units = [(1, 64), (64, 128), (128, 256), (256, 512), (512 + 256, 256), (256 + 128, 128), (128 + 64, 64)]
    expected = 64 + 1  # the last 1 x 1 convolution
    for number, (before, after) in enumerate(units):
        expected += 9 * before * after + after + 9 * after * after + after + before * after + after  # convolutions, shortcut
        expected += 2 * after + (2 * before if number else 0)  # batch norms; the first unit has one
    network = ResUNet(1)
    assert parameters(network) == expected
    strided = [each.stride for each in network.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)]
    assert strided == [(1, 1), (1, 1)] + [(2, 2), (1, 1)] * 3 + [(1, 1), (1, 1)] * 3
    seen, out = outputs_of(network, type(network.down[0]), torch.zeros(1, 1, 32, 48))
    levels = ((64, 1), (128, 2), (256, 4), (512, 8), (256, 4), (128, 2), (64, 1))
    assert seen == [(channels, 32 // stride, 48 // stride) for channels, stride in levels]
    assert out.shape == (1, 1, 32, 48)


def test_a_residual_unit_adds_its_input():
    # If a unit's second convolution is zero, only the shortcut remains, which uses the input before its activation.
    torch.manual_seed(0)
    for unit in ResUNet(1, 0.0625).eval().down:
        nn.init.zeros_(unit.path[-1].weight)
        nn.init.zeros_(unit.path[-1].bias)
        x = torch.randn(1, unit.shortcut.in_channels, 8, 8)
        kernel = unit.shortcut.weight[:, :, 0, 0]
        stride = unit.shortcut.stride[0]
        wanted = torch.einsum("oi,nirc->norc", kernel, x[:, :, ::stride, ::stride]) + unit.shortcut.bias[:, None, None]
        torch.testing.assert_close(unit(x), wanted, atol=1e-5, rtol=0)


def test_fc_densenet_has_the_papers_parameters_convolutions_and_feature_maps():
    network = FCDenseNet103(4)
    assert parameters(network) == 9_319_428  # Oh et al.'s own code with its four classes
    assert sum(isinstance(each, nn.Conv2d | nn.ConvTranspose2d) for each in network.modules()) == 103
    fed = []
    blocks = [*network.down, network.bottleneck, *network.up]
    hooks = [each.register_forward_hook(lambda _, x, new: fed.append((x[0].shape[1], *new.shape[1:]))) for each in blocks]
    with torch.inference_mode():
        out = network.eval()(torch.zeros(1, 1, 64, 32))
    for hook in hooks:
        hook.remove()
    # Jegou et al., table 2, the numbers m of feature maps (its 578 is 304 + 160 + 112 = 576).
    published = [112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]
    assert [before + new for before, new, *_ in fed] == published
    # Each block passes on 16 maps per layer, without its input.
    assert [new for _, new, *_ in fed] == [16 * layers for layers in (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)]
    assert [rows for *_, rows, _ in fed] == [64, 32, 16, 8, 4, 2, 4, 8, 16, 32, 64]
    larger = [each for each in network.modules() if isinstance(each, nn.ConvTranspose2d)]
    assert [(each.in_channels, each.out_channels) for each in larger] == [(c, c) for c in (240, 192, 160, 112, 80)]
    # Only the last block also passes on its input.
    assert network.last.in_channels == 256 and out.shape == (1, 4, 64, 32)
    dropouts = {each.p for each in network.modules() if isinstance(each, nn.Dropout2d)}
    assert dropouts == {0.2}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("sides", [(32, 48), (37, 50), (33, 47), (65, 34)])
def test_unsupported_sides_are_padded_with_the_edge_and_cropped_back(name, sides):
    torch.manual_seed(0)
    model = Segmenter(NARROW[name]).eval()
    x = torch.randn(2, 1, *sides)
    multiple = {"unet": 16, "resunet": 8, "fc_densenet103": 1}[name]
    missing = [math.ceil(side / multiple) * multiple - side for side in sides]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (0, missing[0]), (0, missing[1])], mode="edge")
    with torch.inference_mode():
        wanted = model.network(torch.from_numpy(padded))[:, :, : sides[0], : sides[1]]
        found = model(x)
    assert found.shape == (2, 1, *sides)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sides", [(33, 47), (20, 47), (1, 1)])
def test_fc_densenet_accepts_any_sides_of_at_least_32_pixels(sides):
    model = Segmenter(NARROW["fc_densenet103"]).eval()
    given_sides = []
    model.network.register_forward_pre_hook(lambda _, x: given_sides.append(tuple(x[0].shape[-2:])))
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, *sides)).shape == (1, 1, *sides)
    assert given_sides == [tuple(max(32, side) for side in sides)]


def test_fc_densenet_crops_up_sampled_maps_to_the_size_of_the_skipped_ones():
    network = FCDenseNet103(1, 0.0625).eval()
    enlarged, skipped, joined = [], [], []
    for larger, up, smaller in zip(network.larger, network.up, network.smaller, strict=True):
        larger.register_forward_hook(lambda _, x, out: enlarged.append(out))
        up.register_forward_pre_hook(lambda _, x: joined.append(x[0]))
        smaller.register_forward_pre_hook(lambda _, x: skipped.append(x[0]))
    with torch.inference_mode():
        network(torch.randn(1, 1, 33, 47))
    for whole, finer, both in zip(enlarged, reversed(skipped), joined, strict=True):
        # n pixels become 2 n + 1, of which a crop of 2 n or 2 n + 1 in the middle begins at the first.
        rows, columns = finer.shape[-2:]
        assert {whole.shape[-2] - rows, whole.shape[-1] - columns} <= {0, 1}
        assert torch.equal(both, torch.cat([whole[..., :rows, :columns], finer], dim=1))


def enlarged_twofold(x):
    """Enlarge (n, channels, rows, columns) bilinearly: half pixels lie a quarter of a pixel from a pixel's centre."""
    for axis in (2, 3):
        size = x.shape[axis]
        before, after = (np.take(x, np.clip(np.arange(size) + step, 0, size - 1), axis) for step in (-1, 1))
        halves = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


@pytest.mark.parametrize("make", [ResUNet, AlbuNet])
def test_maps_are_enlarged_bilinearly_and_joined_with_those_from_the_way_down(make):
    torch.manual_seed(0)
    network, maps = make(1, 0.0625).eval(), {}
    down = network.down if make is ResUNet else [getattr(network.encoder, f"layer{number}") for number in (1, 2, 3, 4)]
    up = network.up if make is ResUNet else [network.middle, *network.up, network.last_up]
    for part in (*down, *up):
        part.register_forward_hook(lambda part, given, out: maps.update({part: (given[0].numpy(), out.numpy())}))
    with torch.inference_mode():
        assert network(torch.randn(1, 1, 64, 128)).shape == (1, 1, 64, 128)
    if make is ResUNet:  # each map is enlarged, then joined
        for number, (below, unit) in enumerate(pairwise([down[-1], *up])):
            wanted = [enlarged_twofold(maps[below][1]), maps[down[2 - number]][1]]
            np.testing.assert_allclose(maps[unit][0], np.concatenate(wanted, axis=1), rtol=1e-5, atol=1e-4)
    else:  # each map is joined, then enlarged
        skipped = [maps[layer][1] for layer in down]
        pooled = skipped[-1].reshape(1, 512, 1, 2, 2, 2).max(axis=(3, 5))
        assert maps[down[0]][0].min() >= 0  # after a ReLU
        np.testing.assert_allclose(maps[up[0]][0], enlarged_twofold(pooled), rtol=1e-5, atol=1e-4)
        for below, block in pairwise(up):
            joined = [maps[below][1], *([skipped.pop()] if skipped else [])]
            wanted = enlarged_twofold(np.concatenate(joined, axis=1))
            np.testing.assert_allclose(maps[block][0], wanted, rtol=1e-5, atol=1e-4)


def test_unets_convolutions_start_with_hes_weights():
    # He et al. 2015, eq. 10: variance 2 / (inputs of a unit); Ronneberger et al., section 3.
    torch.manual_seed(0)
    layers = [each for each in UNet(1, 0.5).modules() if isinstance(each, nn.Conv2d)]
    for layer in layers:
        assert not layer.bias.any()
        if layer.weight.numel() > 2000:
            assert layer.weight.var().item() == pytest.approx(2 / layer.weight[0].numel(), rel=0.15)
    assert len(layers) == 19


@pytest.mark.parametrize("loss", ["dice", "cross_entropy"])
@pytest.mark.parametrize("name", NARROW)
def test_every_parameter_learns(name, loss):
    torch.manual_seed(0)
    recipe = override(NARROW[name], loss=loss, width=0.25, **TWO)
    model = Segmenter(recipe)
    truth = torch.zeros(2, 40, 40, dtype=torch.uint8)
    truth[:, 5:30, 5:15], truth[:, 5:30, 20:35] = 1, 2
    segmentation_loss(model(torch.randn(2, 1, 40, 40)), truth, recipe).backward()
    for parameter_name, each in model.named_parameters():
        assert each.grad is not None and torch.isfinite(each.grad).all(), parameter_name
        # A batch norm cancels the bias of the convolution before it.
        assert each.ndim == 1 or each.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NARROW)
def test_a_saved_segmenter_gives_the_same_predictions(name):
    torch.manual_seed(0)
    model = Segmenter(override(NARROW[name], **TWO)).eval()
    recipe = {"network": name, "width": 0.0625, "starting_weights": "gone", **TWO}
    record = {"family": "segmenter", "recipe": recipe, "classes": model.recipe.structures}
    again = load_network(record, model.state_dict(), torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 40, 36), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(again(again.normalise(pixels)), model(model.normalise(pixels)), atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_network(record | {"recipe": recipe | {"width": 0.125}}, model.state_dict(), torch.device("cpu"))


def test_one_structure_has_one_output_and_several_have_one_more():
    assert Segmenter(NARROW["unet"]).network.last.out_channels == 1
    assert Segmenter(override(NARROW["unet"], **TWO)).network.last.out_channels == 3
    recipe = RECIPES["fc_densenet103_lungs"]
    assert parameters(Segmenter(recipe)) == 9_319_428
    assert parameters(Segmenter(RECIPES["unet_lungs"])) == 7_759_521


@pytest.mark.parametrize("network", [UNet, ResUNet, FCDenseNet103, AlbuNet])
def test_the_smallest_width_is_one_channel(network):
    with torch.device("meta"):
        last = [each for each in network(2, 0.001).modules() if isinstance(each, nn.Conv2d)][-1]
    # FC-DenseNet's last block joins what it adds, a channel for each of 4 layers, with its input: as many of the block
    # below (5 layers), and the skipped map (1 and 4).
    assert last.in_channels == (14 if network is FCDenseNet103 else 1) and last.out_channels == 2


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_probabilities_sum_to_one_and_background_comes_first(outputs, kind):
    model = Segmenter(NARROW["unet"])
    logits = 20 * torch.randn(2, outputs, 5, 4, generator=torch.Generator().manual_seed(0)).to(kind)
    found = model.probabilities(logits)
    assert found.dtype == torch.float32 and found.shape == (2, max(2, outputs), 5, 4)
    assert found.min() >= 0 and torch.allclose(found.sum(dim=1), torch.ones(2, 5, 4), atol=1e-6)
    if outputs == 1:
        np.testing.assert_allclose(found[:, 1], 1 / (1 + np.exp(-logits[:, 0].float().numpy().astype(float))), atol=1e-6)
    else:
        assert torch.equal(found.argmax(dim=1), logits.argmax(dim=1))


def test_each_pixel_gets_its_most_probable_label():
    logits = torch.tensor([[0.1, 2.0, -1.0, 0.3], [0.2, 1.0, 3.0, -2.0], [-9.0, 2.5, 0.0, 0.2]]).view(1, 3, 2, 2)
    assert Segmenter(override(NARROW["unet"], **TWO)).labels(logits).tolist() == [[[1, 2], [1, 0]]]
    # For a single structure, a logit above 0 is a probability above 1/2.
    assert Segmenter(NARROW["unet"]).labels(logits[:, :1]).tolist() == [[[1, 1], [0, 1]]]


def test_grey_is_normalised_by_mean_and_standard_deviation():
    x = Segmenter(NARROW["unet"]).normalise(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert x.tolist() == [[[[-2.0, 2.0]]]]  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25


def certain(places, outputs):
    """Return logits (n, outputs, rows, columns) that give each pixel's label a probability of 1, to six digits."""
    wanted = np.stack([places == place for place in range(outputs)], axis=1) if outputs > 1 else (places == 1)[:, None]
    return torch.from_numpy(np.where(wanted, 40.0, -40.0).astype(np.float32))


def dice_loss(logits, truth):
    """Return the Dice loss of the UNet + HRNet paper, equation 1, with 1 added to numerator and denominator, by loops."""
    logits, losses = logits.astype(float), []
    for one, drawn in zip(logits, truth, strict=True):
        found = 1 / (1 + np.exp(-one)) if len(one) == 1 else (np.exp(one) / np.exp(one).sum(axis=0))[1:]
        for number, p in enumerate(found, start=1):
            g = (drawn == number).astype(float)
            losses.append(1 - (2 * (p * g).sum() + 1) / ((p * p).sum() + (g * g).sum() + 1))
    return np.mean(losses)


def cross_entropy(logits, truth, background_weight):
    """Return -sum w log p / sum w over pixels."""
    logits = logits.astype(float)
    if logits.shape[1] == 1:
        inside = 1 / (1 + np.exp(-logits[:, 0]))
        probabilities = np.stack([1 - inside, inside], axis=1)
    else:
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of_truth = np.take_along_axis(probabilities, truth[:, None].astype(int), axis=1)[:, 0]
    weight = np.where(truth == 0, background_weight, 1.0)
    return -(weight * np.log(of_truth)).sum() / weight.sum()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 4]), st.integers(1, 3), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_losses_equal_those_of_numpy(seed, outputs, images, background_weight):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(images, outputs, 7, 5))).astype(np.float32)
    truth = rng.integers(0, max(2, outputs), (images, 7, 5)).astype(np.uint8)
    recipe = override(NARROW["unet"], background_weight=background_weight)
    found = segmentation_loss(torch.from_numpy(logits), torch.from_numpy(truth), recipe)
    assert found.item() == pytest.approx(dice_loss(logits, truth), abs=1e-5)
    found = segmentation_loss(torch.from_numpy(logits), torch.from_numpy(truth), override(recipe, loss="cross_entropy"))
    assert found.item() == pytest.approx(cross_entropy(logits, truth, background_weight), abs=1e-5)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_dice_loss_has_its_closed_forms(outputs):
    recipe = NARROW["unet"] if outputs == 1 else override(NARROW["unet"], **TWO)
    empty = np.zeros((1, 10, 10), np.uint8)
    places, other = empty.copy(), empty.copy()
    places[:, :4, :5] = 1  # 20 pixels
    other[:, 6:, :5] = 1  # 20 others
    if outputs == 3:
        places[:, :4, 5:], other[:, 6:, 5:] = 2, 2

    def loss(found, truth):
        return segmentation_loss(certain(found, outputs), torch.from_numpy(truth), recipe).item()

    assert loss(places, places) == pytest.approx(0, abs=1e-6)
    assert loss(empty, empty) == pytest.approx(0, abs=1e-6)  # an empty mask and an empty prediction
    assert loss(other, places) == pytest.approx(1 - 1 / 41, abs=1e-6)  # (0 + 1) / (20 + 20 + 1)
    assert loss(places, empty) == pytest.approx(1 - 1 / 21, abs=1e-6)
    # All probabilities are 1/2 and half of the mask is set: 2 n/4 over n/4 + n/2, with 1 added to both.
    half = np.zeros((1, 10, 10), np.uint8)
    half[:, :5] = 1
    even = segmentation_loss(torch.zeros(1, 1, 10, 10), torch.from_numpy(half), NARROW["unet"]).item()
    assert even == pytest.approx(1 - (2 * 25 + 1) / (25 + 50 + 1))


def test_cross_entropy_of_one_structure_is_binary_if_background_has_weight_1():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 1, 9, 8, generator=generator), torch.randint(0, 2, (2, 9, 8), generator=generator)
    recipe = override(NARROW["unet"], loss="cross_entropy", background_weight=1.0)
    wanted = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], truth.float())
    assert segmentation_loss(logits, truth, recipe).item() == pytest.approx(wanted.item(), abs=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.tuples(*[st.sampled_from([0.0, 1.0, 3.0, 4.0])] * 3).filter(any))
def test_the_loss_of_a_sparse_structure_equals_that_of_numpy(seed, weights):
    rng = np.random.default_rng(seed)
    logits, truth = 2 * rng.normal(size=(3, 1, 7, 5)), (rng.random((3, 7, 5)) < 0.1).astype(np.uint8)
    truth[0] = 0
    p, g = 1 / (1 + np.exp(-logits[:, 0])), truth.astype(float)
    right = np.where(g, p, 1 - p)
    dice = 1 - 2 * (p * g).sum() / (p.sum() + g.sum())
    parts = -np.log(right).mean(), dice, ((1 - right) ** 2 * -np.log(right)).mean()
    recipe = SparseSegmenterRecipe(loss_weights=weights)
    found = segmentation_loss(torch.from_numpy(logits), torch.from_numpy(truth), recipe)
    assert found.item() == pytest.approx(np.dot(weights, parts), abs=1e-4)


def test_a_batch_without_the_structure_and_without_a_prediction_costs_nothing():
    logits, truth = torch.full((2, 1, 5, 5), -200.0), torch.zeros(2, 5, 5, dtype=torch.uint8)
    assert segmentation_loss(logits, truth, SparseSegmenterRecipe()).item() == pytest.approx(0, abs=1e-6)


def test_albunet_is_a_resnet34_and_its_blocks():
    def convolution(before, after, side=3):
        return side * side * before * after + after

    network = AlbuNet(1)
    names = {name for name, _ in resnet34(weights=None).named_parameters() if not name.startswith("fc.")}
    assert {name for name, _ in network.encoder.named_parameters()} == names
    resnet = 21_284_672 - 2 * 64 * 49  # torchvision's resnet34 without its last layer, for one colour instead of three
    # Channels in, within and out of each block of ternausnets.py with 32 filters.
    blocks = [(512, 512, 256), (768, 512, 256), (512, 512, 256), (384, 256, 64), (128, 128, 128), (128, 128, 32)]
    expected = resnet + sum(convolution(a, b) + convolution(b, c) for a, b, c in blocks)
    assert parameters(network) == expected + convolution(32, 32) + convolution(32, 1, 1) == 34_598_625
    first, theirs = network.encoder.conv1, resnet34(weights=None).conv1
    assert (first.kernel_size, first.stride, first.padding) == (theirs.kernel_size, theirs.stride, theirs.padding)
    model = Segmenter(SparseSegmenterRecipe(width=0.1)).eval()
    seen = []
    model.network.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[-2:])))
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 70, 50)).shape == (1, 1, 70, 50)
    assert seen == [(128, 64)]  # the smallest map is pooled from stride 32 to stride 64


def test_thresholds_decide_on_the_labels_of_a_sparse_structure():
    model = Segmenter(SparseSegmenterRecipe(network="unet", width=0.1, top=0.8, least_area=2 / 16, bottom=0.4))
    logits = torch.full((2, 1, 4, 4), -9.0)
    logits[:, 0, 0, :3] = 2.0  # a probability of 0.88
    logits[0, 0, 1, :2] = 0.0  # 0.5
    logits[1, 0, 0, 1:3] = 0.5  # 0.62: a single pixel is above 0.8
    labels = model.labels(logits)
    assert labels[0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0] * 4, [0] * 4] and not labels[1].any()
