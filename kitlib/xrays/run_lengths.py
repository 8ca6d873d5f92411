"""Masks as text: relative run lengths, as in SIIM-ACR Pneumothorax Segmentation.

A mask is written as pairs of numbers, `gap run gap run ...`: a gap is the number of pixels since the previous run, a run
the number of mask pixels that follow. Pixels are numbered from 0 down the columns of the image. `-1` is an empty mask.
"""

import re

import numpy as np

from kitlib.errors import MaskError

SIDE = 1024  # pixels a side of every image of SIIM-ACR
EMPTY = "-1"
NO_RUNS = np.empty((0, 2), dtype=np.int64)
NUMBER = re.compile(r"-?[0-9]{1,9}")


def encode_mask(mask: np.ndarray) -> str:
    """Return a mask (rows, columns), 0 outside and any other value inside, as text of run lengths; "-1" if it is empty."""
    return encode_runs(runs_of(mask))


def encode_runs(runs: np.ndarray) -> str:
    """Return `runs` as text of run lengths; "-1" if there are no runs.

    `runs` (n, 2) has the first pixel of each run and the pixel after its last, sorted and without overlap.
    """
    return " ".join(map(str, np.diff(runs.ravel(), prepend=0))) if len(runs) else EMPTY


def runs_of(mask: np.ndarray) -> np.ndarray:
    """Return the runs of a mask (rows, columns) as an array (n, 2): each run's first pixel, and the pixel after its last."""
    pixels = np.zeros(mask.size + 2, dtype=bool)
    pixels[1:-1] = np.asarray(mask).astype(bool).ravel(order="F")
    return np.flatnonzero(pixels[1:] != pixels[:-1]).reshape(-1, 2)


def decode_mask(text: str, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    """Return the boolean mask (rows, columns) that the run lengths `text` describe. Raises MaskError if they are invalid."""
    runs, faults = parse_runs(text, rows * columns)
    if faults:
        raise MaskError(f"the run lengths {text[:60]!r} cannot be decoded: {'; '.join(faults)}")
    return draw_runs(runs, rows, columns)


def draw_runs(runs: np.ndarray, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    """Return the boolean mask (rows, columns) that is True in `runs`.

    `runs` (n, 2) has the first pixel of each run and the pixel after its last. Runs may overlap and have any order.
    """
    pixels = np.zeros(rows * columns, dtype=bool)
    for start, end in runs:
        pixels[start:end] = True
    return pixels.reshape((rows, columns), order="F")


def parse_runs(text: str, pixels: int = SIDE * SIDE) -> tuple[np.ndarray, list[str]]:
    """Return the runs (n, 2) of the mask that the run lengths in `text` describe, and a list of the problems of `text`.

    A run is a row: its first pixel, and the pixel after its last. `pixels` is the number of pixels of the image. If there is
    any problem, no runs are returned.
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
