"""UNet (Ronneberger et al. 2015) as in the UNet + HRNet paper, table 4: half of the original channels, with padding."""

from itertools import pairwise

import torch
from torch import nn

CHANNELS = (32, 64, 128, 256, 512)


class UNet(nn.Module):
    """UNet: each level has two 3 x 3 convolutions with ReLU; levels are joined by max-pooling and transposed convolutions.

    With one output it has 7,759,521 parameters, as in the paper. The sides of images must be multiples of `multiple` pixels.
    """

    multiple = 16

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        channels = [max(1, round(count * width)) for count in CHANNELS]
        self.down = nn.ModuleList(
            _convolutions(before, after) for before, after in zip([1, *channels[:-1]], channels, strict=True)
        )
        pairs = list(pairwise(channels[::-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(before, after, 2, stride=2) for before, after in pairs)
        self.joined = nn.ModuleList(_convolutions(2 * after, after) for _, after in pairs)
        self.last = nn.Conv2d(channels[0], outputs, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # Ronneberger et al., section 3: without batch norm the initial weights decide whether training works.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs, rows, columns) for images (n, 1, rows, columns)."""
        skipped = []
        for level, convolutions in enumerate(self.down):
            x = convolutions(nn.functional.max_pool2d(x, 2) if level else x)
            skipped.append(x)
        skipped.pop()
        for up, convolutions in zip(self.up, self.joined, strict=True):
            x = convolutions(torch.cat([up(x), skipped.pop()], dim=1))
        return self.last(x)


def _convolutions(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(after, after, 3, padding=1), nn.ReLU(True)
    )
