"""Predictions of every model family in half precision against float32, with the same weights, trained on phantoms.

No part of gpu.sh, because a CPU shows the same rounding. `python benchmarks/gpu/half_precision.py` takes some minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from kitlib.datasets.base import Dataset
from kitlib.datasets.folds import make_folds
from kitlib.datasets.mask_file import fill_masks
from kitlib.datasets.siim import read_train
from kitlib.datasets.tb_lungs import read_shenzhen
from kitlib.device import Precision, computing_in, pick_device
from kitlib.inference.predict import load_predictor
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.lungs.finders import StoredLungs
from kitlib.phantoms.lungs import write_lungs
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.named import RECIPES
from kitlib.settings import override
from kitlib.tables import BOX, concatenate
from kitlib.training.apply_lungs import apply_lungs
from kitlib.training.driver import train_fold
from kitlib.training.task import Task
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.mask_store import MaskStore

FLOAT32: Precision = "32-true"
HALVES: tuple[Precision, ...] = ("16-mixed", "bf16-mixed")
CLASSIFIERS = {"study": "small_study", "findings": "small_learner", "patches": "small_patches"}
DETECTORS = {"Faster R-CNN": "small_faster_rcnn", "YOLO": "small_yolo"}
LEAST_SCORE = 0.1  # boxes below are not compared: which of them survive suppression is decided by the last digit
LARGEST = {"probability": 0.02, "pixels": 2.0}  # allowed differences

Results = dict[str, np.ndarray | pd.DataFrame]  # predictions by precision


class Phantoms:
    """A phantom data set, decoded, with its tables, masks if it has any, and two folds."""

    def __init__(self, data: Dataset, folder: Path) -> None:
        self.cache = XrayCache(folder / "xrays", 256)
        self.cache.fill(data.images)
        self.tables = {"images": data.images, "labels": data.labels, "boxes": data.boxes}
        self.tables["folds"] = make_folds(data.images, data.labels, data.boxes, 2, 0)
        self.masks = None
        if data.masks is not None:
            self.masks = MaskStore.create_empty(folder / "masks")
            fill_masks(self.masks, data.masks, data.images, self.cache, progress=False)

    def train(self, name: str, run: Path, epochs: int | None, lungs: StoredLungs | None = None) -> Path:
        """Train a small recipe on all folds but 0 in float32, and return its bundle."""
        recipe = override(RECIPES[name], **({"epochs": epochs} if epochs else {}))
        with computing_in(FLOAT32):
            train_fold(Task(self.tables, self.cache, recipe, name, masks=self.masks, lungs=lungs), 0, run)
        return run / "bundle"

    def xrays(self) -> Iterator[CachedXray]:
        return map(self.cache.read, self.tables["images"].image_id)


def in_every_precision(predict: Callable[[], np.ndarray | pd.DataFrame]) -> Results:
    results = {}
    for precision in (FLOAT32, *HALVES):
        with computing_in(precision):
            results[precision] = predict()
    return results


def nearest(boxes: pd.DataFrame, others: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
    """Return for each box the largest shift of an edge, in pixels, and the change of score, to its partner in `others`.

    A partner is the closest box of the same image; boxes without one, more than a tenth of the image away, are counted.
    """
    shifts, changes, alone = [], [], 0
    for image_id, part in boxes[boxes.score >= LEAST_SCORE].groupby("image_id"):
        candidates = others[others.image_id == image_id]
        for box in part.itertuples():
            distances = np.abs(candidates[list(BOX)].to_numpy() - np.array([getattr(box, edge) for edge in BOX])).max(axis=1)
            if not len(distances) or distances.min() > 25:
                alone += 1
                continue
            shifts.append(distances.min())
            changes.append(abs(candidates.score.iloc[distances.argmin()] - box.score))
    return np.array(shifts), np.array(changes), alone


def main(small: bool = False) -> None:
    studies, chests, epochs = (16, 6, 1) if small else (60, 40, None)
    device, failed = pick_device(), []
    table = Table("family", "precision", "largest difference", "mean difference", "largest shift", "boxes without partner")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"train_studies": studies, "test_studies": 6, "side": 256, "seed": 2021, "progress": False}
        competition = Phantoms(
            read_train(write_competition(folder / "in", folder / "truth", **sizes), progress=False), folder
        )
        lungs_data = write_lungs(folder / "in", "shenzhen", images=chests, seed=2021, side=256, progress=False)
        lungs = Phantoms(read_shenzhen(lungs_data, progress=False), folder / "lungs")

        segmenter_bundle = lungs.train("small_lungs", folder / "segmenter", epochs)
        segmenter = load_segmenter(segmenter_bundle, device)
        results: dict[str, Results] = {}
        results["lungs"] = in_every_precision(
            lambda: np.stack([maps / 255 for _, maps, _ in segmenter.maps(competition.xrays())])
        )
        with computing_in(FLOAT32):
            apply_lungs(
                competition.tables["images"], competition.cache, segmenter_bundle, folder / "applied", progress=False
            )
        stored = StoredLungs(folder / "applied")
        for family, name in (CLASSIFIERS | DETECTORS).items():
            used = stored if family == "patches" else None
            bundle = competition.train(name, folder / name, epochs, used)
            predictor = load_predictor(bundle, device, lungs=used)
            kind = "detections" if family in DETECTORS else "class_scores"

            def predict(predictor=predictor, kind=kind) -> np.ndarray | pd.DataFrame:
                chunks = list(predictor.predict(competition.xrays()))
                if kind == "detections":
                    return concatenate(chunks, kind)
                return np.concatenate([chunk[predictor.classes].to_numpy(float) for chunk in chunks])

            results[family] = in_every_precision(predict)
    for family, predictions in results.items():
        for precision in HALVES:
            exact, half = predictions[FLOAT32], predictions[precision]
            if isinstance(exact, pd.DataFrame):
                shifts, changes, alone = nearest(exact, half)
                shown = [f"{shifts.max(initial=0):.2f} pixels", str(alone)]
            else:
                shifts, changes, shown = np.zeros(0), np.abs(exact - half), ["", ""]
            largest = {"probability": changes.max(initial=0), "pixels": shifts.max(initial=0)}
            failed += [f"{family} in {precision}" for what, limit in LARGEST.items() if largest[what] > limit]
            mean = changes.mean() if changes.size else 0.0
            table.add_row(family, precision, f"{changes.max(initial=0):.1e}", f"{mean:.1e}", *shown)
    console = Console()
    console.print(table)
    console.print(f"{studies} studies on {device}; differences of probabilities, scores and edges to float32")
    if failed:
        sys.exit(f"more than {LARGEST}: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
