"""Lungs of a whole data set, segmented once: masks, frames to crop to and, if asked, images black outside of the lungs."""

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kitlib.bundle import ADDED, data_fingerprint, read_bundle, save_bundle
from kitlib.classes import LUNG_CODES
from kitlib.errors import SettingsError
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import CLEAN_UP, Segmented, segmented
from kitlib.lungs.finders import FOUND
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.settings import override
from kitlib.tables import BOX, check_table, concatenate, read_table, write_table
from kitlib.training.fold_folder import open_run
from kitlib.xrays.cache import DECODING, CachedXray, DecodedXrays, XrayCache, usable_cores
from kitlib.xrays.mask_store import MaskStore

# Masks of an older kit are not taken for this one's, with which a submission would crop.
CODE = f"decoding {DECODING}, clean-up {CLEAN_UP}"
PART = 256  # images a file of masks: an interrupted run repeats fewer than so many
# Of the segmenter's recipe: what becomes of a mask, which does not need another training.
CHANGEABLE = ("least_island", "dilations", "closings", "least_area", "least_width", "margin")


def apply_lungs(
    images: pd.DataFrame,
    cache: DecodedXrays,
    bundle: str | Path,
    run_folder: str | Path,
    clean_up: dict[str, Any] | None = None,
    masked_images: bool = False,
    batch_size: int | None = None,
    device: torch.device | None = None,
    resume: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Segment each of `images` once and return the table lungs, in their order.

    `run_folder` gets that table, `masks/`, `bundle/` (the segmenter as it was applied: that of a submission which is to crop
    alike) and, with `masked_images`, `masked/`, a decoded copy that is black outside of the lungs, whole where they were not
    found. `clean_up` changes fields of CHANGEABLE. An interrupted run goes on. Raises TrainingError where the folder holds a
    run of other images or another segmenter, SettingsError for a field that is none of the clean-up's.
    """
    run_folder, changes = Path(run_folder), clean_up or {}
    unknown = [name for name in changes if name not in CHANGEABLE]
    if unknown:
        raise SettingsError(f"the clean-up has no field {unknown[0]!r}; it has: {', '.join(CHANGEABLE)}")
    record, weights = read_bundle(bundle)
    model = load_segmenter(bundle, device, batch_size)
    recipe = model.recipe = override(model.recipe, **changes)
    identity = {
        "segmenter": record["weights_sha256"],
        "recipe": dataclasses.asdict(recipe),
        "longest_side": cache.longest_side,
        "data_fingerprint": data_fingerprint(images=images),
        "masked_images": masked_images,
        "code": CODE,
    }
    open_run(run_folder, identity, resume)
    masks, rows = _done(run_folder, resume)
    waiting = [image_id for image_id in images.image_id if image_id not in masks]
    masked = XrayCache(run_folder / "masked", cache.longest_side) if masked_images else None
    bar = tqdm(total=len(images), initial=len(masks), desc="lungs", unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(waiting), PART):
            stream = (cache.read(image_id) for image_id in waiting[start : start + PART])
            # The clean-up of one image and the network's work on the next ones overlap.
            found = list(pool.map(lambda given: _finished(given, recipe, masked), model.maps(stream)))
            # The masks last: they say what is done.
            part = run_folder / "checkpoints" / f"lungs-{len(masks):06d}.parquet"
            rows.append(_table(found))
            write_table(rows[-1], "lungs", part)
            masks.add({each.image_id: each.codes for each in found})
            bar.update(len(found))
    lungs = concatenate(rows, "lungs").set_index("image_id").loc[images.image_id].reset_index()
    write_table(lungs, "lungs", run_folder / "tables" / "lungs.parquet")
    stated = {name: value for name, value in record.items() if name not in ADDED}
    save_bundle(run_folder / "bundle", weights, stated | {"recipe": dataclasses.asdict(recipe)})
    return lungs


def _done(run_folder: Path, resume: bool) -> tuple[MaskStore, list[pd.DataFrame]]:
    """What an interrupted run has left: whole files of masks, and the rows of their images."""
    store = MaskStore(run_folder / "masks") if resume else MaskStore.afresh(run_folder / "masks")
    parts = [read_table("lungs", part) for part in sorted((run_folder / "checkpoints").glob("lungs-*.parquet"))]
    return store, [part[part.image_id.isin(store.ids)] for part in parts]


def _finished(
    given: tuple[CachedXray, np.ndarray, Placement], recipe: SegmenterRecipe, masked: XrayCache | None
) -> Segmented:
    xray, maps, place = given
    found = segmented(xray, maps, place, recipe)
    if masked is not None:
        inside = np.isin(found.codes, LUNG_CODES) if found.verdict == FOUND else True
        masked.put(dataclasses.replace(xray, pixels=np.where(inside, xray.pixels, 0).astype(np.uint8)))
    return found


def _table(found: Iterable[Segmented]) -> pd.DataFrame:
    rows = [(each.image_id, each.verdict, each.area, *each.frame) for each in found]
    return check_table(pd.DataFrame(rows, columns=["image_id", "verdict", "area", *BOX]), "lungs")
