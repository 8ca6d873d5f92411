"""Adjusts the grey of an X-ray: histogram equalisation, then a gamma curve."""

import numpy as np


def adjust_grey(pixels: np.ndarray, equalise: bool, gamma: float) -> np.ndarray:
    """Return uint8 pixels of any shape, equalised if `equalise`, then mapped to 255 (x / 255)^gamma, rounded.

    This is Patched FLANNEL, section 2.1. The equalised grey is the cumulative histogram, less the count of the darkest grey
    that occurs, rescaled to 0..255 and cut to integers; an image of one grey becomes black. Raises ValueError unless gamma
    is positive.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}; expected a positive number, such as 0.5")
    table = np.arange(256)
    if equalise:
        counts = np.bincount(pixels.ravel(), minlength=256).cumsum()
        darkest = counts[counts > 0][0] if counts[-1] else 0
        table = (counts - darkest).clip(min=0) * 255 // max(1, counts[-1] - darkest)
    return np.rint(255 * (table / 255) ** gamma).astype(np.uint8)[pixels]
