"""A point in time by which work must end, asked politely and, where politeness fails, enforced."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def session_start() -> float | None:
    """When the session began, a time.monotonic() value, where a kernel's start has noted it; else None."""
    return float(os.environ["KIT_STARTED"]) if "KIT_STARTED" in os.environ else None


def session_deadline(hours: float) -> Deadline | None:
    """The end of a session of so many hours, counted from its start; None where nothing ends it, 0 hours included."""
    if hours < 0:
        raise ValueError(f"a session has {hours} hours; 0 means that nothing ends it")
    limit = session_limit(hours * 3600 or math.inf)
    return None if math.isinf(limit) else Deadline(limit, session_start())


class SessionOver(RuntimeError):
    """The session's deadline has ended a training between two epochs; it goes on from the checkpoint in its run folder."""

    def __init__(self, run_folder: Path, done: int, epochs: int) -> None:
        super().__init__(f"{run_folder}: the session ends after {done} of {epochs} epochs")
        self.run_folder, self.done, self.epochs = run_folder, done, epochs

    def __reduce__(self) -> tuple:
        return SessionOver, (self.run_folder, self.done, self.epochs)


def epoch_fits(deadline: Deadline | None, seconds: list[float]) -> bool:
    """Whether one more epoch ends before the deadline, should it take half as long again as the longest of `seconds`."""
    return deadline is None or deadline.left() > 1.5 * max(seconds, default=0.0)
