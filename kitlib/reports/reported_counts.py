"""Whether published figures of a two-class test can come from its counts: which true and false positives would give them.

Of so many positives and negatives there are few possible sensitivities, and a figure that none gives is not what it is
called. The search is over every integer count, so what it says is proof, within the printed decimals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

COUNTS = ("true_positives", "false_negatives", "true_negatives", "false_positives")
MOST_COUNTS = 4_000_000  # pairs of true positives and true negatives that are looked at


class CountsError(ValueError):
    """Counts or figures that cannot be checked; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What a row of published figures can come from.

    `counts` has a row a possibility (COUNTS, and every figure in percent); empty where no counts give the figures. `renamed`
    says for each published name what it has to be for these counts, empty where all are what they are called.
    """

    reported: dict[str, float]
    counts: pd.DataFrame
    renamed: dict[str, tuple[str, ...]]

    @property
    def consistent(self) -> bool:
        return len(self.counts) > 0 and not self.renamed

    def says(self) -> str:
        """One sentence for people."""
        told = ", ".join(f"{name} {value:g}" for name, value in self.reported.items())
        if self.counts.empty:
            return f"{told}: no counts give these figures, under these names or others"
        first = self.counts.iloc[0]
        made = ", ".join(f"{int(first[name])} {name.replace('_', ' ')}" for name in COUNTS)
        more = f", or {len(self.counts) - 1} other counts" if len(self.counts) > 1 else ""
        if not self.renamed:
            return f"{told}: possible, with {made}{more}"
        names = "; ".join(f"{name} is the {' or the '.join(actual)}" for name, actual in self.renamed.items())
        return f"{told}: impossible under these names. With {made}{more}: {names}"


def figures_of(
    true_positives: np.ndarray, false_negatives: np.ndarray, true_negatives: np.ndarray, false_positives: np.ndarray
) -> dict[str, np.ndarray]:
    """sensitivity, specificity, accuracy, npv, ppv, balanced accuracy and f1 in percent, of counts of any one shape.

    NaN for 0 / 0.
    """
    tp, fn, tn, fp = (
        np.asarray(each, dtype=float) for each in (true_positives, false_negatives, true_negatives, false_positives)
    )
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        told = {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "accuracy": (tp + tn) / (tp + fn + tn + fp),
            "npv": tn / (tn + fn),
            "ppv": tp / (tp + fp),
            "balanced accuracy": (sensitivity + specificity) / 2,
            "f1": 2 * tp / (2 * tp + fn + fp),
        }
    return {name: 100 * value for name, value in told.items()}


def check(positives: int, negatives: int, reported: Mapping[str, float], decimals: int = 2) -> Verdict:
    """What `reported` figures (percent, printed with so many decimals) of such a test can come from.

    A printed figure is taken for rounded or cut off: papers do either. Where no counts give all figures under their own
    names, as few of them as possible are taken for another figure, never two for one; the published sensitivity is kept
    where any such reading keeps it. Raises CountsError for an unknown figure or too large a test.
    """
    known = list(figures_of(*np.ones((4, 1))))
    strange = [name for name in reported if name not in known]
    if strange or not reported:
        raise CountsError(f"figures {strange or 'none'}; there are: {', '.join(known)}")
    if positives < 1 or negatives < 1 or (positives + 1) * (negatives + 1) > MOST_COUNTS:
        raise CountsError(
            f"{positives} positives and {negatives} negatives; wanted at least one of each, and at most {MOST_COUNTS} pairs"
        )
    for name, value in reported.items():
        if not 0 <= value <= 100:
            raise CountsError(f"{name} is {value}, wanted percent, 0 to 100")
    tp, tn = (each.ravel() for each in np.meshgrid(np.arange(positives + 1), np.arange(negatives + 1), indexing="ij"))
    counts = dict(zip(COUNTS, (tp, positives - tp, tn, negatives - tn), strict=True))
    figures = figures_of(*counts.values())
    fits = {
        (name, actual): _printed_as(figures[actual], value, decimals) for name, value in reported.items() for actual in known
    }
    kept, renamed = _fewest_renamed(list(reported), known, fits)
    table = pd.DataFrame({**counts, **figures})[kept].reset_index(drop=True)
    return Verdict(dict(reported), table, renamed)


def check_table(rows: pd.DataFrame, positives: int, negatives: int, decimals: int = 2) -> pd.DataFrame:
    """`rows` (figures as columns, percent) with `consistent`, `renamed` and `says` for each."""
    verdicts = [check(positives, negatives, row, decimals) for row in rows.to_dict("records")]
    renamed = ["; ".join(f"{name}: {' or '.join(actual)}" for name, actual in each.renamed.items()) for each in verdicts]
    return rows.assign(
        consistent=[each.consistent for each in verdicts], renamed=renamed, says=[each.says() for each in verdicts]
    )


def pooled(verdicts: list[Verdict]) -> dict[str, tuple[int, int]]:
    """Sensitivity, specificity and accuracy over all folds together: (right, of). Raises CountsError for unsure counts."""
    unsure = [each.says() for each in verdicts if len(each.counts) != 1]
    if unsure or not verdicts:
        raise CountsError(f"{len(unsure)} of {len(verdicts)} folds have not exactly one possible count, first: {unsure[:1]}")
    tp, fn, tn, fp = (sum(int(each.counts[name].iloc[0]) for each in verdicts) for name in COUNTS)
    return {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "accuracy": (tp + tn, tp + fn + tn + fp)}


def _printed_as(values: np.ndarray, printed: float, decimals: int) -> np.ndarray:
    """Whether percentages are `printed` when rounded or cut off to so many decimals."""
    step, slack = 10.0**-decimals, 1e-9
    return (values >= printed - step / 2 - slack) & (values < printed + step - slack)


def _fewest_renamed(
    names: list[str], known: list[str], fits: dict[tuple[str, str], np.ndarray]
) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    """Counts that fit when as few names as possible stand for another figure, and what they then stand for."""
    nothing = np.zeros_like(next(iter(fits.values())))
    readings: dict[tuple[int, bool], list[tuple[str, ...]]] = {}
    for actual in product(known, repeat=len(names)):
        if len(set(actual)) == len(actual):
            changed = [name for name, one in zip(names, actual, strict=True) if name != one]
            readings.setdefault((len(changed), "sensitivity" in changed), []).append(actual)
    for key in sorted(readings):
        kept, renamed = nothing.copy(), {}
        for actual in readings[key]:
            fitting = np.logical_and.reduce([fits[pair] for pair in zip(names, actual, strict=True)])
            if fitting.any():
                kept |= fitting
                for name, one in zip(names, actual, strict=True):
                    if name != one:
                        renamed.setdefault(name, {})[one] = None
        if kept.any():
            return kept, {name: tuple(each) for name, each in renamed.items()}
    return nothing, {}
