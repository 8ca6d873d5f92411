"""A user's own data set of six small images, to be described by a table or by folders."""

from pathlib import Path

import cv2
import numpy as np

ROWS, COLUMNS = 40, 50


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((ROWS, COLUMNS), 90, np.uint8))


def six_images(folder: Path) -> Path:
    """Write x0.png to x5.png in `folder`/images; return `folder`."""
    for number in range(6):
        write_image(folder / "images" / f"x{number}.png")
    return folder
