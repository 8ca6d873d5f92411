"""Classifier of lung patches that predicts the patches of many images in one batch."""

from collections.abc import Sequence

import torch

from kitlib.models.classifier import FindingsClassifier
from kitlib.models.halving_batches import HalvingBatches
from kitlib.models.patches import SCORES, cut_patches
from kitlib.recipes.fields import PatchRecipe

CPU = torch.device("cpu")
# Pixels per forward pass: 512 patches of 224 x 224 on a GPU (fewer if its memory is too small), or 8 on a CPU, so that they
# fit into its cache.
CHUNKS = {"cuda": 512 * 224**2, "cpu": 8 * 224**2}


class PatchClassifier(FindingsClassifier):
    """Classifier of lung patches with one output per class, for classes that exclude each other.

    An image's prediction is the share of its patches that vote for each class, or the mean softmax of its patches, depending
    on the recipe's `patch_score`. Patches are cut from the canvases of `kitlib.models.patches.patch_canvas`. The argument
    `where` of the methods is int64 (m, 3), one row per patch: index of the image, row and column of the patch's centre.
    """

    recipe: PatchRecipe

    def __init__(self, recipe: PatchRecipe, classes: Sequence[str]) -> None:
        super().__init__(recipe, classes)
        self.chunk = 0  # number of patches that fit into memory together; 0 until the first batch

    def image_probabilities(self, canvases: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return each image's class probabilities, float64 (n, classes) on the CPU; rows sum to 1.

        `canvases` is uint8 (n, side, side), one per image. `where` is int64 (m, 3), one row per patch: index of the image,
        row and column of the patch's centre. The patches of all images are cut on the model's device and predicted together,
        in chunks as large as the device's memory allows. Call this in evaluation mode, without gradients, under
        `kitlib.device.autocast`.
        """
        return self.scored(self.probabilities(self.patch_logits(canvases, where)), where, len(canvases))

    def patch_logits(self, canvases: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return each patch's logits, (m, outputs), on the model's device; for the arguments see `image_probabilities`."""
        device, side = next(self.parameters()).device, self.recipe.image_size

        def compute(piece: torch.Tensor) -> list[torch.Tensor]:
            # Only the canvases of these patches, so that a smaller chunk also needs less memory for padded canvases.
            first, last = piece[:, 0].aminmax()
            local = piece - torch.tensor([first, 0, 0])
            shown = canvases[first : last + 1].to(device, non_blocking=True)
            return [self(self.normalise(cut_patches(shown, local.to(device, non_blocking=True), side)))]

        batches = HalvingBatches("patches", CPU, self.chunk or max(1, CHUNKS[device.type] // side**2))
        logits = batches(compute, where.cpu())
        self.chunk = batches.size
        return torch.cat(logits)

    def scored(self, probabilities: torch.Tensor, where: torch.Tensor, images: int) -> torch.Tensor:
        """Combine the probabilities (m, classes) of m patches into those of images, float64 (images, classes) on the CPU.

        Column 0 of `where` (m, 3) is the index of each patch's image; `images` is the number of images.
        """
        return SCORES[self.recipe.patch_score](probabilities.cpu(), where[:, 0].cpu(), images)
