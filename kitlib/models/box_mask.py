"""The auxiliary task of segmentation: the boxes of an image as a mask, the decoder that finds it, and its loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

WIDTH = 128  # channels of the decoder
FINEST = 8  # smallest stride of a map that the decoder reads, pixels


def box_mask(boxes: torch.Tensor, cells: int, stride: int) -> torch.Tensor:
    """Boxes (k, 4), corners in pixels of the canvas, as a mask (cells, cells) of squares of `stride` pixels.

    A cell's value is the share of its area that a box covers, 0..1; of several boxes it is the largest share. So the sum
    times stride^2 is the area of a box that lies on the canvas, to the pixel's fraction. Without a box all is 0.
    """
    if not len(boxes):
        return boxes.new_zeros((cells, cells))
    start = torch.arange(cells, device=boxes.device) * stride
    across, down = (
        (torch.minimum(boxes[:, high, None], start + stride) - torch.maximum(boxes[:, low, None], start)).clamp(min=0)
        for low, high in ((0, 2), (1, 3))
    )
    return (down[:, :, None] * across[:, None, :]).amax(dim=0) / stride**2


def mask_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """0.6 binary cross entropy + 0.4 Dice (1st place), the latter over the whole batch; both (n, cells, cells), mask 0..1.

    Dice is 1 - 2 sum(p m) / (sum(p) + sum(m)) with 1 added above and below, so that a batch without a box costs 0 where
    nothing is found (Milletari et al. 2016, section 3, without the squares).
    """
    logits = logits.float()
    found = logits.sigmoid()
    dice = 1 - (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    return 0.6 * functional.binary_cross_entropy_with_logits(logits, mask) + 0.4 * dice


class MaskDecoder(nn.Module):
    """A feature pyramid (Lin et al. 2017) over a backbone's maps of stride 8 and more, its levels summed at the finest.

    `indices` are the maps that it reads, as timm's `forward_intermediates` counts them, and `stride` is the finest one's.
    """

    def __init__(self, channels: Sequence[int], indices: Sequence[int], stride: int) -> None:
        super().__init__()
        self.indices, self.stride = list(indices), stride
        self.pyramid = FeaturePyramidNetwork(list(channels), WIDTH)
        self.last = nn.Conv2d(WIDTH, 1, kernel_size=1)

    def forward(self, maps: Sequence[torch.Tensor], cells: int) -> torch.Tensor:
        """Maps (n, channels, rows, columns), finest first, to logits (n, cells, cells)."""
        levels = self.pyramid({str(level): each for level, each in enumerate(maps)}).values()
        # Also the finest: a network that does not pad gives maps that lack a cell.
        same = [functional.interpolate(each, (cells, cells), mode="bilinear", align_corners=False) for each in levels]
        return self.last(functional.relu(torch.stack(same).sum(dim=0)))[:, 0]


def mask_decoder(backbone: Any) -> MaskDecoder:
    """The decoder for a timm backbone. Raises ValueError where its maps cannot be had."""
    name = backbone.pretrained_cfg.get("architecture") or type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"recipe.segmentation needs the maps inside the backbone, which timm does not give for {name}; "
            "choose a ResNet, EfficientNet, ConvNeXt or ViT, or segmentation=0"
        )
    # Of several maps of one size the deepest; a ViT's all have one size.
    last = {info["reduction"]: (index, info["num_chs"]) for index, info in enumerate(backbone.feature_info)}
    chosen = {stride: last[stride] for stride in sorted(last) if stride >= FINEST}
    return MaskDecoder([width for _, width in chosen.values()], [index for index, _ in chosen.values()], min(chosen))
