"""The answers of runs that tell exclusive classes apart, model by model, and a model of theirs that can be looked into."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kitlib.bundle import data_fingerprint, read_record
from kitlib.errors import RunError
from kitlib.fusion.test_split import ALL_FOLDS
from kitlib.reports.findings_report import mean_over_folds
from kitlib.runs.finished_run import check_out_of_fold, read_metrics
from kitlib.tables import class_columns, concatenate, empty_table, read_table

SPLITS = {"folds": "class_scores", "test": "test_scores"}  # what images are judged, and the table that answers them
SAME_SCORE = 1e-6  # of one model's scores in a learner's run and in an ensemble's, which keeps them too


def read_class_scores(runs: Iterable[str | Path], folds: pd.DataFrame, split: str = "folds") -> dict[str, pd.DataFrame]:
    """Tables class_scores by model, of runs of learners and of ensembles, in the order in which models come.

    They are of the images in "folds", answered out of fold, or of the "test" images that were put aside, there the mean
    over the models of all folds, under the fold ALL_FOLDS. Runs that hold folds of one model are put together, and rows
    that an ensemble's run repeats count once. Where runs say different things of one image under one model's name, they are
    models of their own, called "run: model". `folds` is the prepared run's table. Raises RunError for a run without such
    answers, for answers that are not out of these folds or, of test images, are of images in them, and for another split.
    """
    if split not in SPLITS:
        raise RunError(f"split is {split!r}; there are: {', '.join(SPLITS)}")
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for run in map(Path, runs):
        read_metrics(run)
        path, others = (run / "tables" / f"{SPLITS[each]}.parquet" for each in (split, *(set(SPLITS) - {split})))
        table = read_table("class_scores", path) if path.is_file() else empty_table("class_scores")
        if table.empty:
            other = f"; it has {others.name}: set split" if others.is_file() else "; name runs of notebooks 20, 25 and 65"
            raise RunError(f"{run} has no answers in tables/{path.name}{other}")
        _check_unseen(run, table, folds, split)
        for model, rows in table.groupby("model", sort=False):
            found.setdefault(str(model), []).append((run.name, rows))
    tables: dict[str, pd.DataFrame] = {}
    for model, parts in found.items():
        together = _together([rows for _, rows in parts])
        if together is not None:
            tables[model] = together
            continue
        for name, rows in parts:
            own = f"{name}: {model}"
            if own in tables:
                raise RunError(f"two runs called {name} have other scores of a model {model}; give one another folder")
            tables[own] = concatenate([rows.assign(model=own)], "class_scores")
    if split == "test":
        tables = {model: mean_over_folds(rows).assign(fold=ALL_FOLDS) for model, rows in tables.items()}
    return tables


def unseen_bundle(run: str | Path, tables: dict[str, pd.DataFrame]) -> tuple[Path, list[str]]:
    """The run's first bundle, and the images in the folds of the prepared run `tables` that it has not seen.

    They are those of the outer fold that was held out (run/outer<k>/fold<n>/bundle), else of its own fold, on which its
    epoch was chosen. Raises RunError for a run without a bundle, and for a bundle that was trained on other data or folds:
    a nested one's are those of the prepared run without its outer fold.
    """
    run = Path(run)
    found = sorted([*run.glob("outer*/fold*/bundle/model.json"), *run.glob("fold*/bundle/model.json")])
    if not found:
        raise RunError(f"{run} has no fold*/bundle; name a run of notebook 20, 25 or 30")
    folder = found[0].parent
    around = folder.parent.parent.name
    folds, record = tables["folds"], read_record(folder)
    fold, rest = record["fold"], folds
    if around.startswith("outer"):
        fold = int(around.removeprefix("outer"))
        rest = folds[folds.fold != fold]
    if record["data_fingerprint"] != data_fingerprint(**{**tables, "folds": rest}):
        raise RunError(f"{folder}: trained on another prepared run, so what it has seen is not known; name that one")
    return folder, folds.id[folds.fold == fold].tolist()


def choose_models(models: Iterable[str], reference: str, pictured: Iterable[str]) -> tuple[str, list[str]]:
    """The model that others are compared with, and those that are drawn, as named or, where empty, chosen.

    The reference is the mean of an ensemble's learners, else the first model; drawn are it and the last model. Raises
    ValueError for a name that is not among `models`.
    """
    models, pictured = list(models), list(pictured)
    for what, names in (("reference", [reference] if reference else []), ("pictured", pictured)):
        if absent := [name for name in names if name not in models]:
            raise ValueError(f"{what}: no model is called {absent[0]!r}; there are: {', '.join(models)}")
    means = [name for name in models if name.split(": ")[-1] == "mean"]
    reference = reference or [*means, *models][0]
    return reference, pictured or list(dict.fromkeys([reference, models[-1]]))


def protocol_of(folds: pd.DataFrame, folds_by: str) -> str:
    """How figures out of these folds were made, in words; `folds_by` is what the prepared run's metrics.json says."""
    count = folds.fold.nunique()
    if folds_by == "patient":
        return f"{count} folds by patient and near-duplicate, each image judged by models without it"
    if folds_by == "source":
        return f"{count} folds, each one source, whose images are judged by models without that source"
    raise RunError(f"the prepared run has folds by {folds_by!r}, of which only patient and source are known here")


def _check_unseen(run: Path, table: pd.DataFrame, folds: pd.DataFrame, split: str) -> None:
    try:
        if split == "folds":
            check_out_of_fold(table, "image_id", folds.set_index("id").fold)
    except RunError as error:
        raise RunError(f"{run}: {error}") from error
    learnt = table[table.image_id.isin(folds.id)]
    if split == "test" and len(learnt):
        first = learnt.iloc[0]
        raise RunError(
            f"{run}: {len(learnt)} answers for test images are of images in the folds, first {first.image_id} by "
            f"{first.model}: name the prepared run that it was trained on"
        )


def _together(parts: list[pd.DataFrame]) -> pd.DataFrame | None:
    """One table of all rows, each once; None where two parts differ about an image and fold, or in their classes."""
    classes = class_columns(parts[0], "class_scores")
    if any(set(class_columns(part, "class_scores")) != set(classes) for part in parts):
        return None
    rows = pd.concat(parts, ignore_index=True)
    of_one = rows.groupby(["image_id", "fold"])[classes]
    if (of_one.max() - of_one.min() > SAME_SCORE).any(axis=None):
        return None
    return concatenate([rows.drop_duplicates(["image_id", "fold"])], "class_scores")
