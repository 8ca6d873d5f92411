"""Makes a model's input from an X-ray: adjusts grey levels, blackens pixels, places the image, cuts the central square.

Pixels are blackened outside the lungs if the model's recipe requires it. Training and prediction share this code, so that a
model gets the same kind of input in both.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitlib.letterbox import Placement
from kitlib.lungs.crop import blacken_outside
from kitlib.lungs.equalise import adjust_grey
from kitlib.recipes.fields import TrainingRecipe

# Width of the border, as a share of the canvas's side. With the recipe's `probe` "border", a model sees only this border.
BORDER = 0.1


@dataclass(frozen=True)
class Canvas:
    """The fields of a recipe that determine a model's input; their meaning is documented in kitlib.recipes.fields."""

    image_size: int
    canvas: int = 0
    equalise: bool = False
    gamma: float = 1.0
    masked: bool = False
    probe: str = ""
    resize: str = "area"

    @property
    def whole(self) -> int:
        """Side length in pixels of the square canvas for the whole image; the model's input is cut from this canvas."""
        return self.canvas or self.image_size

    @property
    def needs_mask(self) -> bool:
        """Whether the model's input depends on the lung mask."""
        return self.masked or self.probe == "outside_lungs"

    def grey(self, pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Return the image `pixels` with adjusted grey levels and, if `mask` is given, black outside the lungs.

        If `probe` is "outside_lungs", the lungs are black instead. `pixels` and the result are uint8 (height, width).
        `mask`, bool (height, width), is True in the lungs; it is None if the lungs are not needed or were not found.
        """
        # Grey levels are adjusted before masking, so that the histogram includes the masked pixels, as in Patched FLANNEL.
        pixels = adjust_grey(pixels, self.equalise, self.gamma) if self.equalise or self.gamma != 1 else pixels
        if self.probe == "outside_lungs" and mask is not None:
            mask = ~mask
        return blacken_outside(pixels, mask)

    def lay(self, grey: np.ndarray, place: Placement) -> np.ndarray:
        """Draw the image `grey` on a canvas at `place`, and return the canvas, uint8 (canvas_rows, canvas_columns).

        If `probe` is "border", everything but the border of the canvas is black.
        """
        canvas = place.image(grey, bicubic=self.resize == "bicubic")
        return keep_border(canvas) if self.probe == "border" else canvas

    def middle(self, place: Placement) -> Placement:
        """Convert a placement on the whole canvas to the placement on its central square, which is used for prediction.

        The square's side length is `image_size`.
        """
        edge = (self.whole - self.image_size) // 2
        return dataclasses.replace(
            place,
            canvas_rows=self.image_size,
            canvas_columns=self.image_size,
            top=place.top - edge,
            left=place.left - edge,
        )

    def crop_middle(self, pixels: np.ndarray) -> np.ndarray:
        """Return the central square of the whole canvas `pixels` as a view; its side length is `image_size`."""
        edge = (self.whole - self.image_size) // 2
        return pixels[edge : edge + self.image_size, edge : edge + self.image_size]


def read_canvas(recipe: TrainingRecipe | Mapping[str, Any], image_size: int = 0) -> Canvas:
    """Return the Canvas of `recipe`: a recipe object, or the dict of a recipe in a bundle's record.

    `image_size` replaces the recipe's `image_size`, unless it is 0.
    """
    names = [field.name for field in dataclasses.fields(Canvas)]
    if isinstance(recipe, TrainingRecipe):
        fields = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
    else:
        fields = {name: recipe[name] for name in names if name in recipe}
    return Canvas(**fields | ({"image_size": image_size} if image_size else {}))


def keep_border(canvas: np.ndarray) -> np.ndarray:
    """Return a copy of the image `canvas`, uint8 (rows, columns), that is black except for a border.

    The border is a tenth of the image's height or width, and at least one pixel.
    """
    shown = canvas.copy()
    down, across = (max(1, round(BORDER * side)) for side in canvas.shape)
    shown[down : canvas.shape[0] - down, across : canvas.shape[1] - across] = 0
    return shown
