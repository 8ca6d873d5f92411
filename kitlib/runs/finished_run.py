"""What a finished run folder holds, read by the stages after it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import RECORD, data_fingerprint
from kitlib.errors import RunError
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.fusion.model_fusion import Fused, FusionSettings, fuse
from kitlib.fusion.stacking import LearnerScores, gather
from kitlib.fusion.test_split import TestSplitScores, gather_test_split
from kitlib.paths import find_run
from kitlib.tables import concatenate, read_table
from kitlib.xrays.cache import DecodedXrays, XrayCache

PREPARED_TABLES = ("images", "labels", "boxes", "folds")
STACKED_TABLES = ("nested_scores", "class_scores", "study_scores")  # the first that is there is the fullest
PREDICTED_TABLES = ("study_scores", "image_scores", "detections", "coverage")


@dataclass(frozen=True)
class ExtraImages:
    """Further images to train on, such as pseudo-labelled ones or another data set's; no model is validated on them.

    The tables are those of `kitlib.tables`; an optional column `none` of images is a soft target, see XrayDataset.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    cache: DecodedXrays

    def identity(self) -> dict[str, Any]:
        """What tells these images from others, in JSON's types."""
        # The fingerprint reads none of the images but which they are: soft targets are given to it as labels.
        none = self.images.set_index("image_id").reindex(columns=["none"]).rename_axis("id").reset_index()
        return {
            "images": len(self.images),
            "longest_side": self.cache.longest_side,
            "data_fingerprint": data_fingerprint(images=self.images, labels=self.labels, boxes=self.boxes),
            "none_fingerprint": data_fingerprint(labels=none),
        }


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of models on images they have not seen, from several runs together; tables may be empty.

    `coverage` (image_id, model, fold) has a row for each image that a detector looked at, also where it found nothing.
    """

    study_scores: pd.DataFrame
    image_scores: pd.DataFrame
    detections: pd.DataFrame
    coverage: pd.DataFrame


def read_metrics(run: str | Path) -> dict[str, Any]:
    """The run's metrics.json, which its notebook writes last. Raises RunError where it is missing."""
    path = Path(run) / "metrics.json"
    if not path.is_file():
        there = sorted(entry.name for entry in Path(run).glob("*")) if Path(run).is_dir() else "no such folder"
        raise RunError(f"{path} is missing: the run is not finished, or another folder is meant; in {run}: {there}")
    return json.loads(path.read_text(encoding="utf-8"))


def read_prepared(run: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a prepared run by their names: images, labels, boxes, folds."""
    read_metrics(run)
    return {name: read_table(name, Path(run) / "tables" / f"{name}.parquet") for name in PREPARED_TABLES}


def read_out_of_fold(runs: Iterable[str | Path]) -> OutOfFold:
    """The out-of-fold predictions of trained runs; a model's folds may come from several runs.

    Raises RunError for a run without any, for detections without their coverage, and for one fold of a model in two runs.
    """
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in PREDICTED_TABLES}
    trained: dict[tuple[str | None, int], Path] = {}
    for run in map(Path, runs):
        model = read_metrics(run).get("model")
        there = [name for name in PREDICTED_TABLES if (run / "tables" / f"{name}.parquet").is_file()]
        if not there:
            raise RunError(f"{run} has no tables of predictions; name runs of the training notebooks")
        if "detections" in there and "coverage" not in there:
            raise RunError(f"{run} has detections but no tables/coverage.parquet; train the detector again")
        tables = {name: read_table(name, run / "tables" / f"{name}.parquet") for name in there}
        for fold in sorted({fold for table in tables.values() for fold in table["fold"]}):
            if (model, fold) in trained:
                raise RunError(
                    f"{run} and {trained[model, fold]} both have fold {fold} of a model {model!r}; name one, or train one "
                    "with another model_name"
                )
            trained[model, fold] = run
        for name, table in tables.items():
            found[name].append(table)
    return OutOfFold(**{name: concatenate(tables, name) for name, tables in found.items()})


def check_out_of_fold(table: pd.DataFrame, key: str, fold_of: pd.Series) -> None:
    """Raises RunError unless each row's `fold` is the one that `fold_of`, a series by id, has for the row's `key`.

    The model of a fold was trained on all images but that fold's: an answer for another image is one that it has learnt.
    """
    wrong = table[table[key].map(fold_of) != table["fold"]]
    if len(wrong):
        first = wrong.iloc[0]
        raise RunError(
            f"{len(wrong)} predictions are not out of fold, first {first[key]} by the model of fold {first['fold']}, which "
            f"has been trained on it ({first['model']}), or on other folds than these"
        )


def read_learners(runs: Iterable[str | Path], prepared: dict[str, pd.DataFrame]) -> LearnerScores:
    """The scores of trained runs, to be stacked: of classifiers of images (notebooks 25 and 20), or study models (30).

    `prepared` are the tables of the prepared run that all come from. A learner's folds, and outer folds, may come from
    several runs. Raises RunError for a run without scores, FusionError where they do not belong together.
    """
    tables = []
    for run in map(Path, runs):
        read_metrics(run)
        there = [name for name in STACKED_TABLES if (run / "tables" / f"{name}.parquet").is_file()]
        if not there:
            raise RunError(f"{run} has none of the tables {', '.join(STACKED_TABLES)}; name runs of notebooks 25, 20 or 30")
        tables.append(read_table(there[0], run / "tables" / f"{there[0]}.parquet"))
    return gather(tables, prepared["images"], prepared["labels"], prepared["folds"])


def read_test_split(
    runs: Iterable[str | Path], prepared: dict[str, pd.DataFrame], found: LearnerScores
) -> TestSplitScores | None:
    """The same runs' scores of the prepared run's test images (tables/test_scores.parquet); None where no run has any.

    Raises FusionError where they do not belong to the learners `found`, as `gather_test_split` says.
    """
    paths = [Path(run) / "tables" / "test_scores.parquet" for run in runs]
    tables = [read_table("class_scores", path) for path in paths if path.is_file()]
    return gather_test_split(tables, found, prepared["images"], prepared["labels"], prepared["folds"])


def read_study_ensemble(run: str | Path, study_scores: pd.DataFrame) -> pd.DataFrame:
    """The cross-fitted study_scores of an ensemble's run (notebook 65), in the place of those of its learners.

    Raises RunError where it is no ensemble of study models, or `study_scores` has other models than its learners: what is
    tuned must be what the submission sees.
    """
    ensemble = read_ensemble(Path(run) / "ensemble")
    path = Path(run) / "tables" / "study_scores.parquet"
    if not path.is_file():
        raise RunError(f"{run} has no tables/study_scores.parquet; name a run of notebook 65 on study models")
    others = sorted(set(study_scores["model"]) ^ set(ensemble.learners))
    if others:
        raise RunError(
            f"{', '.join(others)}: either no learner of the ensemble {run} or not among the runs; name the study models "
            f"that it was made of: {', '.join(ensemble.learners)}"
        )
    return read_table("study_scores", path)


def read_models(
    runs: Iterable[str | Path],
    prepared: dict[str, pd.DataFrame],
    folds: Iterable[int] = (),
    extra: Iterable[ExtraImages] = (),
) -> pd.DataFrame:
    """The trained models of `runs`, those of `folds` or all: model, fold, bundle (its folder).

    Raises RunError where it is not known what a model has been trained on: `prepared` are the tables of the prepared run
    that all of them come from, `extra` the further images of those that had any. And for a run without a bundle.
    """
    expected, known = data_fingerprint(**prepared), [one.identity() for one in extra]
    chosen, rows = set(folds), []
    for run in map(Path, runs):
        bundles = sorted(run.glob(f"fold*/bundle/{RECORD}"))
        if not bundles:
            raise RunError(f"{run} has no fold*/bundle/{RECORD}; name runs of the training notebooks")
        for path in bundles:
            record, metrics = json.loads(path.read_text(encoding="utf-8")), read_metrics(path.parent.parent)
            if record["data_fingerprint"] != expected:
                raise RunError(f"{path}: trained on another prepared run, so what it has seen is not known; name that one")
            if metrics.get("extra") and metrics["extra"] not in known:
                raise RunError(f"{path}: trained on extra images too; name their run, so that what it has seen is known")
            if not chosen or record["fold"] in chosen:
                rows.append((record["model"], record["fold"], str(path.parent)))
    if not rows:
        raise RunError(f"no model of the folds {sorted(chosen)} in {', '.join(map(str, runs))}")
    return pd.DataFrame(rows, columns=["model", "fold", "bundle"])


def read_extra(run: str | Path, for_boxes: bool = False) -> ExtraImages:
    """Images to train on beside one's own: of a pseudo-labelled run (notebook 50) or of any prepared one (notebook 10).

    Of a prepared run those in its folds: no official test images, none that no annotator looked at. `for_boxes` leaves out
    images whose boxes are no lesson for a detector: unsure pseudo-labels, and all of NIH's. Raises RunError where the run is
    of another kind or its decoded images are not at hand.
    """
    run, metrics = Path(run), read_metrics(run)
    if "longest_side" not in metrics:
        raise RunError(f"{run} is no run of notebook 10 or 50: its metrics.json does not say longest_side")
    tables = {name: read_table(name, run / "tables" / f"{name}.parquet") for name in ("images", "labels", "boxes")}
    images = tables["images"]
    folds = run / "tables" / "folds.parquet"
    if folds.is_file():
        images = images[images["image_id"].isin(read_table("folds", folds)["id"])]
    if metrics.get("dataset") == "nih":
        # Nobody has marked opacities there: no box says nothing.
        images = images.assign(boxes_known=False, unsure=True)
    if for_boxes and "unsure" in images.columns:
        images = images[~images["unsure"].astype(bool)]
    # A pseudo-labelled run names the run whose decoded images it uses, if they are not its own.
    home = find_run(metrics["xrays_run"]) if metrics.get("xrays_run") else run
    cache = XrayCache(home / "xrays", metrics["longest_side"])
    absent = [image_id for image_id in images["image_id"] if image_id not in cache]
    if absent:
        raise RunError(
            f"{len(absent)} of {len(images)} images are not decoded in {cache.folder}, first {absent[0]}; attach {home} "
            "whole, or run it again with this kitlib"
        )
    return ExtraImages(images.reset_index(drop=True), tables["labels"], tables["boxes"], cache)


def read_answer(runs: str | Path | Iterable[str | Path], images: pd.DataFrame) -> Fused:
    """The out-of-fold answer of one model's run or runs, as it is, for `images`.

    What it has not predicted is a prior, and not seen. Raises RunError as `read_out_of_fold` does.
    """
    found = read_out_of_fold([runs] if isinstance(runs, str | Path) else runs)
    detections, coverage = (
        table[table["image_id"].isin(images["image_id"])] for table in (found.detections, found.coverage)
    )
    return fuse(found.study_scores, found.image_scores, detections, images, FusionSettings(), coverage)


def read_answers(runs: Iterable[str | Path], images: pd.DataFrame) -> dict[str, Fused]:
    """The answer of each model by its name, as `read_answer` gives it: runs that hold folds of one model answer together."""
    by_model: dict[str, list[str | Path]] = {}
    for run in runs:
        by_model.setdefault(read_metrics(run)["model"], []).append(run)
    return {model: read_answer(of_it, images) for model, of_it in by_model.items()}


def read_fused(run: str | Path) -> Fused:
    """The fused out-of-fold answer of a run of the fusion notebook, without rows that only hold priors."""
    read_metrics(run)
    tables = {name: pd.read_parquet(Path(run) / "tables" / f"{name}.parquet") for name in ("studies", "nones", "detections")}
    for name in ("studies", "nones"):
        tables[name] = tables[name][~tables[name].prior].reset_index(drop=True)
    if "seen" not in tables["nones"]:
        raise RunError(f"{run}/tables/nones.parquet lacks the column seen: an older kitlib has written it; fuse again")
    return Fused(**tables)


def judged_images(images: pd.DataFrame, fused: Fused) -> pd.DataFrame:
    """The rows of `images` that have a `none` and whose study has an answer, priors not counted: what can be scored.

    Raises RunError where none is left.
    """
    studies, nones = fused.studies, fused.nones
    answered = images["image_id"].isin(nones.loc[~nones["prior"], "image_id"])
    judged = images[answered & images["study_id"].isin(studies.loc[~studies["prior"], "study_id"])]
    if judged.empty:
        raise RunError(
            f"no image has both a `none` and a study that is answered ({int(answered.sum())} have a `none`); "
            "include a study run, of folds that the detectors have too, among the runs that are fused"
        )
    return judged.reset_index(drop=True)
