"""Publishes trained models as a Kaggle dataset, with a card that states their training data and out-of-fold metrics."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slugify import slugify

from kitlib.atomic import write_json, write_text
from kitlib.bundle import RECORD
from kitlib.errors import KernelError
from kitlib.kernels.build import copy_bundle
from kitlib.kernels.push import push_dataset
from kitlib.paths import RUN_RECORD
from kitlib.runs.finished_run import read_metrics

# Kaggle's names for the usual licences of weights; `other` means that the card describes the terms.
LICENCES = ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "apache-2.0", "MIT", "other")


def write_publication(
    runs: Iterable[str | Path], folder: str | Path, title: str, owner: str, licence: str, description: str = ""
) -> Path:
    """Write a new folder that can be uploaded to Kaggle as a dataset of trained models, and return its path.

    The folder has the bundles (trained models) of the finished `runs`, a card README.md, which begins with `description`,
    and the dataset's metadata. The bundle of fold N of a run is in RUN/foldN. A kernel to which the dataset is attached can
    train from this bundle, with the recipe's `starting_weights: SLUG/RUN/foldN`. The slug is made from `title`. `owner` is a
    Kaggle user name. `licence` is one of LICENCES; weights inherit the terms of the training data and of the starting
    weights. Raises KernelError if a run has no bundle, two runs have the same name, the folder exists, or the licence, title
    or owner is not valid. Raises RunError if a run is not finished, and BundleError if a bundle is damaged.
    """
    folder, parts = Path(folder), {}
    if licence not in LICENCES:
        raise KernelError(f"licence is {licence!r}; valid: {', '.join(LICENCES)}")
    if not 6 <= len(title) <= 50 or not owner:
        raise KernelError(
            f"title is {title!r} and owner is {owner!r}; the title must have 6 to 50 characters, and the owner must be a "
            "Kaggle user name"
        )
    if folder.exists():
        raise KernelError(f"{folder} exists; give a new folder")
    for run in map(Path, runs):
        metrics = read_metrics(run)
        bundles = {path.parent.name: path for path in sorted(run.glob("fold*/bundle"))} or {"": run / "bundle"}
        if not all((bundle / RECORD).is_file() for bundle in bundles.values()):
            raise KernelError(f"{run} has no bundle (trained model); give the run of a notebook that trains models")
        if run.name in parts:
            raise KernelError(f"two runs are called {run.name}; rename the folder of one of these runs")
        parts[run.name] = (run, metrics, bundles)
    if not parts:
        raise KernelError("no run was given; give the folder of at least one finished run")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        unfinished = Path(name) / folder.name
        card = [_heading(title, licence, description)]
        for run_name, (run, metrics, bundles) in parts.items():
            records = [copy_bundle(bundle, unfinished / run_name / fold) for fold, bundle in bundles.items()]
            card.append(_describe(run_name, run, metrics, records[0], bundles))
        write_text(unfinished / "README.md", "\n".join(card))
        metadata = {"title": title, "id": f"{owner}/{slugify(title)}", "licenses": [{"name": licence}]}
        write_json(unfinished / "dataset-metadata.json", metadata)
        unfinished.rename(folder)
    return folder


def publish(folder: str | Path) -> str:
    """Upload a folder written by `write_publication` as a private Kaggle dataset; return the dataset's OWNER/SLUG.

    If the dataset exists, it gets a new version. Raises KernelError if signing in fails or Kaggle refuses the dataset.
    """
    name = json.loads((Path(folder) / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
    push_dataset(name, Path(folder))
    return name


def _heading(title: str, licence: str, description: str) -> str:
    terms = "see the data sets and starting weights below" if licence == "other" else licence
    return (
        f"# {title}\n\n{description or 'Models for chest X-rays, trained with the chest X-ray competition kit.'}\n\n"
        f"Licence: {terms}. Not for diagnosis. Weights are .safetensors files; model.json describes each model. With the "
        f"kit, `starting_weights: {slugify(title)}/RUN/FOLD` starts a training from one of them.\n"
    )


def _describe(name: str, run: Path, metrics: dict[str, Any], record: dict[str, Any], bundles: dict[str, Path]) -> str:
    """Return the Markdown section of the card about the run `run`: its model, data, recipe and metrics."""
    parameters = {}
    if (run / RUN_RECORD).is_file():
        parameters = json.loads((run / RUN_RECORD).read_text(encoding="utf-8")).get("parameters", {})
    recipe = record["recipe"]
    data = Path(parameters.get("prepare_run", "")).name or "unknown"
    rows = {
        "family": record["family"],
        "network": recipe.get("backbone", recipe.get("network", "")),
        "input": f"{recipe['image_size']} x {recipe['image_size']} pixels, {recipe['placement']}",
        "classes": ", ".join(record["classes"]),
        "folds": ", ".join(bundles) if "" not in bundles else "one model",
        "trained on": f"the prepared run `{data}`, fingerprint {record['data_fingerprint'][:12]}",
        "starting weights": recipe["starting_weights"] or "none",
        "recipe": f"{parameters.get('recipe', 'unknown')}, overrides {json.dumps(parameters.get('overrides', {}))}",
    }
    figures = _figures(metrics).items()
    rows |= {f"{key} ({'test set' if key.startswith('test') else 'out of fold'})": value for key, value in figures}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"## {name}\n\n| | |\n|---|---|\n{table}\n"


def _figures(metrics: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the float values in `metrics`, and in the dicts nested in it, as texts with four decimals.

    The key of a text is `prefix`, followed by the keys that lead to the value, joined by spaces.
    """
    figures: dict[str, str] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            figures |= _figures(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            figures[prefix + key] = f"{value:.4f}"
    return figures
