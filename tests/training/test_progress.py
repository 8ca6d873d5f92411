"""The lines that a training logs."""

import logging

import pytest

from kitlib.training import progress
from kitlib.training.progress import Progress, duration


def test_an_epoch_is_one_line_with_what_is_left(caplog):
    caplog.set_level(logging.INFO, logger="kitlib")
    history = [{"seconds": 40.0, "score": 0.2}, {"seconds": 60.0, "score": 0.31234, "train_loss": 0.5}]
    lines = Progress("study fold 0", 6)
    lines.log_epoch(history, [40.0, 60.0])
    # Four epochs of 50 s, the mean of this session.
    assert caplog.messages == ["study fold 0: epoch 2 of 6, loss 0.500, score 0.3123, 60 s, about 3 min left"]
    lines.log_epoch(history * 3, [60.0])
    assert caplog.messages[1].endswith("60 s, the last epoch")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_within_a_long_epoch_there_is_a_line_now_and_then(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="kitlib")
    now = iter([0.0, 30.0, 61.0, 61.0, 100.0])  # when it starts, then at each batch; twice when a line is logged
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    lines = Progress("study fold 0", 6)
    for batch in (1, 2, 3):
        lines.log_batch(1, batch, 900)
    assert caplog.messages == ["study fold 0: epoch 1 of 6, batch 2 of 900"]
