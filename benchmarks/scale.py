"""How time and memory of each stage grow with the number of images, up to NIH's. Part of `make bench`, at small sizes.

python benchmarks/scale.py --full    # the sizes in STAGES; fails if an exponent is above MAX_EXPONENT
python benchmarks/scale.py --full --only tune_2 --only near_duplicates

Every stage runs in a process of its own, on one thread, with random tables. CPU seconds are those of its second call, so
that imports and compilation are not included, except in `first_fusion`.
"""

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from kitlib.classes import STUDY_CLASSES
from kitlib.tables import BOX

MAX_EXPONENT = 1.3
COMPARES_ALL_PAIRS = "near_duplicates"  # its time grows with the square; a limit in seconds keeps it small instead
ALL_PAIRS_S = 20.0
# Growth from one size to the next is only checked if the larger size takes at least so many seconds, because shorter times
# are mostly noise and fixed costs.
JUDGED_S = 0.5
FOLDS = 5
# Arguments of `main` for the tests, with which it takes a few seconds.
SMALLEST = {"small": "12", "only": ["fuse_2", "near_duplicates", "bootstrap"]}


def tables(images: int, detectors: int, boxes: int = 50, lists: int = 1) -> dict[str, pd.DataFrame]:
    """Return the tables of a prepared run in SIIM's proportions, and out-of-fold predictions of `detectors` detectors.

    Each image has its own study, three of four have two true boxes, and each detector predicts `boxes` boxes per image, for
    each of `lists` folds: most with low scores, a quarter of them near a true box.
    """
    rng = np.random.default_rng(0)
    ids = np.array([f"{number:012x}" for number in rng.permutation(images)], dtype=object)
    classes, fold = rng.integers(4, size=images), rng.integers(FOLDS, size=images)
    corner = rng.uniform(100, 1500, (images, 2, 2))
    true = np.concatenate([corner, corner + rng.uniform(300, 1000, (images, 2, 2))], axis=2)
    n = images * detectors * boxes * lists
    image = np.repeat(np.arange(images), detectors * boxes * lists)
    is_near = (rng.random(n) < 0.25)[:, None]
    near = true[image, rng.integers(2, size=n)] + rng.normal(0, 60, (n, 4))
    start = rng.uniform(0, 2000, (n, 2))
    detections = pd.DataFrame(
        np.where(is_near, near, np.hstack([start, start + rng.uniform(150, 900, (n, 2))])).clip(0, 2500)
    )
    detections.columns = list(BOX)
    detections.insert(0, "image_id", ids[image])
    names = np.repeat([f"detector{k}" for k in range(detectors)], boxes * lists)
    detections.insert(1, "model", np.tile(names, images))
    folds = np.tile(np.repeat(np.arange(lists), boxes), images * detectors) if lists > 1 else fold[image]
    detections.insert(2, "fold", folds)
    score = rng.uniform(0.001 ** (1 / 4), 1, n) ** np.where(is_near[:, 0], 2, 4) * rng.uniform(0.5, 1, n)
    detections.insert(3, "score", score.astype(np.float32).astype(float))
    is_valid = (detections["xmin"] + 1 < detections["xmax"]) & (detections["ymin"] + 1 < detections["ymax"])
    detections = detections[is_valid].reset_index(drop=True)
    labels = pd.DataFrame(np.eye(4)[classes], columns=list(STUDY_CLASSES))
    labels.insert(0, "id", ids)
    probabilities = np.exp(1.5 * np.eye(4)[classes] + rng.normal(0, 1, (images, 4)))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = {"study_id": ids, "model": "study", "fold": fold, **dict(zip(STUDY_CLASSES, probabilities.T, strict=True))}
    none = (0.6 * (classes == 0) + rng.uniform(0, 0.4, images)).clip(0, 1)
    has_boxes = classes > 0
    true_boxes = pd.DataFrame(true[has_boxes].reshape(-1, 4), columns=list(BOX))
    true_boxes.insert(0, "image_id", np.repeat(ids[has_boxes], 2))
    frame = {"image_id": ids, "study_id": ids, "patient_id": ids, "rows": 2500, "columns": 2500}
    return {
        "study_scores": pd.DataFrame(scores),
        "image_scores": pd.DataFrame({"image_id": ids, "model": "study", "fold": fold, "none": none}),
        "detections": detections,
        "coverage": detections[["image_id", "model", "fold"]].drop_duplicates().reset_index(drop=True),
        "images": pd.DataFrame(frame),
        "labels": labels,
        "boxes": true_boxes,
        "folds": pd.DataFrame({"id": ids, "fold": fold}),
    }


def fusing(detectors: int, boxes: int = 50, lists: int = 1) -> Callable[[int, Path], Callable[[], float]]:
    def prepare(images: int, folder: Path) -> Callable[[], float]:
        from kitlib.competitions.fusion_settings import FusionSettings
        from kitlib.fusion.model_fusion import BoxLists, fuse_boxes

        made = tables(images, detectors, boxes, lists)
        given = made["detections"], made["images"], made["coverage"]
        return lambda: fuse_boxes(BoxLists.of(*given), FusionSettings())["score"].sum()

    return prepare


def tuning(detectors: int, crossed: bool = False) -> Callable[[int, Path], Callable[[], float]]:
    def prepare(images: int, folder: Path) -> Callable[[], float]:
        from kitlib.competitions.siim_covid19 import SIIM_COVID19
        from kitlib.fusion.model_fusion import ModelPredictions
        from kitlib.fusion.tuning import Judge, cross_fit, tune

        made = tables(images, detectors)
        predicted = {name: made.pop(name) for name in ("study_scores", "image_scores", "detections", "coverage")}
        predictions = ModelPredictions.of(**predicted)
        if crossed:
            return lambda: cross_fit(Judge(SIIM_COVID19, predictions, made))["cross_fitted"].mean()
        return lambda: tune(Judge(SIIM_COVID19, predictions, made))[1]["score"].iloc[-1]

    return prepare


def scoring(images: int, folder: Path) -> Callable[[], float]:
    from kitlib.scoring.score import score_tables, truth_of

    made = tables(images, 1, 100)
    truth = truth_of(made["images"], made["labels"], made["boxes"])
    return lambda: score_tables(truth, made["study_scores"], made["image_scores"], made["detections"])["score"]


def bootstrapping(images: int, folder: Path) -> Callable[[], float]:
    from kitlib.reports.competition import score_draws
    from kitlib.scoring.score import truth_of

    made = tables(images, 1, 100)
    truth = truth_of(made["images"], made["labels"], made["boxes"])
    predictions = made["study_scores"], made["image_scores"], made["detections"]
    return lambda: score_draws(truth, *predictions, made["images"], 200)["score"].iloc[0]


def grouping(blank: float) -> Callable[[int, Path], Callable[[], float]]:
    """Return a stage that groups near-duplicates among random hashes, of which the share `blank` is identical."""

    def prepare(images: int, folder: Path) -> Callable[[], float]:
        from kitlib.datasets.near_duplicates import MAX_DISTANCE, group_hashes

        bits = np.random.default_rng(0).random((images, 256)) < 0.5
        bits[: int(blank * images)] = False
        hashes = list(bits)
        return lambda: len(set(group_hashes(hashes, MAX_DISTANCE)))

    return prepare


def opening(images: int, folder: Path) -> Callable[[], float]:
    """Return a function that opens a packed cache, as the first process on a machine does, and reads one image."""
    from kitlib.paths import scratch_root
    from kitlib.xrays.cache import CachedXray, XrayCache

    cache = XrayCache(folder, 8)
    cache.put(CachedXray("one", np.zeros((8, 8), np.uint8), 1024, 1024))
    entry = next(cache.folder.iterdir())
    with tarfile.open(cache.packed, "w") as archive:
        for number in range(images):
            archive.add(entry, f"{number:08d}_000.png.safetensors")
    shutil.rmtree(cache.folder)

    def read() -> int:
        shutil.rmtree(scratch_root() / "xrays", ignore_errors=True)
        return XrayCache(folder, 8).read(f"{images - 1:08d}_000.png").rows

    return read


def first_fusion(images: int, folder: Path) -> Callable[[], float]:
    """Return a function that fuses in a new process, as an offline kernel does: with imports and without compiled code."""
    made = tables(images, 2)
    made["detections"].to_parquet(folder / "detections.parquet")
    made["images"].to_parquet(folder / "images.parquet")
    program = (
        "import sys, pandas as pd; from kitlib.competitions.fusion_settings import FusionSettings; "
        "from kitlib.fusion.model_fusion import BoxLists, fuse_boxes; "
        "fuse_boxes(BoxLists.of(*(pd.read_parquet(sys.argv[1] + '/' + name + '.parquet')"
        " for name in ('detections', 'images'))), FusionSettings())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "compiled")}

    def run() -> int:
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        return subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, check=True).returncode

    return run


SIIM, NIH = (1500, 3000, 6334), (28_030, 56_060, 112_120)
# Per stage: a function of a number of images and an empty folder that returns what is measured, and the full sizes.
STAGES: dict[str, tuple[Callable[[int, Path], Callable[[], float]], tuple[int, ...]]] = {
    "fuse_2": (fusing(2), SIIM),
    "fuse_4": (fusing(4), SIIM),
    "fuse_10_lists": (fusing(2, lists=5), (1263,)),
    "first_fusion": (first_fusion, (24, 1263)),
    "tune_1": (tuning(1), SIIM),
    "tune_2": (tuning(2), SIIM),
    "tune_4": (tuning(4), SIIM),
    "cross_fit_1": (tuning(1, crossed=True), SIIM),
    "cross_fit_2": (tuning(2, crossed=True), SIIM),
    "cross_fit_4": (tuning(4, crossed=True), SIIM),
    "score_tables": (scoring, (1500, 6334, 25_336)),
    "bootstrap": (bootstrapping, SIIM),
    "near_duplicates": (grouping(0.0), NIH),
    "near_duplicates_blank": (grouping(1.0), (3167, 6334, 112_120)),
    "packed_cache": (opening, NIH),
}


def measure(stage: str, images: int) -> dict[str, float]:
    """Run a stage in this process; return CPU seconds, memory in MB (the peak minus that before), and the result."""
    with tempfile.TemporaryDirectory() as folder:
        prepare, _ = STAGES[stage]
        if stage != "first_fusion":
            with tempfile.TemporaryDirectory() as other:
                prepare(min(images, 900), Path(other))()  # imports, and compiles as with more images
        call = prepare(images, Path(folder))
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the memory in use
        before, cpu = _memory("VmRSS"), sum(os.times()[:4])
        result = call()
        seconds = sum(os.times()[:4]) - cpu
        return {"seconds": seconds, "memory": _memory("VmHWM") - before, "result": float(result)}


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000


def main(
    small: Annotated[str, typer.Option(help="numbers of images, separated by commas")] = "300,600",
    full: Annotated[bool, typer.Option(help="the sizes in STAGES, up to NIH's, instead of `small`")] = False,
    only: Annotated[list[str], typer.Option(help="stages to measure; default: all")] = [],  # noqa: B006
    limit: Annotated[int, typer.Option(help="the largest number of images")] = NIH[-1],
) -> None:
    table = Table("stage", "images", "CPU seconds", "MB", "exponent", "result", title="Growth with the number of images")
    steep = []
    for stage in only or STAGES:
        sizes = [size for size in (STAGES[stage][1] if full else map(int, small.split(","))) if size <= limit]
        figures = []
        for images in sizes:
            start = time.perf_counter()
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            command = [sys.executable, __file__, "--measured", stage, str(images)]
            output = subprocess.run(command, env={**os.environ, **threads}, check=True, stdout=subprocess.PIPE, text=True)
            figures.append(json.loads(output.stdout.splitlines()[-1]))
            print(f"{stage} {images}: {figures[-1]}, {time.perf_counter() - start:.0f} s in all", file=sys.stderr)
        exponents = [math.nan]
        for (less, more), (low, high) in zip(pairwise(sizes), pairwise(figures), strict=True):
            exponents.append(math.log(max(high["seconds"], 0.01) / max(low["seconds"], 0.01)) / math.log(more / less))
            if stage == COMPARES_ALL_PAIRS:
                steep += [f"{stage}: {high['seconds']:.0f} s"] if high["seconds"] > ALL_PAIRS_S else []
            elif high["seconds"] >= JUDGED_S and exponents[-1] > MAX_EXPONENT:
                steep.append(f"{stage}: {less} to {more} images, exponent {exponents[-1]:.2f}")
        for images, figure, exponent in zip(sizes, figures, exponents, strict=True):
            row = f"{figure['seconds']:.2f}", f"{figure['memory']:.0f}", f"{exponent:.2f}", f"{figure['result']:.6g}"
            table.add_row(stage, f"{images:,}", *row)
    Console(width=120).print(table)
    if steep:
        raise SystemExit("\n".join(["these stages grow faster than allowed:", *steep]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        typer.run(main)
