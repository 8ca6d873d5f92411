"""The ledger of a submission: what each stage did, how long it took, and what was dropped and why."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from kitlib.deadline import OutOfTime
from kitlib.tables import storable

if TYPE_CHECKING:
    from kitlib.inference.cached_lungs import LungsReport
    from kitlib.inference.decoded_once import DecodedOnce

logger = logging.getLogger(__name__)


class Ledger:
    """Collects the rows of a submission's ledger; several threads may add rows."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def table(self) -> pd.DataFrame:
        """Return the rows so far as a table with the columns stage, files, seconds and note."""
        return pd.DataFrame(self._rows, columns=["stage", "files", "seconds", "note"])

    def note(self, stage: str, files: int, began: float, note: str = "") -> None:
        """Add and log a row about a stage; `began` is the time.monotonic() value at which the stage began."""
        seconds, note = time.monotonic() - began, storable(note)
        self._rows.append({"stage": stage, "files": files, "seconds": round(seconds, 1), "note": note})
        logger.info("%s: %d files in %.1f s. %s", stage, files, seconds, note)

    def note_lungs(self, reports: "Sequence[LungsReport]") -> None:
        """Add rows about the segmentation of lungs; `reports` has one report for each process that segmented them."""
        now = time.monotonic()
        for lungs in reports:
            if lungs.fault:
                self.note("lungs", 0, now, lungs.fault)
            if lungs.segmented:
                notes = [f"{lungs.missed} images without plausible lungs are used uncropped"] if lungs.missed else []
                if lungs.overflowed:
                    notes.append(f"{lungs.overflowed} overflowed in half precision; segmented in float32")
                self.note("lungs", lungs.segmented, now - lungs.seconds, "; ".join(notes))

    def note_decoding(self, xrays: "DecodedOnce", files: int) -> None:
        """Add rows about files that failed, had warnings, were slow or were never decoded, out of `files` files in all."""
        now, outcomes = time.monotonic(), list(xrays.outcomes)
        for failed in (outcome for outcome in outcomes if outcome.status == "failed"):
            self.note("decode", 1, now, f"{failed.image_id} keeps its placeholder prediction: {failed.reason}")
        warned: dict[str, list[str]] = {}
        for outcome in outcomes:
            for warning in outcome.warnings:
                warned.setdefault(warning, []).append(outcome.image_id)
        for warning, names in sorted(warned.items(), key=lambda item: -len(item[1])):
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.note("decode", len(names), now, f"{names[0]}{others} decoded with a warning: {warning}")
        if xrays.limits.note:
            self.note("decode", xrays.limits.slow, now, xrays.limits.note)
        if len(outcomes) < files:
            reason = describe_failure(xrays.error) if xrays.error else "time was up" if outcomes else "no model read them"
            self.note("decode", files - len(outcomes), now, f"never decoded; {reason}")


def describe_failure(error: BaseException) -> str:
    """Return the ledger's note for an error; log the error's traceback, unless the error is OutOfTime."""
    if isinstance(error, OutOfTime):
        return "time was up"
    logger.error("a stage failed", exc_info=error)
    return f"failed: {type(error).__name__}: {error}"
