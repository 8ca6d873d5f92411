"""The messages between a submission and its prediction processes, each of which is replaced by a thread of the test."""

import multiprocessing
import os
import threading
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kitlib.deadline import OutOfTime
from kitlib.errors import CacheError, PredictionError
from kitlib.inference import prediction_process
from kitlib.inference.cached_lungs import LungsReport
from kitlib.inference.prediction_process import PredictionProcess, ProcessSettings

END = Path("end")  # the "bundle" that ends a thread


class Predictor:
    """Predicts images in batches of two; raises `error` after the first batch if it is not None.

    Misses the lungs of every image, and counts ten overflows for each. `given` has the images that it was given.
    """

    def __init__(self, model, fold=0, error=None):
        self.model, self.fold, self.error = model, fold, error
        self.seen, self.lungs_missed, self.overflowed, self.given = [], 0, 0, []

    def predict(self, xrays):
        self.seen, xrays = [], iter(xrays)
        while batch := list(islice(xrays, 2)):
            self.given += batch
            self.seen += batch
            self.lungs_missed, self.overflowed = len(self.seen), 10 * len(self.seen)
            yield pd.DataFrame({"image_id": batch, "model": self.model})
            if self.error:
                raise self.error


class Processes:
    """Replaces the multiprocessing context: starts threads, and counts whose kill was asked for, by their number from 1.

    They load `predictors`, by the name of the bundle, and read image ids instead of X-rays, except the `unreadable` ones.
    """

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self):
        self.threads, self.killed, self.loaded = [], [], []
        self.predictors, self.unreadable, self.environ, self.left_s = {}, set(), {}, 60.0
        self.cache = SimpleNamespace(read=self.read)

    def Process(self, target, args, daemon):
        pipe, *others = args
        copy = Connection(os.dup(pipe.fileno()))  # like a process, which has its own file descriptor

        def run():
            with suppress(SystemExit, OSError), copy:
                target(copy, *others)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        return SimpleNamespace(start=thread.start, pid=len(self.threads), join=lambda *_: None, exitcode=7)

    def read(self, image_id):
        if image_id in self.unreadable:
            raise CacheError(image_id)
        return image_id

    def load(self, bundle, batch_size, lungs):
        if bundle == END:
            raise SystemExit
        self.loaded.append((bundle.name, batch_size, lungs))
        if bundle.name not in self.predictors:
            raise ValueError("it is damaged")
        return self.predictors[bundle.name]

    def exit(self, _code):
        raise SystemExit


@pytest.fixture
def server(monkeypatch):
    server, receive_all = Processes(), prediction_process._receive_all

    def receive(connection, loads):
        """Receive messages, and end the thread where its process would exit: when the parent has closed the connection."""
        inboxes = [prediction_process._Inbox()]

        def put(load):
            inboxes.append(load[1])
            loads.put(load)

        with suppress(SystemExit):
            receive_all(connection, SimpleNamespace(put=put))
        inboxes[-1].stop()
        loads.put((END, inboxes[0]))

    monkeypatch.setattr(prediction_process, "LightContext", lambda: server)
    monkeypatch.setattr(prediction_process, "kill_family", server.killed.append)
    monkeypatch.setattr(prediction_process, "die_with_parent", lambda _: None)
    monkeypatch.setattr(prediction_process, "POLL_S", 0.01)
    monkeypatch.setattr(prediction_process, "_receive_all", receive)
    system = SimpleNamespace(environ=server.environ, _exit=server.exit, getpid=lambda: 0)
    monkeypatch.setattr(prediction_process, "os", system)
    monkeypatch.setattr("kitlib.inference.predict.load_predictor", server.load)
    yield server
    for thread in server.threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def process(server):
    settings = ProcessSettings(server.cache, batch_size=4, threads=torch.get_num_threads())
    process = PredictionProcess(settings, "3", SimpleNamespace(left=lambda: server.left_s))
    yield process
    process.kill()


def fail(image_id):
    raise AssertionError(f"{image_id} is not unreadable")


def test_one_process_predicts_with_one_model_after_the_other(server, process):
    server.predictors = {"one": Predictor("first", 2), "two": Predictor("second")}
    for name, model, fold in (("one", "first", 2), ("two", "second", 0)):
        predictor = process.load(Path(name))
        assert (predictor.model, predictor.fold, predictor.seen, predictor.lungs_missed) == (model, fold, [], 0)
        tables, counts = [], []
        for table in predictor.predict(iter("abc"), fail):
            tables.append(table.image_id.tolist())
            counts.append((list(predictor.seen), predictor.lungs_missed, predictor.overflowed))
        assert tables == [["a", "b"], ["c"]] and counts == [(["a", "b"], 2, 20), (["a", "b", "c"], 3, 30)]
    assert server.loaded == [("one", 4, None), ("two", 4, None)]
    assert len(server.threads) == 1 and server.environ == {"CUDA_VISIBLE_DEVICES": "3"} and process.lungs is None
    for _ in range(2):
        process.kill()
    assert server.killed == [1]
    with pytest.raises(PredictionError, match="the prediction process has ended"):
        process.send("load", Path("one"))


def test_an_unreadable_image_is_restored_or_left_out(server, process):
    server.predictors, server.unreadable, asked = {"one": Predictor("first")}, {"b", "d"}, []

    def restore(image_id):
        asked.append(image_id)
        server.unreadable -= {"b"}
        return image_id not in server.unreadable

    tables = list(process.load(Path("one")).predict(iter("abcde"), restore))
    assert [table.image_id.tolist() for table in tables] == [["a", "b"], ["c", "e"]] and asked == ["b", "d"]


def test_a_model_that_fails_ends_its_process_and_the_next_one_gets_another(server, process):
    server.predictors = {"one": Predictor("first", error=RuntimeError("no memory")), "two": Predictor("second")}
    tables = process.load(Path("one")).predict(iter("abc"), fail)
    assert next(tables).image_id.tolist() == ["a", "b"]
    with pytest.raises(PredictionError, match=r"^RuntimeError: no memory$"):
        next(tables)
    assert server.killed == [1]
    with pytest.raises(PredictionError, match=r"^ValueError: it is damaged$"):
        process.load(Path("gone"))
    assert server.killed == [1, 2]
    assert len(list(process.load(Path("two")).predict(iter("abc"), fail))) == 2 and len(server.threads) == 3


def test_a_model_that_is_stopped_leaves_the_process_ready_for_the_next(server, process):
    one, two = Predictor("first"), Predictor("second")
    server.predictors, goes_on = {"one": one, "two": two}, threading.Event()

    def image_ids():
        yield from "abcd"
        goes_on.wait(60)
        yield "e"  # must not reach the second model

    tables = process.load(Path("one")).predict(image_ids(), fail)
    assert next(tables).image_id.tolist() == ["a", "b"]
    tables.close()
    goes_on.set()
    predictor = process.load(Path("two"))
    assert [table.image_id.tolist() for table in predictor.predict(iter("xyz"), fail)] == [["x", "y"], ["z"]]
    assert two.given == ["x", "y", "z"] and "e" not in one.given and server.killed == []


def test_an_error_of_the_image_ids_is_raised_after_the_images_before_it(server, process):
    server.predictors = {"one": Predictor("first")}

    def image_ids():
        yield from "abc"
        raise OSError("the disk is gone")

    tables = process.load(Path("one")).predict(image_ids(), fail)
    assert [next(tables).image_id.tolist() for _ in range(2)] == [["a", "b"], ["c"]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(tables)
    assert server.killed == []


@pytest.mark.parametrize("stops", [False, True])
def test_the_lungs_report_of_a_process_is_that_after_its_latest_model(server, stops):
    settings = ProcessSettings(server.cache, 4, torch.get_num_threads(), lungs=(Path("unet"), True))
    process = PredictionProcess(settings, "", SimpleNamespace(left=lambda: server.left_s))
    server.predictors = {"one": Predictor("first")}
    tables = process.load(Path("one")).predict(iter("abcdef"), fail)
    next(tables)
    assert process.lungs is None
    if stops:
        tables.close()
    else:
        list(tables)
    assert process.lungs == LungsReport(0, 0, 0, 0.0, "")
    ((_, _, lungs),) = server.loaded
    assert (lungs.bundle, lungs.masked, lungs.batch_size) == (Path("unet"), True, 4)
    process.kill()


@pytest.mark.parametrize(("stalled_s", "left_s", "error"), [(0.05, 60, PredictionError), (60, 0, OutOfTime)])
def test_a_silent_process_is_ended_after_a_time_or_at_the_deadline(server, process, monkeypatch, stalled_s, left_s, error):
    server.predictors, waits = {"one": Predictor("first")}, threading.Event()

    def image_ids():
        yield from "ab"
        waits.wait(60)

    tables = process.load(Path("one")).predict(image_ids(), fail)
    next(tables)
    monkeypatch.setattr(prediction_process, "STALLED_S", stalled_s)
    server.left_s = left_s
    with pytest.raises(error):
        next(tables)
    waits.set()
    assert server.killed == [1]


def test_the_exit_code_of_a_process_that_ends_is_told(process, monkeypatch):
    monkeypatch.setattr(prediction_process, "serve", lambda pipe, *_: pipe.close())
    with pytest.raises(PredictionError, match="the prediction process ended with exit code 7"):
        process.load(Path("one"))
