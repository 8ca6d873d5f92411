"""The run of a segmenter without one: frames and masks of SmallXrays, as the notebook that applies one leaves them."""

from pathlib import Path

import numpy as np
import pandas as pd
from small_xrays import COLUMNS, ROWS, SmallXrays

from kitlib.classes import MASK_CODES
from kitlib.lungs import FOUND, StoredLungs
from kitlib.mask_store import MaskStore
from kitlib.tables import BOX, write_table

# In original pixels, on the pixels of the cached copy, around the white block; the mask is all of the frame.
FRAME = (10.0, 6.0, 70.0, 66.0)


def lungs_run(folder: Path, small: SmallXrays, missed=(), frame=FRAME) -> Path:
    """A run folder: every image has one frame and mask, but those `missed`."""
    rows = [
        (name, "too small", 0.01, 0.0, 0.0, float(COLUMNS), float(ROWS)) if name in missed else (name, FOUND, 0.5, *frame)
        for name in small.image_ids
    ]
    table = pd.DataFrame(rows, columns=["image_id", "verdict", "area", *BOX])
    write_table(table, "lungs", folder / "tables" / "lungs.parquet")
    xmin, ymin, xmax, ymax = (np.array(frame) / 2).astype(int)
    mask = np.zeros((ROWS // 2, COLUMNS // 2), np.uint8)
    mask[ymin:ymax, xmin:xmax] = MASK_CODES["lungs"]
    MaskStore(folder / "masks").add({name: mask for name in small.image_ids if name not in missed})
    return folder


def stored_lungs(folder: Path, small: SmallXrays, **changes) -> StoredLungs:
    return StoredLungs(lungs_run(folder, small, **changes))
