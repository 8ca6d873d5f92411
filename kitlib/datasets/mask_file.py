"""Reads masks that people drew, in the files that data sets have them in, and keeps them at the size of the decoded copy."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.datasets.base import Faults
from kitlib.datasets.darwin_json import read_darwin_json
from kitlib.errors import MaskError, UnreadableXray
from kitlib.xrays.cache import XrayCache, usable_cores
from kitlib.xrays.image_file import open_image
from kitlib.xrays.mask_store import MaskStore

# A file whose largest value is below this holds codes, such as 1 for the right and 2 for the left lung, and no greys.
CODES_BELOW = 16
ASPECT_TOLERANCE = 0.01
# What is drawn first is covered by what is drawn later: where a lung and the heart overlap, it is lung.
DRAWN_IN_ORDER = ("heart", "lungs", "left_lung", "right_lung")
# A part of less than this share of a mask is no lung; one lung alone is narrower than this, in heights.
LEAST_PART, LONE_LUNG = 0.05, 0.65
PART = 128  # images a file of masks, so that few are in memory at once


def read_mask(path: str | Path) -> np.ndarray:
    """bool (rows, columns): what a PNG, JPEG or GIF file, or the lungs of a Darwin JSON file, count as inside.

    Of an image it is what is brighter than half of the scale, 255 or, where a value is beyond that, 65535; of colours the
    brightest channel decides, palettes are looked up, alpha is left out. V7's masks have what is to be ignored at 127,
    which is outside. Where no value reaches CODES_BELOW and the file is no JPEG, values are codes and all but 0 are inside.
    An image of one colour that is black is an empty mask. Raises MaskError, which names the file.
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
    """Add a label image to `store` for each of `images`, which are in `cache`, that has rows in `masks` (see Dataset).

    Returns faults, as Dataset has them. An image has no mask at all where one of its files is missing, damaged or of another
    aspect ratio (by more than 1 %) than the image, or where no pixel is lung: half a mask would teach that the rest is
    background. One lung alone, or a structure without a pixel, is a fault too, but kept. Masks are brought to the decoded
    copy's size by area, and a pixel is inside from one half. Of structures that overlap, DRAWN_IN_ORDER, the later one
    counts. Images that the store has already are left as they are.
    """
    unknown = sorted(set(masks.structure) - set(DRAWN_IN_ORDER))
    if unknown:
        raise ValueError(f"masks have the structure {unknown[0]!r}; there are: {', '.join(DRAWN_IN_ORDER)}")
    wanted = masks[masks.image_id.isin(images.image_id) & ~masks.image_id.isin(store.ids)]
    drawings = [
        (image_id, list(zip(rows.structure, rows.path, strict=True)))
        for image_id, rows in wanted.groupby("image_id", sort=False)
    ]
    faults, bar = Faults(), tqdm(total=len(drawings), desc="masks", unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(drawings), PART):
            part = drawings[start : start + PART]
            read = list(pool.map(lambda drawing: _label_image(drawing[0], drawing[1], cache), part))
            for (image_id, _), (_, problems) in zip(part, read, strict=True):
                for file, problem in problems:
                    faults.add(file, image_id, problem)
            store.add({image_id: codes for (image_id, _), (codes, _) in zip(part, read, strict=True) if codes is not None})
            bar.update(len(part))
    return faults.table()


def _label_image(
    image_id: str, files: Sequence[tuple[str, str]], cache: XrayCache
) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
    """uint8 of the decoded copy's size, None where the image is to have no mask, and what is wrong, by file."""
    xray, problems = cache.read(image_id), []
    drawn: dict[str, list[np.ndarray]] = {}
    for structure, path in files:
        try:
            mask = read_mask(path)
        except MaskError as error:
            problems.append((_shown(path), f"{error}; the image has no mask"))
            continue
        if abs(mask.shape[1] * xray.rows / (mask.shape[0] * xray.columns) - 1) > ASPECT_TOLERANCE:
            sizes = f"{mask.shape[0]} x {mask.shape[1]} pixels, its image {xray.rows} x {xray.columns}"
            problems.append((_shown(path), f"has {sizes}, another aspect ratio; the image has no mask"))
            continue
        drawn.setdefault(structure, []).append(_resized(mask, xray.pixels.shape))
    if problems:
        return None, problems
    codes = np.zeros(xray.pixels.shape, np.uint8)
    for structure in DRAWN_IN_ORDER:
        for inside in drawn.get(structure, ()):
            codes[inside] = MASK_CODES[structure]
    where = _shown(files[0][1])
    lungs = np.isin(codes, LUNG_CODES)
    if not lungs.any():
        return None, [(where, "no pixel is lung; the image has no mask")]
    problems = [
        (where, f"the {structure.replace('_', ' ')} has no pixel; kept")
        for structure, masks in drawn.items()
        if not any(inside.any() for inside in masks)
    ]
    if not problems and _is_lone(lungs):
        problems.append((where, "one lung only is drawn; kept"))
    return codes, problems


def _resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool of `shape`: the pixels of which at least half is inside."""
    if mask.shape == shape:
        return mask
    by = cv2.INTER_AREA if mask.shape[0] >= shape[0] else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.uint8) * 255, shape[::-1], interpolation=by) > 127


def _is_lone(lungs: np.ndarray) -> bool:
    """Whether a mask of lungs, which has a pixel, has one part, too narrow for two."""
    parts = cv2.connectedComponentsWithStats(lungs.astype(np.uint8))[2][1:]
    large = parts[parts[:, cv2.CC_STAT_AREA] >= LEAST_PART * lungs.sum()]
    return len(large) == 1 and bool(large[0, cv2.CC_STAT_WIDTH] < LONE_LUNG * large[0, cv2.CC_STAT_HEIGHT])


def _shown(path: str) -> str:
    """Masks of one image often share its name, and their folders tell them apart."""
    return "/".join(Path(path).parts[-2:])
