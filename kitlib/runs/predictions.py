"""Reads the predictions of finished runs: out of fold, of the images put aside, and fused."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kitlib.competitions.siim_covid19 import Fused, SiimFusion
from kitlib.errors import RunError
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.fusion.model_fusion import ModelPredictions, fuse
from kitlib.fusion.stacking import LearnerScores, gather
from kitlib.fusion.test_split import TestSplitScores, gather_test_split
from kitlib.runs.finished_run import read_metrics
from kitlib.tables import concatenate, read_table

STACKED_TABLES = ("nested_scores", "class_scores", "study_scores")  # most complete first; the first that a run has is read
PREDICTED_TABLES = ("study_scores", "image_scores", "class_scores", "detections", "coverage", "mask_maps")


def read_out_of_fold(runs: Iterable[str | Path]) -> ModelPredictions:
    """Return the out-of-fold predictions in training runs: each model's predictions for the images in its held-out fold.

    The folds of a model may come from several runs. Rows of a run's table `class_scores` are returned in `image_scores`. A
    run with detections must have the table `coverage`, which lists the predicted images. Raises RunError if this table is
    missing, if a run has no predictions, or if two runs have the same fold of the same model.
    """
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in PREDICTED_TABLES}
    run_of: dict[tuple[str | None, int], Path] = {}
    for run in map(Path, runs):
        model = read_metrics(run).get("model")
        available = [name for name in PREDICTED_TABLES if (run / "tables" / f"{name}.parquet").is_file()]
        if not available:
            raise RunError(f"{run} has no tables of predictions; give runs of the training notebooks")
        if "detections" in available and "coverage" not in available:
            raise RunError(f"{run} has detections but no tables/coverage.parquet; train the detector again")
        tables = {name: read_table(name, run / "tables" / f"{name}.parquet") for name in available}
        for fold in sorted({fold for table in tables.values() for fold in table["fold"]}):
            if (model, fold) in run_of:
                raise RunError(
                    f"{run} and {run_of[model, fold]} both have fold {fold} of a model {model!r}; pass only one of these "
                    "runs, or train one of them with another model_name"
                )
            run_of[model, fold] = run
        for name, table in tables.items():
            parts[name].append(table)
    classes = parts.pop("class_scores")
    gathered = {name: concatenate(tables, name) for name, tables in parts.items()}
    if classes:
        gathered["image_scores"] = concatenate([gathered["image_scores"], *classes], "class_scores")
    return ModelPredictions.of(**gathered)


def check_out_of_fold(table: pd.DataFrame, key: str, fold_of: pd.Series) -> None:
    """Raise RunError unless all predictions in `table` are out of fold.

    The column `fold` of `table` must be the fold of the row's image or study: a fold's model was trained on all other folds.
    `fold_of` is a series of folds, indexed by image or study id. `key` is the column of `table` with these ids.
    """
    wrong = table[table[key].map(fold_of) != table["fold"]]
    if len(wrong):
        first = wrong.iloc[0]
        raise RunError(
            f"{len(wrong)} predictions are not out of fold; the first is for {first[key]!r} by model {first['model']!r} of "
            f"fold {first['fold']}. Either this model was trained on {first[key]!r}, or the run's folds differ from those "
            "of the given prepared run"
        )


def read_learners(runs: Iterable[str | Path], prepared: dict[str, pd.DataFrame]) -> LearnerScores:
    """Return the scores of the models to stack, from runs of image classifiers (notebooks 25 and 20) or study models (30).

    These models are called learners. `prepared` holds the tables of the prepared run that all learners were trained on. A
    learner's folds and outer folds may come from several runs. Raises RunError if a run has no scores, and FusionError if
    the scores cannot be stacked together.
    """
    tables = []
    for run in map(Path, runs):
        read_metrics(run)
        available = [name for name in STACKED_TABLES if (run / "tables" / f"{name}.parquet").is_file()]
        if not available:
            raise RunError(f"{run} has none of the tables {', '.join(STACKED_TABLES)}; give runs of notebooks 25, 20 or 30")
        tables.append(read_table(available[0], run / "tables" / f"{available[0]}.parquet"))
    return gather(tables, prepared["images"], prepared["labels"], prepared["folds"])


def read_test_split(
    runs: Iterable[str | Path], prepared: dict[str, pd.DataFrame], out_of_fold: LearnerScores
) -> TestSplitScores | None:
    """Return the scores of the models to stack (learners) for the prepared run's test images; None if there are no scores.

    The scores are read from tables/test_scores.parquet in `runs`. `out_of_fold` is the result of `read_learners` for the
    same `runs` and `prepared`. Raises FusionError if the test scores do not match these learners (see `gather_test_split`).
    """
    paths = [Path(run) / "tables" / "test_scores.parquet" for run in runs]
    tables = [read_table("class_scores", path) for path in paths if path.is_file()]
    return gather_test_split(tables, out_of_fold, prepared["images"], prepared["labels"], prepared["folds"])


def read_study_ensemble(run: str | Path, study_scores: pd.DataFrame) -> pd.DataFrame:
    """Return an ensemble's cross-fitted table `study_scores`, which replaces the argument `study_scores`.

    `run` is the ensemble's run (notebook 65), `study_scores` the table of the combined models. Raises RunError if the run is
    not an ensemble of study models, or if the ensemble does not combine exactly the models in `study_scores`. Fusion must be
    tuned on the models that the submission will use.
    """
    ensemble = read_ensemble(Path(run) / "ensemble")
    path = Path(run) / "tables" / "study_scores.parquet"
    if not path.is_file():
        raise RunError(f"{run} has no tables/study_scores.parquet; give a run of notebook 65 on study models")
    others = sorted(set(study_scores["model"]) ^ set(ensemble.learners))
    if others:
        raise RunError(
            f"the ensemble {run} combines other study models than those of the given runs (difference: "
            f"{', '.join(others)}). Give the runs of exactly these models: {', '.join(ensemble.learners)}"
        )
    return read_table("study_scores", path)


def read_answer(runs: str | Path | Iterable[str | Path], images: pd.DataFrame) -> Fused:
    """Return one model's out-of-fold predictions for `images`, fused with the default settings.

    `runs` is the model's run, or several runs if each has some of the model's folds. Images and studies that the model has
    not predicted get the class frequencies as placeholder predictions. Their column `prior` is True; in the table `nones`,
    the column `seen` is False. Raises RunError in the same cases as `read_out_of_fold`.
    """
    predictions = read_out_of_fold([runs] if isinstance(runs, str | Path) else runs)
    return fuse(predictions.only(images["image_id"]), images, SiimFusion())


def read_answers(runs: Iterable[str | Path], images: pd.DataFrame) -> dict[str, Fused]:
    """Return the fused out-of-fold predictions of each model in `runs`, keyed by model name; see `read_answer`.

    Runs with different folds of the same model are joined.
    """
    runs_of: dict[str, list[str | Path]] = {}
    for run in runs:
        runs_of.setdefault(read_metrics(run)["model"], []).append(run)
    return {model: read_answer(model_runs, images) for model, model_runs in runs_of.items()}


def read_fused(run: str | Path) -> Fused:
    """Return the fused out-of-fold predictions from the run `run` of notebook 60, without placeholder predictions (`prior`).

    Raises RunError if the run is not finished, or if an older kitlib wrote it.
    """
    read_metrics(run)
    tables = {name: pd.read_parquet(Path(run) / "tables" / f"{name}.parquet") for name in ("studies", "nones", "detections")}
    for name in ("studies", "nones"):
        tables[name] = tables[name][~tables[name].prior].reset_index(drop=True)
    if "seen" not in tables["nones"]:
        raise RunError(f"{run}/tables/nones.parquet, from an older kitlib, lacks the column `seen`; run notebook 60 again")
    return Fused(**tables)


def judged_images(images: pd.DataFrame, fused: Fused) -> pd.DataFrame:
    """Return the rows of `images` that can be scored: those with predictions for both `none` and the study's classes.

    `fused` has the predictions. Placeholder predictions (`prior`) do not count. Raises RunError if no image remains.
    """
    studies, nones = fused.studies, fused.nones
    has_none = images["image_id"].isin(nones.loc[~nones["prior"], "image_id"])
    judged = images[has_none & images["study_id"].isin(studies.loc[~studies["prior"], "study_id"])]
    if judged.empty:
        raise RunError(
            f"no image has predictions for both `none` and its study's classes ({int(has_none.sum())} images have only "
            "`none`); also fuse a run of study models with the same folds as the detectors"
        )
    return judged.reset_index(drop=True)
