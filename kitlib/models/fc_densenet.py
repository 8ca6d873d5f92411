"""FC-DenseNet103 (Jegou et al. 2017, The One Hundred Layers Tiramisu, table 2), the segmenter of Patched FLANNEL."""

import torch
from torch import nn

FIRST = 48  # output channels of the first convolution
GROWTH = 16  # channels that each layer adds
DOWN, BOTTLENECK, UP = (4, 5, 7, 10, 12), 15, (12, 10, 7, 5, 4)  # layers per block
DROPOUT = 0.2  # probability


class FCDenseNet103(nn.Module):
    """FC-DenseNet103: a U-Net of dense blocks with 103 convolutions and, for four outputs, 9,319,428 parameters.

    The bottleneck and the blocks on the way up, except for the last block, pass on only their new features. Images may have
    any size of at least 32 x 32 pixels: up-sampled maps are cropped to the size of the map from the way down.
    """

    multiple = 1
    least = 32

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        channels, growth = max(1, round(FIRST * width)), max(1, round(GROWTH * width))
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.down, self.smaller, skipped = nn.ModuleList(), nn.ModuleList(), []
        for layers in DOWN:
            self.down.append(DenseBlock(channels, growth, layers))
            channels += growth * layers
            skipped.append(channels)
            self.smaller.append(_transition_down(channels))
        self.bottleneck = DenseBlock(channels, growth, BOTTLENECK)
        new_channels = growth * BOTTLENECK
        self.larger, self.up = nn.ModuleList(), nn.ModuleList()
        for layers in UP:
            self.larger.append(nn.ConvTranspose2d(new_channels, new_channels, 3, stride=2))
            channels = new_channels + skipped.pop()
            self.up.append(DenseBlock(channels, growth, layers))
            new_channels = growth * layers
        self.last = nn.Conv2d(channels + new_channels, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs, rows, columns) for images (n, 1, rows, columns)."""
        x, skipped = self.first(x), []
        for block, smaller in zip(self.down, self.smaller, strict=True):
            x = torch.cat([x, block(x)], dim=1)
            skipped.append(x)
            x = smaller(x)
        new_features = self.bottleneck(x)
        for larger, block in zip(self.larger, self.up, strict=True):
            finer = skipped.pop()
            rows, columns = finer.shape[-2:]
            x = torch.cat([larger(new_features)[..., :rows, :columns], finer], dim=1)
            new_features = block(x)
        return self.last(torch.cat([x, new_features], dim=1))


class DenseBlock(nn.Module):
    """Layers of batch norm, ReLU, 3 x 3 convolution and dropout; each gets the block's input and all previous outputs."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + growth * previous),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels + growth * previous, growth, 3, padding=1),
                nn.Dropout2d(DROPOUT),
            )
            for previous in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return only the layers' outputs (n, growth x layers, rows, columns) for x (n, channels, rows, columns)."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features[1:], dim=1)


def _transition_down(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1),
        nn.Dropout2d(DROPOUT),
        nn.MaxPool2d(2),
    )
