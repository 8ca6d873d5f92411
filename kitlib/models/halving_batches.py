"""As many images at a time as a GPU's memory allows."""

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class HalvingBatches:
    """Computes over a batch in pieces of at most `size` images, halved for good whenever memory does not suffice."""

    def __init__(self, model: str, device: torch.device, size: int) -> None:
        self.model, self.device, self.size = model, device, size

    def __call__(self, compute: Callable[[torch.Tensor], list[Any]], pixels: torch.Tensor) -> list[Any]:
        """The lists that `compute` gives of `pixels` (n, ...) on the device, joined."""
        found: list[Any] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.size]
            try:
                found += compute(piece.to(self.device, non_blocking=True))
            except torch.cuda.OutOfMemoryError:
                if len(piece) == 1:
                    raise
                self.size = (len(piece) + 1) // 2
                logger.warning("%s: out of GPU memory at %d images, going on with %d", self.model, len(piece), self.size)
            else:
                start += len(piece)
                continue
            # Outside the handler: the error's traceback holds the tensors that are to be freed.
            torch.cuda.empty_cache()
        return found
