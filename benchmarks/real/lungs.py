"""Prepares real chest X-rays with manual lung masks as runs for notebook 12, one run per data set.

PYTHONPATH=. .venv/bin/python benchmarks/real/lungs.py --data DATA --out runs/lungs

The data are not part of this project; the script needs the tables cxr_seg/labels.csv and cxr_cls/labels.csv. Patients and
near-duplicates that these tables put into one group count as one patient.
"""

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import pandas as pd
import typer

from kitlib.atomic import write_json
from kitlib.classes import MASK_CODES
from kitlib.datasets.folds import check_no_leak, make_folds
from kitlib.datasets.near_duplicates import group_near_duplicates
from kitlib.tables import empty_table, write_table
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore

LONGEST_SIDE = 512
# Run folder -> annotator in the table, number of folds, convention of the masks (see MASK_CONVENTIONS).
SETS = {
    "v7": ("v7labs", 5, "with_heart"),
    "kermany": ("v7labs_semantic(aligned)", 5, "with_heart"),
    "shenzhen": ("arcus.ml", 2, "lung_fields"),
}


def main(data: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    masks = pd.read_csv(data / "cxr_seg" / "labels.csv")
    groups = pd.read_csv(data / "cxr_cls" / "labels.csv").set_index("file").group.dropna()
    for name, (annotator, n_folds, convention) in SETS.items():
        rows = masks[masks.annotator == annotator].reset_index(drop=True)
        prepare(data, rows, groups, out / name, n_folds, convention)


def prepare(data: Path, rows: pd.DataFrame, groups: pd.Series, run: Path, n_folds: int, convention: str) -> None:
    ids = [Path(mask).stem for mask in rows["mask"]]
    images = pd.DataFrame(
        {
            "image_id": ids,
            "study_id": ids,
            "patient_id": groups.reindex(rows.image).fillna(rows.patient_id.set_axis(rows.image)).to_numpy(),
            "path": [str(data / path) for path in rows.image],
            "source": run.name,
            "view": rows["view"].fillna(""),
            "convention": convention,
        }
    )
    cache, store = XrayCache(run / "xrays", LONGEST_SIDE), MaskStore.create_empty(run / "masks")
    outcomes = cache.fill(images)
    if (outcomes.status == "failed").any():
        raise SystemExit(outcomes[outcomes.status == "failed"].to_string())
    images = images.assign(rows=outcomes["rows"].to_numpy(), columns=outcomes["columns"].to_numpy())
    codes = {}
    for image_id, path in zip(ids, rows["mask"], strict=True):
        mask = cv2.imread(str(data / path), cv2.IMREAD_GRAYSCALE)
        if mask.shape != cache.read(image_id).pixels.shape:
            raise SystemExit(f"{path} has {mask.shape} pixels, but its image has {cache.read(image_id).pixels.shape}")
        codes[image_id] = np.where(mask > 127, MASK_CODES["lungs"], 0)
    store.add(codes)
    labels = pd.get_dummies(rows.label, dtype=float)
    labels.insert(0, "id", ids)
    duplicates = group_near_duplicates(cache, images.image_id, 32)
    folds = make_folds(images, labels, empty_table("boxes"), n_folds, 0, duplicates)
    check_no_leak(folds, images, duplicates)
    for name, table in {"images": images, "labels": labels, "boxes": empty_table("boxes"), "folds": folds}.items():
        write_table(table, name, run / "tables" / f"{name}.parquet")
    write_json(run / "metrics.json", {"longest_side": LONGEST_SIDE, "images": len(images), "convention": convention})
    print(f"{run}: {len(images)} images of {images.patient_id.nunique()} groups in {n_folds} folds, masks: {convention}")


if __name__ == "__main__":
    typer.run(main)
