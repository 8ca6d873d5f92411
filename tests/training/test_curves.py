"""Curves for TensorBoard, W&B and MLflow: one point an epoch, from either training loop."""

import pytest
from pytorch_lightning.loggers import CSVLogger

from kitlib.errors import TrainingError
from kitlib.recipes.fields import TrainingRecipe
from kitlib.settings import field_kinds
from kitlib.training.curves import LOGGERS, open_curves
from kitlib.training.progress import Progress


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
    with pytest.raises(TrainingError, match=rf'curves is "{kind}".*pip install {kind}\), or leave curves empty'):
        open_curves(kind, tmp_path / "curves", "title")
    assert not (tmp_path / "curves").exists()


def test_the_recipe_offers_what_can_be_written():
    assert set(field_kinds(TrainingRecipe)["curves"].__args__) == {"", *LOGGERS}
