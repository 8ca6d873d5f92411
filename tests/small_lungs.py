"""A fake run of notebook 14: frames and masks of SmallXrays, and a segmenter that needs no training."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.bundle import save_bundle
from kitlib.classes import MASK_CODES
from kitlib.lungs.clean_up import CLEAN_UP, FOUND
from kitlib.lungs.finders import StoredLungs
from kitlib.models.families import family_of
from kitlib.models.segmenter import Segmenter
from kitlib.recipes.fields import SegmenterRecipe, SparseSegmenterRecipe
from kitlib.tables import BOX, write_table
from kitlib.xrays.mask_store import MaskStore
from tests.small_xrays import COLUMNS, ROWS, SmallXrays

# In original pixels, aligned to pixels of the cached copy, around the white block; the mask fills the frame.
FRAME = (10.0, 6.0, 70.0, 66.0)


def lungs_run(folder: Path, small: SmallXrays, missed=(), frame=FRAME) -> Path:
    """Write a run folder in which every image has FRAME and a mask, except those in `missed`."""
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
    bright_segmenter(folder / "bundle")
    return folder


def stored_lungs(folder: Path, small: SmallXrays, **changes) -> StoredLungs:
    return StoredLungs(lungs_run(folder, small, **changes))


def bright_segmenter(folder: Path, sparse: bool = False, **clean_up) -> Path:
    """Save the bundle of a UNet whose weights pass the image through, so that bright pixels are lung, or if `sparse` a
    pneumothorax.
    """
    rules = {"dilations": 0, "closings": 0, "least_area": 0.01, "least_width": 0.5, "least_island": 0.001, "margin": 0.1}
    recipe = SegmenterRecipe(width=1 / 32, image_size=64, **(rules | clean_up))
    if sparse:
        recipe = SparseSegmenterRecipe(network="unet", width=1 / 32, image_size=64)
    network = Segmenter(recipe)
    for parameter in network.parameters():
        parameter.data.zero_()
    down, joined, last = network.network.down[0], network.network.joined[3], network.network.last
    # Of the two concatenated maps, the second comes from the image's resolution, the first from deeper layers.
    for convolution, channel in ((down[0], 0), (down[2], 0), (joined[0], 1), (joined[2], 0)):
        convolution.weight.data[0, channel, 1, 1] = 1
    last.weight.data.fill_(10), last.bias.data.fill_(-1)
    record = {
        **{"family": family_of(recipe).name, "model": "bright", "classes": list(recipe.structures)},
        "recipe": dataclasses.asdict(recipe),
        **{
            "architecture": {"clean_up": CLEAN_UP},
            "longest_side": 50,
            "image_size": 64,
            "placement": "letterbox",
            "mean": network.mean,
        },
        **{"std": network.std, "fold": 0, "data_fingerprint": "", "precision": "float32", "validation": {}},
    }
    save_bundle(folder, network.state_dict(), record)
    return folder
