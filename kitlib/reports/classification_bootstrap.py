"""How sure figures of exclusive classes are: intervals over patients, paired differences, and ours under published ones.

Whole patients are drawn with replacement, for a patient's images are not independent. Answers for the same patients and one
seed get the same draws, so that the difference of two models' draws is a paired comparison.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from kitlib.reports.classification_report import (
    ECE_BINS,
    FIGURES,
    Judged,
    confidence_bins,
    counted_figures,
    log_losses,
    on_shared_images,
)
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
    judge = _Judge(given)
    tables = [judge.figures(times[:, codes]) for times in _times(len(patients), samples, seed)]
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
        told = ", ".join(f"{len(each)} of {name}" for name, each in drawn.items())
        raise ValueError(f"draws are {told}; wanted as many of each of the models {', '.join(given)}")
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


class _Judge:
    """What does not change from draw to draw, found once."""

    def __init__(self, given: Judged) -> None:
        truth, found, size = given.truth, given.found, len(given.classes)
        self.classes = given.classes
        true = np.arange(size) == truth[:, None]
        gaps = (given.called == truth) - found.max(axis=1)
        # Each figure but the areas is made of sums over images: columns whose sums are wanted.
        self.cells = np.eye(size * size)[truth * size + given.called]
        self.gaps = np.eye(ECE_BINS)[confidence_bins(found)] * gaps[:, None]
        self.squares = (found - true) ** 2
        self.losses = log_losses(found, truth)
        self.ranked = [_ranked(column, positive) for column, positive in zip(found.T, true.T, strict=True)]

    def figures(self, weight: np.ndarray) -> pd.DataFrame:
        """A row a draw, of how often it has each image: weight (draws, n)."""
        size, total = len(self.classes), weight.sum(axis=1)
        matrix = (weight @ self.cells).reshape(-1, size, size)
        figures = counted_figures(matrix)
        areas = [_areas(weight, *each) for each in self.ranked]
        figures["roc_auc"], figures["pr_auc"] = (np.stack(each, axis=1) for each in zip(*areas, strict=True))
        figures["brier"] = weight @ self.squares / total[:, None]
        occurs = matrix.sum(axis=2) > 0
        macro = {name: _mean_where(figures[name], occurs) for name in FIGURES}
        right = np.trace(matrix, axis1=1, axis2=2) / total
        precision, recall = macro["ppv"], macro["sensitivity"]
        both = precision + recall
        columns = {
            "accuracy": right,
            "micro_f1": right,
            "papers_micro_f1": np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0),
            "ece": np.abs(weight @ self.gaps).sum(axis=1) / total,
            "brier": figures["brier"].sum(axis=1),
            "log_loss": weight @ self.losses / total,
        }
        for name in FIGURES:
            columns |= {f"{name} {each}": figures[name][:, place] for place, each in enumerate(self.classes)}
            columns[f"{name} macro"] = macro[name]
        return pd.DataFrame(columns)


def _ranked(found: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images by falling score, which of those are positive, and the last place of each group of equal scores."""
    order = np.argsort(-found, kind="stable")
    scores = found[order]
    return order, positive[order].astype(float), np.flatnonzero(np.append(scores[1:] != scores[:-1], True))


def _areas(weight: np.ndarray, order: np.ndarray, positive: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC AUC and average precision (draws,) of `_ranked` images that weigh (draws, n).

    The first is NaN without a positive or without a negative, the second without a positive.
    """
    weight = weight[:, order]
    hits, calls = (np.cumsum(each, axis=1)[:, lasts] for each in (weight * positive, weight))
    false = calls - hits
    more_hits, more_false = np.diff(hits, prepend=0.0), np.diff(false, prepend=0.0)
    positives, negatives = hits[:, -1], false[:, -1]
    pairs = positives * negatives
    area = (more_false * (hits - more_hits / 2)).sum(axis=1)
    precision = np.divide(hits, calls, out=np.zeros_like(hits), where=calls > 0)
    found = (more_hits * precision).sum(axis=1)
    return (
        np.divide(area, pairs, out=np.full_like(area, np.nan), where=pairs > 0),
        np.divide(found, positives, out=np.full_like(found, np.nan), where=positives > 0),
    )


def _mean_where(values: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Means (draws,) over the classes that occur and are defined, of (draws, classes)."""
    counts = occurs & np.isfinite(values)
    sums = np.where(counts, values, 0.0).sum(axis=1)
    return np.divide(sums, counts.sum(axis=1), out=np.full(len(sums), np.nan), where=counts.any(axis=1))


def _cell(value: float, spread: float | None) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.4f}" + (f" (sd {spread:.2f})" if spread is not None else "")


def _interval_cell(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f} [{low:.3f}, {high:.3f}]"
