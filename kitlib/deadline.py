"""A point in time by which work must end, asked politely and, where politeness fails, enforced."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STRIKES_S = 2.0  # seconds between two


class OutOfTime(BaseException):
    """The deadline has struck. No `Exception`, so that no library's handler takes it for a fault of its own."""


class Deadline:
    """Seconds left until `seconds` from now (or from `started`, a time.monotonic() value)."""

    def __init__(self, seconds: float, started: float | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"a deadline needs a positive number of seconds, got {seconds}")
        self.at = (time.monotonic() if started is None else started) + seconds

    def left(self) -> float:
        return self.at - time.monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTime inside the block when the deadline strikes, wherever the code then is (an import, a wait).

        Works by a signal and therefore in the main thread only, which is where notebooks run; elsewhere callers must ask
        `left()`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, self._strike)
        # Again and again: a strike inside a destructor or a callback of the interpreter is only printed.
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3), STRIKES_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _strike(self, *_: object) -> None:
        raise OutOfTime


def session_limit(seconds: float) -> float:
    """`seconds`, or less where the surroundings end the session earlier and say so in KIT_TIME_LIMIT_S (the rehearsal)."""
    return min(seconds, float(os.environ.get("KIT_TIME_LIMIT_S", seconds)))
