"""Segments the lungs in all images of a data set.

Writes masks, the frames to crop to and, optionally, copies of the images that are black outside the lungs.
"""

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from kitlib.bundle import ADDED, data_fingerprint, read_bundle, save_bundle
from kitlib.classes import LUNG_CODES
from kitlib.errors import SettingsError
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import CLEAN_UP, Segmented, clean_up_maps
from kitlib.lungs.finders import FOUND
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.settings import override
from kitlib.tables import BOX, check_table, concatenate, read_table, write_table
from kitlib.training.fold_folder import open_run
from kitlib.xrays.cache import DECODING, CachedXray, DecodedXrays, XrayCache, usable_cores
from kitlib.xrays.mask_store import MaskStore

# Part of a run's identity, so that masks from another version of the kit are not reused, with which a submission would crop
# differently.
CODE_VERSION = f"decoding {DECODING}, clean-up {CLEAN_UP}"
IMAGES_PER_FILE = 256  # images per file of masks; at most this many are segmented again after an interruption
# Fields of the segmenter's recipe that only post-process masks, so that they can be changed without new training.
CLEAN_UP_FIELDS = ("least_island", "dilations", "closings", "least_area", "least_width", "margin")


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
    """Segment the lungs of every image and return the `lungs` table, one row per image in the order of `images`.

    `bundle` is the folder of the segmenter's bundle. `clean_up` overrides fields of the segmenter's recipe; only those in
    CLEAN_UP_FIELDS are allowed. Writes to `run_folder`: the `lungs` table; `masks/`; `bundle/`, the segmenter with the
    clean-up fields that were applied, so that a submission crops in the same way; and, with `masked_images`, `masked/`, a
    cache of copies that are black outside the lungs (an image without detected lungs is copied unchanged). With `resume`, an
    interrupted run continues. Raises TrainingError if the folder contains a run with other images, settings or another
    segmenter; SettingsError if `clean_up` has a field that is not in CLEAN_UP_FIELDS.
    """
    run_folder, changes = Path(run_folder), clean_up or {}
    unknown = [name for name in changes if name not in CLEAN_UP_FIELDS]
    if unknown:
        raise SettingsError(f"clean_up has no field {unknown[0]!r}; valid fields: {', '.join(CLEAN_UP_FIELDS)}")
    record, weights = read_bundle(bundle)
    model = load_segmenter(bundle, device, batch_size)
    recipe = model.recipe = override(model.recipe, **changes)
    identity = {
        "segmenter": record["weights_sha256"],
        "recipe": dataclasses.asdict(recipe),
        "longest_side": cache.longest_side,
        "data_fingerprint": data_fingerprint(images=images),
        "masked_images": masked_images,
        "code": CODE_VERSION,
    }
    open_run(run_folder, identity, resume)
    masks, rows = _read_finished_parts(run_folder, resume)
    remaining = [image_id for image_id in images.image_id if image_id not in masks]
    masked = XrayCache(run_folder / "masked", cache.longest_side) if masked_images else None
    bar = tqdm(total=len(images), initial=len(masks), desc="lungs", unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(remaining), IMAGES_PER_FILE):
            stream = (cache.read(image_id) for image_id in remaining[start : start + IMAGES_PER_FILE])
            # Threads clean up the masks while the network segments the next images.
            results = list(pool.map(lambda segmentation: _clean_up_image(segmentation, recipe, masked), model.maps(stream)))
            # Masks are written last: an image counts as done if its mask is stored.
            part = run_folder / "checkpoints" / f"lungs-{len(masks):06d}.parquet"
            rows.append(_lungs_table(results))
            write_table(rows[-1], "lungs", part)
            masks.add({result.image_id: result.codes for result in results})
            bar.update(len(results))
    lungs = concatenate(rows, "lungs").set_index("image_id").loc[images.image_id].reset_index()
    write_table(lungs, "lungs", run_folder / "tables" / "lungs.parquet")
    fields = {name: value for name, value in record.items() if name not in ADDED}
    save_bundle(run_folder / "bundle", weights, fields | {"recipe": dataclasses.asdict(recipe)})
    return lungs


def _read_finished_parts(run_folder: Path, resume: bool) -> tuple[MaskStore, list[pd.DataFrame]]:
    """Return the masks that an interrupted run has stored, and a list of `lungs` tables with the rows of these images."""
    store = MaskStore(run_folder / "masks") if resume else MaskStore.create_empty(run_folder / "masks")
    parts = [read_table("lungs", part) for part in sorted((run_folder / "checkpoints").glob("lungs-*.parquet"))]
    return store, [part[part.image_id.isin(store.ids)] for part in parts]


def _clean_up_image(
    segmentation: tuple[CachedXray, np.ndarray, Placement], recipe: SegmenterRecipe, masked: XrayCache | None
) -> Segmented:
    """Clean up the segmentation of one image and return its lung mask, frame and verdict.

    If `masked` is given, also stores in this cache a copy of the image that is black outside the lungs, or unchanged if no
    usable lungs were found.
    """
    xray, maps, place = segmentation
    result = clean_up_maps(xray, maps, place, recipe)
    if masked is not None:
        inside = np.isin(result.codes, LUNG_CODES) if result.verdict == FOUND else True
        masked.put(dataclasses.replace(xray, pixels=np.where(inside, xray.pixels, 0).astype(np.uint8)))
    return result


def _lungs_table(results: Iterable[Segmented]) -> pd.DataFrame:
    rows = [(result.image_id, result.verdict, result.area, *result.frame) for result in results]
    return check_table(pd.DataFrame(rows, columns=["image_id", "verdict", "area", *BOX]), "lungs")
