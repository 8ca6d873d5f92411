"""ResUNet (Zhang et al. 2018, Road Extraction by Deep Residual U-Net, table I); see paper "ResUNet + ensembles", table 5."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

CHANNELS = (64, 128, 256, 512)


class ResUNet(nn.Module):
    """ResUNet: three residual units and a bridge, with strides 1, 2, 2, 2, then three residual units on the way up.

    On the way up, each unit's input is up-sampled bilinearly and concatenated with the map of the same size from the way
    down. The sides of images must be multiples of `multiple` pixels.
    """

    multiple = 8

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        channels = [max(1, round(count * width)) for count in CHANNELS]
        self.down = nn.ModuleList(
            ResidualUnit(before, after, stride=2 if level else 1, first=not level)
            for level, (before, after) in enumerate(zip([1, *channels[:-1]], channels, strict=True))
        )
        self.up = nn.ModuleList(ResidualUnit(before + after, after) for before, after in pairwise(channels[::-1]))
        self.last = nn.Conv2d(channels[0], outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs, rows, columns) for images (n, 1, rows, columns)."""
        skipped = []
        for unit in self.down:
            x = unit(x)
            skipped.append(x)
        skipped.pop()
        for unit in self.up:
            finer = skipped.pop()
            x = functional.interpolate(x, finer.shape[-2:], mode="bilinear", align_corners=False)
            x = unit(torch.cat([x, finer], dim=1))
        return self.last(x)


class ResidualUnit(nn.Module):
    """Sum of a 1 x 1 convolution and a path of two layers, each batch norm, ReLU and 3 x 3 convolution.

    In the network's `first` unit, the path begins with a convolution, without the batch norm and ReLU before it.
    """

    def __init__(self, before: int, after: int, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        leading = [] if first else [nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
        self.path = nn.Sequential(
            *leading,
            nn.Conv2d(before, after, 3, stride, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features `x` (n, before, rows, columns) to features (n, after, rows / stride, columns / stride)."""
        return self.path(x) + self.shortcut(x)
