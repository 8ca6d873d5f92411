"""Prefetches items in a thread, so that reading and preparing images overlap with the model's computation."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")

BATCHES_AHEAD = 3


def ahead(items: Iterator[Item], most: int = BATCHES_AHEAD) -> Generator[Item, None, None]:
    """Yield `items` unchanged while a thread prefetches up to `most` of them.

    If `items` raises an error, it is raised here after the preceding items. Closing the generator ends the thread.
    """
    end, stopped = object(), threading.Event()
    prefetched: queue.Queue = queue.Queue(most)

    def put(item: Any) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return prefetched.put(item, timeout=0.1)

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((end, None))
        except BaseException as error:  # passed on to the consumer, which raises it
            put((end, error))

    thread = threading.Thread(target=produce, name="canvases", daemon=True)
    thread.start()
    try:
        while True:
            item, error = prefetched.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        # Wait a second at most: the thread may be blocked by a slow file after the consumer has stopped.
        thread.join(timeout=1)
