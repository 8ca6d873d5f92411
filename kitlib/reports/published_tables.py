"""The documents' tables of figures, read from `published_tables.yaml`, and whether a table's figures are possible at all.

A published figure that cannot be what it is called stands as printed, and the table's `faults` say so.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from kitlib.errors import SettingsError
from kitlib.reports.classification_report import counted_figures

COUNTS = ("true_positives", "false_negatives", "true_negatives", "false_positives")
UNITS = {"percent": 100.0, "share": 1.0}


@dataclass(frozen=True)
class PublishedTable:
    """One table: `rows` has a row a model, 0..1, NaN where nothing is printed; `spread` the standard deviations, if any."""

    title: str  # document and number
    rows: pd.DataFrame
    data: str  # what was tested, how many images of which class
    protocol: str  # how it was split, chosen and averaged
    faults: str  # why a figure may not mean what it says; empty: nothing known
    spread: pd.DataFrame | None = None
    counts: tuple[int, int] | None = None  # positives and negatives behind each row, where the rows are single tests


def published(name: str) -> PublishedTable:
    """The table called `name`, a key of TABLES."""
    if name not in TABLES:
        raise SettingsError(f"no published table is called {name!r}; there are: {', '.join(TABLES)}")
    return TABLES[name]


def check_counts(table: PublishedTable) -> pd.DataFrame:
    """Whether each row can come from the counts behind it: its figures in percent, COUNTS, consistent, renamed and says.

    COUNTS are the first possible ones, NA where there are none. Rows of means are not checked. Empty for a table whose
    counts are not known.
    """
    if table.counts is None:
        return pd.DataFrame()
    single = table.rows[["mean" not in name for name in table.rows.index]]
    percent = (single * 100).round(2).rename(columns=lambda name: name.partition(" ")[0])
    return percent.join(pd.DataFrame([_verdict(*table.counts, row) for row in percent.to_dict("records")], percent.index))


def possible_counts(
    positives: int, negatives: int, printed: dict[str, float], decimals: int = 2
) -> tuple[pd.DataFrame, dict[str, tuple[str, ...]]]:
    """What `printed` figures (percent) of a test of so many positives and negatives can come from: a row of COUNTS each.

    Every integer count is tried, so what this says is proof, within the printed decimals; a printed figure is taken for
    rounded or cut off, as papers do either. Where no counts give all figures under their own names, as few of them as
    possible are taken for another figure, never two for one, and the sensitivity is kept where any such reading keeps it:
    name -> what it has to be. Figures are those of `counted_figures`, and "balanced accuracy". Raises ValueError.
    """
    tp, tn = (each.ravel() for each in np.meshgrid(np.arange(positives + 1), np.arange(negatives + 1), indexing="ij"))
    counts = np.stack([tp, positives - tp, tn, negatives - tn])
    figures = {name: 100 * each[:, 1] for name, each in counted_figures(counts[[2, 3, 1, 0]].T.reshape(-1, 2, 2)).items()}
    figures["balanced accuracy"] = (figures["sensitivity"] + figures["specificity"]) / 2
    odd = [f"{name} {value}" for name, value in printed.items() if name not in figures or not 0 <= value <= 100]
    if odd or min(positives, negatives) < 1:
        raise ValueError(
            f"{positives} positives and {negatives} negatives with {', '.join(odd) or 'these figures'}: wanted at least one "
            f"of each, and percent, 0 to 100, of: {', '.join(figures)}"
        )
    step, slack = 10.0**-decimals, 1e-9
    fits = {
        (name, actual): (found >= value - step / 2 - slack) & (found < value + step - slack)
        for name, value in printed.items()
        for actual, found in figures.items()
    }
    readings: dict[tuple[int, bool], list[tuple[str, ...]]] = {}
    for actual in product(figures, repeat=len(printed)):
        if len(set(actual)) == len(actual):
            changed = [name for name, one in zip(printed, actual, strict=True) if name != one]
            readings.setdefault((len(changed), "sensitivity" in changed), []).append(actual)
    renamed: dict[str, dict[str, None]] = {}
    kept = np.zeros(len(tp), bool)
    for key in sorted(readings):
        for actual in readings[key]:
            pairs = list(zip(printed, actual, strict=True))
            if (fitting := np.logical_and.reduce([fits[pair] for pair in pairs])).any():
                kept |= fitting
                for name, one in pairs:
                    if name != one:
                        renamed.setdefault(name, {})[one] = None
        if kept.any():
            break
    table = pd.DataFrame(counts.T[kept], columns=list(COUNTS))
    return table, {name: tuple(actual) for name, actual in renamed.items()}


def _verdict(positives: int, negatives: int, printed: dict[str, float]) -> dict[str, Any]:
    counts, renamed = possible_counts(positives, negatives, printed)
    if counts.empty:
        return {"consistent": False, "renamed": "", "says": "no counts give these figures, under these names or others"}
    made = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.iloc[0].items())
    more = f", or {len(counts) - 1} other counts" if len(counts) > 1 else ""
    names = "; ".join(f"{name} is the {' or the '.join(actual)}" for name, actual in renamed.items())
    says = f"impossible under these names. With {made}{more}: {names}" if names else f"possible, with {made}{more}"
    told = "; ".join(f"{name}: {' or '.join(actual)}" for name, actual in renamed.items())
    return {**counts.iloc[0], "consistent": not renamed, "renamed": told, "says": says}


def _read_tables(path: Path) -> dict[str, PublishedTable]:
    tables = {}
    for name, told in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        figures, scale = told.pop("figures"), UNITS[told.pop("unit")]
        counts = (told.pop("positives"), told.pop("negatives")) if "positives" in told else None
        parts = {
            part: (pd.DataFrame.from_dict(told.pop(part), "index", float, figures) / scale).round(6)
            for part in ("rows", "spread")
            if part in told
        }
        tables[name] = PublishedTable(**told, **parts, counts=counts)
    return tables


TABLES = _read_tables(Path(__file__).with_suffix(".yaml"))
