"""Classifier of patches of the lungs, whose answers for many images' patches come from one batched forward."""

from collections.abc import Sequence

import torch

from kitlib.models.classifier import FindingsClassifier
from kitlib.models.halving_batches import HalvingBatches
from kitlib.models.patches import SCORES, windows
from kitlib.recipes.fields import PatchRecipe

# Pixels a forward: 512 patches of 224 x 224, fewer where a GPU's memory is too small for them, or 8, which stay in a
# processor's cache.
CHUNKS = {"cuda": 512 * 224**2, "cpu": 8 * 224**2}


class PatchClassifier(FindingsClassifier):
    """One output a class for a patch, as a classifier of findings has for an image; exactly one class is true.

    An image's answer is the share of its patches that vote for each class, or their mean softmax, as the recipe's
    `patch_score` says. Patches lie on `kitlib.models.patches.patch_canvas`; `where` says which, see
    `kitlib.models.patches.places`.
    """

    recipe: PatchRecipe

    def __init__(self, recipe: PatchRecipe, classes: Sequence[str]) -> None:
        super().__init__(recipe, classes)
        self.chunk = 0  # patches that fit into memory together, once that is known

    def image_probabilities(self, canvases: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Canvases uint8 (n, side, side) and centres int64 (m, 3) to float64 (n, classes) on the CPU; rows sum to 1.

        All patches are cut on the model's device and computed together, in as large chunks as fit into its memory. Call it
        in evaluation mode, without gradients, in the precision of `kitlib.device.autocast`.
        """
        return self.scored(self.probabilities(self.patch_logits(canvases, where)), where, len(canvases))

    def patch_logits(self, canvases: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """The logits (m, outputs) of the single patches, on the model's device."""
        device, side = next(self.parameters()).device, self.recipe.image_size
        patches = windows(canvases.to(device, non_blocking=True), side)
        fitted = HalvingBatches("patches", device, self.chunk or max(1, CHUNKS[device.type] // side**2))
        found = fitted(lambda each: [self(self.normalise(patches[tuple(each.T)]))], where)
        self.chunk = fitted.size
        return torch.cat(found)

    def scored(self, probabilities: torch.Tensor, where: torch.Tensor, images: int) -> torch.Tensor:
        """Probabilities (m, classes) of patches to those of their images, float64 (images, classes) on the CPU."""
        return SCORES[self.recipe.patch_score](probabilities.cpu(), where[:, 0].cpu(), images)
