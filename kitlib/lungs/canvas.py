"""What of an X-ray a model's canvas shows: its grey adjusted, the lungs or all but them, a middle square, a border.

Training and prediction share it, so that a model predicts on what it has learnt from.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitlib.letterbox import Placement
from kitlib.lungs.crop import only_lungs
from kitlib.lungs.equalise import adjusted
from kitlib.recipes.fields import TrainingRecipe

# Of a canvas's side, at each edge: what the probe "border" leaves.
BORDER = 0.1


@dataclass(frozen=True)
class Canvas:
    """A recipe's fields of these names, which say what a model is shown; see kitlib.recipes.fields."""

    image_size: int
    canvas: int = 0
    equalise: bool = False
    gamma: float = 1.0
    masked: bool = False
    probe: str = ""

    @property
    def whole(self) -> int:
        """Side of the square on which the image is laid; the model sees a square of image_size of it."""
        return self.canvas or self.image_size

    @property
    def needs_mask(self) -> bool:
        """Whether what is seen follows the lungs' mask."""
        return self.masked or self.probe == "outside_lungs"

    def grey(self, pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """uint8 (height, width) as it is to be laid on the canvas: adjusted, then black outside or inside of the lungs.

        `mask`, bool of the same shape; without one (the lungs were not found) nothing is black.
        """
        # In this order: what a mask blackens is part of the image's histogram, as Patched FLANNEL has it.
        pixels = adjusted(pixels, self.equalise, self.gamma) if self.equalise or self.gamma != 1 else pixels
        if self.probe == "outside_lungs" and mask is not None:
            mask = ~mask
        return only_lungs(pixels, mask)

    def lay(self, grey: np.ndarray, place: Placement) -> np.ndarray:
        """The canvas of `place` with `grey` on it, and no more than its border for the probe of that name."""
        return border_alone(place.image(grey)) if self.probe == "border" else place.image(grey)

    def middle(self, place: Placement) -> Placement:
        """From a placement on the whole square to one on the square of image_size in its middle, which prediction sees."""
        edge = (self.whole - self.image_size) // 2
        if not edge and self.whole == self.image_size:
            return place
        return dataclasses.replace(
            place,
            canvas_rows=self.image_size,
            canvas_columns=self.image_size,
            top=place.top - edge,
            left=place.left - edge,
        )

    def middle_of(self, pixels: np.ndarray) -> np.ndarray:
        """The same square of a whole canvas (whole, whole); a view, no copy."""
        edge = (self.whole - self.image_size) // 2
        return pixels[edge : edge + self.image_size, edge : edge + self.image_size]


def canvas_of(recipe: TrainingRecipe | Mapping[str, Any], image_size: int = 0) -> Canvas:
    """The canvas of a recipe, or of a bundle's record of one; `image_size` instead of its own, where it is not 0."""
    names = [field.name for field in dataclasses.fields(Canvas)]
    if isinstance(recipe, TrainingRecipe):
        fields = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
    else:
        fields = {name: recipe[name] for name in names if name in recipe}
    return Canvas(**fields | ({"image_size": image_size} if image_size else {}))


def border_alone(canvas: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns), black but for a tenth of its side at each edge, in whole pixels and at least one."""
    shown = canvas.copy()
    down, across = (max(1, round(BORDER * side)) for side in canvas.shape)
    shown[down : canvas.shape[0] - down, across : canvas.shape[1] - across] = 0
    return shown
