"""Predictions of one trained model over a stream of X-rays. Imports no training library: a submission starts in seconds."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib import classifier
from kitlib.bundle import BundleError, read_bundle
from kitlib.cache import CachedXray
from kitlib.classes import STUDY_CLASSES
from kitlib.device import autocast, pick_device
from kitlib.geometry import PLACEMENTS, Placement, clip_boxes, flip_boxes
from kitlib.tables import BOX, check_table, concatenate, empty_table

logger = logging.getLogger(__name__)

BATCH_SIZES = {"cuda": 64, "cpu": 8}
BATCHES_AHEAD = 3  # placed on canvases while the model computes


class Predictor:
    """One model and how its input is made. Boxes leave it in original pixels.

    `batch_size` is halved for good whenever the GPU's memory does not suffice. With `flip` a study's probabilities are the
    mean over the image and its mirror image; a detector gives the mirror image's boxes, mirrored back, as those of a further
    model, named with `_flip`.
    """

    def __init__(
        self, record: dict[str, Any], network: Any, device: torch.device, batch_size: int | None = None, flip: bool = False
    ) -> None:
        self.kind = "study" if record["family"] == "study" else "detector"
        self.model, self.fold, self.record = record["model"], record["fold"], record
        self.network, self.device, self.flip = network, device, flip
        self.batch_size = batch_size or BATCH_SIZES[device.type]
        self.seen: list[str] = []  # image_ids whose predictions have left, with a box or without
        self._place = PLACEMENTS[record["placement"]]

    def predict(self, stream: Iterable[CachedXray]) -> Iterator[pd.DataFrame]:
        """A table a batch, while a thread reads ahead in `stream`.

        Study: image_id, model, fold, the four classes and none, a row an image. Detector: table detections, no row for
        images without a box. An error of the stream is raised here; closing the iterator ends the thread.
        """
        for image_ids, placements, pixels in _ahead(self._canvases(stream)):
            studies = self.kind == "study"
            table = self._studies(image_ids, pixels) if studies else self._boxes(image_ids, placements, pixels)
            self.seen += image_ids
            yield table

    def _canvases(self, stream: Iterable[CachedXray]) -> Iterator[tuple[list[str], list[Placement], torch.Tensor]]:
        image_ids, placements, canvases = [], [], []
        for xray in stream:
            placement = self._place(xray.rows, xray.columns, self.record["image_size"])
            image_ids.append(xray.image_id)
            placements.append(placement)
            canvases.append(placement.image(xray.pixels))
            if len(canvases) >= self.batch_size:
                yield image_ids, placements, torch.from_numpy(np.stack(canvases))
                image_ids, placements, canvases = [], [], []
        if canvases:
            yield image_ids, placements, torch.from_numpy(np.stack(canvases))

    def _studies(self, image_ids: list[str], pixels: torch.Tensor) -> pd.DataFrame:
        found = np.concatenate(self._fitting(self._probabilities, pixels))
        table = pd.DataFrame(found, columns=[*STUDY_CLASSES, "none"])
        table.insert(0, "image_id", image_ids)
        table.insert(1, "model", self.model)
        table.insert(2, "fold", self.fold)
        return table

    def _probabilities(self, pixels: torch.Tensor) -> list[np.ndarray]:
        with torch.inference_mode(), autocast(self.device):
            x = self.network.normalise(pixels)
            found = classifier.probabilities(self.network(x))
            if self.flip:
                found = (found + classifier.probabilities(self.network(x.flip(-1)))) / 2
        return [found.double().cpu().numpy()]

    def _boxes(self, image_ids: list[str], placements: list[Placement], pixels: torch.Tensor) -> pd.DataFrame:
        tables = []
        for image_id, placement, found in zip(
            image_ids, placements, self._fitting(self.network.predict, pixels), strict=True
        ):
            tables.append(self._detections(image_id, self.model, placement, found[:, :4], found[:, 4]))
        if self.flip:
            mirrored = self._fitting(lambda each: self.network.predict(each.flip(-1)), pixels)
            for image_id, placement, found in zip(image_ids, placements, mirrored, strict=True):
                boxes = flip_boxes(found[:, :4], placement.canvas_columns)
                tables.append(self._detections(image_id, f"{self.model}_flip", placement, boxes, found[:, 4]))
        return concatenate(tables, "detections")

    def _detections(
        self, image_id: str, model: str, placement: Placement, boxes: np.ndarray, scores: np.ndarray
    ) -> pd.DataFrame:
        """Boxes of one canvas in original pixels, cut at the image's edges; what keeps less than a pixel is dropped."""
        corners, inside = clip_boxes(placement.boxes_to_original(boxes), placement.rows, placement.columns)
        table = pd.DataFrame(corners[inside], columns=list(BOX))
        return table.assign(image_id=image_id, model=model, fold=self.fold, score=scores[inside].astype(float).clip(0, 1))

    def _fitting(self, compute: Callable[[torch.Tensor], list[np.ndarray]], pixels: torch.Tensor) -> list[np.ndarray]:
        """`compute` over as many images at a time as memory allows, its lists joined."""
        found: list[np.ndarray] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.batch_size]
            try:
                found += compute(piece.to(self.device, non_blocking=True))
            except torch.cuda.OutOfMemoryError:
                if len(piece) == 1:
                    raise
                self.batch_size = (len(piece) + 1) // 2
                logger.warning(
                    "%s: out of GPU memory at %d images, going on with %d", self.model, len(piece), self.batch_size
                )
            else:
                start += len(piece)
                continue
            # Outside the handler: the error's traceback holds the tensors that are to be freed.
            torch.cuda.empty_cache()
        return found


def load_predictor(
    bundle_folder: str | Path, device: torch.device | None = None, batch_size: int | None = None, flip: bool = False
) -> Predictor:
    """The bundle's model on `device` (default: `pick_device`). Raises BundleError for a bundle that cannot be trusted."""
    record, state_dict = read_bundle(bundle_folder)
    device = device or pick_device()
    if record["family"] == "study":
        load = classifier.load
    elif record["family"] == "faster_rcnn":
        from kitlib.faster_rcnn import load
    elif record["family"] == "yolo":
        # Only here: ultralytics is slow to import and missing where no YOLO was sent along.
        from kitlib.yolo import load
    else:
        raise BundleError(f"{bundle_folder}: no family {record['family']!r}; there are: study, faster_rcnn, yolo")
    return Predictor(record, load(record, state_dict, device), device, batch_size, flip)


def study_and_image_scores(chunks: Iterable[pd.DataFrame], images: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables study_scores (mean over a study's images) and image_scores out of a study model's predictions of images."""
    chunks = [chunk for chunk in chunks if len(chunk)]
    if not chunks:
        return empty_table("study_scores"), empty_table("image_scores")
    found = pd.concat(chunks, ignore_index=True)
    studies = images.set_index("image_id").study_id
    unknown = found.loc[~found.image_id.isin(studies.index), "image_id"]
    if len(unknown):
        raise ValueError(f"{len(unknown)} predicted images are not in the table images, first {unknown.iloc[0]}")
    found["study_id"] = found.image_id.map(studies)
    mean = found.groupby(["study_id", "model", "fold"], as_index=False)[list(STUDY_CLASSES)].mean()
    return check_table(mean, "study_scores"), check_table(found[["image_id", "model", "fold", "none"]], "image_scores")


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, made by a thread that stays at most BATCHES_AHEAD in front."""
    done, stopped = object(), threading.Event()
    made: queue.Queue = queue.Queue(BATCHES_AHEAD)

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
