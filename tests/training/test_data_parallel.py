"""Two processes that train one model have one validation score, and their errors state the cause."""

import numpy as np
import pytest

from kitlib.deadline import SessionOver
from kitlib.errors import TrainingError
from kitlib.settings import override
from kitlib.training.data_parallel import (
    SharedBatches,
    gather_list,
    gather_rows,
    is_first_process,
    rank_and_world_size,
    train_together,
)
from kitlib.training.driver import train_fold
from tests.small_tasks import small_task
from tests.small_xrays import RECIPE, SmallXrays, fail_to_train
from tests.training.test_detector import FASTER_RCNN, pooled_precision


def test_two_processes_judge_a_detector_by_all_boxes_together(tmp_path, quick_processes):
    # Batch norm statistics differ between the processes; predictions use those of the first.
    # At 64 pixels a side the pyramid omits its coarser maps, whose layers get no gradients.
    recipe = override(FASTER_RCNN, image_size=64, epochs=3, learning_rate=5e-3, ema_decay=0.9, nominal_batch=8)
    run = train_together(train_fold, small_task(SmallXrays(16), recipe), 1, tmp_path, 2)
    assert run.metrics["best"]["score"] > 0
    assert pooled_precision(SmallXrays(16), run.tables["detections"]) == pytest.approx(
        run.metrics["best"]["score"], abs=1e-6
    )


def test_an_error_in_a_process_is_raised_with_its_message(tmp_path, real_processes):
    # Real processes import the module of the function that they run; that of `train_fold` takes twice as long to import.
    with pytest.raises(TrainingError) as failed:
        train_together(fail_to_train, small_task(SmallXrays(16), RECIPE), 1, tmp_path, 2)
    first, second = str(failed.value).splitlines()
    assert first == f"{tmp_path}: ValueError: out of luck"
    assert second == f"  logs: {tmp_path / 'processes'}"


@pytest.fixture
def of_three(monkeypatch):
    """Let this process be the second of three; what the others send is given."""

    def others(first, third):
        def gather(values, value):
            values[:] = first, value, third

        monkeypatch.setattr("torch.distributed.all_gather_object", gather)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    return others


def test_results_of_all_processes_are_joined_in_the_order_of_the_images(of_three):
    # Of seven images, the processes have three, two and two.
    of_three([0, 3, 6], [2, 5])
    assert gather_list([1, 4]) == list(range(7))
    rows = np.full((7, 2), np.nan)
    rows[1::3] = [[1, 10], [4, 40]]
    of_three(np.array([[0, 0], [3, 30], [6, 60]]), np.array([[2, 20], [5, 50]]))
    assert gather_rows(rows).tolist() == [[n, 10 * n] for n in range(7)]
    assert not is_first_process()


def test_a_process_alone_has_all_results():
    rows = np.array([[1.0], [2.0]])
    assert gather_rows(rows) is rows and gather_list((1, 2)) == [1, 2]
    assert is_first_process() and rank_and_world_size() == (0, 1)


def test_every_process_gets_its_part_of_each_whole_batch(of_three):
    batches = SharedBatches(range(20), 6)
    assert len(batches) == 3 and list(batches) == [[1, 4], [7, 10], [13, 16]]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_is_started_over_once_and_then_continued_by_all_processes(tmp_path, monkeypatch, resume):
    seen = []

    def train(task, fold, run_folder):
        seen.append((task.resume, (run_folder / "metrics.json").exists()))
        (run_folder / "metrics.json").write_text("{}")
        return fold

    def launch(config, function):  # in this process
        return lambda *given: {rank: function(*given) for rank in range(config.nproc_per_node)}

    monkeypatch.setattr("kitlib.training.data_parallel.elastic_launch", launch)
    (tmp_path / "metrics.json").write_text("{}")
    task = small_task(SmallXrays(16), RECIPE, resume=resume)
    assert train_together(train, task, 7, tmp_path, 2) == 7
    # A finished run is only read; otherwise two processes train, of which the second finds the first one's result here.
    assert seen == ([(True, True)] if resume else [(True, False), (True, True), (True, True)])


def test_the_end_of_a_session_ends_the_training_of_all_processes(tmp_path, monkeypatch):
    def train(task, fold, run_folder):
        raise SessionOver(run_folder, 1, 3)

    monkeypatch.setattr(
        "kitlib.training.data_parallel.elastic_launch", lambda _, function: lambda *given: {0: function(*given)}
    )
    with pytest.raises(SessionOver, match="1 of 3 epochs"):
        train_together(train, small_task(SmallXrays(16), RECIPE), 0, tmp_path / "deep" / "fold0", 2)
