"""Segmenters of lungs: one of three published networks, its loss, and what its outputs say of each pixel."""

import torch
from torch import nn
from torch.nn import functional

from kitlib.device import memory_format
from kitlib.models.fc_densenet import FCDenseNet103
from kitlib.models.resunet import ResUNet
from kitlib.models.unet import UNet
from kitlib.recipes.fields import SegmenterRecipe

Published = UNet | ResUNet | FCDenseNet103
NETWORKS: dict[str, type[Published]] = {"unet": UNet, "resunet": ResUNet, "fc_densenet103": FCDenseNet103}


class Segmenter(nn.Module):
    """A network under its recipe. Its outputs: one structure alone, or background and then each structure."""

    network: Published

    def __init__(self, recipe: SegmenterRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        structures = len(recipe.structures)
        self.network = NETWORKS[recipe.network](1 if structures == 1 else structures + 1, recipe.width)
        self.mean, self.std = [0.5], [0.25]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised x (n, 1, rows, columns) of any size to logits (n, outputs, rows, columns).

        Where the network wants other sides, x is padded with its edge and the logits are cut back.
        """
        rows, columns = x.shape[-2:]
        down, right = (_missing(side, self.network) for side in (rows, columns))
        if down or right:
            x = functional.pad(x, (0, right, 0, down), mode="replicate")
        return self.network(x)[..., :rows, :columns]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Grey canvases uint8 (n, rows, columns) to the network's input, on their device."""
        x = (pixels[:, None].float() / 255 - self.mean[0]) / self.std[0]
        return x.contiguous(memory_format=memory_format(x.device))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits to float32 probabilities (n, 1 + structures, rows, columns), background first, summing to 1."""
        logits = logits.float()
        if logits.shape[1] > 1:
            return logits.softmax(dim=1)
        inside = logits.sigmoid()
        return torch.cat([1 - inside, inside], dim=1)


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor, recipe: SegmenterRecipe) -> torch.Tensor:
    """The recipe's loss of logits (n, outputs, rows, columns) against places (n, rows, columns), 0 for background.

    "dice": 1 - 2 sum(p g) / (sum(p^2) + sum(g^2)), UNet + HRNet paper, equation 1, the mean over images and structures; 1 is
    added above and below, so that an empty mask costs 0 where nothing is found. "cross_entropy": the mean over pixels,
    background by its weight.
    """
    logits = logits.float()
    if recipe.loss == "cross_entropy":
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        weight = logits.new_ones(logits.shape[1])
        weight[0] = recipe.background_weight
        return functional.cross_entropy(logits, truth.long(), weight)
    found = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1:]
    places = torch.arange(1, found.shape[1] + 1, device=truth.device)
    mask = (truth[:, None] == places[:, None, None]).float()
    shared, squares = (found * mask).sum(dim=(2, 3)), (found**2 + mask).sum(dim=(2, 3))
    return 1 - ((2 * shared + 1) / (squares + 1)).mean()


def _missing(side: int, network: Published) -> int:
    """Pixels that a side lacks to the next one that the network takes."""
    wanted = max(side, getattr(network, "least", network.multiple))
    return -(-wanted // network.multiple) * network.multiple - side
