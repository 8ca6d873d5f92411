"""Adjusts the grey levels of an X-ray: histogram equalisation, then a gamma curve."""

import numpy as np


def adjust_grey(pixels: np.ndarray, equalise: bool, gamma: float) -> np.ndarray:
    """Equalise the histogram of uint8 pixels if `equalise`, then map each grey level x to 255 (x / 255)^gamma.

    Returns uint8 pixels of the same shape. The method is that of Patched FLANNEL, section 2.1. The equalised grey level is
    the cumulative histogram, minus the number of pixels with the darkest level in the image, rescaled to 0..255 and
    truncated to integers; an image with a single grey level becomes black. Raises ValueError unless gamma is positive.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}; expected a positive number, such as 0.5")
    table = np.arange(256)
    if equalise:
        counts = np.bincount(pixels.ravel(), minlength=256).cumsum()
        darkest = counts[counts > 0][0] if counts[-1] else 0
        table = (counts - darkest).clip(min=0) * 255 // max(1, counts[-1] - darkest)
    return np.rint(255 * (table / 255) ** gamma).astype(np.uint8)[pixels]
