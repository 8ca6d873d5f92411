"""Reads predictions of finished single-label classification runs, and finds images that a saved model was not trained on."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kitlib.bundle import data_fingerprint, read_record
from kitlib.errors import RunError
from kitlib.fusion.test_split import ALL_FOLDS
from kitlib.reports.findings_report import mean_over_folds
from kitlib.runs.finished_run import read_metrics
from kitlib.runs.predictions import check_out_of_fold
from kitlib.tables import class_columns, concatenate, empty_table, read_table

SPLITS = {"folds": "class_scores", "test": "test_scores"}  # split -> table with the predictions for its images
SAME_SCORE = 1e-6  # an ensemble's run contains a copy of its learners' scores, which may differ by this much


def read_class_scores(runs: Iterable[str | Path], folds: pd.DataFrame, split: str = "folds") -> dict[str, pd.DataFrame]:
    """Return the predictions of training and ensemble runs: one `class_scores` table per model, keyed by the model's name.

    If `split` is "folds", the tables have out-of-fold predictions. If `split` is "test", the tables have predictions for the
    held-out test images, averaged over the models of all folds; the column `fold` is then -1 (ALL_FOLDS). Models are in the
    order in which they appear in `runs`. Runs that contain different folds of one model are merged; rows that an ensemble
    run repeats are dropped. If two runs have different scores for an image under the same model name, the table of each run
    is kept under the name "run: model". `folds` is the table of the prepared run. Raises RunError:

    - for an unknown split, or a run without such predictions
    - with "folds", for predictions that are not out-of-fold with respect to `folds`
    - with "test", for predictions for images in `folds`
    """
    if split not in SPLITS:
        raise RunError(f"split is {split!r}; valid splits: {', '.join(SPLITS)}")
    parts_by_model: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for run in map(Path, runs):
        read_metrics(run)
        path, other_path = (run / "tables" / f"{SPLITS[key]}.parquet" for key in (split, *(set(SPLITS) - {split})))
        table = read_table("class_scores", path) if path.is_file() else empty_table("class_scores")
        if table.empty:
            advice = (
                f"it has {other_path.name}; use the other split"
                if other_path.is_file()
                else "use runs of notebooks 20, 25 or 65"
            )
            raise RunError(f"{run} has no predictions in tables/{path.name}; {advice}")
        _check_unseen(run, table, folds, split)
        for model, rows in table.groupby("model", sort=False):
            parts_by_model.setdefault(str(model), []).append((run.name, rows))
    tables: dict[str, pd.DataFrame] = {}
    for model, parts in parts_by_model.items():
        merged = _merge_parts([rows for _, rows in parts])
        if merged is not None:
            tables[model] = merged
            continue
        for name, rows in parts:
            own_name = f"{name}: {model}"
            if own_name in tables:
                raise RunError(f"two runs called {name} have different scores for model {model}; rename one of the folders")
            tables[own_name] = concatenate([rows.assign(model=own_name)], "class_scores")
    if split == "test":
        tables = {model: mean_over_folds(rows).assign(fold=ALL_FOLDS) for model, rows in tables.items()}
    return tables


def unseen_bundle(run: str | Path, tables: dict[str, pd.DataFrame]) -> tuple[Path, list[str]]:
    """Return the folder of the run's first bundle (trained model), and the ids of images that it was not trained on.

    `tables` are the tables of the prepared run, keyed by name. If the run is nested (run/outer<k>/fold<n>/bundle), the ids
    are those of the outer fold k, which was held out. Otherwise the ids are those of the bundle's validation fold, on which
    the epoch was chosen. Raises RunError if the run has no bundle, or if the bundle's data fingerprint is not that of
    `tables`. For a nested run, this is the fingerprint of `tables` without the outer fold.
    """
    run = Path(run)
    records = sorted([*run.glob("outer*/fold*/bundle/model.json"), *run.glob("fold*/bundle/model.json")])
    if not records:
        raise RunError(f"{run} has no fold*/bundle; use a run of notebook 20, 25 or 30")
    folder = records[0].parent
    parent = folder.parent.parent.name
    folds, record = tables["folds"], read_record(folder)
    fold, trained_folds = record["fold"], folds
    if parent.startswith("outer"):
        fold = int(parent.removeprefix("outer"))
        trained_folds = folds[folds.fold != fold]
    if record["data_fingerprint"] != data_fingerprint(**{**tables, "folds": trained_folds}):
        raise RunError(
            f"{folder} was trained on another prepared run, so its unseen images are unknown; use that prepared run"
        )
    return folder, folds.id[folds.fold == fold].tolist()


def kept_models(runs: Iterable[str | Path], models: Iterable[str]) -> list[str]:
    """Return those of `models` (names from `read_class_scores`) whose trained model is saved in one of `runs`.

    A training run saves its own model. A run of notebook 65 saves an ensemble, but only the scores of the learners.
    """
    kept, models = [], set(models)
    for run in map(Path, runs):
        name = str(read_metrics(run).get("model", ""))
        kept += [candidate for candidate in (f"{run.name}: {name}", name) if candidate in models]
    return list(dict.fromkeys(kept))


def choose_models(
    models: Iterable[str], reference: str, pictured: Iterable[str], kept: Iterable[str]
) -> tuple[str, list[str]]:
    """Return the names of the reference model and of the models to show in figures, with defaults for empty arguments.

    The default of `reference` is the model `mean` of an ensemble, or the first model if no ensemble has a `mean`. The
    default of `pictured` is `kept` (see `kept_models`), or the reference model if `kept` is empty. Raises ValueError for a
    name that is not in `models`.
    """
    models, pictured = list(models), list(pictured)
    for parameter, names in (("reference", [reference] if reference else []), ("pictured", pictured)):
        if absent := [name for name in names if name not in models]:
            raise ValueError(f"{parameter}: model {absent[0]!r} does not exist; available models: {', '.join(models)}")
    means = [name for name in models if name.split(": ")[-1] == "mean"]
    reference = reference or [*means, *models][0]
    return reference, pictured or list(kept) or [reference]


def protocol_of(folds: pd.DataFrame, folds_by: str) -> str:
    """Return a text that says how the out-of-fold predictions for `folds` were made.

    `folds_by` comes from the prepared run's metrics.json. Raises RunError if it is not "patient", "study" or "source".
    """
    count = folds.fold.nunique()
    if folds_by in ("patient", "study"):
        return f"{count} folds by {folds_by} and near-duplicate; each image is predicted by models not trained on it"
    if folds_by == "source":
        return f"{count} folds, one per source; each image is predicted by models not trained on its source"
    raise RunError(f"the prepared run has folds by {folds_by!r}; expected folds by patient, study or source")


def _check_unseen(run: Path, table: pd.DataFrame, folds: pd.DataFrame, split: str) -> None:
    try:
        if split == "folds":
            check_out_of_fold(table, "image_id", folds.set_index("id").fold)
    except RunError as error:
        raise RunError(f"{run}: {error}") from error
    in_folds = table[table.image_id.isin(folds.id)]
    if split == "test" and len(in_folds):
        first = in_folds.iloc[0]
        raise RunError(
            f"{run}: {len(in_folds)} test predictions are for images in the folds, such as that of model {first.model!r} "
            f"for image {first.image_id!r}; use the prepared run that the model was trained on"
        )


def _merge_parts(parts: list[pd.DataFrame]) -> pd.DataFrame | None:
    """Merge tables of one model's scores and drop repeated rows; return None if the tables contradict each other.

    Tables contradict each other if their classes differ, or if their scores for the same image and fold differ.
    """
    classes = class_columns(parts[0], "class_scores")
    if any(set(class_columns(part, "class_scores")) != set(classes) for part in parts):
        return None
    rows = pd.concat(parts, ignore_index=True)
    of_one = rows.groupby(["image_id", "fold"])[classes]
    if (of_one.max() - of_one.min() > SAME_SCORE).any(axis=None):
        return None
    return concatenate([rows.drop_duplicates(["image_id", "fold"])], "class_scores")
