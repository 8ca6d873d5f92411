"""How well one detector finds opacities out of fold, with an interval over patients, and how two detectors compare."""

import numpy as np
import pandas as pd

from kitlib.scoring.average_precision import average_precision
from kitlib.scoring.score import table_hits


def detection_draws(
    detections: pd.DataFrame,
    coverage: pd.DataFrame,
    images: pd.DataFrame,
    boxes: pd.DataFrame,
    samples: int = 500,
    seed: int = 0,
) -> np.ndarray:
    """Opacity AP (VOC 2010) of the images in `coverage`, (1 + samples,): of all patients, then of the bootstrap's draws.

    Whole patients are drawn with replacement. Two detectors over the same images and seed get the same draws, so the
    difference of their arrays is a paired comparison. Folds are pooled: a model's scores must mean the same in each.
    Raises ValueError where an image of `coverage` is not in `images`, or has been looked at twice.
    """
    looked = coverage["image_id"]
    if looked.duplicated().any():
        raise ValueError(f"image {looked[looked.duplicated()].iloc[0]} was looked at twice; give one detector's folds")
    patient = images.set_index("image_id")["patient_id"].reindex(sorted(looked))
    if patient.isna().any():
        raise ValueError(f"image {patient.index[patient.isna()][0]} of the coverage is not in the table images")
    codes, patients = pd.factorize(patient)
    known = detections[detections["image_id"].isin(looked)]
    true = boxes[boxes["image_id"].isin(looked)]
    hits, score = table_hits(known, "image_id", true), known["score"].to_numpy()
    found, boxed = (codes[patient.index.get_indexer(table["image_id"])] for table in (known, true))
    rng = np.random.default_rng(seed)
    even = np.full(len(patients), 1 / len(patients))
    draws = [np.ones(len(patients)), *(rng.multinomial(len(patients), even) for _ in range(samples))]
    return np.array([average_precision(score, hits, times[boxed].sum(), times[found]) for times in draws])


def interval(draws: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """value, low and high of an array of `detection_draws`, or of the difference of two: the percentile interval."""
    low, high = np.nanquantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}
