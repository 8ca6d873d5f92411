"""A submission's lungs: segmented once an image, whichever models ask, and never at the price of a prediction."""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kitlib.inference.segment_lungs import load_segmenter
from kitlib.lungs.finders import LungFinder, Lungs
from kitlib.xrays.cache import CachedXray

logger = logging.getLogger(__name__)


class CachedLungs:
    """Asks the segmenter of `bundle` about each image once; a `LungFinder`.

    An image that it fails at has no lungs. Without a bundle that works, or once it has failed at each image of several, it
    finds no more, and `fault` says why ("" before).
    `segmented` is the number of images that it has looked at, `missed` those of them without plausible lungs, `seconds` the
    time that took. Frames are kept, and masks, as PNG, where they are asked for by `masked`; with `most`, of so many images,
    the last ones. Several threads may ask.
    """

    def __init__(self, bundle: Path | None, masked: bool, batch_size: int | None = None, most: int | None = None) -> None:
        self.bundle, self.masked, self.batch_size, self.most = bundle, masked, batch_size, most
        self.fault, self.missed, self.seconds = "", 0, 0.0
        self._segmenter: LungFinder | None = None
        self._known: dict[str, tuple[np.ndarray | None, bytes | None]] = {}
        # A model that was stopped may still be reading ahead in its thread when the next one begins.
        self._one_at_a_time = threading.Lock()

    @property
    def segmented(self) -> int:
        return len(self._known)

    def begin(self) -> None:
        """Load the segmenter, unless that has been done or has failed."""
        if self._segmenter is not None or self.fault:
            return
        began = time.monotonic()
        try:
            if self.bundle is None:
                raise FileNotFoundError("the weights have no segmenter's bundle; name its run by the kernel's key `lungs`")
            self._segmenter = load_segmenter(self.bundle, batch_size=self.batch_size)
        except Exception as error:
            self._give_up(error)
        self.seconds += time.monotonic() - began

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        with self._one_at_a_time:
            self.begin()
            began, new = time.monotonic(), [xray for xray in xrays if xray.image_id not in self._known]
            if new and self._segmenter is not None and not self.fault:
                self._segment(self._segmenter, new)
            self.seconds += time.monotonic() - began
            found = [self._kept(xray.image_id) for xray in xrays]
            for image_id in list(self._known)[: -self.most] if self.most else ():
                del self._known[image_id]
            return found

    def _segment(self, segmenter: LungFinder, xrays: list[CachedXray]) -> None:
        """One image that the segmenter fails at is missed alone; where it fails at all of a batch, it is given up."""
        try:
            self._keep(xrays, segmenter.find(xrays))
            return
        except Exception as error:
            failure = error
        alone: list[Lungs | None] = []
        for xray in xrays:
            try:
                alone += segmenter.find([xray])
            except Exception as error:
                failure = error
                alone.append(None)
        if len(xrays) > 1 and all(lungs is None for lungs in alone):
            self._give_up(failure)
        else:
            self._keep(xrays, [lungs or Lungs(None) for lungs in alone])

    def _keep(self, xrays: Sequence[CachedXray], found: list[Lungs]) -> None:
        for xray, lungs in zip(xrays, found, strict=True):
            mask = lungs.mask if self.masked else None
            png = None if mask is None else cv2.imencode(".png", mask.astype(np.uint8))[1].tobytes()
            self._known[xray.image_id] = lungs.frame, png
            self.missed += lungs.frame is None

    def _kept(self, image_id: str) -> Lungs:
        frame, png = self._known.get(image_id, (None, None))
        if png is None:
            return Lungs(frame)
        return Lungs(frame, np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)) > 0)

    def _give_up(self, error: Exception) -> None:
        logger.error("the lungs' segmenter failed", exc_info=error)
        self.fault = f"failed: {type(error).__name__}: {error}; images are seen whole from here on"
