"""Box masks have the boxes' area, and the mask loss is lower for a better prediction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from kitlib.models.box_mask import WIDTH, MaskDecoder, box_mask, mask_loss

CELLS, STRIDE = 8, 4
SIDE = CELLS * STRIDE
corners = st.tuples(*[st.floats(-5, SIDE + 5, width=32) for _ in range(4)])


def inside(box):
    """Return width and height of the part of a box that lies on the canvas."""
    low, high = np.clip(box[:2], 0, SIDE), np.clip(box[2:], 0, SIDE)
    return np.maximum(high - low, 0)


@given(corners)
def test_the_mask_has_exactly_the_area_of_the_box(values):
    xmin, xmax = sorted(values[:2])
    ymin, ymax = sorted(values[2:])
    mask = box_mask(torch.tensor([[xmin, ymin, xmax, ymax]]), CELLS, STRIDE)
    assert mask.shape == (CELLS, CELLS) and mask.min() >= 0 and mask.max() <= 1
    width, height = inside(np.array([xmin, ymin, xmax, ymax]))
    assert mask.sum().item() * STRIDE**2 == pytest.approx(width * height, abs=1e-2)
    # The centre of mass is the middle of the visible part: x along columns, y along rows.
    if width * height > 1:
        middles = (torch.arange(CELLS) + 0.5) * STRIDE
        cut = mask.sum(dim=0) @ middles / mask.sum(), mask.sum(dim=1) @ middles / mask.sum()
        assert abs(cut[0].item() - np.clip([xmin, xmax], 0, SIDE).mean()) < STRIDE
        assert abs(cut[1].item() - np.clip([ymin, ymax], 0, SIDE).mean()) < STRIDE


def test_a_cell_holds_the_share_of_its_area_that_is_covered():
    # 2 of 4 columns and 1 of 4 rows of the first cell: 1/8; the second cell of the row: 4 of 4 columns.
    mask = box_mask(torch.tensor([[2.0, 3.0, 8.0, 4.0]]), 3, 4)
    assert torch.equal(mask, torch.tensor([[1 / 8, 1 / 4, 0], [0, 0, 0], [0, 0, 0]]))


def test_two_boxes_count_once_where_they_overlap_and_none_is_zero():
    both = box_mask(torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12]]), 4, 4)
    assert both.sum() * 16 == 64 + 64 - 16
    assert box_mask(torch.zeros(0, 4), 4, 4).sum() == 0


@pytest.mark.parametrize("boxes", [0, 2])
def test_the_mask_is_on_the_device_of_the_boxes(boxes):
    mask = box_mask(torch.zeros(boxes, 4, device="meta"), 5, 4)
    assert mask.device.type == "meta" and mask.shape == (5, 5)


def test_the_loss_is_its_formula():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 3), torch.rand(2, 3, 3)
    p, m = 1 / (1 + np.exp(-logits.numpy().astype(float))), mask.numpy().astype(float)
    bce = -(m * np.log(p) + (1 - m) * np.log(1 - p)).mean()
    dice = 1 - (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
    assert mask_loss(logits, mask).item() == pytest.approx(0.6 * bce + 0.4 * dice, abs=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.booleans())
def test_a_better_prediction_costs_less(seed, step, empty):
    """The loss falls with every step from any prediction towards the truth."""
    torch.manual_seed(seed)
    mask = torch.zeros(2, 6, 6)
    if not empty:
        mask[:, 1:4, 2:5] = 1
    start, truth = torch.randn(2, 6, 6).clamp(-3, 3) * 2, (mask * 2 - 1) * 8
    nearer = torch.lerp(start, truth, step)
    assert mask_loss(truth, mask) < mask_loss(nearer, mask) < mask_loss(start, mask)


def test_a_rough_mask_costs_less_than_none_and_a_batch_without_a_box_can_cost_0():
    mask = functional.pad(torch.ones(1, 4, 4), (2, 2, 2, 2))
    rough = functional.pad(torch.ones(1, 4, 4), (1, 3, 1, 3))
    assert mask_loss(rough * 8 - 4, mask) < mask_loss(torch.full_like(mask, -4.0), mask)
    assert mask_loss(torch.full((1, 8, 8), -30.0), torch.zeros(1, 8, 8)).item() == pytest.approx(0, abs=1e-5)


def test_the_decoder_is_a_pyramid_with_one_output():
    # A 1 x 1 and a 3 x 3 convolution per map (Lin et al. 2017), then a single score per cell.
    pyramid = sum((channels + 1) * WIDTH + (9 * WIDTH + 1) * WIDTH for channels in (3, 5))
    decoder = MaskDecoder([3, 5], [1, 2], 8)
    assert sum(each.numel() for each in decoder.parameters()) == pyramid + WIDTH + 1
    assert decoder([torch.zeros(2, 3, 6, 6), torch.zeros(2, 5, 3, 3)], 7).shape == (2, 7, 7)


def test_the_decoder_resizes_all_maps_to_the_same_places_and_sums_them():
    decoder = MaskDecoder([WIDTH, WIDTH], [1, 2], 8)
    decoder.pyramid = nn.Identity()
    nn.init.constant_(decoder.last.weight, 1 / WIDTH)
    nn.init.zeros_(decoder.last.bias)

    def columns(cells):
        """Return a map (1, WIDTH, cells, cells) whose values are the columns of the cells' centres, -1/2..1/2."""
        return ((torch.arange(cells) + 0.5) / cells - 0.5).expand(1, WIDTH, cells, cells)

    # Values below 0 are cut off. The coarse map does not reach the centres at the border.
    expected = 2 * columns(8)[:, 0].clamp(min=0)
    torch.testing.assert_close(decoder([columns(8), columns(4)], 8)[..., :-1], expected[..., :-1], atol=1e-6, rtol=0)
