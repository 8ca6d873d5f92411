"""Decodes a test set only once for all models of a submission, while the first model predicts."""

import logging
import math
import threading
from collections.abc import Iterator

import pandas as pd

from kitlib.errors import CacheError
from kitlib.xrays.cache import CachedXray, XrayCache, decoding_pool, usable_cores
from kitlib.xrays.file_limits import FileLimits
from kitlib.xrays.worker import Outcome

logger = logging.getLogger(__name__)


class DecodedOnce:
    """Iterates over a test set's readable images any number of times; the first iteration decodes them.

    `outcomes` contains one result per file decoded so far, including files that failed. If decoding as a whole fails, all
    iterations end, and `error` is the reason. Iterations may overlap: the thread of a model that was stopped may still read
    images when the next model begins. `limits` sets the time limit of each file.
    """

    def __init__(
        self, cache: XrayCache, images: pd.DataFrame, workers: int, longest_s: float, seconds: float = math.inf
    ) -> None:
        """Prepare `workers` decoding processes (0: one per core), without decoding a file yet.

        A file may take at most `longest_s` seconds to decode, and less after many slow files. `seconds` is the time for
        decoding and prediction together.
        """
        self.cache, self.images = cache, images
        self.error: Exception | None = None
        self.outcomes: list[Outcome] = []
        workers = workers or usable_cores()
        self.limits = FileLimits(longest_s, seconds, workers, len(images))
        self._pool = decoding_pool(workers)
        self._decoding = cache.decode(images, workers, self.limits.next_limit, self._pool)
        self._one_at_a_time, self._closed = threading.Lock(), False

    def without(self, image_ids: set[str]) -> Iterator[CachedXray]:
        """Yield all readable images except those in `image_ids`; images that have not been decoded yet are decoded."""
        for index in self._readable_without(image_ids):
            if xray := self._read(index):
                yield xray

    def ids_without(self, image_ids: set[str]) -> Iterator[str]:
        """Yield the ids of all readable images except `image_ids`, for a process that reads the images from `cache`."""
        for index in self._readable_without(image_ids):
            yield self.outcomes[index].image_id

    def restore(self, image_id: str) -> bool:
        """Decode an image again if its decoded copy is damaged or gone; return whether the copy can be read now."""
        index = next(index for index, outcome in enumerate(self.outcomes) if outcome.image_id == image_id)
        return self._read(index) is not None

    def sized(self, images: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of `images` that have been decoded, with the original size in the columns `rows` and `columns`."""
        sizes = {done.image_id: (done.rows, done.columns) for done in list(self.outcomes) if done.status != "failed"}
        images = images[images.image_id.isin(sizes)].copy()
        images[["rows", "columns"]] = [sizes[name] for name in images.image_id]
        return images

    def close(self) -> None:
        """Stop decoding at once; all iterations end, even if a stopped model's thread is still waiting for a file."""
        self._closed = True
        self._pool.stop()
        self._pool.join()

    def _readable_without(self, image_ids: set[str]) -> Iterator[int]:
        index = 0
        while self._decode_up_to(index):
            if self.outcomes[index].status != "failed" and self.outcomes[index].image_id not in image_ids:
                yield index
            index += 1

    def _read(self, index: int) -> CachedXray | None:
        """Return the image of `outcomes[index]`, if necessary after decoding it again; return None if that fails, too."""
        image_id = self.outcomes[index].image_id
        try:
            return self.cache.read(image_id)
        except (CacheError, KeyError, OSError) as error:
            logger.warning("image %s is decoded again, because its decoded copy cannot be read: %s", image_id, error)
        with self._one_at_a_time:
            if self._closed:
                return None
            image = self.images[self.images.image_id == image_id]
            try:
                self.outcomes[index] = next(self.cache.decode(image, 1, self.limits.next_limit, self._pool))
                return None if self.outcomes[index].status == "failed" else self.cache.read(image_id)
            except Exception as error:
                self.outcomes[index] = Outcome(image_id, "failed", f"its decoded copy was lost: {error}")
                return None

    def _decode_up_to(self, index: int) -> bool:
        """Decode the next file if `outcomes` has no element `index` yet; return whether this element exists now."""
        with self._one_at_a_time:
            if index == len(self.outcomes) and not self._closed:
                try:
                    outcome = next(self._decoding)
                    self.limits.count(outcome)
                    self.outcomes.append(outcome)
                except StopIteration:
                    return False
                except Exception as error:
                    self.error = None if self._closed else error
            return index < len(self.outcomes)
