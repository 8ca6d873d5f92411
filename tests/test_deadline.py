import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kitlib.deadline import Deadline, OutOfTime, SessionOver, epoch_fits, session_deadline, session_limit


def test_the_deadline_interrupts_a_wait():
    began = time.monotonic()
    with pytest.raises(OutOfTime), Deadline(0.2).enforced():
        threading.Event().wait(30)
    assert 0.15 < time.monotonic() - began < 5


def test_except_exception_does_not_catch_the_deadline():
    script = (
        "from kitlib.deadline import Deadline\n"
        "with Deadline(0.2).enforced():\n"
        "    while True:\n"
        "        try: sum(range(1000))\n"
        "        except Exception: pass"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip().endswith("kitlib.deadline.OutOfTime")


def test_a_deadline_that_was_met_does_not_interrupt_later():
    before = signal.getsignal(signal.SIGALRM)
    with Deadline(60).enforced():
        assert signal.getsignal(signal.SIGALRM) != before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == before


def test_a_deadline_needs_a_positive_number_of_seconds():
    with pytest.raises(ValueError, match="a positive number of seconds, got 0"):
        Deadline(0)


@pytest.mark.parametrize(("seconds", "fits"), [([], True), ([60.0], True), ([60.0, 70.0, 10.0], False)])
def test_an_epoch_fits_if_there_is_time_for_half_as_much_again_as_the_longest_took(seconds, fits):
    # 1.5 * 60 s = 90 s and 1.5 * 70 s = 105 s.
    assert epoch_fits(Deadline(100), seconds) is fits
    assert epoch_fits(None, seconds)


def test_a_past_deadline_interrupts_at_once():
    with pytest.raises(OutOfTime), Deadline(1, started=time.monotonic() - 5).enforced():
        threading.Event().wait(30)


def test_the_environment_may_end_a_session_earlier(monkeypatch):
    monkeypatch.setenv("KIT_TIME_LIMIT_S", "12.5")
    assert session_limit(9 * 3600) == 12.5
    assert session_limit(10) == 10


def test_a_session_counts_from_its_start_and_ends_only_if_a_limit_is_set(monkeypatch):
    assert session_deadline(0) is None
    assert session_deadline(1000).left() == pytest.approx(3_600_000, abs=60)
    monkeypatch.setenv("KIT_STARTED", str(time.monotonic() - 3600))
    assert session_deadline(2).left() == pytest.approx(3600, abs=60)
    # A rehearsal's limit applies with a limit in hours and without.
    monkeypatch.setenv("KIT_TIME_LIMIT_S", "4000")
    assert [session_deadline(hours).left() for hours in (2, 0)] == pytest.approx([400, 400], abs=60)
    with pytest.raises(ValueError, match="invalid session length: -1 hours"):
        session_deadline(-1)


def test_a_deadline_is_the_same_in_another_process():
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).left())"
    pickled = pickle.dumps(Deadline(500))
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, timeout=60, check=True)
    assert float(done.stdout) == pytest.approx(500, abs=60)


def test_the_end_of_a_session_passes_between_processes():
    error = pickle.loads(pickle.dumps(SessionOver(Path("runs/study/fold0"), 3, 20)))
    assert (error.run_folder, error.done, error.epochs) == (Path("runs/study/fold0"), 3, 20)
    assert str(error) == "runs/study/fold0: the session ends after 3 of 20 epochs"
