"""Segments the lungs in all images of a data set.

Writes the masks that the network predicted, the frames to crop to and, optionally, copies of the images that are black
outside the cleaned lungs.
"""

import dataclasses
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from kitlib.bundle import ADDED, data_fingerprint, read_bundle, save_bundle
from kitlib.errors import SettingsError
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import CLEAN_UP, FOUND, Cleaned, clean_up_mask, decode_maps
from kitlib.recipes.fields import PUBLISHED_CLEAN_UP, SegmenterRecipe
from kitlib.settings import override
from kitlib.tables import BOX, check_table, concatenate, read_table, write_table
from kitlib.training.fold_folder import open_run
from kitlib.xrays.cache import DECODING, CachedXray, DecodedXrays, XrayCache, usable_cores
from kitlib.xrays.mask_store import MaskStore

logger = logging.getLogger(__name__)

# Part of a run's identity, so that masks from another version of the kit are not reused: a submission would crop images
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

    `bundle` is the folder of the segmenter's bundle. `clean_up` replaces the recipe's settings for the clean-up of masks,
    such as `dilations`; CLEAN_UP_FIELDS lists the fields. With `resume`, an interrupted run continues. Writes to
    `run_folder`:

    - `tables/lungs.parquet`, the `lungs` table
    - `masks/`, the masks that the network predicted, before the clean-up
    - `bundle/`, the segmenter with the settings in `clean_up`, so that a submission finds the same lungs
    - if `masked_images`, `masked/`, a cache of the images, which are black outside the lungs found after the clean-up; an
      image without usable lungs is unchanged

    Raises TrainingError if the folder contains a run with other images, other settings or another segmenter. Raises
    SettingsError if `clean_up` has a field that CLEAN_UP_FIELDS lacks. Also raises SettingsError if `least_area` has its
    published value, which is for masks after the published dilations and closings, but `dilations` or `closings` differ.
    """
    run_folder, changes = Path(run_folder), clean_up or {}
    unknown = [name for name in changes if name not in CLEAN_UP_FIELDS]
    if unknown:
        raise SettingsError(f"clean_up has no field {unknown[0]!r}; valid fields: {', '.join(CLEAN_UP_FIELDS)}")
    record, weights = read_bundle(bundle)
    model = load_segmenter(bundle, device, batch_size)
    recipe = model.recipe = override(model.recipe, **changes)
    _check_clean_up(recipe, bundle)
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
            results = list(pool.map(lambda segmentation: _segment_image(segmentation, recipe, masked), model.maps(stream)))
            # Masks are written last: an image counts as done if its mask is stored.
            part = run_folder / "checkpoints" / f"lungs-{len(masks):06d}.parquet"
            rows.append(_lungs_table(cleaned for cleaned, _ in results))
            write_table(rows[-1], "lungs", part)
            masks.add({cleaned.image_id: codes for cleaned, codes in results})
            bar.update(len(results))
    lungs = concatenate(rows, "lungs").set_index("image_id").loc[images.image_id].reset_index()
    write_table(lungs, "lungs", run_folder / "tables" / "lungs.parquet")
    fields = {name: value for name, value in record.items() if name not in ADDED}
    applied = {"recipe": dataclasses.asdict(recipe), "architecture": {"clean_up": CLEAN_UP}}
    save_bundle(run_folder / "bundle", weights, fields | applied)
    return lungs


def _check_clean_up(recipe: SegmenterRecipe, bundle: str | Path) -> None:
    """Raise SettingsError if `least_area` has its published value, but `dilations` or `closings` do not.

    If all three have their published values, logs a warning for any network but a UNet, because the values were published
    for a UNet. Old bundles of other networks have the published values.
    """
    published = {name: getattr(recipe, name) == value for name, value in PUBLISHED_CLEAN_UP.items()}
    if published["least_area"] and not all(published.values()):
        raise SettingsError(
            f"least_area is {recipe.least_area:.4f}, which was published for masks after {PUBLISHED_CLEAN_UP['dilations']} "
            f"dilations and {PUBLISHED_CLEAN_UP['closings']} closings, but the recipe has {recipe.dilations} dilations and "
            f"{recipe.closings} closings. Also set least_area in `clean_up`; 0 means no minimum"
        )
    if recipe.network != "unet" and all(published.values()):
        logger.warning(
            "%s has the clean-up settings of UNet + HRNet (8 dilations, 2 closings, a minimal area), published for a UNet, "
            "but its network is %s. These settings enlarge masks by a fifth. To use the masks as predicted, set `clean_up` "
            "to {dilations: 0, closings: 0, least_area: 0}",
            bundle,
            recipe.network,
        )


def _read_finished_parts(run_folder: Path, resume: bool) -> tuple[MaskStore, list[pd.DataFrame]]:
    """Return the stored masks of an interrupted run, and its `lungs` tables, without images that have no stored mask."""
    store = MaskStore(run_folder / "masks") if resume else MaskStore.create_empty(run_folder / "masks")
    parts = [read_table("lungs", part) for part in sorted((run_folder / "checkpoints").glob("lungs-*.parquet"))]
    return store, [part[part.image_id.isin(store.ids)] for part in parts]


def _segment_image(
    segmentation: tuple[CachedXray, np.ndarray, Placement], recipe: SegmenterRecipe, masked: XrayCache | None
) -> tuple[Cleaned, np.ndarray]:
    """Return the cleaned lungs of one image, and the label image that the network predicted (see `decode_maps`).

    `segmentation` is the image, the network's probability maps and the image's placement on the network's canvas. If
    `masked` is given, also stores the image in this cache, black outside the cleaned lungs. An image without usable lungs is
    stored unchanged.
    """
    xray, maps, place = segmentation
    codes = decode_maps(maps, place, xray.pixels.shape, recipe)
    cleaned = clean_up_mask(xray, codes, recipe)
    if masked is not None:
        inside = cleaned.mask if cleaned.verdict == FOUND else True
        masked.put(dataclasses.replace(xray, pixels=np.where(inside, xray.pixels, 0).astype(np.uint8)))
    return cleaned, codes


def _lungs_table(results: Iterable[Cleaned]) -> pd.DataFrame:
    rows = [(result.image_id, result.verdict, result.area, *result.frame) for result in results]
    return check_table(pd.DataFrame(rows, columns=["image_id", "verdict", "area", *BOX]), "lungs")
