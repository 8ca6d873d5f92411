import subprocess
import sys
import threading
import time

import pytest

from kitlib.deadline import Deadline, OutOfTime, session_limit


def test_the_deadline_interrupts_a_wait():
    began = time.monotonic()
    with pytest.raises(OutOfTime), Deadline(0.2).enforced():
        threading.Event().wait(30)
    assert 0.15 < time.monotonic() - began < 5


def test_no_handler_of_exceptions_swallows_it():
    script = (
        "from kitlib.deadline import Deadline\n"
        "with Deadline(0.2).enforced():\n"
        "    while True:\n"
        "        try: sum(range(1000))\n"
        "        except Exception: pass"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip().endswith("kitlib.deadline.OutOfTime")


def test_a_deadline_that_was_met_never_strikes():
    with Deadline(0.2).enforced():
        pass
    time.sleep(0.3)


def test_a_deadline_that_is_past_strikes_at_once():
    with pytest.raises(OutOfTime), Deadline(1, started=time.monotonic() - 5).enforced():
        threading.Event().wait(30)


def test_the_surroundings_may_end_a_session_earlier(monkeypatch):
    monkeypatch.setenv("KIT_TIME_LIMIT_S", "12.5")
    assert session_limit(9 * 3600) == 12.5
    assert session_limit(10) == 10
