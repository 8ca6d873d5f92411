"""AlbuNet (A. Buslaev), a U-Net with a ResNet-34 as encoder: the first model of the 1st place in SIIM-ACR Pneumothorax.

github.com/sneddy/pneumothorax-segmentation, unet_pipeline/models/ternausnets.py.
"""

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet34

FILTERS = 32


class AlbuNet(nn.Module):
    """AlbuNet for grey images. `encoder` is a resnet34 with one input channel and torchvision's tensor names.

    Each decoder block doubles the rows and columns of its input, bilinearly, before two 3 x 3 convolutions with ReLU.
    `width` scales the number of channels in the decoder only. An image's rows and columns must be divisible by `multiple`.
    """

    multiple = 64

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        self.encoder = resnet34(weights=None)
        self.encoder.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.encoder.fc = nn.Identity()
        size = max(1, round(FILTERS * width))
        self.middle = _convolutions(512, 16 * size, 8 * size)
        # Channels of the encoder's map; then, in units of `size`, of the block below, within the block, and of its output.
        blocks = ((512, 8, 16, 8), (256, 8, 16, 8), (128, 8, 8, 2), (64, 2, 4, 4))
        self.up = nn.ModuleList(
            _convolutions(skipped + below * size, within * size, after * size) for skipped, below, within, after in blocks
        )
        self.last_up = _convolutions(4 * size, 4 * size, size)
        self.last = nn.Sequential(nn.Conv2d(size, size, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(size, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs, rows, columns) for images (n, 1, rows, columns)."""
        encoder, skipped = self.encoder, []
        x = functional.max_pool2d(encoder.relu(encoder.bn1(encoder.conv1(x))), 2)
        for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            x = layer(x)
            skipped.append(x)
        x = self.middle(_enlarge(functional.max_pool2d(x, 2)))
        for block in self.up:
            x = block(_enlarge(torch.cat([x, skipped.pop()], dim=1)))
        return self.last(self.last_up(_enlarge(x)))


def _enlarge(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _convolutions(before: int, between: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, between, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(between, after, 3, padding=1),
        nn.ReLU(True),
    )
