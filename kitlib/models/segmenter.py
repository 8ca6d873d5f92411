"""A wrapper of published segmentation networks that predicts each pixel's probabilities, and the loss for training."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kitlib.device import memory_format
from kitlib.models.albunet import AlbuNet
from kitlib.models.fc_densenet import FCDenseNet103
from kitlib.models.resunet import ResUNet
from kitlib.models.unet import UNet
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.scoring.metrics import threshold_map

Published = UNet | ResUNet | FCDenseNet103 | AlbuNet
NETWORKS: dict[str, type[Published]] = {
    "unet": UNet,
    "resunet": ResUNet,
    "fc_densenet103": FCDenseNet103,
    "albunet": AlbuNet,
}
DICE_EPSILON = 1e-5  # keeps the Dice loss of an empty batch finite


class Segmenter(nn.Module):
    """A published segmentation network, chosen by the recipe.

    For a single structure, the network has one output. For several structures, its first output is for the background, and
    each other output is for one structure.
    """

    network: Published

    def __init__(self, recipe: SegmenterRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        structures = len(recipe.structures)
        self.network = NETWORKS[recipe.network](1 if structures == 1 else structures + 1, recipe.width)
        self.mean, self.std = [0.5], [0.25]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, outputs, rows, columns) for normalised images (n, 1, rows, columns) of any size.

        If the network does not accept this size, `x` is padded with its edge pixels, and the logits are cropped again.
        """
        rows, columns = x.shape[-2:]
        down, right = (_padding(side, self.network) for side in (rows, columns))
        if down or right:
            x = functional.pad(x, (0, right, 0, down), mode="replicate")
        return self.network(x)[..., :rows, :columns]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convert grey `pixels`, uint8 (n, rows, columns), to network input (n, 1, rows, columns) on the same device."""
        x = (pixels[:, None].float() / 255 - self.mean[0]) / self.std[0]
        return x.contiguous(memory_format=memory_format(x.device))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 probabilities (n, 1 + structures, rows, columns) for logits (n, outputs, rows, columns).

        The background is first; the probabilities of each pixel sum to 1.
        """
        logits = logits.float()
        if logits.shape[1] > 1:
            return logits.softmax(dim=1)
        inside = logits.sigmoid()
        return torch.cat([1 - inside, inside], dim=1)

    def labels(self, logits: torch.Tensor) -> np.ndarray:
        """Return label images (n, rows, columns) for logits (n, outputs, rows, columns): 0, or k for the k-th structure.

        Each pixel gets its most probable label. With a SparseSegmenterRecipe, the recipe's thresholds decide.
        """
        probabilities, recipe = self.probabilities(logits), self.recipe
        if not isinstance(recipe, SparseSegmenterRecipe):
            return probabilities.argmax(dim=1).cpu().numpy()
        maps = (255 * probabilities[:, 1]).round().to(torch.uint8).cpu().numpy()
        least = recipe.least_area * maps[0].size
        return np.stack([threshold_map(each, recipe.top, least, recipe.bottom) for each in maps]).astype(np.uint8)


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor, recipe: SegmenterRecipe) -> torch.Tensor:
    """Return the recipe's loss for logits (n, outputs, rows, columns) and label images (n, rows, columns).

    Labels are 0 for background and k for the k-th structure. Below, p is the predicted probability and g the true mask.
    "dice" is the mean over images and structures of 1 - (2 sum(p g) + 1) / (sum(p^2) + sum(g^2) + 1): equation 1 of the
    UNet + HRNet paper, with 1 added so that the loss is 0 if a mask is empty and nothing is predicted.
    "cross_entropy" is the mean over pixels, with the background weighted by `background_weight`.
    "bce_dice_focal", for one output, is a sum of three losses, weighted by `loss_weights`, as in the 1st place solution of
    SIIM-ACR Pneumothorax Segmentation: the mean binary cross entropy of all pixels; 1 - 2 sum(p g) / (sum(p) + sum(g)) over
    the whole batch (in most single images, g is empty); and the mean focal loss -(1 - q)^2 log q of all pixels, where q is
    the probability of the pixel's true label.
    """
    logits = logits.float()
    if isinstance(recipe, SparseSegmenterRecipe):
        return _bce_dice_focal(logits[:, 0], (truth > 0).float(), recipe.loss_weights)
    if recipe.loss == "cross_entropy":
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        weight = logits.new_ones(logits.shape[1])
        weight[0] = recipe.background_weight
        return functional.cross_entropy(logits, truth.long(), weight)
    probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1:]
    structures = torch.arange(1, probabilities.shape[1] + 1, device=truth.device)
    mask = (truth[:, None] == structures[:, None, None]).float()
    intersection, squares = (probabilities * mask).sum(dim=(2, 3)), (probabilities**2 + mask).sum(dim=(2, 3))
    return 1 - ((2 * intersection + 1) / (squares + 1)).mean()


def _bce_dice_focal(logits: torch.Tensor, mask: torch.Tensor, weights: tuple[float, float, float]) -> torch.Tensor:
    entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities * mask).sum() + DICE_EPSILON) / (probabilities.sum() + mask.sum() + DICE_EPSILON)
    focal = ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()
    return weights[0] * entropy.mean() + weights[1] * dice + weights[2] * focal


def _padding(side: int, network: Published) -> int:
    """Return the smallest number of pixels that must be added to a side of an image so that `network` accepts it."""
    minimum = max(side, getattr(network, "least", network.multiple))
    return -(-minimum // network.multiple) * network.multiple - side
