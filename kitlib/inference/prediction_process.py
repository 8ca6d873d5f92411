"""Predicts in a separate process with its own GPU; the parent process decodes the images and fuses the predictions."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.deadline import Deadline, OutOfTime
from kitlib.errors import CacheError, PredictionError
from kitlib.inference.cached_lungs import CachedLungs, LungsReport
from kitlib.processes import die_with_parent, kill_family
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.worker import LightContext

logger = logging.getLogger(__name__)

POLL_S = 0.2
# A process that has work to do, but sends nothing for this long, is stuck. Loading a model and predicting its first batch,
# which includes cuDNN's choice of algorithms, take a small part of this time.
STALLED_S = 300.0
STARTING_S = 300.0  # for importing torch, from a disk that all processes read
STOPPING_S = 60.0  # for the batches that are prepared already when a model is stopped


@dataclass(frozen=True)
class ProcessSettings:
    """Settings that a prediction process gets when it starts."""

    cache: XrayCache  # has the decoded images
    batch_size: int
    threads: int  # CPU threads for torch
    lungs: tuple[Path | None, bool] | None = None  # a segmenter's bundle, and whether masks are needed; None: neither


class PredictionProcess:
    """Runs a process that predicts with one model after the other; `load` starts the process if it is not running.

    `gpu` is the value of CUDA_VISIBLE_DEVICES in the process, "" for no GPU. `lungs` is the latest LungsReport of the
    process. It is None until a model has finished, and always None if `settings.lungs` is None.
    """

    def __init__(self, settings: ProcessSettings, gpu: str, deadline: Deadline) -> None:
        self.settings, self.gpu, self.deadline = settings, gpu, deadline
        self.lungs: LungsReport | None = None
        self._process: Any = None
        self._connection: Any = None

    def load(self, bundle: Path) -> "RemotePredictor":
        """Return a predictor with the model in `bundle`, loaded in the process.

        Raises PredictionError if the model cannot be loaded, or if the process dies or gets stuck, and OutOfTime if the
        deadline passes. After an error, the process has been killed.
        """
        if self._process is None:
            self._start()
        self.send("load", bundle)
        return RemotePredictor(self, *self.receive()[1])

    def send(self, what: str, content: Any = None) -> None:
        """Send a message to the process. Raises PredictionError if the process has ended."""
        try:
            self._connection.send((what, content))
        except (AttributeError, OSError) as error:  # AttributeError: it has been killed
            raise PredictionError("the prediction process has ended") from error

    def receive(self, last_sent: Callable[[], float] = lambda: 0.0, limit_s: float | None = None) -> tuple[str, Any]:
        """Return the name and the content of the next message from the process.

        `last_sent` returns the time.monotonic() value at which the process last got work. The process may be silent for
        `limit_s` seconds (default: 300) after this time and after the start of this call. Raises the errors of `load`.
        """
        limit_s = limit_s or STALLED_S
        began, connection, process = time.monotonic(), self._connection, self._process
        try:
            while not connection.poll(POLL_S):
                if self.deadline.left() <= 0:
                    raise OutOfTime
                if time.monotonic() - max(began, last_sent()) > limit_s:
                    raise PredictionError(f"the prediction process was stuck for {limit_s:.0f} s and was ended")
            what, content = connection.recv()
        except (EOFError, OSError) as error:
            process.join(1)
            self.kill()
            raise PredictionError(f"the prediction process ended with exit code {process.exitcode}") from error
        except BaseException:
            self.kill()
            raise
        if what == "failed":
            self.kill()  # after an error of CUDA, every later model would fail in this process, too
            raise PredictionError(content)
        return what, content

    def kill(self) -> None:
        """Kill the process if it is running."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if process is not None:
            kill_family(process.pid)
            process.join()
            connection.close()

    def _start(self) -> None:
        context = LightContext()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.settings, self.gpu, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()  # otherwise the process's end would go unnoticed
        self.receive(limit_s=STARTING_S)


class RemotePredictor:
    """A model in a PredictionProcess, used like a Predictor; it has only the attributes that a submission reads."""

    def __init__(self, process: PredictionProcess, model: str, fold: int) -> None:
        self.process, self.model, self.fold = process, model, fold
        self.seen: list[str] = []
        self.lungs_missed = self.overflowed = 0
        self._last_sent, self._sending, self._ended = 0.0, threading.Lock(), False
        self._failure: Exception | None = None  # in the thread that sends image ids

    def predict(self, image_ids: Iterable[str], restore: Callable[[str], bool]) -> Generator[pd.DataFrame, None, None]:
        """Predict images from the cache; yield one table of predictions per batch. A thread iterates over `image_ids`.

        If the decoded copy of an image cannot be read, `restore` decodes the image again and returns whether the copy can be
        read now. Raises the errors of `PredictionProcess.load`, and errors that iterating over `image_ids` raises. Closing
        the generator before its end waits until the process is ready for another model.
        """
        threading.Thread(target=self._send_all, args=[image_ids], name="image ids", daemon=True).start()
        what = ""
        try:
            while True:
                what, content = self.process.receive(lambda: self._last_sent)
                if what == "done":
                    self.process.lungs = content or self.process.lungs
                    if self._failure is not None:
                        raise self._failure
                    return
                if what == "unreadable":
                    self.process.send("restored", restore(content))
                    continue
                table, seen, self.lungs_missed, self.overflowed = content
                self.seen += seen
                yield table
        except (PredictionError, OutOfTime):
            what = "failed"
            raise
        finally:
            with self._sending:
                self._ended = True
            if what not in ("done", "failed"):
                self._stop()

    def _send_all(self, image_ids: Iterable[str]) -> None:
        try:
            for image_id in image_ids:
                if not self._send("image", image_id):
                    return
        except PredictionError:
            return  # the next `receive` says why the process has ended
        except Exception as error:  # raised by `predict` after the images that were sent
            self._failure = error
        with contextlib.suppress(PredictionError):
            self._send("end")

    def _send(self, what: str, content: Any = None) -> bool:
        """Send a message and return True. Return False if the prediction has ended: a message would reach the next model."""
        with self._sending:
            if not self._ended:
                self.process.send(what, content)
                self._last_sent = time.monotonic()
            return not self._ended

    def _stop(self) -> None:
        """Make the process stop predicting with this model, and discard the batches that the process has prepared."""
        began = time.monotonic()
        try:
            self.process.send("stop")
            while (message := self.process.receive())[0] != "done":
                if time.monotonic() - began > STOPPING_S:
                    self.process.kill()
                    return
            self.process.lungs = message[1] or self.process.lungs
        except (PredictionError, OutOfTime):
            return  # it has ended, or failed at one of these batches


def serve(pipe: Any, settings: ProcessSettings, gpu: str, parent: int) -> None:
    """Main function of a prediction process: load and predict as the parent's messages say, until the parent ends."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    die_with_parent(parent)
    logging.basicConfig(level=logging.WARNING, format=f"prediction process {gpu}: %(message)s")
    import torch

    from kitlib.inference.predict import load_predictor

    connection = _Connection(pipe)
    torch.set_num_threads(settings.threads)
    lungs = None if settings.lungs is None else CachedLungs(*settings.lungs, settings.batch_size)
    loads: queue.SimpleQueue[tuple[Path, _Inbox]] = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(connection, loads), daemon=True).start()
    connection.send(("started", None))
    while True:
        (bundle, inbox), predictor = loads.get(), None  # frees the previous model's memory
        try:
            predictor, sent = load_predictor(bundle, batch_size=settings.batch_size, lungs=lungs), 0
            connection.send(("loaded", (predictor.model, predictor.fold)))
            for table in predictor.predict(inbox.xrays(settings.cache, connection)):
                counts = predictor.lungs_missed, predictor.overflowed
                connection.send(("predicted", (table, predictor.seen[sent:], *counts)))
                sent = len(predictor.seen)
            connection.send(("done", None if lungs is None else lungs.report()))
        except Exception as error:
            logger.error("%s failed", bundle, exc_info=error)
            connection.send(("failed", f"{type(error).__name__}: {error}"))
        finally:
            inbox.stop()


class _Connection:
    """Connection of a prediction process to its parent; several threads may send."""

    def __init__(self, connection: Any) -> None:
        self.recv, self._connection, self._one_at_a_time = connection.recv, connection, threading.Lock()

    def send(self, message: tuple[str, Any]) -> None:
        with self._one_at_a_time:
            self._connection.send(message)


class _Inbox:
    """Queues of what the parent sends for one model: ids of images, and whether an unreadable image was decoded again."""

    def __init__(self) -> None:
        self.image_ids: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.restored: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True
        self.image_ids.put(None)
        self.restored.put(False)

    def xrays(self, cache: XrayCache, connection: _Connection) -> Iterator[CachedXray]:
        """Yield decoded images from `cache`. The parent decodes unreadable images again; if that fails, they are skipped."""
        while (image_id := self.image_ids.get()) is not None and not self.stopped:
            try:
                yield cache.read(image_id)
            except (CacheError, KeyError, OSError):
                connection.send(("unreadable", image_id))
                if self.restored.get():
                    yield cache.read(image_id)


def _receive_all(connection: _Connection, loads: "queue.SimpleQueue[tuple[Path, _Inbox]]") -> None:
    """Receive the parent's messages: put each model with a new inbox into `loads`, and later messages into this inbox."""
    inbox = _Inbox()
    while True:
        try:
            what, content = connection.recv()
        except (EOFError, OSError):  # the parent has closed the connection
            os._exit(0)
        if what == "load":
            inbox = _Inbox()
            loads.put((content, inbox))
        elif what == "stop":
            inbox.stop()
        elif what == "restored":
            inbox.restored.put(content)
        else:
            inbox.image_ids.put(content if what == "image" else None)
