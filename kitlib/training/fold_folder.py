"""A training run's folder: which images it takes, who may go on with it, and what it holds at the end."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from kitlib.atomic import replacing, write_json, write_text
from kitlib.bundle import data_fingerprint, save_bundle
from kitlib.device import precision
from kitlib.lungs.finders import StoredLungs
from kitlib.models.starting_weights import starting_weights_digest
from kitlib.recipes.fields import TrainingRecipe
from kitlib.runs.reading import ExtraImages
from kitlib.runs.record import process_record
from kitlib.tables import check_table, class_columns, concatenate
from kitlib.xrays.cache import CachedXray, XrayCache

logger = logging.getLogger(__name__)

# Columns of every history; the others are what a module logged.
COUNTED = ("epoch", "seconds", "images_per_s", "learning_rate")


# Heidelberg's schedule ends at a twentieth of its first learning rate.
LEARNING_RATE_FLOOR = 0.05


class ResumeError(ValueError):
    """A run folder holds another run than the one asked for; the message names each difference."""


@dataclass(frozen=True)
class Fitted:
    """How a training went.

    `history` has a row an epoch, counted from 1: epoch, seconds (with validation), images_per_s (of training alone),
    learning_rate (at its end), and whatever the module logged.
    """

    history: pd.DataFrame
    best_epoch: int

    def best(self) -> dict[str, float]:
        """What the module logged in the kept epoch, where finite."""
        row = self.history.loc[self.history.epoch == self.best_epoch].iloc[0]
        return {name: float(value) for name, value in row.items() if math.isfinite(value) and name not in COUNTED}

    def metrics(self, device: torch.device) -> dict[str, Any]:
        """The part of a run's metrics.json that every training has, in JSON's types; rates in training images a second."""
        return {
            "best_epoch": self.best_epoch,
            "epochs": len(self.history),
            "best": self.best(),
            "seconds": round(float(self.history.seconds.sum()), 2),
            "images_per_s": round(float(self.history.images_per_s.median()), 2),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": precision(device),
        }


class _BothCaches:
    """Reads an image from the cache that has it."""

    def __init__(self, cache: XrayCache, extra: ExtraImages) -> None:
        self.cache, self.extra = cache, extra.cache
        self.extra_ids = frozenset(extra.images.image_id)
        self.longest_side = cache.longest_side

    def read(self, image_id: str) -> CachedXray:
        return (self.extra if image_id in self.extra_ids else self.cache).read(image_id)


def with_extra(
    train_images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    cache: XrayCache,
    extra: ExtraImages | None,
    validation_images: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, XrayCache]:
    """The training images with the extra ones after them, and labels, boxes and a cache for both.

    Extra images marked `false_none` stay out. The labels keep their classes: an extra image's label is NaN (unknown) where
    the extra table lacks the class. Raises ValueError for extra images that are validated on, by image_id, study_id or
    patient_id, or that are trained on already.
    """
    if extra is None:
        return train_images, labels, boxes, cache
    added = check_table(extra.images, "images", "the extra images")
    added_labels = check_table(extra.labels, "labels", "the extra images")
    if "false_none" in added.columns:
        added = added[~added.false_none.fillna(False).astype(bool)]
    if added.empty:
        raise ValueError("the extra run has no image to learn this from (detectors: NIH's have no boxes); name another")
    for there, meaning, columns in (
        (validation_images, "validated on", ("image_id", "study_id", "patient_id")),
        (train_images, "trained on already", ("image_id", "study_id")),
    ):
        for column in columns:
            shared = added.loc[added[column].isin(there[column]), column]
            if len(shared):
                raise ValueError(
                    f"{len(shared)} of {len(added)} extra images are {meaning}, by {column}, first {shared.iloc[0]!r}; "
                    "leave them out of the extra run"
                )
    classes = class_columns(labels, "labels")
    unknown = [name for name in classes if name not in added_labels or added_labels[name].isna().all()]
    if unknown:
        logger.warning("the extra images tell nothing about %s: these labels count as unknown", ", ".join(unknown))
    added_boxes = check_table(extra.boxes, "boxes", "the extra images")
    # Each table speaks only for its own images: an extra box must not reach a validation image.
    labels, added_labels = labels[~labels.id.isin(added.study_id)], added_labels[added_labels.id.isin(added.study_id)]
    boxes, added_boxes = boxes[~boxes.image_id.isin(added.image_id)], added_boxes[added_boxes.image_id.isin(added.image_id)]
    return (
        concatenate((train_images, added), "images"),
        concatenate((labels, added_labels.reindex(columns=labels.columns).astype(dict.fromkeys(classes, float))), "labels"),
        concatenate((boxes, added_boxes), "boxes"),
        _BothCaches(cache, extra),
    )


def split(
    images: pd.DataFrame,
    folds: pd.DataFrame,
    fold: int,
    seed: int,
    limit_train: int | None = None,
    limit_validation: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Images of all folds but `fold`, and images of `fold`; those marked `false_none` or without a fold are in neither.

    A limit is a number of images: patients are drawn by `seed` and kept whole as long as they fit.
    """
    known = images.set_index("image_id", drop=False)
    missing = folds.loc[~folds.id.isin(known.index), "id"]
    if len(missing):
        raise ValueError(f"{len(missing)} images of the folds are not in the table images, first {missing.iloc[0]}")
    kept = folds[~folds.id.map(known.false_none).astype(bool)] if "false_none" in images.columns else folds
    parts = []
    for chosen, limit in ((kept.fold != fold, limit_train), (kept.fold == fold, limit_validation)):
        part = known.loc[kept.id[chosen]].reset_index(drop=True)
        if limit is not None:
            part = _whole_patients(part, limit, seed)
        if part.empty:
            raise ValueError(
                f"fold {fold} leaves nothing to train or to validate on; folds: {sorted(set(kept.fold))}, limit {limit}"
            )
        parts.append(part)
    return parts[0], parts[1]


def run_identity(
    tables: dict[str, pd.DataFrame],
    fold: int,
    cache: XrayCache,
    recipe: TrainingRecipe,
    model_name: str,
    seed: int,
    limit_train: int | None,
    limit_validation: int | None,
    extra: ExtraImages | None = None,
    lungs: StoredLungs | None = None,
) -> dict[str, Any]:
    """All that a run's weights follow from, in JSON's types; `tables` are images, labels, boxes and folds by name."""
    return {
        "model": model_name,
        "fold": fold,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "limit_train": limit_train,
        "limit_validation": limit_validation,
        "longest_side": cache.longest_side,
        "data_fingerprint": data_fingerprint(**tables),
        "folds_fingerprint": data_fingerprint(folds=tables["folds"]),
        "starting_weights_sha256": starting_weights_digest(recipe.starting_weights) if recipe.starting_weights else "",
        **({"extra": extra.identity()} if extra is not None else {}),
        **({"lungs_fingerprint": lungs.fingerprint, "segmenter": lungs.segmenter} if lungs is not None else {}),
    }


def open_run(run_folder: str | Path, identity: dict[str, Any], resume: bool) -> bool:
    """Make a run folder ready for the run that `identity` (JSON types) describes; True if it already holds its results.

    With `resume`, a folder that holds a run of another identity is refused with ResumeError; without, it is emptied of its
    checkpoints and of metrics.json, the mark of a finished run.
    """
    run_folder = Path(run_folder)
    described = run_folder / "checkpoints" / "run.json"
    if not resume:
        start_over(run_folder)
    # What a killed process was writing; weights are large.
    for kind in ("last", "best"):
        for half in described.parent.glob(f".{kind}.*"):
            half.unlink(missing_ok=True)  # processes that train together all do this
    if not described.is_file():
        write_json(described, identity)
        return False
    there, here = _flat(json.loads(described.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(identity)))
    for one in (there, here):
        # What counts is their content: another session finds the same weights at another place.
        one.pop("recipe.starting_weights", None)
    differing = [name for name in sorted(there | here) if there.get(name, "-") != here.get(name, "-")]
    if differing:
        listing = "; ".join(f"{name}: {there.get(name, '-')!r} there, {here.get(name, '-')!r} here" for name in differing)
        raise ResumeError(
            f"{run_folder} holds another run and cannot be resumed ({listing}); ask for the same run, name another "
            "folder, or start it over with resume=False"
        )
    finished = (run_folder / "metrics.json").is_file()
    if finished:
        logger.info("%s is finished; reading its results", run_folder)
    return finished


def start_over(run_folder: Path) -> None:
    """Remove the checkpoints, and first metrics.json, the mark of a finished run."""
    (run_folder / "metrics.json").unlink(missing_ok=True)
    shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)


def continue_from(earlier: Path, run: Path) -> list[str]:
    """Copy the folds of an earlier session's run, which may be read-only, into `run`, to go on with; a line on each.

    Each appears whole or not at all. A fold that has got as far here already stays as it is. Raises ResumeError where
    `earlier` has no fold to go on with.
    """
    folds = sorted(path.parent.parent for path in earlier.glob("fold*/checkpoints/run.json"))
    if not folds:
        there = ", ".join(sorted(entry.name for entry in earlier.iterdir())) or "nothing"
        raise ResumeError(f"{earlier} has no fold*/checkpoints/run.json to go on with; there is: {there}")
    lines = []
    for fold in folds:
        here = run / fold.name
        if (here / "checkpoints").is_dir() and _progress(here) >= _progress(fold):
            lines.append(f"{fold.name}: kept, the one in {earlier} is no further")
            continue
        beside = run / f".{fold.name}.copying"
        shutil.rmtree(beside, ignore_errors=True)
        # The bytes alone: an input's files and folders are read-only.
        for path in sorted(fold.rglob("*")):
            target = beside / path.relative_to(fold)
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        shutil.rmtree(here, ignore_errors=True)
        beside.replace(here)
        lines.append(f"{fold.name}: goes on from {fold}")
    return lines


def _progress(fold: Path) -> tuple[bool, int]:
    """Whether it is finished, and the number of its last epoch, -1 where none is."""
    checkpoint = fold / "checkpoints" / "last.ckpt"
    last = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["epoch"] if checkpoint.is_file() else -1
    return (fold / "metrics.json").is_file(), last


def save_trained(
    run_folder: Path, model: torch.nn.Module, family: str, classes: Iterable[str], identity: dict[str, Any], fitted: Fitted
) -> None:
    """The run's bundle: `model` as `fit` left it, with a `recipe` and a `mean` and `std` of its input."""
    recipe, best = model.recipe, fitted.best()
    record = {key: identity[key] for key in ("model", "fold", "recipe", "longest_side", "data_fingerprint")} | {
        "family": family,
        "classes": list(classes),
        "architecture": {"parameters": sum(each.numel() for each in model.parameters())}
        | {key: identity[key] for key in ("segmenter",) if key in identity},
        "image_size": recipe.image_size,
        "placement": recipe.placement,
        "mean": list(model.mean),
        "std": list(model.std),
        "validation": {name: best[name] for name in ("score", *classes) if name in best},
    }
    save_bundle(run_folder / "bundle", model.state_dict(), record)


def finish_fold(
    run_folder: Path, identity: dict[str, Any], counts: dict[str, Any], fitted: Fitted, device: torch.device
) -> None:
    """tables/history.csv, figures/curves.png and, last, metrics.json, which marks a finished run.

    It holds all that is given, what `fitted` says of itself, and the process's record (see kitlib.runs.record).
    """
    write_text(run_folder / "tables" / "history.csv", fitted.history.to_csv(index=False))
    draw_curves(fitted, run_folder / "figures" / "curves.png")
    write_json(run_folder / "metrics.json", {**identity, **counts, **fitted.metrics(device), **process_record()})


def read_finished(run_folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """metrics.json and the history of a finished run; FileNotFoundError where there is none."""
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics, pd.read_csv(run_folder / "tables" / "history.csv")


def draw_curves(fitted: Fitted, path: str | Path) -> None:
    """Losses on the left, the score and its parts on the right, the kept epoch marked."""
    history, figure = fitted.history, Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    parts = history.columns.difference(COUNTED, sort=False)
    for name in parts:
        axes = left if "loss" in name else right
        strong = "loss" in name or name == "score"
        axes.plot(
            history.epoch, history[name], marker=".", label=name, linewidth=2 if strong else 1, alpha=1 if strong else 0.6
        )
    for axes, label in ((left, "loss"), (right, "validation")):
        axes.axvline(fitted.best_epoch, color="grey", linestyle=":", label="kept epoch")
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend(fontsize="small")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)


def _whole_patients(images: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    patients = np.random.default_rng(seed).permutation(images.patient_id.unique())
    sizes = images.patient_id.value_counts()
    drawn, room = set(), limit
    for patient in patients:
        if sizes[patient] <= room:
            drawn.add(patient)
            room -= sizes[patient]
    return images[images.patient_id.isin(drawn)].reset_index(drop=True)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def kept_row(history: list[dict[str, float]], recipe: TrainingRecipe) -> int:
    """Index of the epoch whose weights the recipe keeps: the first with the highest score, or the last."""
    if recipe.keep not in ("best", "last"):
        raise ValueError(f"recipe.keep is {recipe.keep!r}; there are: best, last")
    if recipe.keep == "last":
        return len(history) - 1
    return max(range(len(history)), key=lambda row: (history[row]["score"], -row))


def is_over(history: list[dict[str, float]], recipe: TrainingRecipe) -> bool:
    """Whether the epochs are used up, or as many as the recipe's patience have passed since the one that is kept."""
    if not history:
        return False
    return len(history) >= recipe.epochs or len(history) - 1 - kept_row(history, recipe) >= recipe.patience
