"""Auxiliary task of study classifiers: to predict a mask of the boxes. Defines the true mask, the decoder and the loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

WIDTH = 128  # channels of the decoder
FINEST = 8  # smallest stride of a feature map that the decoder uses, pixels


def box_mask(boxes: torch.Tensor, cells: int, stride: int) -> torch.Tensor:
    """Return a mask (cells, cells) of an image's boxes; each cell is a square of `stride` x `stride` canvas pixels.

    `boxes` is (k, 4): xmin, ymin, xmax and ymax in canvas pixels. The value of a cell is the share of its area that a box
    covers, 0..1; if several boxes cover the cell, it is the largest of their shares. So for a single box, the sum of the
    mask times stride^2 is exactly the box's area on the canvas. Without boxes the mask is 0.
    """
    if not len(boxes):
        return boxes.new_zeros((cells, cells))
    start = torch.arange(cells, device=boxes.device) * stride
    widths, heights = (
        (torch.minimum(boxes[:, high, None], start + stride) - torch.maximum(boxes[:, low, None], start)).clamp(min=0)
        for low, high in ((0, 2), (1, 3))
    )
    return (heights[:, :, None] * widths[:, None, :]).amax(dim=0) / stride**2


def mask_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return 0.6 x binary cross entropy + 0.4 x Dice loss. Both arguments are (n, cells, cells); `mask` is 0..1.

    The factors 0.6 and 0.4 are those of SIIM-COVID19's 1st place. With p = sigmoid(logits) and m = mask, the Dice loss of a
    whole batch is 1 - (2 sum(p m) + 1) / (sum(p) + sum(m) + 1). Because of the added 1, the Dice loss is 0 if the batch has
    no boxes and the predicted mask is empty. Source: Milletari et al. 2016, section 3, without the squares.
    """
    logits = logits.float()
    predicted = logits.sigmoid()
    dice = 1 - (2 * (predicted * mask).sum() + 1) / (predicted.sum() + mask.sum() + 1)
    return 0.6 * functional.binary_cross_entropy_with_logits(logits, mask) + 0.4 * dice


class MaskDecoder(nn.Module):
    """Predicts the mask of boxes by a feature pyramid (Lin et al. 2017) over a backbone's maps of stride 8 and above.

    The pyramid's maps are resized to the mask's size and summed. `indices` says which of the backbone's maps are used, for
    timm's `forward_intermediates`; `stride` is the stride of the finest of these maps.
    """

    def __init__(self, channels: Sequence[int], indices: Sequence[int], stride: int) -> None:
        super().__init__()
        self.indices, self.stride = list(indices), stride
        self.pyramid = FeaturePyramidNetwork(list(channels), WIDTH)
        self.last = nn.Conv2d(WIDTH, 1, kernel_size=1)

    def forward(self, maps: Sequence[torch.Tensor], cells: int) -> torch.Tensor:
        """Return mask logits (n, cells, cells) for a list of feature maps (n, channels, rows, columns), finest map first."""
        levels = self.pyramid({str(level): feature_map for level, feature_map in enumerate(maps)}).values()
        # The finest map is resized too, because the maps of a network without padding can be smaller than `cells`.
        resized = [functional.interpolate(level, (cells, cells), mode="bilinear", align_corners=False) for level in levels]
        return self.last(functional.relu(torch.stack(resized).sum(dim=0)))[:, 0]


def make_mask_decoder(backbone: Any) -> MaskDecoder:
    """Build the decoder for a timm backbone. Raises ValueError if timm cannot return the backbone's feature maps."""
    name = backbone.pretrained_cfg.get("architecture") or type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"recipe.segmentation needs the backbone's intermediate feature maps, which timm does not return for {name}; "
            "choose a ResNet, EfficientNet, ConvNeXt or ViT, or segmentation=0"
        )
    # If several maps have the same stride, as all maps of a ViT do, the deepest is used.
    deepest = {info["reduction"]: (index, info["num_chs"]) for index, info in enumerate(backbone.feature_info)}
    chosen = {stride: deepest[stride] for stride in sorted(deepest) if stride >= FINEST}
    return MaskDecoder([width for _, width in chosen.values()], [index for index, _ in chosen.values()], min(chosen))
