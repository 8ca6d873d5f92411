"""Compares lung masks before and after the clean-up of the UNet + HRNet paper, on manual masks of real X-rays.

PYTHONPATH=. .venv/bin/python benchmarks/real/clean_up.py --prepared runs/lungs/v7 --segmenter runs/lungs/resunet_v7/fold0

First prepare the data with benchmarks/real/lungs.py and train a segmenter, see lungs.sh. For the images of the fold that the
segmenter has not seen, prints the Dice and the share of Patched FLANNEL's patch centres outside the manual masks, once for
the segmenter's masks and once for the manual ones. For all manual masks, prints how many each rule accepts.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kitlib.inference.segment_lungs import load_segmenter
from kitlib.lungs.clean_up import clean_up_mask, decode_maps
from kitlib.lungs.finders import Lungs
from kitlib.models.patches import centres, image_seed, patch_canvas
from kitlib.recipes.fields import PUBLISHED_CLEAN_UP, PatchRecipe
from kitlib.recipes.named import RECIPES
from kitlib.runs.finished_run import read_metrics
from kitlib.scoring.metrics import overlap
from kitlib.settings import override
from kitlib.tables import read_table
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore

AREA = "least_area"
PATCHES = RECIPES["patched_resnet152"]
RULES = {
    "as drawn": {"dilations": 0, "closings": 0, AREA: 0.0},
    "published": PUBLISHED_CLEAN_UP,
    "published area, as drawn": {"dilations": 0, "closings": 0, AREA: PUBLISHED_CLEAN_UP[AREA]},
}


def main(prepared: Annotated[Path, typer.Option()], segmenter: Annotated[Path, typer.Option()]) -> None:
    cache = XrayCache(prepared / "xrays", read_metrics(prepared)["longest_side"])
    manual, folds = MaskStore(prepared / "masks"), read_table("folds", prepared / "tables" / "folds.parquet")
    model, fold = load_segmenter(segmenter / "bundle"), read_metrics(segmenter)["fold"]
    unseen = folds.id[folds.fold == fold].tolist()
    drawn = {
        xray.image_id: decode_maps(maps, place, xray.pixels.shape, model.recipe)
        for xray, maps, place in model.maps(map(cache.read, unseen))
    }
    for name, codes_of in (("segmenter", drawn), ("manual", {image_id: manual.read(image_id) for image_id in unseen})):
        for rule in ("as drawn", "published"):
            recipe, rows = override(model.recipe, **RULES[rule]), []
            for image_id, codes in codes_of.items():
                xray, truth = cache.read(image_id), manual.read(image_id) > 0
                mask = clean_up_mask(xray, codes, recipe).mask
                rows.append((overlap(mask, truth)[0], share_outside(xray, mask, truth)))
            dice, outside = np.nanmean(rows, axis=0)
            print(f"{name} masks, {rule}: {len(rows)} images, Dice {dice:.3f}, patch centres outside {outside:.3f}")
    for rule, fields in RULES.items():
        recipe = override(model.recipe, **fields)
        verdicts = Counter(clean_up_mask(cache.read(name), manual.read(name), recipe).verdict for name in manual.ids)
        print(f"all manual masks, {rule}: {dict(verdicts)}")


def share_outside(xray, mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the image's patch centres that are outside `truth`; NaN if the image is a single patch."""
    assert isinstance(PATCHES, PatchRecipe)
    frame = np.zeros(4)
    canvas, true_canvas = (patch_canvas(xray, Lungs(frame, each), PATCHES) for each in (mask, truth))
    if canvas.mask is None or true_canvas.mask is None:
        return float("nan")
    points = centres(canvas.mask, PATCHES.patches, image_seed(xray.image_id))
    return 1 - float(true_canvas.mask[tuple(points.T)].mean())


if __name__ == "__main__":
    typer.run(main)
