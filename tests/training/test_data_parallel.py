"""Two processes that train one model have one validation score, and their errors state the cause."""

import pytest

from kitlib.errors import TrainingError
from kitlib.settings import override
from kitlib.training.data_parallel import train_together
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
    # Real processes import what they are given; `train_fold` would take them twice as long.
    with pytest.raises(TrainingError) as failed:
        train_together(fail_to_train, small_task(SmallXrays(16), RECIPE), 1, tmp_path, 2)
    first, second = str(failed.value).splitlines()
    assert first == f"{tmp_path}: ValueError: out of luck"
    assert second == f"  logs: {tmp_path / 'processes'}"
