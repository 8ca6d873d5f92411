"""The answers of runs that tell exclusive classes apart, model by model, and a model of theirs that can be looked into."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kitlib.bundle import read_record
from kitlib.findings_report import mean_over_folds
from kitlib.put_aside import ALL_FOLDS
from kitlib.runs import RunError, read_metrics
from kitlib.tables import class_columns, concatenate, empty_table, read_table

SPLITS = {"folds": "class_scores", "test": "test_scores"}  # what images are judged, and the table that answers them
SAME_SCORE = 1e-6  # of one model's scores in a learner's run and in an ensemble's, which keeps them too


def read_class_scores(runs: Iterable[str | Path], split: str = "folds") -> dict[str, pd.DataFrame]:
    """Tables class_scores by model, of runs of learners and of ensembles, in the order in which models come.

    They are of the images in "folds", answered out of fold, or of the "test" images that were put aside, there the mean
    over the models of all folds, under the fold ALL_FOLDS. Runs that hold folds of one model are put together, and rows
    that an ensemble's run repeats count once. Where runs say different things of one image under one model's name, they are
    models of their own, called "run: model". Raises RunError for a run without such answers, and for another split.
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


def unseen_bundle(run: str | Path, folds: pd.DataFrame) -> tuple[Path, list[str]]:
    """The run's first bundle, and the images of the table folds that it has not seen.

    They are those of the outer fold that was held out (run/outer<k>/fold<n>/bundle), else of its own fold, on which its
    epoch was chosen. Raises RunError for a run without a bundle.
    """
    run = Path(run)
    found = sorted([*run.glob("outer*/fold*/bundle/model.json"), *run.glob("fold*/bundle/model.json")])
    if not found:
        raise RunError(f"{run} has no fold*/bundle; name a run of notebook 20, 25 or 30")
    folder = found[0].parent
    around = folder.parent.parent.name
    fold = int(around.removeprefix("outer")) if around.startswith("outer") else read_record(folder)["fold"]
    return folder, folds.id[folds.fold == fold].tolist()


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
