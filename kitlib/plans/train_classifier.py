"""Trains a classifier with one call, which runs notebook 10 (for a user's own images) and then notebook 25."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kitlib.errors import RunError
from kitlib.notebook import run_notebook
from kitlib.paths import find_run, project_root, run_path
from kitlib.runs.finished_run import read_prepared
from kitlib.runs.record import METRICS
from kitlib.runs.run_kinds import find_kind


def train_classifier(
    data: str | Path,
    run: str | Path,
    *,
    recipe: str = "small_learner",
    folds: Iterable[int] | None = None,
    epochs: int = 0,
    prepare: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Path:
    """Train a classifier for the classes of a data set; return the folder of the training run, which `predict` accepts.

    `data` is the name or folder of a prepared run, or a folder of your own images. `run` is the name of the new run's folder
    in runs/, or an absolute path. For your own images, `prepare` has the parameters of notebook 10, such as
    `{"table": "labels.csv", "columns": {"file": "Image", "label": "Class"}}` or `{"class_folders": True}` (see
    docs/own_images.md); notebook 10 then prepares the images in another new run, named like `run` with `_prepared` appended.
    Notebook 25 trains one model for each of `folds` (default: all folds of the prepared run) with the recipe called
    `recipe`, for `epochs` epochs (0: as in the recipe). `parameters` are further parameters of notebook 25.

    A call with the same arguments continues interrupted training. Raises RunNotFound if `data` does not exist; RunError if
    `prepare` is missing for your own images, or is given for a prepared run; SettingsError for an unknown parameter or
    recipe; and NotebookError, with the path of the log, if a notebook fails.
    """
    folder = run_path(run)
    source = Path(data) if Path(data).is_dir() else find_run(data, "notebook 10_prepare")
    if find_kind(source) == "prepared":
        if prepare:
            raise RunError(f"{source} is already a prepared run; leave out `prepare`, or give the folder of the images")
        prepared = source.resolve()
    elif prepare:
        prepared = folder.with_name(f"{folder.name}_prepared")
        _run("10_prepare", prepared, {"dataset": "table", "competition": str(source.resolve()), **prepare})
    else:
        raise RunError(
            f'{source} is not a prepared run. If it has your own images, also give `prepare`: {{"class_folders": True}} or, '
            'for example, {"table": "labels.csv", "columns": {"file": "Image", "label": "Class"}}'
        )
    chosen = sorted(set(read_prepared(prepared)["folds"]["fold"].tolist())) if folds is None else list(folds)
    settings = {"recipe": recipe, "folds": chosen, "epochs": epochs, "model_name": folder.name}
    _run("25_train_classifier", folder, {"prepare_run": str(prepared), **settings, **parameters})
    return folder


def _run(notebook: str, folder: Path, parameters: dict[str, Any]) -> None:
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    run_notebook(path, folder / "notebook.ipynb", {**parameters, "run_folder": str(folder)}, folder / METRICS)
