"""Published tables of metrics, read from `published_tables.yaml`, and a check whether their metrics are possible at all.

A published value that cannot be the metric in its heading is kept as printed, and the table's `faults` mention it.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.errors import SettingsError
from kitlib.reports.classification_report import count_metrics
from kitlib.yaml_reader import read_yaml

COUNTS = ("true_positives", "false_negatives", "true_negatives", "false_positives")
UNITS = {"percent": 100.0, "share": 1.0}


@dataclass(frozen=True)
class PublishedTable:
    """One published table of metrics, with facts about how they were measured.

    `rows` has one row per model and one column per metric, with values in 0..1, NaN where nothing is printed. `spread` has
    the standard deviations in the same layout, or is None if they are not printed.
    """

    title: str  # document and table number
    rows: pd.DataFrame
    data: str  # test data, with the number of images per class
    protocol: str  # how data were split, models chosen and results averaged
    faults: str  # why a value may not mean what its name says; empty if no fault is known
    spread: pd.DataFrame | None = None
    counts: tuple[int, int] | None = None  # positives and negatives of each row, if the rows are single tests

    @property
    def has_folds(self) -> bool:
        """Whether the rows are the folds of one model, such as "fold 1"."""
        return any(str(name).startswith("fold ") for name in self.rows.index)


def find_published(name: str) -> PublishedTable:
    """Return the published table called `name`, a key of TABLES. Raises SettingsError if it does not exist."""
    if name not in TABLES:
        raise SettingsError(f"published table {name!r} does not exist; available tables: {', '.join(TABLES)}")
    return TABLES[name]


def check_counts(table: PublishedTable) -> pd.DataFrame:
    """Check whether the metrics of each row can result from any counts of true and false positives and negatives.

    The result has the metrics in percent; a column such as `true_positives` for each of the first possible counts (NA if no
    counts are possible); `consistent` (bool); `renamed` (each misnamed metric, with its possible names); and `says` (the
    result in words). Rows of means are not checked. Returns an empty table if `table.counts` is None.
    """
    if table.counts is None:
        return pd.DataFrame()
    single_tests = table.rows[["mean" not in name for name in table.rows.index]]
    percent = (single_tests * 100).round(2).rename(columns=lambda name: name.partition(" ")[0])
    return percent.join(pd.DataFrame([_verdict(*table.counts, row) for row in percent.to_dict("records")], percent.index))


def possible_counts(
    positives: int, negatives: int, printed: dict[str, float], decimals: int = 2
) -> tuple[pd.DataFrame, dict[str, tuple[str, ...]]]:
    """Return the possible counts behind printed metrics, and which printed metrics are possible only under another name.

    `printed` maps metric names to percentages, for a test with `positives` positive and `negatives` negative cases. The
    first result is a table with one row per possibility and the columns true_positives, false_negatives, true_negatives and
    false_positives. The second maps the printed name of a misnamed metric to the metrics that it can be.

    All integer counts are tried, so the result is a proof within the printed `decimals`. A printed value may be rounded or
    truncated, because papers do both. If no counts fit all printed names, as few metrics as possible are renamed, no
    two to the same name, and `sensitivity` keeps its name if possible. Valid names are those of `count_metrics` and
    "balanced accuracy". Raises ValueError for an invalid name, a value outside 0..100, or a test without positives or
    negatives.
    """
    tp, tn = (grid.ravel() for grid in np.meshgrid(np.arange(positives + 1), np.arange(negatives + 1), indexing="ij"))
    counts = np.stack([tp, positives - tp, tn, negatives - tn])
    figures = {name: 100 * grid[:, 1] for name, grid in count_metrics(counts[[2, 3, 1, 0]].T.reshape(-1, 2, 2)).items()}
    figures["balanced accuracy"] = (figures["sensitivity"] + figures["specificity"]) / 2
    invalid = [f"{name} {value}" for name, value in printed.items() if name not in figures or not 0 <= value <= 100]
    if invalid or min(positives, negatives) < 1:
        raise ValueError(
            f"got {positives} positives, {negatives} negatives and these invalid metrics: {', '.join(invalid) or 'none'}; "
            f"expected at least 1 positive and 1 negative, and percentages from 0 to 100 for: {', '.join(figures)}"
        )
    step, slack = 10.0**-decimals, 1e-9
    fits = {
        (name, actual): (figure_values >= value - step / 2 - slack) & (figure_values < value + step - slack)
        for name, value in printed.items()
        for actual, figure_values in figures.items()
    }
    readings: dict[tuple[int, bool], list[tuple[str, ...]]] = {}
    for actual in product(figures, repeat=len(printed)):
        if len(set(actual)) == len(actual):
            changed = [name for name, actual_name in zip(printed, actual, strict=True) if name != actual_name]
            readings.setdefault((len(changed), "sensitivity" in changed), []).append(actual)
    renamed: dict[str, dict[str, None]] = {}
    possible = np.zeros(len(tp), bool)
    for key in sorted(readings):
        for actual in readings[key]:
            pairs = list(zip(printed, actual, strict=True))
            if (fitting := np.logical_and.reduce([fits[pair] for pair in pairs])).any():
                possible |= fitting
                for name, actual_name in pairs:
                    if name != actual_name:
                        renamed.setdefault(name, {})[actual_name] = None
        if possible.any():
            break
    table = pd.DataFrame(counts.T[possible], columns=list(COUNTS))
    return table, {name: tuple(actual) for name, actual in renamed.items()}


def _verdict(positives: int, negatives: int, printed: dict[str, float]) -> dict[str, Any]:
    counts, renamed = possible_counts(positives, negatives, printed)
    if counts.empty:
        return {"consistent": False, "renamed": "", "says": "no counts result in these metrics, under these or other names"}
    counts_text = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.iloc[0].items())
    more = f", or {len(counts) - 1} other counts" if len(counts) > 1 else ""
    names = "; ".join(f"{name} is the {' or the '.join(actual)}" for name, actual in renamed.items())
    message = (
        f"impossible under these names. With {counts_text}{more}: {names}"
        if names
        else f"possible, with {counts_text}{more}"
    )
    renamed_text = "; ".join(f"{name}: {' or '.join(actual)}" for name, actual in renamed.items())
    return {**counts.iloc[0], "consistent": not renamed, "renamed": renamed_text, "says": message}


def _read_tables(path: Path) -> dict[str, PublishedTable]:
    tables = {}
    for name, entry in read_yaml(path).items():
        figures, scale = entry.pop("figures"), UNITS[entry.pop("unit")]
        counts = (entry.pop("positives"), entry.pop("negatives")) if "positives" in entry else None
        parts = {
            part: (pd.DataFrame.from_dict(entry.pop(part), "index", float, figures) / scale).round(6)
            for part in ("rows", "spread")
            if part in entry
        }
        tables[name] = PublishedTable(**entry, **parts, counts=counts)
    return tables


TABLES = _read_tables(Path(__file__).with_suffix(".yaml"))
