"""Reads the tables, metrics and models of finished runs, and checks them for later runs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import RECORD, data_fingerprint
from kitlib.errors import RunError
from kitlib.paths import find_run
from kitlib.tables import read_table
from kitlib.xrays.cache import DecodedXrays, XrayCache
from kitlib.xrays.mask_store import MaskStore

PREPARED_TABLES = ("images", "labels", "boxes", "folds")


@dataclass(frozen=True)
class ExtraImages:
    """Additional training images, such as pseudo-labelled images or those of another data set; never used for validation.

    `images`, `labels` and `boxes` are tables of the same names in `kitlib.tables`. The optional column `none` of `images` is
    a soft target for training: the probability that the image has no opacity. `cache` reads the decoded images.
    """

    images: pd.DataFrame
    labels: pd.DataFrame
    boxes: pd.DataFrame
    cache: DecodedXrays

    def identity(self) -> dict[str, Any]:
        """Return a dictionary that identifies these images: their number, longest side in pixels, and fingerprints.

        Its values are of JSON types.
        """
        # data_fingerprint reads only the ids of `images`, so the soft targets are passed as labels.
        none = self.images.set_index("image_id").reindex(columns=["none"]).rename_axis("id").reset_index()
        return {
            "images": len(self.images),
            "longest_side": self.cache.longest_side,
            "data_fingerprint": data_fingerprint(images=self.images, labels=self.labels, boxes=self.boxes),
            "none_fingerprint": data_fingerprint(labels=none),
        }


def read_metrics(run: str | Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json, which its notebook writes last. Raises RunError if the file is missing."""
    path = Path(run) / "metrics.json"
    if not path.is_file():
        available = sorted(entry.name for entry in Path(run).glob("*")) if Path(run).is_dir() else "nothing (no such folder)"
        raise RunError(
            f"{path} is missing. If {run} is a run's folder, run its notebook again to finish the run; otherwise give a "
            f"run's folder. {run} contains: {available}"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def read_prepared(run: str | Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a prepared run (notebook 10), keyed by name: "images", "labels", "boxes" and "folds".

    Raises RunError if the run is not finished, and TableError if a table is missing or invalid.
    """
    read_metrics(run)
    return {name: read_table(name, Path(run) / "tables" / f"{name}.parquet") for name in PREPARED_TABLES}


def read_masks(run: str | Path) -> MaskStore | None:
    """Return the ground-truth masks of a prepared run (notebook 10), or None if the run has no masks."""
    return MaskStore(folder) if (folder := Path(run) / "masks").is_dir() else None


def read_models(
    runs: Iterable[str | Path],
    prepared: dict[str, pd.DataFrame],
    folds: Iterable[int] = (),
    extra: Iterable[ExtraImages] = (),
) -> pd.DataFrame:
    """Return a table of the trained models of `runs`, with the columns model, fold and bundle (the bundle's folder).

    If `folds` is not empty, only the models of these folds are listed. `prepared` holds the tables of the prepared run that
    all models were trained on, `extra` the additional images that some models were trained on. Raises RunError if a run has
    no bundle, or if no model remains. Also raises RunError if a model was trained on other data, because the images that the
    model has seen are then unknown.
    """
    expected, known_extra = data_fingerprint(**prepared), [images.identity() for images in extra]
    chosen, rows = set(folds), []
    for run in map(Path, runs):
        bundles = sorted(run.glob(f"fold*/bundle/{RECORD}"))
        if not bundles:
            raise RunError(f"{run} has no fold*/bundle/{RECORD}; give runs of the training notebooks")
        for path in bundles:
            record, metrics = json.loads(path.read_text(encoding="utf-8")), read_metrics(path.parent.parent)
            if record["data_fingerprint"] != expected:
                raise RunError(
                    f"{path}: the model was trained on another prepared run, so the images that it has seen are unknown; "
                    "give that prepared run"
                )
            if metrics.get("extra") and metrics["extra"] not in known_extra:
                raise RunError(
                    f"{path}: the model was trained on extra images too; give the run of the extra images, so that all "
                    "images that the model has seen are known"
                )
            if not chosen or record["fold"] in chosen:
                rows.append((record["model"], record["fold"], str(path.parent)))
    if not rows:
        raise RunError(f"no model of folds {sorted(chosen)} in {', '.join(map(str, runs))}; give the runs of these folds")
    return pd.DataFrame(rows, columns=["model", "fold", "bundle"])


def read_extra(run: str | Path, for_boxes: bool = False) -> ExtraImages:
    """Return additional training images from a pseudo-labelled run (notebook 50) or from any prepared run (notebook 10).

    From a prepared run, only images in its folds are used, which excludes official test images and images that no annotator
    looked at. `for_boxes` excludes images whose boxes must not train a detector: images with unsure pseudo-labels, and all
    NIH images. Raises RunError if the run is of another kind, or if its decoded images are missing.
    """
    run, metrics = Path(run), read_metrics(run)
    if "longest_side" not in metrics:
        raise RunError(f"{run} is not a run of notebook 10 or 50: its metrics.json lacks 'longest_side'")
    tables = {name: read_table(name, run / "tables" / f"{name}.parquet") for name in ("images", "labels", "boxes")}
    images = tables["images"]
    folds = run / "tables" / "folds.parquet"
    if folds.is_file():
        images = images[images["image_id"].isin(read_table("folds", folds)["id"])]
    if metrics.get("dataset") == "nih":
        # Opacities are not annotated in NIH, so an image without a box is not a negative.
        images = images.assign(boxes_known=False, unsure=True)
    if for_boxes and "unsure" in images.columns:
        images = images[~images["unsure"].astype(bool)]
    # The images of a pseudo-labelled run may be decoded in another run, which its metrics then state.
    xrays_run = find_run(metrics["xrays_run"]) if metrics.get("xrays_run") else run
    cache = XrayCache(xrays_run / "xrays", metrics["longest_side"])
    missing = [image_id for image_id in images["image_id"] if image_id not in cache]
    if missing:
        raise RunError(
            f"{len(missing)} of {len(images)} images are not decoded in {cache.folder}; the first is {missing[0]}. Attach "
            f"all files of {xrays_run}, or run its notebook again with this version of kitlib"
        )
    return ExtraImages(images.reset_index(drop=True), tables["labels"], tables["boxes"], cache)
