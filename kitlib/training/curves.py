"""Writes the metrics of each epoch for TensorBoard, Weights & Biases or MLflow, with Lightning's loggers."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from kitlib.errors import TrainingError

PROJECT = "kit"  # name of the project in W&B, of the experiment in MLflow
# Value of the recipe's field `curves` -> function that creates a logger from a folder and a title. All loggers are offline.
LOGGERS: dict[str, Callable[[Path, str], Logger]] = {
    "tensorboard": lambda folder, title: TensorBoardLogger(folder, name="", version=""),
    "wandb": lambda folder, title: WandbLogger(title, save_dir=folder, project=PROJECT, offline=True),
    "mlflow": lambda folder, title: MLFlowLogger(PROJECT, title, tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"),
}


@contextmanager
def open_curves(kind: str, folder: Path, title: str) -> Iterator[Logger | None]:
    """Yield a Lightning logger of the kind "tensorboard", "wandb" or "mlflow" that writes to `folder`; None if `kind` is "".

    The logger is closed when the `with` block ends, so that the next model trained in this process does not continue the
    same curves. Raises TrainingError if the package named `kind` is not installed.
    """
    if not kind:
        yield None
        return
    if importlib.util.find_spec(kind) is None:
        raise TrainingError(
            f'curves is "{kind}", but the package {kind!r} is not installed. Install it with `.venv/bin/python -m pip '
            f'install {kind}`, or set curves="" and use tables/history.csv, which has the same metrics'
        )
    folder.mkdir(parents=True, exist_ok=True)
    curves = LOGGERS[kind](folder, title)
    try:
        yield curves
    finally:
        curves.finalize("success")
        if isinstance(curves, WandbLogger):
            curves.experiment.finish()
