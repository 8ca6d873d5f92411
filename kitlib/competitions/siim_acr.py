"""SIIM-ACR Pneumothorax Segmentation (2019): a mask of the pneumothorax, which most images do not have.

A mask is written as pairs of numbers, `gap run gap run ...`: the pixels from the end of the previous run to the next run,
and the pixels of that run. Pixels are numbered from 0 down the columns of the image. `-1` is an empty mask. A run that ends
in the last pixel is written like any other; the organisers' own encoder loses it.

The metric is the mean over images of Dice, 2 |X and Y| / (|X| + |Y|), which is 1 if both masks are empty: one wrong pixel on
an image without a pneumothorax costs the whole image.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kitlib.competitions.contract import Competition
from kitlib.competitions.csv_files import Rows, read_listed, read_truth_table, refuse
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.errors import MaskError, ScoringError

SIDE = 1024  # pixels a side of every image
EMPTY = "-1"
NO_RUNS = np.empty((0, 2), dtype=np.int64)
NUMBER = re.compile(r"-?[0-9]{1,9}")


def encode_mask(mask: np.ndarray) -> str:
    """Return the run lengths of a mask (rows, columns), whose pixels are true or not 0; EMPTY for an empty one."""
    pixels = np.asarray(mask).astype(bool).ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(pixels, prepend=0, append=0))
    return " ".join(map(str, np.diff(edges, prepend=0))) if len(edges) else EMPTY


def decode_mask(text: str, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    """Return the boolean mask (rows, columns) that `text` describes. Raises MaskError if `text` has a fault."""
    runs, faults = parse_runs(text, rows * columns)
    if faults:
        raise MaskError(f"the run lengths {text[:60]!r} cannot be decoded: {'; '.join(faults)}")
    pixels = np.zeros(rows * columns, dtype=bool)
    for start, end in runs:
        pixels[start:end] = True
    return pixels.reshape((rows, columns), order="F")


def parse_runs(text: str, pixels: int = SIDE * SIDE) -> tuple[np.ndarray, list[str]]:
    """Return the runs (n, 2) in `text`, each its first pixel and the pixel after its last; and a description of each fault.

    `pixels` is the number of pixels of the image. With a fault, there are no runs.
    """
    words = text.split()
    if words == [EMPTY]:
        return NO_RUNS, []
    if not words:
        return NO_RUNS, [f"empty cell; an image without a pneumothorax has {EMPTY}"]
    wrong = [word for word in words if not NUMBER.fullmatch(word)]
    if wrong:
        return NO_RUNS, [f"{wrong[0]!r} is not a whole number of pixels"]
    if len(words) % 2:
        return NO_RUNS, [f"{len(words)} numbers are not pairs (gap run)"]
    lengths = np.array(words, dtype=np.int64)
    runs, pairs = lengths.cumsum().reshape(-1, 2), lengths.reshape(-1, 2)
    faults = []
    for is_wrong, problem in (
        (pairs[:, 0] < 0, "begins before the previous run ends: runs overlap or are not sorted"),
        (pairs[:, 1] <= 0, "has no pixel"),
        (
            runs[:, 1] > pixels,
            f"reaches beyond the {pixels} pixels of the image; gaps count from the end of the previous run",
        ),
    ):
        for index in np.flatnonzero(is_wrong)[:1]:
            others = f" (and {is_wrong.sum() - 1} more)" if is_wrong.sum() > 1 else ""
            faults.append(f"run {index + 1}{others}, {pairs[index, 0]} {pairs[index, 1]}, {problem}")
    return (NO_RUNS if faults else runs), faults


def read_truth(path: Path) -> dict[str, np.ndarray]:
    """Return the runs (n, 2) of each image, by image_id, from stage_2_train.csv or, if that is missing, train-rle.csv.

    An image has a row for each lesion; runs of different rows may overlap, because the mask is their union. train-rle.csv
    has blanks before the second name and before its values, which are ignored.
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


ROWS = Rows(("ImageId", "EncodedPixels"), _parse_row)


def metric(truth: Mapping[str, np.ndarray], submission: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return `score`, the mean Dice, and its mean on the images `with_pneumothorax` and `without`, all 0..1.

    Both arguments map each image_id to its runs (n, 2), as `parse_runs` returns them. A part without images is NaN. Raises
    ScoringError unless both have the same ids.
    """
    if truth.keys() != submission.keys():
        different = sorted(truth.keys() ^ submission.keys())
        raise ScoringError(f"{len(different)} ids are only in the truth or only in the submission, such as {different[0]!r}")
    values = np.array([dice(runs, submission[name]) for name, runs in truth.items()], dtype=float)
    is_positive = np.array([len(runs) > 0 for runs in truth.values()], dtype=bool)
    parts = {"score": values, "with_pneumothorax": values[is_positive], "without": values[~is_positive]}
    return {name: float(part.mean()) if len(part) else float("nan") for name, part in parts.items()}


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return Dice of two masks, 0..1, given as runs (n, 2), in any order, which may overlap; 1 if both are empty."""
    total = count_pixels(first) + count_pixels(second)
    return 2 * (total - count_pixels(np.concatenate([first, second]))) / total if total else 1.0


def count_pixels(runs: np.ndarray) -> int:
    """Return the number of pixels in the union of runs (n, 2), each its first pixel and the pixel after its last."""
    starts, ends = runs[np.argsort(runs[:, 0])].T
    covered = np.maximum.accumulate(np.append(0, ends))
    return int(np.maximum(ends - np.maximum(starts, covered[:-1]), 0).sum())


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return an empty mask for every image, as 78 % of the training images have."""
    return [[name, EMPTY] for name in ids]


SIIM_ACR = Competition(
    name="siim-acr",
    slug="siim-acr-pneumothorax-segmentation",
    title="SIIM-ACR Pneumothorax Segmentation",
    header=ROWS.header,
    read_truth=read_truth,
    truth_ids=lambda truth: truth.keys(),
    read_sample=ROWS.read_sample,
    read_submission=ROWS.read,
    find_faults=ROWS.find_faults,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="siim_acr",
    settings=FusionSettings,
    truth_of=lambda images, labels, boxes, masks: {},
    decide=lambda merged, settings: {},
    fill=lambda ids, decided: ([], ids),
    read_test=read_listed(ROWS),
    mask_classes=("Pneumothorax",),
)
