"""Ending processes: kill one with all its descendants, and exit this one cleanly on a signal."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import psutil


def kill_family(process: int) -> None:
    """Kill the process with the id `process` and all its descendants, even those in other process groups."""
    try:
        first = psutil.Process(process)
        first.suspend()  # it must not start another child while its family is listed
        family = [*first.children(recursive=True), first]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def die_with_parent(parent: int) -> None:
    """Make Linux kill this process when the parent process, whose id is `parent`, ends, even if the parent is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    if os.getppid() != parent:
        sys.exit(1)


@contextmanager
def handling(handlers: Mapping[int, Callable]) -> Iterator[None]:
    """Install signal handlers, keyed by signal, until the block ends. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exiting_on_signals() -> AbstractContextManager[None]:
    """Raise SystemExit inside the block on SIGTERM or SIGHUP, so that files are closed and child processes terminated.

    SIGHUP is sent when the terminal closes. A signal that the process already ignores stays ignored, as nohup requires.
    """
    active = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    return handling({number: lambda number, _: sys.exit(128 + number) for number in active})
