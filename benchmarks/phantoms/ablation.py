"""Measures the gain of each addition to the training on phantoms, out of fold: `python benchmarks/phantoms/ablation.py`.

Every row trains the same small models on the same folds and seeds with one field of the recipe changed. The last epoch is
kept, so that nothing is chosen on the held-out fold. The tables show the mean average precision of the study outputs (or of
opacity) and the paired difference to the first row, with 95 % intervals of a bootstrap over patients. Finished runs stay in
--folder, so that an interrupted script continues. Takes an hour on two cores.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from kitlib.atomic import write_text
from kitlib.classes import STUDY_CLASSES
from kitlib.datasets.folds import make_folds
from kitlib.datasets.siim import read_train
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.fields import DetectorRecipe, StudyRecipe
from kitlib.recipes.named import recipe
from kitlib.reports.competition import detection_draws, interval
from kitlib.scoring.score import class_precision
from kitlib.tables import concatenate
from kitlib.training.driver import train_fold
from kitlib.training.task import Task
from kitlib.xrays.cache import XrayCache

STUDY: dict[str, dict[str, Any]] = {
    "small_study": {},
    "auxiliary segmentation": {"segmentation": 1.0},
    "moving average of the weights": {"ema_decay": 0.98},
    "label smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "mirror image": {"views": ("full", "flip")},
    "mirror image and lung crops": {"views": ("full", "flip", "lungs", "lungs_flip")},
    "study alone": {"outputs": "study"},
    "none alone": {"outputs": "none"},
}
DETECTOR: dict[str, dict[str, dict[str, Any]]] = {
    "small_yolo": {
        "small_yolo": {},
        "GIoU instead of CIoU": {"box_loss": "giou"},
        "mirror image": {"views": ("full", "flip")},
        "mixup": {"mixup": 0.5},
        "images with boxes alone": {"negatives": 0.0},
    },
    "small_faster_rcnn": {
        "small_faster_rcnn": {},
        "CIoU instead of smooth L1": {"box_loss": "ciou"},
        "moving average of the weights": {"ema_decay": 0.98},
        "mirror image": {"views": ("full", "flip")},
        "images with boxes alone": {"negatives": 0.0},
    },
}

# Arguments of `main` for the tests, with which it takes a few seconds.
SMALLEST = {"studies": 8, "side": 64, "seeds": 1, "samples": 2, "only": "study", "rows": 2, "epochs": 1}


def main(
    folder: Annotated[Path, typer.Option(help="folder for phantoms, decoded copies and runs")] = Path("runs/ablation"),
    studies: int = 160,
    side: int = 256,
    seeds: int = 2,
    samples: int = 500,
    only: Annotated[str, typer.Option(help="one of study, small_yolo, small_faster_rcnn; empty: all")] = "",
    rows: Annotated[int, typer.Option(help="measure only the first rows of each table; 0: all")] = 0,
    epochs: Annotated[int, typer.Option(help="epochs of each training; 0: the recipe's")] = 0,
) -> None:
    """Train the missing models, print the tables as Markdown and write them to FOLDER/ablation.md."""
    sizes = {"train_studies": studies, "test_studies": 4, "side": side, "damaged_test_files": 0}
    competition = write_competition(folder / "inputs", folder / "truth", seed=7, progress=False, **sizes)
    data = read_train(competition, progress=False)
    cache = XrayCache(folder / "xrays", side)
    cache.fill(data.images)
    tables = {"images": data.images, "labels": data.labels, "boxes": data.boxes}
    tables["folds"] = make_folds(**tables, n_folds=2)
    text = []
    common = {"epochs": epochs} if epochs else {}
    additions = {
        model: {name: {**common, **changes} for name, changes in [*cases.items()][: rows or None]}
        for model, cases in {"study": STUDY, **DETECTOR}.items()
        if only in ("", model)
    }
    for model, cases in additions.items():
        if model == "study":
            text += [_study_table(cases, tables, cache, folder, seeds, samples)]
        else:
            text += [_detector_table(model, cases, tables, cache, folder, seeds, samples)]
    write_text(folder / f"ablation{'_' * bool(only)}{only}.md", "\n\n".join(text) + "\n")
    print("\n\n".join(text))


Cases = dict[str, dict[str, Any]]  # name of the addition -> recipe fields that it changes


def _study_table(
    cases: Cases, tables: dict[str, pd.DataFrame], cache: XrayCache, folder: Path, seeds: int, samples: int
) -> str:
    rows, first = [], None
    for name, changes in cases.items():
        settings = recipe("small_study", StudyRecipe, keep="last", **changes)
        draws = []
        for seed in range(seeds):
            run_folder = folder / "runs" / "study" / f"{name.replace(' ', '_')}_seed{seed}"
            task = Task(tables, cache, settings, "study", seed=seed)
            runs = [train_fold(task, fold, run_folder / f"fold{fold}") for fold in (0, 1)]
            study_scores = concatenate([run.tables["study_scores"] for run in runs], "study_scores")
            image_scores = concatenate([run.tables["image_scores"] for run in runs], "image_scores")
            draws.append(_study_draws(study_scores, image_scores, tables, samples))
        mean = np.mean(draws, axis=0)  # (1 + samples, 2): mean AP of the study classes, AP of none
        first = mean if first is None else first
        rows.append((name, *(_cell(mean[:, output], first[:, output]) for output in (0, 1))))
    return _markdown(["addition", "study classes", "none"], rows)


def _study_draws(
    study_scores: pd.DataFrame, image_scores: pd.DataFrame, tables: dict[str, pd.DataFrame], samples: int
) -> np.ndarray:
    """Return (1 + samples, 2), all patients, then each draw: mean AP of the study classes, AP of `none`; NaN if missing."""
    images = tables["images"][tables["images"].image_id.isin(tables["folds"].id)]
    patients = np.sort(images.patient_id.unique())
    of_study = images.drop_duplicates("study_id").set_index("study_id").patient_id
    of_image = images.set_index("image_id").patient_id
    labels = tables["labels"].set_index("id")
    boxed = set(tables["boxes"].image_id)
    study = np.searchsorted(patients, of_study.loc[study_scores.study_id])
    image = np.searchsorted(patients, of_image.loc[image_scores.image_id])
    empty = ~image_scores.image_id.isin(boxed).to_numpy()
    rng = np.random.default_rng(0)
    draws = []
    for number in range(1 + samples):
        times = np.ones(len(patients))
        if number:
            times = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)))
        precisions = [
            class_precision(study_scores[name], labels.loc[study_scores.study_id, name] == 1, times[study])
            for name in STUDY_CLASSES
            if len(study_scores)
        ]
        none = class_precision(image_scores.none, empty, times[image]) if len(image_scores) else np.nan
        draws.append((np.nanmean(precisions) if precisions else np.nan, none))
    return np.array(draws)


def _detector_table(
    model: str,
    cases: Cases,
    tables: dict[str, pd.DataFrame],
    cache: XrayCache,
    folder: Path,
    seeds: int,
    samples: int,
) -> str:
    rows, first = [], None
    for name, changes in cases.items():
        settings = recipe(model, DetectorRecipe, keep="last", **changes)
        draws = []
        for seed in range(seeds):
            run_folder = folder / "runs" / model / f"{name.replace(' ', '_')}_seed{seed}"
            task = Task(tables, cache, settings, model, seed=seed)
            runs = [train_fold(task, fold, run_folder / f"fold{fold}") for fold in (0, 1)]
            detections = concatenate([run.tables["detections"] for run in runs], "detections")
            coverage = concatenate([run.tables["coverage"] for run in runs], "coverage")
            draws.append(detection_draws(detections, coverage, tables["images"], tables["boxes"], samples))
        mean = np.mean(draws, axis=0)
        first = mean if first is None else first
        rows.append((name, _cell(mean, first)))
    return _markdown(["addition", "opacity"], rows)


def _cell(draws: np.ndarray, first: np.ndarray) -> str:
    if np.isnan(draws[0]):
        return "-"
    if draws is first or np.array_equal(draws, first):
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval(draws))
    return f"{draws[0]:.3f}, " + "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**interval(draws - first))


def _markdown(columns: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
