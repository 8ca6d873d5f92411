"""Reads the mask files of data sets, and stores the masks as label images of the size of the decoded X-rays."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from kitlib.classes import LUNG_CODES, MASK_CODES, SPARSE_STRUCTURES
from kitlib.datasets.darwin_json import read_darwin_json
from kitlib.datasets.faults import Faults
from kitlib.errors import MaskError, UnreadableXray
from kitlib.xrays.cache import XrayCache, usable_cores
from kitlib.xrays.image_file import open_image
from kitlib.xrays.mask_store import MaskStore
from kitlib.xrays.run_lengths import decode_mask

# If all values of a file are below this, they are codes (such as 1 for the right and 2 for the left lung), not grey levels.
CODES_BELOW = 16
ASPECT_TOLERANCE = 0.01
# Later structures overwrite earlier ones: a pixel where a lung and the heart overlap is lung.
DRAWN_IN_ORDER = ("heart", "lungs", "left_lung", "right_lung", "pneumothorax")
# A connected part that covers less than LEAST_PART of the lung mask is not a lung. If there is only one large part and its
# width is less than LONE_LUNG of its height, only one lung is drawn.
LEAST_PART, LONE_LUNG = 0.05, 0.65
IMAGES_PER_PART = 128  # images in each file of the mask store; limits the number of masks in memory


def read_mask(path: str | Path) -> np.ndarray:
    """Return the mask in a PNG, JPEG or GIF file, or the lungs in a Darwin JSON file, as a bool array (rows, columns).

    In an image file, a pixel is True if its brightest colour channel is above half of the scale. The scale is 255, or 65535
    if any value exceeds 255. Pixels to be ignored, which are 127 in V7's masks, are therefore False. If all values are below
    CODES_BELOW and the file is not a JPEG, the values are class codes, and every pixel but 0 is True. Palettes are resolved,
    alpha is ignored. A black image is an empty mask. Raises MaskError, with the file's path, if the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return read_darwin_json(path).mask()
    try:
        with open_image(path) as image:
            kind = image.format
            image.load()
            grey = image if image.mode.startswith("I") else image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            values = np.asarray(grey)
    except UnreadableXray as error:
        raise MaskError(f"{path} {error.reason}: fetch the mask again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MaskError(f"{path} is damaged ({' '.join(str(error).split())}): fetch the mask again") from error
    values = values.max(axis=2) if values.ndim == 3 else values
    brightest = int(values.max())
    if brightest < CODES_BELOW and kind != "JPEG":
        return values > 0
    return values > (255 if brightest <= 255 else 65535) // 2


def fill_masks(
    store: MaskStore, masks: pd.DataFrame, images: pd.DataFrame, cache: XrayCache, progress: bool = True
) -> pd.DataFrame:
    """Add a mask to `store` for every image that has rows in `masks`; return the faults. See Dataset for both tables.

    `cache` must contain all `images`. Masks are resized by area averaging to the reduced X-rays in `cache`; a pixel belongs
    to a structure if the structure covers at least half of the pixel. Where structures overlap, the later one in
    DRAWN_IN_ORDER wins. Masks that are already in the store are not changed.

    These faults leave an image without a mask: a mask file is missing, is damaged, or has an aspect ratio that differs from
    the image's by more than 1 % (an incomplete mask would teach that the missing part is background); no pixel is lung. With
    these faults, the mask is stored: it has only one lung, or an empty structure. A mask that has only SPARSE_STRUCTURES
    (pneumothorax) may be empty. Raises ValueError if a structure is unknown.
    """
    unknown = sorted(set(masks.structure) - set(DRAWN_IN_ORDER))
    if unknown:
        raise ValueError(f"unknown structure {unknown[0]!r} in the masks; valid: {', '.join(DRAWN_IN_ORDER)}")
    pending = masks[masks.image_id.isin(images.image_id) & ~masks.image_id.isin(store.ids)]
    runs = pending["runs"] if "runs" in pending else pd.Series("", pending.index)
    drawings = [
        (image_id, list(zip(rows.structure, rows.path, runs[rows.index], strict=True)))
        for image_id, rows in pending.groupby("image_id")
    ]
    faults, bar = Faults(), tqdm(total=len(drawings), desc="masks", unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(drawings), IMAGES_PER_PART):
            part = drawings[start : start + IMAGES_PER_PART]
            read = list(pool.map(lambda drawing: _label_image(drawing[0], drawing[1], cache), part))
            for (image_id, _), (_, problems) in zip(part, read, strict=True):
                for file, problem in problems:
                    faults.add(file, image_id, problem)
            store.add({image_id: codes for (image_id, _), (codes, _) in zip(part, read, strict=True) if codes is not None})
            bar.update(len(part))
    return faults.table()


def _label_image(
    image_id: str, files: Sequence[tuple[str, str, str]], cache: XrayCache
) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
    """Return the mask of an image as a label image (None if a fault prevents it), and the faults as (file, problem).

    The label image is uint8, of the same shape as the decoded X-ray in `cache`. `files` has one tuple (structure, path, text
    of run lengths) per mask. If the text is "", the mask is in the file `path`.
    """
    xray, problems = cache.read(image_id), []
    masks_of: dict[str, list[np.ndarray]] = {}
    for structure, path, runs in files:
        try:
            mask = decode_mask(runs) if runs else read_mask(path)
        except MaskError as error:
            problems.append((_short_name(path), f"{error}; the image gets no mask"))
            continue
        if abs(mask.shape[1] * xray.rows / (mask.shape[0] * xray.columns) - 1) > ASPECT_TOLERANCE:
            sizes = f"{mask.shape[0]} x {mask.shape[1]} pixels, but its image has {xray.rows} x {xray.columns}"
            problems.append((_short_name(path), f"has {sizes}: the aspect ratios differ; the image gets no mask"))
            continue
        masks_of.setdefault(structure, []).append(_resize(mask, xray.pixels.shape))
    if problems:
        return None, problems
    codes = np.zeros(xray.pixels.shape, np.uint8)
    for structure in DRAWN_IN_ORDER:
        for inside in masks_of.get(structure, ()):
            codes[inside] = MASK_CODES[structure]
    first_file = _short_name(files[0][1])
    if set(masks_of) <= set(SPARSE_STRUCTURES):
        return codes, []
    lungs = np.isin(codes, LUNG_CODES)
    if not lungs.any():
        return None, [(first_file, "no pixel is lung; the image gets no mask")]
    problems = [
        (first_file, f"the mask of the {structure.replace('_', ' ')} is empty; the image's mask is used")
        for structure, masks in masks_of.items()
        if not any(inside.any() for inside in masks)
    ]
    if not problems and _is_one_lung(lungs):
        problems.append((first_file, "only one lung is drawn; the mask is used"))
    return codes, problems


def _resize(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a bool mask resized to `shape`; a pixel of the result is True if the mask covers at least half of its area."""
    if mask.shape == shape:
        return mask
    interpolation = cv2.INTER_AREA if mask.shape[0] >= shape[0] else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.uint8) * 255, shape[::-1], interpolation=interpolation) > 127


def _is_one_lung(lungs: np.ndarray) -> bool:
    """Return whether a nonempty bool mask has a single large connected part, which is too narrow to be both lungs."""
    parts = cv2.connectedComponentsWithStats(lungs.astype(np.uint8))[2][1:]
    large = parts[parts[:, cv2.CC_STAT_AREA] >= LEAST_PART * lungs.sum()]
    return len(large) == 1 and bool(large[0, cv2.CC_STAT_WIDTH] < LONE_LUNG * large[0, cv2.CC_STAT_HEIGHT])


def _short_name(path: str) -> str:
    """Return "folder/name" of a mask file, because an image's masks often have the same name in different folders."""
    return "/".join(Path(path).parts[-2:])
