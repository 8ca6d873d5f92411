"""Items made in a thread while the ones before are worked on: reading and placing overlap with the model's computing."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

BATCHES_AHEAD = 3


def ahead(items: Iterator[Item], most: int = BATCHES_AHEAD) -> Generator[Item, None, None]:
    """The same items, made by a thread that stays at most `most` in front; an error of theirs is raised here.

    Closing the iterator ends the thread.
    """
    done, stopped = object(), threading.Event()
    made: queue.Queue = queue.Queue(most)

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((done, None))
        except BaseException as error:  # the consumer raises it, whatever it is
            put((done, error))

    thread = threading.Thread(target=work, name="canvases", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stopped.set()
        # A stream that waits for a slow file must not hold up whoever has stopped listening.
        thread.join(timeout=1)
