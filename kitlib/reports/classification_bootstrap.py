"""How sure figures of exclusive classes are: intervals over patients, paired differences, and ours under published ones.

Whole patients are drawn with replacement, for a patient's images are not independent. Answers for the same patients and one
seed get the same draws, so that the difference of two models' draws is a paired comparison.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from kitlib.reports.classification_report import Figures, Judged, on_shared_images
from kitlib.reports.competition import interval
from kitlib.reports.published_tables import PublishedTable

# Draws that are judged together: 64 of 5,000 images take some MB an array.
AT_ONCE = 64


def draws(given: Judged, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every figure of `overall` and `class_table` as a column; the first row is of all patients, then one a draw.

    Columns are those of `overall`, then such as "f1 COVID-19" and "f1 macro". A draw without a class leaves it out of its
    means. Raises ValueError for no sample.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; intervals need at least 1 draw, and some hundreds to be steady")
    patients, codes = np.unique(given.answers.patient, return_inverse=True)
    judge = Figures(given)
    tables = [judge.of(times[:, codes]) for times in _times(len(patients), samples, seed)]
    return pd.concat(tables, ignore_index=True)


def intervals(drawn: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """name, value, low, high of each column of `draws`: percentile intervals, NaN where no draw defines the figure."""
    return pd.DataFrame([{"name": name, **_told(drawn[name].to_numpy(), level)} for name in drawn.columns])


def paired(
    given: Mapping[str, Judged],
    reference: str,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    drawn: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Each other model less `reference`, on the images that all have answered, the same patients drawn for both.

    Rows of model, reference, name (of the figure), value, low, high, images and `sides`: the smaller share of draws on
    either side of no difference, doubled, which is near 1 where nothing tells the two apart. `drawn`: what `draws` gave for
    each of `given` with one seed, in place of `samples` and `seed`; `given` is then of the images that all share. Raises
    ValueError for an unknown reference, for `drawn` of other models or other images, and as `on_shared_images` does.
    """
    if reference not in given:
        raise ValueError(f"no model is called {reference!r}; there are: {', '.join(given)}")
    shared = on_shared_images(given)
    if drawn is None:
        drawn = {name: draws(each, samples, seed) for name, each in shared.items()}
    elif set(drawn) != set(given) or len({len(each) for each in drawn.values()}) > 1:
        lengths = ", ".join(f"{len(each)} of {name}" for name, each in drawn.items())
        raise ValueError(f"draws are {lengths}; wanted as many of each of the models {', '.join(given)}")
    elif odd := [name for name, each in given.items() if len(each.truth) != len(shared[name].truth)]:
        raise ValueError(f"draws of {', '.join(odd)} are of images that not all models have: on_shared_images comes first")
    rows = []
    for name in given:
        if name == reference:
            continue
        differences = drawn[name] - drawn[reference]
        for figure in differences.columns:
            values = differences[figure].to_numpy()
            known = values[1:][np.isfinite(values[1:])]
            sides = min(1.0, 2 * min((known <= 0).mean(), (known >= 0).mean())) if len(known) else float("nan")
            told = {"model": name, "reference": reference, "name": figure, **_told(values, level)}
            rows.append({**told, "sides": sides, "images": len(shared[name].truth)})
    return pd.DataFrame(rows, columns=["model", "reference", "name", "value", "low", "high", "sides", "images"])


def beside(table: PublishedTable, drawn: Mapping[str, pd.DataFrame], level: float = 0.95) -> pd.DataFrame:
    """Text: the published rows, then a row for each of our models by name, of `draws`, with its interval.

    Columns are the published ones, and index levels `from` ("published", "here") and `model`. What one side lacks is "-".
    """
    rows = {}
    for name, row in table.rows.iterrows():
        spread = table.spread.loc[name] if table.spread is not None else {}
        rows["published", name] = {column: _cell(row[column], spread.get(column)) for column in table.rows.columns}
    for name, draws in drawn.items():
        told = intervals(draws[[column for column in table.rows.columns if column in draws]], level).set_index("name")
        rows["here", name] = {figure: _interval_cell(*each[["value", "low", "high"]]) for figure, each in told.iterrows()}
    text = pd.DataFrame.from_dict(rows, orient="index", columns=list(table.rows.columns)).fillna("-")
    text.index = pd.MultiIndex.from_tuples(list(rows), names=["from", "model"])
    return text


def what_differs(table: PublishedTable, given: Judged, protocol: str) -> pd.DataFrame:
    """Rows data, protocol and faults with columns published and here: why the two parts of `beside` are no rank.

    `protocol` says how ours was made, such as "3 patient-grouped folds, nested".
    """
    counts = np.bincount(given.truth, minlength=len(given.classes))
    classes = ", ".join(f"{count:,} {name}" for name, count in zip(given.classes, counts, strict=True))
    sources = ", ".join(sorted({str(name) for name in given.source}))
    patients = len(np.unique(given.answers.patient))
    lacking = [column for column in table.rows.columns if column.partition(" ")[2] not in ("", "macro", *given.classes)]
    here = f"{len(given.truth):,} images of {patients:,} patients: {classes}; from {sources}"
    if lacking:
        here += f"; nothing here is comparable to {', '.join(lacking)}"
    return pd.DataFrame(
        {"published": [table.data, table.protocol, table.faults], "here": [here, protocol, ""]},
        index=["data", "protocol", "faults"],
    )


def _told(values: np.ndarray, level: float) -> dict[str, float]:
    if np.isfinite(values[1:]).any():
        return interval(values, level)
    return {"value": float(values[0]), "low": float("nan"), "high": float("nan")}


def _times(patients: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn, (at most AT_ONCE, patients) a batch: once each first, then `samples` draws."""
    rng = np.random.default_rng(seed)
    yield np.ones((1, patients))
    for start in range(0, samples, AT_ONCE):
        count = min(AT_ONCE, samples - start)
        drawn = rng.integers(patients, size=(count, patients)) + patients * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * patients).reshape(count, patients).astype(float)


def _cell(value: float, spread: float | None) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.4f}" + (f" (sd {spread:.2f})" if spread is not None else "")


def _interval_cell(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f} [{low:.3f}, {high:.3f}]"
