"""The lines that a training logs."""

import logging
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.4, "99 s"), (99.5, "2 min"), (5969, "99 min"), (5970, "1.7 h"), (7200, "2.0 h")],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_within_a_long_epoch_there_is_a_line_now_and_then(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="kitlib")
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    lines = Progress("study fold 0", 6)
    for batch, clock.now in ((1, 59.9), (2, 60.0), (3, 119.9)):
        lines.log_batch(1, batch, 900)
    assert caplog.messages == ["study fold 0: epoch 1 of 6, batch 2 of 900"]
    clock.now = 130.0
    lines.log_epoch([{"seconds": 130.0, "score": 0.5}], [130.0])
    clock.now = 189.9
    lines.log_batch(2, 1, 900)  # less than a minute after the epoch's line
    assert len(caplog.messages) == 2
