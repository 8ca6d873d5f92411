import time

import pytest
import torch
from torch.utils.data import DataLoader

from kitlib.errors import TrainingError
from kitlib.training.shared_memory import explaining_timeouts, workers_that_fit


@pytest.mark.parametrize(
    ("workers", "prefetched", "free", "fitting"),
    [
        (2, 2, 5000, 2),  # 2 workers x 2 batches, and the batch in use
        (2, 2, 4999, 0),
        (2, 4, 8999, 0),
        (2, 4, 9000, 2),
        (0, 2, 0, 0),
    ],
)
def test_workers_need_room_for_the_batches_they_prefetch(caplog, workers, prefetched, free, fitting):
    assert workers_that_fit(workers, 1000, prefetched, lambda: free) == fitting
    assert bool(caplog.text) is (fitting < workers)


class Waiting(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        time.sleep(60)


def test_a_batch_that_does_not_arrive_is_an_error_that_says_what_to_do():
    loader = DataLoader(Waiting(), num_workers=1, timeout=0.5, multiprocessing_context="fork")
    with pytest.raises(TrainingError, match=r"/dev/shm is full .*Set `workers` to 0"), explaining_timeouts():
        list(loader)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), explaining_timeouts():
        raise RuntimeError("out of memory")
