"""Temperature scaling of probabilities, fitted on other folds (Guo et al. 2017, ICML, "On Calibration of Modern Neural
Networks", section 4.2)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

LEAST = 1e-7  # a probability below counts as this: float32 knows none nearer to 1
BOUNDS = (0.02, 50.0)  # of the temperature: beyond, all answers are certain or even


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """(n, C) -> p^(1/T), each row adding to 1: softmax of the logits over T. Above 1 it softens, below 1 it sharpens."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, wanted more than 0")
    logits = np.log(np.maximum(probabilities, LEAST)) / temperature
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def log_loss(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Mean of -log p of the true class; `truth` (n,) numbers the classes from 0."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], LEAST)).mean())


def fit_temperature(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The temperature, within BOUNDS, that gives (n, C) the lowest log loss. Raises ValueError without rows."""
    if not len(truth):
        raise ValueError("no rows to fit a temperature to")
    found = minimize_scalar(
        lambda exponent: log_loss(scaled(probabilities, np.exp(exponent)), truth),
        bounds=np.log(BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def cross_scaled(scores: pd.DataFrame, classes: Sequence[str], truth: np.ndarray) -> tuple[pd.DataFrame, pd.Series]:
    """Each fold of one model's out-of-fold scores, scaled by the temperature of its other folds; the temperatures by fold.

    `scores` has a column fold and `classes`; `truth` (n,) numbers these from 0. Raises ValueError for a single fold: there
    is nothing to fit on.
    """
    folds, found = scores["fold"].to_numpy(), scores[list(classes)].to_numpy(dtype=float)
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise ValueError(f"scores of one fold ({', '.join(map(str, numbers))}): a temperature is fitted on the others")
    temperatures = pd.Series({fold: fit_temperature(found[folds != fold], truth[folds != fold]) for fold in numbers})
    after = np.empty_like(found)
    for fold, temperature in temperatures.items():
        after[folds == fold] = scaled(found[folds == fold], temperature)
    return scores.assign(**dict(zip(classes, after.T, strict=True))), temperatures
