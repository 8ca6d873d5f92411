"""The grey of an X-ray as a segmenter wants it: its histogram equalised, then a power of it."""

import numpy as np


def adjusted(pixels: np.ndarray, equalise: bool, gamma: float) -> np.ndarray:
    """uint8 pixels of any shape, equalised if asked, then 255 (x / 255)^gamma, rounded; Patched FLANNEL, section 2.1.

    The equalised grey is the share of pixels that are not brighter, from the darkest one's on, rescaled to 0..255 in whole
    numbers; an image of one grey becomes black.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}, wanted a positive power, such as 0.5")
    table = np.arange(256)
    if equalise:
        counts = np.bincount(pixels.ravel(), minlength=256).cumsum()
        darkest = counts[counts > 0][0] if counts[-1] else 0
        table = (counts - darkest).clip(min=0) * 255 // max(1, counts[-1] - darkest)
    return np.rint(255 * (table / 255) ** gamma).astype(np.uint8)[pixels]
