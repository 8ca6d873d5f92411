"""The prefetching thread: order, errors of any kind, and consumers that stop early."""

import threading
import time

import pytest

from kitlib.inference.read_ahead import ahead


@pytest.mark.parametrize("most", [1, 3, 100])
def test_items_come_once_each_and_in_order(most):
    assert list(ahead(iter(range(50)), most)) == list(range(50))
    assert list(ahead(iter(()))) == []
    # None is an item like any other.
    assert list(ahead(iter([None, 0, None]))) == [None, 0, None]


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error):
    def broken():
        yield 1
        yield 2
        raise error

    items = ahead(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(type(error)):
        next(items)


def test_a_slow_item_does_not_delay_a_consumer_that_stops():
    waiting, go_on = threading.Event(), threading.Event()

    def slow():
        yield 1
        waiting.set()
        go_on.wait(30)
        yield 2

    items = ahead(slow())
    assert next(items) == 1 and waiting.wait(5)
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 5  # 1 s, with a margin for a busy machine
    go_on.set()


def test_an_error_of_the_consumer_ends_the_thread():
    made = []

    def endless():
        while True:
            made.append(1)
            yield len(made)

    def fails():
        for item in ahead(endless(), 2):
            if item == 3:
                raise ValueError(item)

    before = threading.active_count()
    with pytest.raises(ValueError, match="3"):
        fails()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    # Three consumed, two queued, one held by the thread.
    assert threading.active_count() <= before and len(made) <= 6
