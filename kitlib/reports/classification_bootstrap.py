"""Bootstrap of classification metrics: intervals over patients, paired differences, comparison with published results.

Whole patients are drawn with replacement because the images of one patient are not independent. Two models' predictions for
the same patients get the same draws if the seed is the same, so the differences between their draws are a paired comparison.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from kitlib.reports.classification_report import Judged, Metrics, on_shared_images
from kitlib.reports.competition import interval
from kitlib.reports.published_tables import PublishedTable

# Draws that are computed together: 64 draws of 5,000 images take a few MB per array.
DRAWS_PER_BATCH = 64


def draws(predictions: Judged, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a table with one column per metric: the first row is for all patients, each later row for one bootstrap draw.

    The columns are the metrics of `overall`, such as "accuracy", then those of `class_table`, such as "f1 COVID-19" and "f1
    macro". A class that does not occur in a draw is left out of the means of that draw. `samples` is the number of draws.
    Raises ValueError if it is below 1.
    """
    if samples < 1:
        raise ValueError(f"`samples` is {samples}; it must be at least 1, and a few hundred for stable intervals")
    patients, codes = np.unique(predictions.answers.patient, return_inverse=True)
    metrics = Metrics(predictions)
    tables = [metrics.for_weights(counts[:, codes]) for counts in _draw_counts(len(patients), samples, seed)]
    return pd.concat(tables, ignore_index=True)


def intervals(drawn: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Return percentile intervals as a table with one row per metric and the columns name, value, low and high.

    `drawn` is the table that `draws` returned; `level` is the share of draws inside the interval.
    """
    return pd.DataFrame([{"name": name, **_interval_or_nan(drawn[name].to_numpy(), level)} for name in drawn.columns])


def paired_differences(
    models: Mapping[str, Judged],
    reference: str,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    drawn: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Return the differences of each model's metrics from those of `reference`, on the images that all models predicted.

    Both models of a pair get the same draws of patients. The columns are `model`, `reference`, `name` (the metric), `value`,
    `low`, `high`, `sides` and `images`. `sides` is a two-sided p-value: twice the smaller of the share of draws with a
    difference of at most zero and the share with a difference of at least zero. `drawn` has earlier draws to reuse: a table
    from `draws` for each model, all with the same seed. With `drawn`, `models` must be the result of `on_shared_images`.
    Raises ValueError for an unknown reference, if `drawn` was computed for other models or images, if no image is shared, or
    if the models have different classes.
    """
    if reference not in models:
        raise ValueError(f"reference model {reference!r} does not exist; available models: {', '.join(models)}")
    shared = on_shared_images(models)
    if drawn is None:
        drawn = {name: draws(table, samples, seed) for name, table in shared.items()}
    elif set(drawn) != set(models) or len({len(table) for table in drawn.values()}) > 1:
        lengths = ", ".join(f"{len(table)} rows for {name}" for name, table in drawn.items())
        raise ValueError(f"`drawn` has {lengths}; each of these models needs the same number of rows: {', '.join(models)}")
    elif mismatched := [name for name, table in models.items() if len(table.truth) != len(shared[name].truth)]:
        raise ValueError(
            f"predictions of {', '.join(mismatched)} include images that not all models have predicted; "
            "call `on_shared_images` before `draws`"
        )
    rows = []
    for name in models:
        if name == reference:
            continue
        differences = drawn[name] - drawn[reference]
        for metric in differences.columns:
            values = differences[metric].to_numpy()
            finite = values[1:][np.isfinite(values[1:])]
            sides = min(1.0, 2 * min((finite <= 0).mean(), (finite >= 0).mean())) if len(finite) else float("nan")
            columns = {"model": name, "reference": reference, "name": metric, **_interval_or_nan(values, level)}
            rows.append({**columns, "sides": sides, "images": len(shared[name].truth)})
    return pd.DataFrame(rows, columns=["model", "reference", "name", "value", "low", "high", "sides", "images"])


def fold_table(predictions: Judged) -> pd.DataFrame:
    """Return a table of metrics with one row per fold, a row "mean" and a row "sd" (standard deviation over the folds).

    The columns are the metrics, as in `draws`; the index has the fold numbers, then "mean" and "sd". This is how most papers
    report cross-validation. A fold in which a metric is undefined is left out of its mean. The standard deviation is that of
    a sample (n - 1); it is NaN if there is one fold.
    """
    folds = predictions.answers.fold
    numbers = np.unique(folds)
    table = Metrics(predictions).for_weights((numbers[:, None] == folds).astype(float)).set_axis(numbers)
    return pd.concat([table, table.agg(["mean", "std"]).rename(index={"std": "sd"})]).rename_axis("fold")


def append_to_published(
    table: PublishedTable,
    drawn: Mapping[str, pd.DataFrame],
    by_fold: Mapping[str, pd.DataFrame] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return a published table as text, followed by one row with intervals for each model in `drawn`.

    `drawn` maps each model's name to the table that `draws` returned, `by_fold` to the table that `fold_table` returned.
    With `by_fold`, each model also gets a row with the mean and standard deviation over the folds and, if the published
    table has rows for folds, a row per fold. The columns are those of the published table. The index levels are `from`
    ("published", "here", "here, fold 0" or "here, mean of folds") and `model`. A missing value is "-".
    """
    rows = {}
    for name, row in table.rows.iterrows():
        spread = table.spread.loc[name] if table.spread is not None else {}
        rows["published", name] = {column: _cell(row[column], spread.get(column)) for column in table.rows.columns}
    for name, draws in drawn.items():
        own = intervals(draws[[column for column in table.rows.columns if column in draws]], level)
        cells = own[["value", "low", "high"]].itertuples(index=False)
        rows["here", name] = {metric: _interval_cell(*cell) for metric, cell in zip(own["name"], cells, strict=True)}
        if by_fold:
            folds = by_fold[name][own["name"]]
            for fold in folds.index.drop(["mean", "sd"]) if table.has_folds else []:
                rows[f"here, fold {fold}", name] = {metric: _cell(folds.loc[fold, metric], None) for metric in folds}
            means = folds.loc[["mean", "sd"]]
            rows["here, mean of folds", name] = {metric: _cell(*means[metric]) for metric in means}
    text = pd.DataFrame.from_dict(rows, orient="index", columns=list(table.rows.columns)).fillna("-")
    text.index = pd.MultiIndex.from_tuples(list(rows), names=["from", "model"])
    return text


def what_differs(table: PublishedTable, predictions: Judged, protocol: str) -> pd.DataFrame:
    """Return a table of text that shows why a published table and our results cannot be ranked together.

    The rows are data, protocol and faults, the columns published and here. `protocol` says how our predictions were made,
    for example "3 patient-grouped folds, nested".
    """
    counts = np.bincount(predictions.truth, minlength=len(predictions.classes))
    classes = ", ".join(f"{count:,} {name}" for name, count in zip(predictions.classes, counts, strict=True))
    sources = ", ".join(sorted({str(name) for name in predictions.source}))
    patients = len(np.unique(predictions.answers.patient))
    own_classes = ("", "macro", *predictions.classes)
    missing = [column for column in table.rows.columns if column.partition(" ")[2] not in own_classes]
    own_data = f"{len(predictions.truth):,} images of {patients:,} patients: {classes}; from {sources}"
    if missing:
        own_data += f"; nothing here is comparable to {', '.join(missing)}"
    return pd.DataFrame(
        {"published": [table.data, table.protocol, table.faults], "here": [own_data, protocol, ""]},
        index=["data", "protocol", "faults"],
    )


def _interval_or_nan(values: np.ndarray, level: float) -> dict[str, float]:
    """Return a dict with the value and the interval (low, high) of one metric; low and high are NaN if no draw is finite.

    `values` is an array (1 + draws,) with the metric for all patients, then for each bootstrap draw.
    """
    if np.isfinite(values[1:]).any():
        return interval(values, level)
    return {"value": float(values[0]), "low": float("nan"), "high": float("nan")}


def _draw_counts(patients: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield arrays (draws, patients) that say how often each draw contains each patient.

    The first array has a single row, in which each patient counts once. The `samples` draws follow, at most DRAWS_PER_BATCH
    per array.
    """
    rng = np.random.default_rng(seed)
    yield np.ones((1, patients))
    for start in range(0, samples, DRAWS_PER_BATCH):
        count = min(DRAWS_PER_BATCH, samples - start)
        indices = rng.integers(patients, size=(count, patients)) + patients * np.arange(count)[:, None]
        yield np.bincount(indices.ravel(), minlength=count * patients).reshape(count, patients).astype(float)


def _cell(value: float, spread: float | None) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.4f}" + (f" (sd {spread:.2f})" if spread is not None else "")


def _interval_cell(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f} [{low:.3f}, {high:.3f}]"
