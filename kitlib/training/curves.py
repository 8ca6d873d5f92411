"""Curves of a training's epochs for TensorBoard, Weights & Biases or MLflow, written by Lightning's loggers."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from kitlib.errors import TrainingError

PROJECT = "kit"  # name of the project in W&B, of the experiment in MLflow
# The recipe's field `curves` -> what makes its logger, from a folder and the training's title. Nothing is sent anywhere.
LOGGERS: dict[str, Callable[[Path, str], Logger]] = {
    "tensorboard": lambda folder, title: TensorBoardLogger(folder, name="", version=""),
    "wandb": lambda folder, title: WandbLogger(title, save_dir=folder, project=PROJECT, offline=True),
    "mlflow": lambda folder, title: MLFlowLogger(PROJECT, title, tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"),
}


@contextmanager
def open_curves(kind: str, folder: Path, title: str) -> Iterator[Logger | None]:
    """Yield a logger that writes to `folder` in the format of `kind`, a key of LOGGERS; None if `kind` is "".

    At the end the logger is closed, so that the next training in this process has a run of its own. Raises TrainingError if
    the package of that name is not installed.
    """
    if not kind:
        yield None
        return
    if importlib.util.find_spec(kind) is None:
        raise TrainingError(
            f'curves is "{kind}", but the package {kind} is not installed; install it (.venv/bin/python -m pip install '
            f"{kind}), or leave curves empty: tables/history.csv has the same figures"
        )
    folder.mkdir(parents=True, exist_ok=True)
    curves = LOGGERS[kind](folder, title)
    try:
        yield curves
    finally:
        curves.finalize("success")
        if isinstance(curves, WandbLogger):
            curves.experiment.finish()
