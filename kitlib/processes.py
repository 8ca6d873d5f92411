"""End a process with all that it has started, and this one tidily."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import psutil


def kill_family(process: int) -> None:
    """Kill the process and its descendants, also one that leads a process group of its own, as a notebook's kernel does."""
    try:
        first = psutil.Process(process)
        first.suspend()  # so that it starts no further child while its family is counted
        family = [*first.children(recursive=True), first]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def handling(handlers: Mapping[int, Callable]) -> Iterator[None]:
    """Inside, signals are handled in this way, if this is the main thread: no other may listen to them."""
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
    """Make a SystemExit of SIGTERM and of a closed terminal, as Ctrl-C makes an exception, so that what is open is closed.

    What is ignored stays so: nohup asks for that.
    """
    heard = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    return handling({number: lambda number, _: sys.exit(128 + number) for number in heard})
