"""Compares crops by a segmenter's masks with crops by darkness, out of fold: how much of the annotated lungs they contain.

PYTHONPATH=. .venv/bin/python benchmarks/real/lung_frames.py runs/lungs/v7 runs/lungs/unet_v7

The first argument is a prepared run with masks, the second a run of notebook 12 on it.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import typer
from rich.console import Console

from kitlib.inference.segment_lungs import load_segmenter
from kitlib.lungs.finders import DarkLungs, LungFinder
from kitlib.runs.finished_run import read_metrics
from kitlib.tables import read_table
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.mask_store import MaskStore

BATCH = 16


def main(prepared: Path, segmented: Path) -> None:
    cache, masks = XrayCache(prepared / "xrays", read_metrics(prepared)["longest_side"]), MaskStore(prepared / "masks")
    rows = []
    for fold in sorted(segmented.glob("fold*")):
        ids = read_table("mask_scores", fold / "tables" / "mask_scores.parquet").image_id.unique()
        finders = {"masks": load_segmenter(fold / "bundle"), "darkness": DarkLungs()}
        for start in range(0, len(ids), BATCH):
            xrays = [cache.read(image_id) for image_id in ids[start : start + BATCH]]
            for name, finder in finders.items():
                rows += [(name, *result) for result in judge(finder, xrays, masks)]
    table = pd.DataFrame(rows, columns=["finder", "not found", "inside", "area"])
    frames = table[~table["not found"]].groupby("finder")
    summary = pd.DataFrame(
        {
            "images": table.groupby("finder").size(),
            "not found": table.groupby("finder")["not found"].mean(),
            "whole lungs inside": frames["inside"].apply(lambda inside: (inside > 0.995).mean()),
            "share inside, in 95 %": frames["inside"].quantile(0.05),
            "smallest share inside": frames["inside"].min(),
            "share of the image": frames["area"].mean(),
        }
    )
    Console().print(summary.round(3).to_string())


def judge(finder: LungFinder, xrays: list[CachedXray], masks: MaskStore) -> list[tuple[bool, float, float]]:
    """Return per image: whether no lungs were found, share of annotated lungs in the frame, frame's share of the image."""
    rows = []
    for xray, lungs in zip(xrays, finder.find(xrays), strict=True):
        if lungs.frame is None:
            rows.append((True, 1.0, 1.0))
            continue
        drawn = np.argwhere(masks.read(xray.image_id) > 0) + 0.5
        scale = [xray.columns / xray.pixels.shape[1], xray.rows / xray.pixels.shape[0]]
        x, y = drawn[:, 1] * scale[0], drawn[:, 0] * scale[1]
        xmin, ymin, xmax, ymax = lungs.frame
        inside = float(((x > xmin) & (x < xmax) & (y > ymin) & (y < ymax)).mean())
        rows.append((False, inside, (xmax - xmin) * (ymax - ymin) / (xray.rows * xray.columns)))
    return rows


if __name__ == "__main__":
    typer.run(main)
