"""The images of a test set, decoded while the first model predicts and read by every further model."""

import threading
from collections.abc import Iterator

import pandas as pd

from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.worker import Outcome


class DecodedOnce:
    """The readable images of a test set, for any number of passes; the first pass decodes them while the model predicts.

    `outcomes` contains one result per file decoded so far, including files that failed. If decoding as a whole fails, all
    passes end, and `error` is the reason. Passes may overlap, because the thread of a stopped model may still be reading
    ahead when the next model begins.
    """

    def __init__(self, cache: XrayCache, images: pd.DataFrame, workers: int | None, timeout_s: float) -> None:
        self.cache = cache
        self.error: Exception | None = None
        self.outcomes: list[Outcome] = []
        self._decoding = cache.decode(images, workers=workers, timeout_s=timeout_s)
        self._one_at_a_time = threading.Lock()

    def without(self, image_ids: set[str]) -> Iterator[CachedXray]:
        """Yield all readable images except those in `image_ids`; images that no pass has decoded yet are decoded."""
        index = 0
        while self._decode_up_to(index):
            outcome = self.outcomes[index]
            index += 1
            if outcome.status != "failed" and outcome.image_id not in image_ids:
                yield self.cache.read(outcome.image_id)

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
