"""Finds run folders, recognises the kind of a run by its files, and finds the other runs that a run's parameters list."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kitlib.errors import InputNotFound
from kitlib.paths import find_run
from kitlib.runs.record import METRICS, RECORD

# A fold's folder that contains one of these marks its parent as a run.
FOLD_FILES = (METRICS, "checkpoints")

# Maps a kind of run to the files that identify it: a run has the first kind of which it contains at least one file.
KINDS = {
    "fusion": ("fusion.json",),
    "ensemble": ("ensemble/ensemble.json",),
    "study": ("tables/study_scores.parquet", "tables/image_scores.parquet"),
    "detector": ("tables/coverage.parquet", "tables/detections.parquet"),
    "findings": ("tables/class_scores.parquet",),
    "masks": ("tables/mask_maps.parquet",),
    "lungs": ("tables/mask_scores.parquet",),
    "applied lungs": ("tables/lungs.parquet",),
    "prepared": ("tables/folds.parquet",),
    "pseudo-labels": ("left_out.csv",),
    "report": ("comparison.csv",),
}


def find_kind(folder: Path) -> str:
    """Return the kind of the run in `folder`, such as "study" (a key of KINDS); "" if none of its files shows a kind."""
    folders = (folder, *fold_folders(folder).values())
    return next(
        (kind for kind, names in KINDS.items() if any((path / name).is_file() for path in folders for name in names)), ""
    )


def fold_folders(folder: Path) -> dict[int | str, Path]:
    """Return a dict from a run's folds to their folders; a key is the fold's number or, for nested folds, text like "2/0".

    "2/0" is the inner fold 0 of the outer fold 2.
    """
    folder_of = {path.name.removeprefix("fold"): path for path in folder.glob("fold*")}
    folders: dict[int | str, Path] = {int(number): folder_of[number] for number in sorted(folder_of) if number.isdigit()}
    for path in sorted(folder.glob("outer*/fold*")):
        outer, inner = path.parent.name.removeprefix("outer"), path.name.removeprefix("fold")
        if outer.isdigit() and inner.isdigit():
            folders[f"{outer}/{inner}"] = path
    return folders


def is_run(folder: Path) -> bool:
    """Return whether `folder` is a run folder, that is, whether a notebook has started a run in it."""
    return any((folder / name).is_file() for name in (RECORD, METRICS)) or any(
        (fold / name).exists() for fold in fold_folders(folder).values() for name in FOLD_FILES
    )


def walk_runs(root: Path, is_run: Callable[[Path], bool] = is_run) -> Iterator[Path]:
    """Yield the run folders in and below `root`; `is_run` recognises them. Folders inside a run are not searched."""
    for path, folders, _ in os.walk(root):
        if is_run(Path(path)):
            folders.clear()
            yield Path(path)
        else:
            folders[:] = sorted(entry for entry in folders if not entry.startswith("."))


def named_folder(name: Any, run: Path) -> Path | None:
    """Return the folder of the run `name`, or None if the folder does not exist.

    `run` is the folder of the run that has `name` in its parameters. The folders next to `run` are tried first, because both
    runs may have been moved together.
    """
    if not name or not isinstance(name, str):
        return None
    for folder in (run.parent / name, run.parent / Path(name).name):
        if folder.is_dir():
            return folder
    try:
        return find_run(name)
    except InputNotFound:
        return None
