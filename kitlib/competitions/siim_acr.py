"""SIIM-ACR Pneumothorax Segmentation (2019): a mask of the pneumothorax, which most images do not have.

A mask is written as run lengths, see kitlib.xrays.run_lengths. A run that ends in the last pixel is written like any other
run, although the organisers' encoder omits it.

The metric is the mean over images of Dice, 2 |X and Y| / (|X| + |Y|), which is 1 if both masks are empty. So one predicted
pixel on an image without a pneumothorax lowers the Dice of this image from 1 to 0.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from kitlib.classes import MASK_CODES
from kitlib.competitions.contract import Competition, fill_rows
from kitlib.competitions.csv_files import Rows, read_truth_table, refuse
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.errors import MaskError, ScoringError
from kitlib.scoring.metrics import threshold_map
from kitlib.settings import Count, Probability
from kitlib.xrays.run_lengths import EMPTY, SIDE, draw_runs, encode_runs, parse_runs, runs_of

FINDING = "pneumothorax"
CODE = MASK_CODES[FINDING]
LEVELS = 257  # the 256 grey levels of a map, and one more, which no pixel reaches: the threshold for the probability 1


@dataclass(frozen=True)
class SiimAcrSettings(FusionSettings):
    """Fusion settings of SIIM-ACR: the thresholds that turn a probability map into a mask, by the rule of the 1st place.

    See kitlib.scoring.metrics.threshold_map for the rule and its thresholds top, least_area and bottom. Their published
    values are (0.75, 2000, 0.3) and (0.7, 600, 0.3).
    """

    GRIDS: ClassVar = {
        "mask": (
            ("top", "least_area", "bottom"),
            tuple(
                (top, least_area, bottom)
                for top in (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
                for least_area in (1, 300, 600, 1000, 1500, 2000, 3000, 5000)
                for bottom in (0.2, 0.3, 0.4, 0.5)
                if bottom <= top
            ),
        )
    }

    top: Probability = 0.75
    least_area: Count = 2000  # pixels, of SIDE x SIDE
    bottom: Probability = 0.3


def read_truth(path: Path) -> dict[str, np.ndarray]:
    """Return the true masks in a CSV file: a dict from image_id to the mask's runs (n, 2), as `parse_runs` returns them.

    `path` is the file, or a folder with stage_2_train.csv or, if it is missing, train-rle.csv. A run is its first pixel and
    the pixel after its last. The file has one row per lesion; a mask is the union of all runs of its image, which may
    overlap. Blanks before the name and the values of the column EncodedPixels, as in train-rle.csv, are ignored.
    """
    table = read_truth_table(path, ("stage_2_train.csv", "train-rle.csv"), ("ImageId", "EncodedPixels"))
    rows: dict[str, list[np.ndarray]] = {}
    for row, (image_id, text) in enumerate(zip(table["ImageId"], table["EncodedPixels"], strict=True)):
        runs, faults = parse_runs(text)
        if faults:
            refuse(table, row, "; ".join(faults))
        rows.setdefault(image_id, []).append(runs)
    return {image_id: np.concatenate(runs) for image_id, runs in rows.items()}


def _parse_row(image_id: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    return parse_runs(cells[0])


ROWS = Rows(("ImageId", "EncodedPixels"), _parse_row, "stage_2_sample_submission.csv")


def metric(truth: Mapping[str, np.ndarray], submission: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return mean Dice coefficients, 0..1: of all images, and of the images with and without a pneumothorax.

    The keys of the result are `score`, `with_pneumothorax` and `without`. Both arguments map each image_id to the runs (n,
    2) of its mask, as `parse_runs` returns them. The ground truth decides whether an image is with or without a
    pneumothorax. A mean over no images is NaN. Raises ScoringError unless both arguments have the same ids.
    """
    if truth.keys() != submission.keys():
        different = sorted(truth.keys() ^ submission.keys())
        raise ScoringError(f"{len(different)} ids are only in the truth or only in the submission, such as {different[0]!r}")
    values = np.array([dice(runs, submission[name]) for name, runs in truth.items()], dtype=float)
    is_positive = np.array([len(runs) > 0 for runs in truth.values()], dtype=bool)
    parts = {"score": values, "with_pneumothorax": values[is_positive], "without": values[~is_positive]}
    return {name: float(part.mean()) if len(part) else float("nan") for name, part in parts.items()}


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Dice coefficient of two masks: 0..1, 1 if both are empty. Runs (n, 2) may overlap and have any order."""
    total = count_pixels(first) + count_pixels(second)
    return 2 * (total - count_pixels(np.concatenate([first, second]))) / total if total else 1.0


def count_pixels(runs: np.ndarray) -> int:
    """Return the number of pixels in the union of runs (n, 2): each run's first pixel, and the pixel after its last."""
    starts, ends = runs[np.argsort(runs[:, 0])].T
    covered = np.maximum.accumulate(np.append(0, ends))
    return int(np.maximum(ends - np.maximum(starts, covered[:-1]), 0).sum())


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame, masks: Any) -> dict[str, np.ndarray]:
    """Return the true masks of the prepared `images` as a dict from image_id to runs (n, 2).

    `masks` is a MaskStore. Images without a mask in `masks` are omitted. Raises MaskError if `masks` is None.
    """
    if masks is None:
        raise MaskError("the prepared run has no masks, so there is no ground truth; prepare the competition's data again")
    ids = [image_id for image_id in images["image_id"] if image_id in masks]
    return {
        image_id: runs_of(_on_grid(np.where(masks.read(image_id) == CODE, 255, 0).astype(np.uint8)) > 127)
        for image_id in ids
    }


def decide(merged: MergedPredictions, settings: SiimAcrSettings) -> dict[str, np.ndarray]:
    """Return the runs (n, 2) of a mask for each image that a model has predicted, keyed by image_id."""
    # Imported here because a submission writes its first file before packages for images are installed.
    from kitlib.xrays.cache import usable_cores
    from kitlib.xrays.mask_store import decode_grey

    maps = _maps_of(merged)

    def runs(png: bytes) -> np.ndarray:
        return runs_of(threshold_map(_on_grid(decode_grey(png)), settings.top, settings.least_area, settings.bottom))

    with ThreadPoolExecutor(usable_cores()) as pool:
        return dict(zip(maps["image_id"], pool.map(runs, maps["map"]), strict=True))


def fill(ids: list[str], decided: Mapping[str, np.ndarray]) -> tuple[list[list[str]], list[str]]:
    """Return the submission's rows for `ids`, and the ids that `decided` lacks, which get an empty mask."""
    return fill_rows(baseline_rows(ids), {image_id: [encode_runs(runs)] for image_id, runs in decided.items()})


def compare(truth: Mapping[str, np.ndarray], maps: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `maps` for images in `truth`, with a column `counts` from which `judge` computes scores quickly.

    `maps` is the table of fused probability maps in MergedPredictions. For `counts`, each map is resized to 1024 x 1024
    pixels. `counts` is an int array (2, LEVELS). Of the pixels whose grey level in the map is at least k, entry [0, k] is
    the number inside the true mask, and entry [1, k] the number outside.
    """
    import cv2

    from kitlib.xrays.cache import usable_cores
    from kitlib.xrays.mask_store import decode_grey

    def count(image_id: str, png: bytes) -> np.ndarray:
        pixels, runs = _on_grid(decode_grey(png)), truth[image_id]
        all_pixels = cv2.calcHist([pixels], [0], None, [LEVELS], [0, LEVELS]).ravel()
        # Both are transposed, because runs go down the columns.
        inside = np.bincount(cv2.transpose(pixels)[draw_runs(runs).T], minlength=LEVELS) if len(runs) else np.zeros(LEVELS)
        return np.stack([inside, all_pixels - inside])[:, ::-1].cumsum(axis=1, dtype=float)[:, ::-1].astype(np.int32)

    maps = maps[maps["image_id"].isin(truth.keys())]
    with ThreadPoolExecutor(usable_cores()) as pool:  # OpenCV works outside Python's lock
        return maps.assign(counts=list(pool.map(count, maps["image_id"], maps["map"])))


def judge(truth: Mapping[str, np.ndarray], merged: MergedPredictions, settings: SiimAcrSettings) -> float:
    """Return the mean Dice coefficient (0..1) of the masks that `decide` would return, over the images in `truth`.

    An image without a row in `merged.masks` gets an empty mask. This takes milliseconds if `merged.masks` has the column
    `counts` that `compare` adds; otherwise, all masks are decoded first.
    """
    maps = merged.masks if "counts" in merged.masks else compare(truth, _maps_of(merged))
    maps = maps[(maps["finding"] == FINDING) & maps["image_id"].isin(truth.keys())]
    top, bottom = (math.floor(255 * probability) + 1 for probability in (settings.top, settings.bottom))
    counts = np.array(maps["counts"].tolist(), int).reshape(-1, 2, LEVELS)[:, :, [0, top, bottom]]
    hits, others = (counts[:, :, 2] * (counts[:, :, 1].sum(axis=1) >= settings.least_area)[:, None]).T
    total = hits + others + counts[:, 0, 0]
    predicted = np.where(total, 2 * hits / np.maximum(total, 1), 1.0).sum()
    unpredicted = sum(not len(truth[image_id]) for image_id in truth.keys() - set(maps["image_id"]))
    return float(predicted + unpredicted) / len(truth) if truth else float("nan")


def _maps_of(merged: MergedPredictions) -> pd.DataFrame:
    return merged.masks[merged.masks["finding"] == FINDING]


def _on_grid(pixels: np.ndarray) -> np.ndarray:
    """Return grey values, uint8 (rows, columns), resized to SIDE x SIDE: averaged if reduced, interpolated if enlarged."""
    import cv2

    method = cv2.INTER_AREA if max(pixels.shape) > SIDE else cv2.INTER_LINEAR
    return pixels if pixels.shape == (SIDE, SIDE) else cv2.resize(pixels, (SIDE, SIDE), interpolation=method)


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return a row with an empty mask for every id; 78 % of the training images have an empty mask."""
    return [[name, EMPTY] for name in ids]


SIIM_ACR = Competition.with_rows(
    ROWS,
    name="siim-acr",
    slug="siim-acr-pneumothorax-segmentation",
    title="SIIM-ACR Pneumothorax Segmentation",
    read_truth=read_truth,
    truth_ids=lambda truth: truth.keys(),
    read_submission=ROWS.read,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="siim_acr",
    settings=SiimAcrSettings,
    truth_of=truth_of,
    decide=decide,
    fill=fill,
    side=SIDE,
    judge=judge,
    compare=compare,
    mask_classes=(FINDING,),
)
