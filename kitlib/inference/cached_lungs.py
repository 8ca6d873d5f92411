"""Finds the lungs in a submission's images, once per image for all models; a failure never stops a prediction."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kitlib.inference.segment_lungs import LungSegmenter, load_segmenter
from kitlib.lungs.finders import LungFinder, Lungs
from kitlib.xrays.cache import CachedXray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LungsReport:
    """Snapshot of a CachedLungs: each field has the value, at one moment, of the attribute with the same name."""

    segmented: int
    missed: int
    overflowed: int
    seconds: float
    fault: str


class CachedLungs:
    """Finds lungs with the segmenter in the folder `bundle`, once per image, and caches the results.

    If the segmenter fails on an image, the image is treated as one without lungs. Segmentation stops if the bundle cannot be
    loaded, or if the segmenter fails on all images of a batch with at least two; then `fault` has the reason, otherwise "".
    `missed` is the number of segmented images without plausible lungs, `seconds` the time spent. For the last `most` images
    (None: all), the cache keeps the lung frame and, if `masked` is True, the lung mask. Thread-safe.
    """

    def __init__(self, bundle: Path | None, masked: bool, batch_size: int | None = None, most: int | None = None) -> None:
        self.bundle, self.masked, self.batch_size, self.most = bundle, masked, batch_size, most
        self.fault, self.missed, self.seconds = "", 0, 0.0
        self._segmenter: LungFinder | None = None
        self._cache: dict[str, tuple[np.ndarray | None, bytes | None]] = {}
        # The thread of a stopped model may still be reading ahead when the next model begins.
        self._one_at_a_time = threading.Lock()

    @property
    def segmented(self) -> int:
        """Number of images in the cache."""
        return len(self._cache)

    @property
    def overflowed(self) -> int:
        """Number of images in batches that overflowed in half precision and were segmented again in float32."""
        return self._segmenter.overflowed if isinstance(self._segmenter, LungSegmenter) else 0

    def report(self) -> LungsReport:
        """Return the counts, the time spent and the fault so far."""
        return LungsReport(self.segmented, self.missed, self.overflowed, self.seconds, self.fault)

    def begin(self) -> None:
        """Load the segmenter, unless it is loaded already or `fault` is set. If loading fails, set `fault` to the reason."""
        if self._segmenter is not None or self.fault:
            return
        began = time.monotonic()
        try:
            if self.bundle is None:
                raise FileNotFoundError(
                    "the weights contain no lung segmenter; set `lungs` in the kernel's YAML file to a segmenter's run"
                )
            self._segmenter = load_segmenter(self.bundle, batch_size=self.batch_size)
        except Exception as error:
            self._give_up(error)
        self.seconds += time.monotonic() - began

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return the lungs of each X-ray; X-rays that are not in the cache are segmented first."""
        with self._one_at_a_time:
            self.begin()
            began, uncached = time.monotonic(), [xray for xray in xrays if xray.image_id not in self._cache]
            if uncached and self._segmenter is not None and not self.fault:
                self._segment(self._segmenter, uncached)
            self.seconds += time.monotonic() - began
            lungs = [self._cached(xray.image_id) for xray in xrays]
            for image_id in list(self._cache)[: -self.most] if self.most else ():
                del self._cache[image_id]
            return lungs

    def _segment(self, segmenter: LungFinder, xrays: list[CachedXray]) -> None:
        """Segment a batch and cache the results.

        If the batch fails, its images are segmented one by one. If the batch has two or more images, and all of them fail,
        `fault` is set.
        """
        try:
            self._store(xrays, segmenter.find(xrays))
            return
        except Exception as error:
            failure = error
        results: list[Lungs | None] = []
        for xray in xrays:
            try:
                results += segmenter.find([xray])
            except Exception as error:
                failure = error
                results.append(None)
        if len(xrays) > 1 and all(lungs is None for lungs in results):
            self._give_up(failure)
        else:
            self._store(xrays, [lungs or Lungs(None) for lungs in results])

    def _store(self, xrays: Sequence[CachedXray], results: list[Lungs]) -> None:
        for xray, lungs in zip(xrays, results, strict=True):
            mask = lungs.mask if self.masked else None
            png = None if mask is None else cv2.imencode(".png", mask.astype(np.uint8))[1].tobytes()
            self._cache[xray.image_id] = lungs.frame, png
            self.missed += lungs.frame is None

    def _cached(self, image_id: str) -> Lungs:
        frame, png = self._cache.get(image_id, (None, None))
        if png is None:
            return Lungs(frame)
        return Lungs(frame, np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)) > 0)

    def _give_up(self, error: Exception) -> None:
        logger.error("the lung segmenter failed", exc_info=error)
        self.fault = f"failed: {type(error).__name__}: {error}; all further images are used uncropped"
