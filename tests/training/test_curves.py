"""Curves for TensorBoard, W&B and MLflow: one point an epoch, from either training loop."""

import importlib.util
import inspect
from types import SimpleNamespace

import pandas as pd
import pytest
from pytorch_lightning.loggers import CSVLogger

from kitlib.errors import TrainingError
from kitlib.recipes.fields import DetectorRecipe, StudyRecipe, TrainingRecipe
from kitlib.settings import field_kinds, override
from kitlib.training import curves
from kitlib.training.curves import LOGGERS, open_curves
from kitlib.training.progress import Progress
from tests.small_tasks import train_small
from tests.small_xrays import SmallXrays

SMALL_STUDY = StudyRecipe(backbone="resnet10t", image_size=32, batch_size=4, epochs=2, frozen_backbone=False)
SMALL_YOLO = DetectorRecipe(family="yolo", backbone="yolov8n", width=0.25, image_size=64, batch_size=4, epochs=2)


def test_each_epoch_is_a_point(tmp_path):
    progress = Progress("study fold 0", 2, CSVLogger(tmp_path, name="", version=""))
    history = [{"epoch": 1.0, "score": 0.25, "seconds": 2.0}, {"epoch": 2.0, "score": 0.5, "seconds": 2.0}]
    for epochs in (1, 2):
        progress.log_epoch(history[:epochs], [2.0])
    lines = [dict(zip(("epoch", "score", "seconds", "step"), line.split(","), strict=True)) for line in written(tmp_path)]
    assert [(line["step"], float(line["score"])) for line in lines] == [("1", 0.25), ("2", 0.5)]


def written(folder) -> list[str]:
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert header == "epoch,score,seconds,step"
    return lines


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_missing_package_is_an_error_that_names_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = rf'curves is "{kind}".*pip install {kind}`, or set curves=""'
    with pytest.raises(TrainingError, match=message), open_curves(kind, tmp_path / "curves", "title"):
        pass
    assert not (tmp_path / "curves").exists()


class Closing(CSVLogger):
    closed = 0

    def finalize(self, status):
        Closing.closed += status == "success"


@pytest.mark.parametrize("recipe", [SMALL_STUDY, SMALL_YOLO], ids=["lightning", "ultralytics"])
def test_either_training_loop_writes_its_epochs_and_closes_the_logger(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(Closing, "closed", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *package: name == "tensorboard" or find(name, *package))
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda folder, title: Closing(folder, name="", version=""))
    train_small(tmp_path, SmallXrays(16), override(recipe, curves="tensorboard"))
    scores = pd.read_csv(tmp_path / "tables" / "history.csv").score
    points = pd.read_csv(tmp_path / "curves" / "metrics.csv")
    assert points.step.tolist() == [1, 2] and points.score.tolist() == pytest.approx(scores.tolist())
    assert Closing.closed == 1


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("tensorboard", "TensorBoardLogger", {"save_dir": "FOLDER", "name": "", "version": ""}),
        # Weights & Biases would send data unless it is offline.
        ("wandb", "WandbLogger", {"name": "title", "save_dir": "FOLDER", "project": "kit", "offline": True}),
        (
            "mlflow",
            "MLFlowLogger",
            {"experiment_name": "kit", "run_name": "title", "tracking_uri": "sqlite:///FOLDER/mlflow.db"},
        ),
    ],
)
def test_a_logger_writes_to_the_folder_alone_and_is_closed_after_an_error(tmp_path, monkeypatch, kind, name, expected):
    """A fake logger, because its package need not be installed, is called as the real one's signature allows."""
    signature, made, closed = inspect.signature(getattr(curves, name)), [], []

    class Fake:
        experiment = SimpleNamespace(finish=lambda: closed.append("experiment"))

        def __init__(self, *given, **named):
            made.append({key: str(value) for key, value in signature.bind(*given, **named).arguments.items()})

        def finalize(self, status):
            closed.append(status)

    monkeypatch.setattr(curves, name, Fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    folder = tmp_path / "fold0" / "curves"
    with pytest.raises(ConnectionError), open_curves(kind, folder, "title"):
        raise ConnectionError
    assert made == [{key: str(value).replace("FOLDER", str(folder)) for key, value in expected.items()}] and folder.is_dir()
    assert closed == ["success", *["experiment"] * (kind == "wandb")]


def test_the_recipe_offers_what_can_be_written():
    assert set(field_kinds(TrainingRecipe)["curves"].__args__) == {"", *LOGGERS}
