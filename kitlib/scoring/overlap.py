"""How well two masks agree: Dice and Jaccard."""

import numpy as np


def overlap(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice 2 |A and B| / (|A| + |B|) and Jaccard |A and B| / |A or B| of two bool arrays of one shape.

    Both are 1 where both masks are empty. Jaccard is Dice / (2 - Dice).
    """
    if found.shape != truth.shape:
        raise ValueError(f"masks of {found.shape} and {truth.shape} pixels cannot be compared")
    shared, total = int((found & truth).sum()), int(found.sum()) + int(truth.sum())
    if not total:
        return 1.0, 1.0
    return 2 * shared / total, shared / (total - shared)
