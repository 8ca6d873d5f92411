"""Run folder of one fold: checks that it belongs to the requested run, copies earlier sessions' folds, writes results."""

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from kitlib.atomic import replacing, write_json, write_text
from kitlib.bundle import save_bundle
from kitlib.device import RECORDED, precision
from kitlib.errors import TrainingError
from kitlib.recipes.fields import TrainingRecipe
from kitlib.runs.record import process_record
from kitlib.scoring.metrics import CALL_METRICS

logger = logging.getLogger(__name__)

# Columns of a history that are not metrics; all other columns are metrics that the module logged.
NOT_METRICS = ("epoch", "seconds", "images_per_s", "learning_rate")

# Heidelberg's schedule ends at a twentieth of its first learning rate.
LEARNING_RATE_FLOOR = 0.05


@dataclass(frozen=True)
class FitResult:
    """History of a finished training, and the epoch whose weights are kept.

    `history` has one row per epoch, with the columns epoch (from 1), seconds (including validation), images_per_s (without
    validation), learning_rate (at the end of the epoch), and one column for each metric that was logged. `best_epoch` is the
    number (from 1) of the epoch whose weights are kept.
    """

    history: pd.DataFrame
    best_epoch: int

    def best(self) -> dict[str, float]:
        """Return the metrics of the kept epoch as a dict from name to value, without NaN and infinite values."""
        row = self.history.loc[self.history.epoch == self.best_epoch].iloc[0]
        return {name: float(value) for name, value in row.items() if math.isfinite(value) and name not in NOT_METRICS}

    def metrics(self, device: torch.device) -> dict[str, Any]:
        """Return the fields of metrics.json that describe this training, in JSON types.

        `seconds` is the sum over all epochs, `images_per_s` is the median.
        """
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
    """Prepare a folder for a run; return True if the folder already contains this run and the run is finished.

    `identity`, a dict in JSON types, describes the run's settings and data, and is recorded in the folder. With `resume`,
    the checkpoints of an interrupted run are kept. Without `resume`, the checkpoints and metrics.json (which marks a
    finished run) are deleted. A folder without checkpoints and results can be used for any run. Raises TrainingError if the
    folder, with `resume`, contains checkpoints or results of a run whose `identity` differs.
    """
    run_folder = Path(run_folder)
    record_path = run_folder / "checkpoints" / "run.json"
    if not resume:
        start_over(run_folder)
    # Removes temporary files of a killed process, which are as large as the weights.
    for kind in ("last", "best"):
        for temporary_path in record_path.parent.glob(f".{kind}.*"):
            temporary_path.unlink(missing_ok=True)  # another process of the same training may have deleted it
    if not record_path.is_file():
        write_json(record_path, identity)
        return False
    recorded = _flatten(json.loads(record_path.read_text(encoding="utf-8")))
    requested = _flatten(json.loads(json.dumps(identity)))
    for fields in (recorded, requested):
        # Weights are compared by their digest, because the same file may have another path in another session.
        fields.pop("recipe.starting_weights", None)
        fields.pop("recipe.curves", None)  # changes no weight
    differing = [name for name in sorted(recorded | requested) if recorded.get(name, "-") != requested.get(name, "-")]
    is_finished = (run_folder / "metrics.json").is_file()
    has_results = any(path.name == "last.ckpt" or path.suffix == ".parquet" for path in record_path.parent.iterdir())
    if differing and not is_finished and not has_results:
        logger.info("%s has no checkpoint with its previous settings; starting over with the new settings", run_folder)
        write_json(record_path, identity)
        return False
    if differing:
        listing = "; ".join(
            f"{name}: {recorded.get(name, '-')!r} recorded, {requested.get(name, '-')!r} requested" for name in differing
        )
        raise TrainingError(
            f"{run_folder} contains an earlier run with other settings or data ({listing}). To continue the earlier run, "
            f"use the recorded values; to keep it, set run_folder to another name; to replace it, delete {run_folder}"
        )
    if is_finished:
        logger.info("%s is finished; reading its results", run_folder)
    return is_finished


def start_over(run_folder: Path) -> None:
    """Delete a run's metrics.json (which marks a finished run), checkpoints and curves, so that training starts anew."""
    (run_folder / "metrics.json").unlink(missing_ok=True)
    for name in ("checkpoints", "curves"):
        shutil.rmtree(run_folder / name, ignore_errors=True)


def continue_from(earlier: Path, run: Path) -> list[str]:
    """Copy folds from the run folder `earlier` to the run folder `run`, to continue them; return one message per fold.

    `earlier` is from an earlier session and may be read-only. Each copy is atomic. A fold is not copied if `run` already
    contains the fold with at least as many epochs. Raises TrainingError if `earlier` has no fold to resume.
    """
    folds = sorted(path.parent.parent for path in earlier.glob("fold*/checkpoints/run.json"))
    if not folds:
        available = ", ".join(sorted(entry.name for entry in earlier.iterdir())) or "nothing"
        raise TrainingError(f"{earlier} has no fold to resume (fold*/checkpoints/run.json), but contains: {available}")
    lines = []
    for fold in folds:
        destination = run / fold.name
        if (destination / "checkpoints").is_dir() and _read_progress(destination) >= _read_progress(fold):
            lines.append(f"{fold.name}: not copied, because {run} already has at least as many of its epochs as {earlier}")
            continue
        temporary_folder = run / f".{fold.name}.copying"
        shutil.rmtree(temporary_folder, ignore_errors=True)
        # Permissions are not copied, because an attached input is read-only and the copy must be writable.
        for path in sorted(fold.rglob("*")):
            target = temporary_folder / path.relative_to(fold)
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        shutil.rmtree(destination, ignore_errors=True)
        temporary_folder.replace(destination)
        lines.append(f"{fold.name}: resumes from {fold}")
    return lines


def _read_progress(fold: Path) -> tuple[bool, int]:
    """Return whether a fold is finished, and the number (from 0) of its last complete epoch, or -1 if there is none."""
    checkpoint = fold / "checkpoints" / "last.ckpt"
    last = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["epoch"] if checkpoint.is_file() else -1
    return (fold / "metrics.json").is_file(), last


def save_trained(
    run_folder: Path,
    model: Any,
    family: str,
    classes: Iterable[str],
    identity: dict[str, Any],
    fitted: FitResult,
    device: torch.device,
) -> None:
    """Write the trained model to run_folder/bundle.

    `model` has the weights of the kept epoch, a `recipe`, and the `mean` and `std` that normalise its input. `family` is the
    name of its model family; `identity` describes the run, as in `open_run`; `device` is the device used for training.
    """
    recipe, best = model.recipe, fitted.best()
    record = {key: identity[key] for key in ("model", "fold", "recipe", "longest_side", "data_fingerprint")} | {
        "family": family,
        "classes": list(classes),
        "architecture": {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        | {key: identity[key] for key in ("segmenter",) if key in identity},
        "image_size": recipe.image_size,
        "placement": recipe.placement,
        "mean": list(model.mean),
        "std": list(model.std),
        "precision": RECORDED[precision(device)],
        "validation": {name: best[name] for name in ("score", *classes) if name in best},
    }
    save_bundle(run_folder / "bundle", model.state_dict(), record)


def finish_fold(
    run_folder: Path, identity: dict[str, Any], counts: dict[str, Any], result: FitResult, device: torch.device
) -> None:
    """Write tables/history.csv, figures/curves.png and, last, metrics.json, which marks a finished run.

    metrics.json contains `identity`, `counts`, the metrics of `result`, and `process_record()` (see kitlib.runs.record).
    """
    write_text(run_folder / "tables" / "history.csv", result.history.to_csv(index=False))
    draw_curves(result, run_folder / "figures" / "curves.png")
    write_json(run_folder / "metrics.json", {**identity, **counts, **result.metrics(device), **process_record()})


def draw_curves(result: FitResult, path: str | Path) -> None:
    """Plot losses, validation scores and the learning rate against epochs, and write the plot to the image file `path`.

    A dotted line marks the kept epoch.
    """
    history, figure = result.history, Figure(figsize=(15, 4), dpi=110, layout="constrained")
    left, right, rate = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    parts = history.columns.difference(NOT_METRICS, sort=False)
    for name in parts:
        axes = left if "loss" in name else right
        is_main = "loss" in name or name in ("score", *CALL_METRICS)
        axes.plot(
            history.epoch, history[name], marker=".", label=name, linewidth=2 if is_main else 1, alpha=1 if is_main else 0.6
        )
    rate.plot(history.epoch, history.learning_rate, marker=".", color="black", label="at the epoch's end")
    rate.set_ylim(0, 1.05 * history.learning_rate.max())
    for axes, label in ((left, "loss"), (right, "validation"), (rate, "learning rate")):
        axes.axvline(result.best_epoch, color="grey", linestyle=":", label="kept epoch")
        axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, history.epoch.max() + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # a legend inside the axes would hide lines
    # `savefig` would draw the figure twice, first to lay it out; this takes half of the time, and gives the same pixels.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    with replacing(path) as temporary_path:
        imsave(temporary_path, canvas.buffer_rgba(), dpi=figure.dpi)


def mean_curves(histories: Iterable[pd.DataFrame]) -> Figure:
    """Plot losses (left) and validation scores (right) against epochs: the mean of the folds as a line, +- one SD as a band.

    `histories` has the history of each fold (see `FitResult`). The mean of an epoch is over the folds that reached it. The
    figure corresponds to figure 10 of the UNet + HRNet paper.
    """
    joined = pd.concat(histories)
    by_epoch = joined.groupby("epoch")[list(joined.columns.difference(NOT_METRICS, sort=False))]
    mean, spread = by_epoch.mean(), by_epoch.std().fillna(0)
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in mean:
        axes = left if "loss" in name else right
        (line,) = axes.plot(mean.index, mean[name], marker=".", label=name)
        low, high = mean[name] - spread[name], mean[name] + spread[name]
        axes.fill_between(mean.index, low, high, alpha=0.2, color=line.get_color())
    for axes, label in ((left, "loss"), (right, "validation")):
        axes.set(xlabel="epoch", ylabel=f"{label}, mean of {by_epoch.size().max()} folds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as a flat dict, whose keys are the nested keys joined by dots, each preceded by `prefix`."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def find_kept_epoch(history: list[dict[str, float]], recipe: TrainingRecipe) -> int:
    """Return the index (from 0) of the epoch whose weights are kept.

    It is the last epoch if the recipe's `keep` is "last", otherwise the epoch with the highest score (the first, if several
    are equal). `history` has one dict of metrics per epoch.
    """
    if recipe.keep == "last":
        return len(history) - 1
    return max(range(len(history)), key=lambda row: (history[row]["score"], -row))


def is_over(history: list[dict[str, float]], recipe: TrainingRecipe) -> bool:
    """Return whether training is over, because all epochs are done or the score has not risen for `patience` epochs.

    `history` has one dict of metrics per completed epoch. If the recipe's `keep` is "last", training is over only when all
    epochs are done.
    """
    if not history:
        return False
    return len(history) >= recipe.epochs or len(history) - 1 - find_kept_epoch(history, recipe) >= recipe.patience
