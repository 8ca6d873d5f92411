"""Where the lungs are, by their darkness alone: some milliseconds an image, and it says when it is not sure.

On 401 real COVID chests with masks drawn by people (tests/lungs/test_darkness.py) the frame holds the whole lungs in half
of the images and 0.95 of them in 95 %, at 0.86 of the image's area; in 22 % of the images it finds none. Small children's
chests (Kermany's) are harder: 0.80 of the lungs in 95 %, none in 37 %.
"""

import cv2
import numpy as np

WORK_SIDE = 128  # pixels of the longer side at which is looked
DARK_SHARES = np.arange(0.2, 0.62, 0.03)  # of the image's pixels that are tried as dark
LUNG_AREA = (0.02, 0.32)  # of the image, each lung
LEAST_HEIGHT = 0.2  # of the image, each lung
# Opacities are as bright as what surrounds the lungs, so that a dark area may be a part of one; a chest's frame is about as
# high as it is wide.
MARGIN = 0.13  # of the frame's sides, added around
LEAST_ASPECT = 0.95  # height of the frame, in widths; a lower one is lengthened at the bottom
LEAST_SIDE = 0.55  # of the image; a smaller frame is no chest


def lung_box(pixels: np.ndarray) -> np.ndarray | None:
    """xmin, ymin, xmax, ymax of both lungs with a margin, on whole pixels of `pixels` (uint8 (rows, columns), air dark).

    None where no two areas look like lungs. At several levels the dark areas that do not touch the top or the sides are
    taken; the level counts at which the largest ones of the left and the right half are largest.
    """
    rows, columns = pixels.shape
    shrink = min(1.0, WORK_SIDE / max(rows, columns))
    size = max(1, round(columns * shrink)), max(1, round(rows * shrink))
    small = cv2.GaussianBlur(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), (0, 0), 1.5)
    best, frame = 0.0, None
    for level in np.unique(np.quantile(small, DARK_SHARES)):
        worth, found = _lungs(small <= level)
        if worth > best:
            best, frame = worth, found
    if frame is None:
        return None
    xmin, ymin, xmax, ymax = frame
    ymax = max(ymax, ymin + LEAST_ASPECT * (xmax - xmin))
    x, y = MARGIN * (xmax - xmin), MARGIN * (ymax - ymin)
    grown = np.array([xmin - x, ymin - y, xmax + x, ymax + y]) / [*size, *size]
    grown = grown.clip(0, 1)
    if (grown[2:] - grown[:2]).min() < LEAST_SIDE:
        return None
    grown = grown * [columns, rows, columns, rows]
    return np.concatenate([np.floor(grown[:2]), np.ceil(grown[2:])])


def _lungs(dark: np.ndarray) -> tuple[float, tuple[float, float, float, float] | None]:
    """How much the dark areas (rows, columns) look like two lungs, and their common frame."""
    rows, columns = dark.shape
    dark = cv2.morphologyEx(dark.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, _, stats, centres = cv2.connectedComponentsWithStats(dark, connectivity=4)
    halves: list[list[np.ndarray]] = [[], []]
    for (left, top, width, height, area), (x, _) in zip(stats[1:], centres[1:], strict=True):
        inside = left > 0 and top > 0 and left + width < columns
        likely = LUNG_AREA[0] <= area / dark.size <= LUNG_AREA[1] and height >= LEAST_HEIGHT * rows
        if inside and likely and width < 0.6 * columns:
            halves[int(x > columns / 2)].append(np.array([left, top, left + width, top + height, area]))
    if not all(halves):
        return 0.0, None
    right, left = (max(half, key=lambda each: each[4]) for half in halves)
    if min(right[3], left[3]) <= max(right[1], left[1]):
        return 0.0, None
    # A half that shows a part only is as wide as the other, seen from the middle.
    middle = (right[2] + left[0]) / 2
    reach = max(middle - right[0], left[2] - middle)
    ymin, ymax = min(right[1], left[1]), max(right[3], left[3])
    return float(min(right[4], left[4])), (middle - reach, ymin, middle + reach, ymax)
