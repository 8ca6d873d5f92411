"""Logs training progress: one line per epoch, and one per minute within long epochs; also passes metrics to loggers."""

import logging
import time
from collections.abc import Sequence

from pytorch_lightning.loggers import Logger

logger = logging.getLogger(__name__)

BETWEEN_LINES_S = 60.0


class Progress:
    """Logs the training progress of one model. `title` names the model and fold, `epochs` is the recipe's number of epochs.

    If `curves`, a Lightning logger, is given, the metrics of each epoch are also passed to it.
    """

    def __init__(self, title: str, epochs: int, curves: Logger | None = None) -> None:
        self.title, self.epochs, self.curves, self.latest = title, epochs, curves, time.monotonic()

    def log_batch(self, epoch: int, batch: int, batches: int) -> None:
        """Log that a batch is done, unless another line was logged less than a minute ago.

        `epoch` and `batch` are numbers from 1, `batches` is the number of batches per epoch.
        """
        if time.monotonic() - self.latest >= BETWEEN_LINES_S:
            self.latest = time.monotonic()
            logger.info("%s: epoch %d of %d, batch %d of %d", self.title, epoch, self.epochs, batch, batches)

    def log_epoch(self, history: Sequence[dict[str, float]], seconds: Sequence[float]) -> None:
        """Log loss, score and duration of the last epoch in `history`, and the estimated time for the remaining epochs.

        `seconds` has the duration of each of this session's epochs. Training may end earlier than estimated, because of the
        recipe's `patience`.
        """
        row, remaining = history[-1], self.epochs - len(history)
        self.latest = time.monotonic()
        loss = f"loss {row['train_loss']:.3f}, " if "train_loss" in row else ""
        left = f"about {duration(remaining * sum(seconds) / len(seconds))} left" if remaining else "the last epoch"
        figures = f"{loss}score {row['score']:.4f}, {duration(row['seconds'])}, {left}"
        logger.info("%s: epoch %d of %d, %s", self.title, len(history), self.epochs, figures)
        if self.curves:
            self.curves.log_metrics(row, step=len(history))
            self.curves.save()


def duration(seconds: float) -> str:
    """Return a duration as text, in seconds, minutes or hours."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
