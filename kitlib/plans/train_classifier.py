"""Trains a classifier with one call: the notebooks 10 (for own images) and 25, one after the other."""

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
    """Train a classifier of the classes of `data` in notebook 25; return the folder of its run, to give to `predict`.

    `data` is a prepared run (its name or folder), or a folder of own images. Own images are first prepared by notebook 10,
    into a run with the name of `run` followed by `_prepared`; `prepare` has its parameters, such as `{"table": "labels.csv",
    "columns": {"file": "Image", "label": "Class"}}` or `{"class_folders": True}`, see docs/own_images.md. `run` is the name
    of a run (a folder below runs/) or an absolute path. One model is trained for each of `folds` (default: all of the
    prepared run), with the `recipe`, for `epochs` epochs (0: the recipe's). Further `parameters` are those of notebook 25.

    An interrupted training continues when it is called again. Raises RunError if `data` is neither, SettingsError for an
    unknown parameter or recipe, and NotebookError, which names the log, if a notebook fails.
    """
    folder = run_path(run)
    source = Path(data) if Path(data).is_dir() else find_run(data, "notebook 10_prepare")
    if find_kind(source) == "prepared":
        if prepare:
            raise RunError(f"{source} is prepared already, so `prepare` would be ignored; give the folder of the images")
        prepared = source.resolve()
    elif prepare:
        prepared = folder.with_name(f"{folder.name}_prepared")
        _run("10_prepare", prepared, {"dataset": "table", "competition": str(source.resolve()), **prepare})
    else:
        raise RunError(
            f'{source} is not a prepared run; for own images, give `prepare`, such as {{"class_folders": True}} or '
            '{"table": "labels.csv", "columns": {"file": "Image", "label": "Class"}}'
        )
    chosen = sorted(set(read_prepared(prepared)["folds"]["fold"].tolist())) if folds is None else list(folds)
    settings = {"recipe": recipe, "folds": chosen, "epochs": epochs, "model_name": folder.name}
    _run("25_train_classifier", folder, {"prepare_run": str(prepared), **settings, **parameters})
    return folder


def _run(notebook: str, folder: Path, parameters: dict[str, Any]) -> None:
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    run_notebook(path, folder / "notebook.ipynb", {**parameters, "run_folder": str(folder)}, folder / METRICS)
