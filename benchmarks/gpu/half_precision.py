"""Predictions of every model family in half precision against float32, with the same weights, trained on phantoms.

Not part of gpu.sh, because a CPU shows the same rounding. `python benchmarks/gpu/half_precision.py` takes some minutes.
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
BEST = 3  # boxes per image that are compared, those with the highest scores
# In float16, in which Kaggle's T4s compute: allowed difference of 99 % of the numbers, and least share of unmoved boxes.
ALLOWED, UNMOVED = 0.02, 0.9

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
        # Patch classifiers average their patches here, because votes hide small differences.
        means = {"patch_score": "mean_softmax"} if name == CLASSIFIERS["patches"] else {}
        recipe = override(RECIPES[name], **means, **({"epochs": epochs} if epochs else {}))
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


def compare_boxes(boxes: pd.DataFrame, others: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays, one value for each of the best boxes: the largest shift of an edge in pixels, and the score change.

    A box is compared with the closest box of the same image in `others`. A large shift means that suppression kept another
    box.
    """
    shifts, changes = [], []
    for image_id, part in boxes.groupby("image_id"):
        candidates = others[others.image_id == image_id]
        for _, box in part.nlargest(BEST, "score").iterrows():
            distances = np.abs((candidates[list(BOX)] - box[list(BOX)].astype(float)).to_numpy()).max(axis=1)
            shifts.append(distances.min(initial=np.inf))
            changes.append(abs(candidates.score.iloc[distances.argmin()] - box.score) if len(distances) else box.score)
    return np.array(shifts), np.array(changes)


def main(small: bool = False) -> None:
    studies, chests, epochs = (16, 6, 1) if small else (60, 40, None)
    device, failed = pick_device(), []
    table = Table("family", "precision", "median difference", "largest", "median shift", "boxes within half a pixel")
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
            shown, unmoved = ["", ""], 1.0
            if isinstance(exact, pd.DataFrame):
                shifts, changes = compare_boxes(exact, half)
                unmoved = float((shifts < 0.5).mean())
                shown = [f"{np.median(shifts):.3f} pixels", f"{unmoved:.0%} of {len(shifts)}"]
            else:
                changes = np.abs(exact - half)
            if precision == "16-mixed" and (np.quantile(changes, 0.99) > ALLOWED or unmoved < UNMOVED):
                failed.append(family)
            table.add_row(family, precision, f"{np.median(changes):.1e}", f"{changes.max():.1e}", *shown)
    console = Console()
    console.print(table)
    console.print(f"{studies} studies on {device}; differences of probabilities, scores and edges to float32")
    if failed:
        sys.exit(f"float16 changes more than allowed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
