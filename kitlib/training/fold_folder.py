"""A fold's run folder: which training may go on with it, and what it holds at the end."""

import json
import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from kitlib.atomic import replacing, write_json, write_text
from kitlib.bundle import save_bundle
from kitlib.device import precision
from kitlib.errors import TrainingError
from kitlib.recipes.fields import TrainingRecipe
from kitlib.runs.record import process_record

logger = logging.getLogger(__name__)

# Columns of every history; the others are what a module logged.
COUNTED = ("epoch", "seconds", "images_per_s", "learning_rate")


# Heidelberg's schedule ends at a twentieth of its first learning rate.
LEARNING_RATE_FLOOR = 0.05


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


def open_run(run_folder: str | Path, identity: dict[str, Any], resume: bool) -> bool:
    """Make a run folder ready for the run that `identity` (JSON types) describes; True if it already holds its results.

    A folder without a checkpoint or a result is started over. With `resume`, one that has any of a run of another identity
    is refused with TrainingError; without, it is emptied of its checkpoints and of metrics.json, the mark of a finished run.
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
    finished = (run_folder / "metrics.json").is_file()
    begun = any(each.name == "last.ckpt" or each.suffix == ".parquet" for each in described.parent.iterdir())
    if differing and not finished and not begun:
        logger.info("%s has no checkpoint of its earlier settings; starting over", run_folder)
        write_json(described, identity)
        return False
    if differing:
        listing = "; ".join(f"{name}: {there.get(name, '-')!r} there, {here.get(name, '-')!r} here" for name in differing)
        raise TrainingError(
            f"{run_folder} holds a run with other settings or data ({listing}). To continue that run, set these back; to "
            f"keep it, set run_folder to another name; to replace it, delete {run_folder}"
        )
    if finished:
        logger.info("%s is finished; reading its results", run_folder)
    return finished


def start_over(run_folder: Path) -> None:
    """Remove the checkpoints, and first metrics.json, the mark of a finished run."""
    (run_folder / "metrics.json").unlink(missing_ok=True)
    shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)


def continue_from(earlier: Path, run: Path) -> list[str]:
    """Copy the folds of an earlier session's run, which may be read-only, into `run`, to go on with; a line on each.

    Each appears whole or not at all. A fold that has got as far here already stays as it is. Raises TrainingError where
    `earlier` has no fold to go on with.
    """
    folds = sorted(path.parent.parent for path in earlier.glob("fold*/checkpoints/run.json"))
    if not folds:
        there = ", ".join(sorted(entry.name for entry in earlier.iterdir())) or "nothing"
        raise TrainingError(f"{earlier} has no fold*/checkpoints/run.json to go on with; there is: {there}")
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
    run_folder: Path, model: Any, family: str, classes: Iterable[str], identity: dict[str, Any], fitted: Fitted
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


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def kept_row(history: list[dict[str, float]], recipe: TrainingRecipe) -> int:
    """Index of the epoch whose weights the recipe keeps: the first with the highest score, or the last."""
    if recipe.keep == "last":
        return len(history) - 1
    return max(range(len(history)), key=lambda row: (history[row]["score"], -row))


def is_over(history: list[dict[str, float]], recipe: TrainingRecipe) -> bool:
    """Whether the epochs are used up, or as many as the recipe's patience have passed since the one that is kept."""
    if not history:
        return False
    return len(history) >= recipe.epochs or len(history) - 1 - kept_row(history, recipe) >= recipe.patience
