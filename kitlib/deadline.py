"""Deadlines: work can ask how much time remains, and is interrupted if it does not stop in time."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPEAT_S = 2.0  # seconds between two interruptions once the deadline has passed


class OutOfTime(BaseException):
    """Raised when an enforced deadline passes. A BaseException, so that no library's `except Exception` swallows it."""


class Deadline:
    """A point in time: `seconds` after `started` (a time.monotonic() value), or after now if `started` is None."""

    def __init__(self, seconds: float, started: float | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"a deadline needs a positive number of seconds, got {seconds}")
        self.at = (time.monotonic() if started is None else started) + seconds

    def left(self) -> float:
        """Return the seconds that remain; negative once the deadline has passed."""
        return self.at - time.monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTime inside the block when the deadline passes, even during an import or a wait.

        It uses a signal, so it works only in the main thread, where notebooks run. In other threads it does nothing, and the
        block has to check `left()` itself.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, self._interrupt)
        # Repeated, because an exception inside a destructor or an interpreter's callback is only printed.
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3), REPEAT_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _interrupt(self, *_: object) -> None:
        raise OutOfTime


def session_limit(seconds: float) -> float:
    """Return `seconds`, or KIT_TIME_LIMIT_S if lower. This environment variable is set by a kernel's rehearsal."""
    return min(seconds, float(os.environ.get("KIT_TIME_LIMIT_S", seconds)))


def session_start() -> float | None:
    """Return the time.monotonic() value at which the Kaggle session began, or None outside a Kaggle kernel."""
    return float(os.environ["KIT_STARTED"]) if "KIT_STARTED" in os.environ else None


def session_deadline(hours: float) -> Deadline | None:
    """Return the deadline of the session, or None if there is no limit.

    There are two limits: `hours` (0: no limit) and KIT_TIME_LIMIT_S seconds, both from the session's start or, outside
    Kaggle, from now. The deadline is the earlier one. Raises ValueError if `hours` is negative.
    """
    if hours < 0:
        raise ValueError(f"invalid session length: {hours} hours; use a positive number, or 0 for no limit")
    limit = session_limit(hours * 3600 or math.inf)
    return None if math.isinf(limit) else Deadline(limit, session_start())


class SessionOver(RuntimeError):
    """Raised between two epochs when no time is left in the session. The checkpoint in the run folder allows resuming."""

    def __init__(self, run_folder: Path, done: int, epochs: int) -> None:
        super().__init__(f"{run_folder}: the session ends after {done} of {epochs} epochs")
        self.run_folder, self.done, self.epochs = run_folder, done, epochs

    def __reduce__(self) -> tuple:
        return SessionOver, (self.run_folder, self.done, self.epochs)


def epoch_fits(deadline: Deadline | None, seconds: list[float]) -> bool:
    """Return whether an epoch of 1.5 times the longest past duration in `seconds` fits before the deadline."""
    return deadline is None or deadline.left() > 1.5 * max(seconds, default=0.0)
