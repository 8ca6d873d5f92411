"""Run folders without training: their tables of predictions are chosen so that the figures are known."""

import dataclasses
from pathlib import Path

import pandas as pd

from kitlib.atomic import write_json
from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.tables import BOX as SIDES
from kitlib.tables import empty_table, write_table
from tests.small_xrays import BOX, RECIPE, SmallXrays


def tables_of(small: SmallXrays) -> dict[str, pd.DataFrame]:
    return {"images": small.images, "labels": small.labels, "boxes": small.boxes, "folds": small.fold_table}


def prepare(folder: Path, tables: dict[str, pd.DataFrame], **metrics) -> Path:
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {"images": len(tables["images"]), "longest_side": 50, **metrics})
    return folder


def train(
    folder: Path,
    prepared: dict[str, pd.DataFrame],
    folds=(0, 1),
    model="study",
    recipe=RECIPE,
    record=None,
    parameters=None,
    finished=True,
    of_fold=None,
    **predicted,
) -> Path:
    """Write a trained run with the tables `predicted`, limited to `folds`; its JSON files get `record` and `of_fold`."""
    for fold in folds:
        metrics = {
            "model": model,
            "fold": fold,
            "recipe": dataclasses.asdict(recipe),
            "seed": 0,
            "data_fingerprint": data_fingerprint(**prepared),
            "folds_fingerprint": data_fingerprint(folds=prepared["folds"]),
            "seconds": 10.0,
            **(of_fold or {}),
        }
        write_json(folder / f"fold{fold}" / "metrics.json", metrics)
    for name, table in predicted.items():
        write_table(table[table.fold.isin(folds)], name, folder / "tables" / f"{name}.parquet")
    all_parameters = {"prepare_run": "prepare", "folds": list(folds), **(parameters or {})}
    write_json(folder / "record.json", {"parameters": all_parameters, **(record or {})})
    if finished:
        write_json(folder / "metrics.json", {"model": model, "folds": list(folds), "score": 0.125})
    return folder


def study_scores(tables: dict[str, pd.DataFrame], sure: float, model="study") -> pd.DataFrame:
    """Return predictions in which the true class has `sure` and the others share the remainder; 0.25 is uninformative."""
    images = tables["images"].drop_duplicates("study_id").merge(tables["folds"], left_on="image_id", right_on="id")
    truth = tables["labels"].set_index("id").loc[images.study_id, list(STUDY_CLASSES)]
    scores = (truth * sure + (1 - truth) * (1 - sure) / 3).reset_index(drop=True)
    return scores.assign(study_id=images.study_id.to_numpy(), model=model, fold=images.fold.to_numpy())


def image_scores(tables: dict[str, pd.DataFrame], none=0.5, model="study") -> pd.DataFrame:
    folds = tables["folds"]
    return pd.DataFrame({"image_id": folds.id, "model": model, "fold": folds.fold, "none": none})


def coverage(tables: dict[str, pd.DataFrame], model="yolo") -> pd.DataFrame:
    return image_scores(tables, model=model).drop(columns="none")


def true_boxes(tables: dict[str, pd.DataFrame], score: float, model="yolo") -> pd.DataFrame:
    """Return detections that equal the true boxes, with `score`."""
    boxes = tables["boxes"].merge(tables["folds"], left_on="image_id", right_on="id").drop(columns="id")
    return boxes.assign(model=model, score=score)


def false_boxes(tables: dict[str, pd.DataFrame], score: float, model="yolo") -> pd.DataFrame:
    """Return detections with one box per image, far from the true one."""
    away = dict(zip(SIDES, (BOX[2] + 10, BOX[1], BOX[2] + 30, BOX[3]), strict=True))
    return coverage(tables, model).assign(score=score, **away)


NOTHING = empty_table("detections")
