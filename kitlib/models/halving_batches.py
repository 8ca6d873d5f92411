"""Runs predictions in batches whose size is halved when a GPU runs out of memory."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from kitlib.device import is_out_of_memory

logger = logging.getLogger(__name__)


class HalvingBatches:
    """Splits a batch into pieces of at most `size` images; `size` is halved for good when the GPU runs out of memory."""

    def __init__(self, model: str, device: torch.device, size: int) -> None:
        self.model, self.device, self.size = model, device, size

    def __call__(self, compute: Callable[[torch.Tensor], list[Any]], pixels: torch.Tensor) -> list[Any]:
        """Call `compute` on pieces of `pixels` (n, ...), moved to the device; return all results in one list.

        `compute` returns a list of results for its piece. If a single image does not fit into memory, the error is raised.
        """
        results: list[Any] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.size]
            try:
                results += compute(piece.to(self.device, non_blocking=True))
            except RuntimeError as error:
                if len(piece) == 1 or not is_out_of_memory(error):
                    raise
                self.size = (len(piece) + 1) // 2
                logger.warning("%s: out of GPU memory at %d images, continuing with %d", self.model, len(piece), self.size)
            else:
                start += len(piece)
                continue
            # Outside of the except block, because in it the error's traceback would keep the tensors alive.
            torch.cuda.empty_cache()
        return results
