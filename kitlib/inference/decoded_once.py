"""Decodes a test set once, while the first model predicts it, for all models of a submission."""

import logging
import threading
from collections.abc import Iterator

import pandas as pd

from kitlib.errors import CacheError
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.worker import Outcome

logger = logging.getLogger(__name__)


class DecodedOnce:
    """The readable images of a test set, for any number of passes; the first pass decodes them while the model predicts.

    `outcomes` contains one result per file decoded so far, including files that failed. If decoding as a whole fails, all
    passes end, and `error` is the reason. Passes may overlap, because the thread of a stopped model may still be reading
    ahead when the next model begins.
    """

    def __init__(self, cache: XrayCache, images: pd.DataFrame, workers: int, timeout_s: float) -> None:
        """Decode no file yet. `workers` is the number of decoding processes, 0 for one per core; `timeout_s` is per file."""
        self.cache, self.images, self.timeout_s = cache, images, timeout_s
        self.error: Exception | None = None
        self.outcomes: list[Outcome] = []
        self._decoding = cache.decode(images, workers=workers or None, timeout_s=timeout_s)
        self._one_at_a_time = threading.Lock()

    def without(self, image_ids: set[str]) -> Iterator[CachedXray]:
        """Yield all readable images except those in `image_ids`; images that no pass has decoded yet are decoded."""
        index = 0
        while self._decode_up_to(index):
            outcome = self.outcomes[index]
            index += 1
            if outcome.status != "failed" and outcome.image_id not in image_ids and (xray := self._read(index - 1)):
                yield xray

    def sized(self, images: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of `images` that are decoded so far; `rows` and `columns` are added, the image's original size."""
        sizes = {done.image_id: (done.rows, done.columns) for done in list(self.outcomes) if done.status != "failed"}
        images = images[images.image_id.isin(sizes)].copy()
        images[["rows", "columns"]] = [sizes[name] for name in images.image_id]
        return images

    def close(self) -> None:
        """Stop decoding, unless the thread of a stopped model still waits for a file after two seconds."""
        if self._one_at_a_time.acquire(timeout=2):
            self._decoding.close()
            self._one_at_a_time.release()

    def _read(self, index: int) -> CachedXray | None:
        """Return the image of `outcomes[index]`, decoded again if its entry is damaged or gone; None if that fails."""
        image_id = self.outcomes[index].image_id
        try:
            return self.cache.read(image_id)
        except (CacheError, KeyError) as error:
            logger.warning("decoding %s again: %s", image_id, error)
        image = self.images[self.images.image_id == image_id]
        self.outcomes[index] = next(self.cache.decode(image, workers=1, timeout_s=self.timeout_s))
        return None if self.outcomes[index].status == "failed" else self.cache.read(image_id)

    def _decode_up_to(self, index: int) -> bool:
        """Decode the next file if `outcomes` has no element `index` yet; return whether it has one now."""
        with self._one_at_a_time:
            if index == len(self.outcomes):
                try:
                    self.outcomes.append(next(self._decoding))
                except StopIteration:
                    return False
                except Exception as error:
                    self.error = error
                    return False
            return True
