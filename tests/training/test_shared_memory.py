import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from kitlib.errors import TrainingError
from kitlib.recipes.fields import StudyRecipe
from kitlib.training.kept_memory import CANVASES
from kitlib.training.shared_memory import explaining_timeouts, workers_that_fit
from kitlib.training.study import StudyStrategy
from tests.small_tasks import small_task
from tests.small_xrays import SmallXrays


@pytest.mark.parametrize(
    ("workers", "free", "fitting"),
    [(2, 2000, 2), (2, 1999, 1), (2, 999, 0), (1, 1000, 1), (0, 0, 0)],
)
def test_workers_need_room_for_the_batches_they_prefetch(caplog, workers, free, fitting):
    assert workers_that_fit(workers, 1000, lambda: free) == fitting
    assert bool(caplog.text) is (fitting < workers)


def test_the_advice_for_more_shared_memory_is_twice_what_the_batches_need(caplog, monkeypatch):
    monkeypatch.setattr("kitlib.training.shared_memory.SHARED_MEMORY", Path("/nowhere"))
    assert workers_that_fit(2, 100_000_000) == 2  # unlimited without the folder
    assert workers_that_fit(2, 100_000_000, lambda: 150_000_000) == 1
    assert "--shm-size=382m" in caplog.text  # 2 x 200,000,000 / 2^20 = 381.5


class Waiting(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        time.sleep(3)  # longer than the timeout; the loader ends only when its worker does


def test_a_batch_that_does_not_arrive_is_an_error_that_says_what_to_do():
    loader = DataLoader(Waiting(), num_workers=1, timeout=0.5, multiprocessing_context="fork")
    with pytest.raises(TrainingError, match=r"/dev/shm is full .*Set `workers` to 0"), explaining_timeouts():
        list(loader)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), explaining_timeouts():
        raise RuntimeError("out of memory")


def test_training_and_validation_batches_are_counted_together(tmp_path, monkeypatch, caplog):
    """Two workers; each has two training batches of four canvases and two validation batches of eight: 24 of 32 x 32."""
    recipe = StudyRecipe(backbone="resnet10t", image_size=32, batch_size=4, frozen_backbone=False)
    needed = 2 * (2 * 4 + 2 * 8) * 32 * 32
    for free, workers in ((needed, 2), (needed - 1, 1), (needed // 2 - 1, 0)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        strategy = StudyStrategy(replace(small_task(SmallXrays(40), recipe), workers=2), 0, tmp_path)
        strategy.make_examples()
        assert strategy.training_batches().num_workers == strategy.validation_batches().num_workers == workers
    assert caplog.text.count("--shm-size=1m") == 2


@pytest.mark.parametrize(
    ("gpu", "cores", "folds", "processes", "workers"),
    [
        (False, 16, 1, 1, 0),
        (True, 4, 1, 1, 4),
        (True, 4, 2, 1, 2),
        (True, 4, 1, 2, 2),
        (True, 64, 2, 1, 8),
        (True, 1, 2, 1, 1),
    ],
)
def test_the_cores_are_divided_among_the_trainings_that_feed_gpus(
    tmp_path, monkeypatch, gpu, cores, folds, processes, workers
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("kitlib.training.shared_memory.usable_cores", lambda: cores)
    monkeypatch.setattr(CANVASES, "folds_at_once", folds)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = StudyRecipe(backbone="resnet10t", image_size=32, batch_size=4)
    for given, expected in ((-1, workers), (3, 3), (0, 0)):
        strategy = StudyStrategy(small_task(SmallXrays(16), recipe, workers=given), 0, tmp_path)
        strategy.make_examples()
        assert strategy.workers == expected
    with pytest.raises(ValueError, match=r"`workers` is -2; expected -1 or more"):
        small_task(SmallXrays(16), recipe, workers=-2).checked()
