"""Temperature scaling of probabilities; the temperature of each fold is fitted on the other folds.

Guo et al. 2017, ICML, "On Calibration of Modern Neural Networks", section 4.2.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

LEAST = 1e-7  # smaller probabilities are raised to this value, about float32's resolution at 1
BOUNDS = (0.02, 50.0)  # limits of the temperature; beyond them, probabilities are nearly 0 and 1, or nearly equal


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities (n, C) scaled by a temperature T: each p becomes p^(1/T), and rows are divided by their sum.

    This is the softmax of logits divided by T. T above 1 makes the probabilities of a row more equal, T below 1 less equal.
    Raises ValueError if T is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    logits = np.log(np.maximum(probabilities, LEAST)) / temperature
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def log_loss(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of -log p of the true class, for `probabilities` (n, C) and class indices `truth` (n,)."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], LEAST)).mean())


def fit_temperature(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Return the temperature, from 0.02 to 50, with which scaled `probabilities` (n, C) have the smallest log loss.

    `truth` (n,) holds the true class indices. Raises ValueError if there are no rows.
    """
    if not len(truth):
        raise ValueError("a temperature cannot be fitted, because `probabilities` has no rows")
    result = minimize_scalar(
        lambda exponent: log_loss(scaled(probabilities, np.exp(exponent)), truth),
        bounds=np.log(BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(result.x))


def cross_scaled(scores: pd.DataFrame, classes: Sequence[str], truth: np.ndarray) -> tuple[pd.DataFrame, pd.Series]:
    """Scale each fold of a model's out-of-fold scores by a temperature that is fitted on the model's other folds.

    Returns a copy of `scores` with scaled probabilities, and a Series of the temperatures, indexed by fold. `scores` has the
    column fold and one column of probabilities for each of `classes`; `truth` (n,) holds the true class index of each row.
    Raises ValueError if there is only one fold.
    """
    folds, probabilities = scores["fold"].to_numpy(), scores[list(classes)].to_numpy(dtype=float)
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise ValueError(
            f"all scores are from a single fold ({', '.join(map(str, numbers))}), but a temperature is fitted on other folds"
        )
    temperatures = pd.Series({fold: fit_temperature(probabilities[folds != fold], truth[folds != fold]) for fold in numbers})
    scaled_probabilities = np.empty_like(probabilities)
    for fold, temperature in temperatures.items():
        scaled_probabilities[folds == fold] = scaled(probabilities[folds == fold], temperature)
    return scores.assign(**dict(zip(classes, scaled_probabilities.T, strict=True))), temperatures
