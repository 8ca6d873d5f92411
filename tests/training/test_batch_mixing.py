"""Mixing keeps the sum of each target and unknown targets, and mixes pixels, mask and targets by the same share."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.training.batch_mixing import mix_batch

SIDE = 16


def batch(n, seed, stride=None):
    """Return a batch in which image i has grey level 10 i and its own class; each mask has a single value."""
    torch.manual_seed(seed)
    made = {
        "pixels": (torch.arange(n, dtype=torch.uint8) * 10)[:, None, None].expand(n, SIDE, SIDE).clone(),
        "label": torch.eye(n),
        "none": torch.rand(n),
        "boxes": [torch.zeros(0, 4)] * n,
        "index": torch.arange(n),
    }
    if stride:
        cells = SIDE // stride
        made["mask"] = torch.linspace(0, 1, n)[:, None, None].expand(n, cells, cells).clone()
    return made


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.3, 0.7)]),
    st.sampled_from([None, 4]),
)
def test_the_sum_of_each_target_stays_and_pixels_hold_the_shares_of_the_labels(n, seed, alphas, stride):
    given_batch = batch(n, seed, stride)
    before = {name: value.clone() for name, value in given_batch.items() if name != "boxes"}
    mixed = mix_batch(given_batch, *alphas)
    for name, value in before.items():
        assert torch.equal(given_batch[name], value)  # the input batch is unchanged
    assert mixed["label"].sum(dim=0).numpy() == pytest.approx(np.ones(n), abs=1e-5)
    assert mixed["label"].sum(dim=1).numpy() == pytest.approx(np.ones(n), abs=1e-5)
    assert mixed["none"].sum().item() == pytest.approx(before["none"].sum().item(), abs=1e-4)
    # With MixUp and CutMix, an image's mean grey level is the mean over its parts, weighted by the shares in its label.
    greys = mixed["label"] @ (torch.arange(n) * 10.0)
    assert mixed["pixels"].float().mean(dim=(1, 2)).numpy() == pytest.approx(greys.numpy(), abs=1e-3)
    if stride:
        shares = mixed["label"] @ torch.linspace(0, 1, n)
        assert mixed["mask"].mean(dim=(1, 2)).numpy() == pytest.approx(shares.numpy(), abs=1e-5)
        large = mixed["mask"].repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        assert (mixed["pixels"].float() / (10 * max(1, n - 1))).numpy() == pytest.approx(large.numpy(), abs=1e-4)


def test_what_is_unknown_in_either_image_stays_unknown():
    for alphas in ((0.4, 0.0), (0.0, 1.0)):
        one = batch(2, seed=1)
        one["none"] = torch.tensor([torch.nan, 1.0])
        one["label"][0] = torch.nan
        # Each image is mixed at random with the other image or with itself.
        for seed in range(4):
            torch.manual_seed(seed)
            mixed = mix_batch(one, *alphas)
            meets_itself = mixed["label"][1].isfinite().all().item()
            assert mixed["none"].isnan().tolist() == [True, not meets_itself]
            assert mixed["label"].isnan().all(dim=1).tolist() == [True, not meets_itself]


def test_the_shares_are_betas():
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    for alpha in (0.2, 1.0):
        torch.manual_seed(0)
        shares = []
        while len(shares) < 700:
            mixed = mix_batch({"pixels": torch.zeros(2, 1, 1), "label": torch.eye(2), "none": torch.zeros(2)}, alpha, 0.0)
            if mixed["label"][0, 1] > 0:  # mixed with the other image, not with itself
                shares.append(mixed["label"][0, 0].item())
        assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def cutmix_places(draws, side):
    """Return for each draw of CutMix with alpha 1 which pixels come from the other image."""
    pixels = torch.stack([torch.zeros(side, side), torch.ones(side, side)])
    one, places = {"pixels": pixels, "label": torch.eye(2), "none": torch.zeros(2)}, []
    torch.manual_seed(0)
    while len(places) < draws:
        pasted = mix_batch(one, 0.0, 1.0)["pixels"][0] == 1
        if pasted.any():  # mixed with the other image, not with itself
            places.append(pasted)
    return torch.stack(places).double()


def test_cutmix_pastes_squares_at_even_places_that_are_cut_at_the_edges():
    # A square of the side a, 0..1, with a centre drawn evenly from 0..1 covers a - a^2 / 4 of an axis on average. With a^2
    # drawn evenly, the mean of (a - a^2 / 4)^2 is 1/2 - 1/5 + 1/48.
    places = cutmix_places(500, side=64)
    assert places.mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.05)  # four standard deviations
    rows, columns = places.mean(dim=(0, 2)), places.mean(dim=(0, 1))
    for axis in (rows, columns):
        assert axis[0] > 0.1 and axis[-1] > 0.1  # squares reach the edges
        assert axis[:32].mean().item() == pytest.approx(axis[32:].mean().item(), abs=0.1)
    inner = places[(places[:, [0, -1]].sum(dim=(1, 2)) == 0) & (places[:, :, [0, -1]].sum(dim=(1, 2)) == 0)]
    heights, widths = inner.any(dim=2).sum(dim=1), inner.any(dim=1).sum(dim=1)
    assert len(inner) > 50 and (heights - widths).abs().max() <= 1  # in whole pixels


def test_each_method_mixes_half_of_the_batches():
    one = {"pixels": torch.zeros(2, 1, 1, dtype=torch.uint8), "label": torch.eye(2), "none": torch.zeros(2)}
    torch.manual_seed(0)
    kinds = [mix_batch(one, 0.4, 1.0)["pixels"].dtype for _ in range(400)]
    # Only MixUp needs fractions of grey levels. Four standard deviations are 0.1.
    assert np.mean([kind == torch.uint8 for kind in kinds]) == pytest.approx(0.5, abs=0.1)


def test_without_an_alpha_the_batch_passes_and_nothing_is_drawn():
    one = batch(3, seed=0)
    state = torch.get_rng_state()
    assert mix_batch(one, 0.0, 0.0) is one
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn_follows_from_torchs_seed():
    for alphas in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0)):
        first, again = (mix_batch(batch(4, seed=5), *alphas) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in ("pixels", "label", "none"))
