"""Where the lungs of an image are, whoever says so: their darkness, a finished run's masks, or a model on the spot."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kitlib.bundle import file_digest, read_record
from kitlib.classes import LUNG_CODES
from kitlib.lungs.darkness import lung_box
from kitlib.tables import BOX, read_table
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import MaskStore

FOUND = "found"


@dataclass(frozen=True)
class Lungs:
    """The lungs of one image, as far as they were found."""

    frame: np.ndarray | None  # (4,) xmin, ymin, xmax, ymax in original pixels; None: not found, the whole image counts
    mask: np.ndarray | None = None  # bool, of the shape of the cached pixels; None: nobody drew one


class LungFinder(Protocol):
    """Says where the lungs are, image by image of a batch."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]: ...


class DarkLungs:
    """By their darkness alone, see kitlib.lungs.darkness; no masks."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        found = []
        for xray in xrays:
            box = lung_box(xray.pixels)
            found.append(Lungs(None if box is None else in_original(box, xray)))
        return found


def in_original(box: np.ndarray, xray: CachedXray) -> np.ndarray:
    """xmin, ymin, xmax, ymax (4,) on the pixels of the decoded copy, in those of the original."""
    height, width = xray.pixels.shape
    # In this order, so that a frame at the far edge is not beyond it by a rounding.
    return box / [width, height, width, height] * np.array([xray.columns, xray.rows] * 2)


def segmenter_digest(record: dict[str, Any]) -> str:
    """SHA-256 (hex) of what a segmenter's masks follow from: a bundle's weights, and its recipe with the clean-up."""
    told = json.dumps([record["weights_sha256"], record["recipe"]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


class StoredLungs:
    """As a run of the notebook that applies a segmenter has found them: its table lungs and its masks.

    `fingerprint` (hex) tells one run's lungs from another's, and `segmenter` who drew them, see `segmenter_digest`.
    """

    def __init__(self, run_folder: str | Path) -> None:
        table_path = Path(run_folder) / "tables" / "lungs.parquet"
        table = read_table("lungs", table_path)
        self.segmenter = segmenter_digest(read_record(Path(run_folder) / "bundle"))
        self.run, self.known = Path(run_folder), frozenset(table.image_id)
        found = table[table.verdict == FOUND]
        self.frames = dict(zip(found.image_id, found[list(BOX)].to_numpy(float), strict=True))
        self.masks = MaskStore(Path(run_folder) / "masks")
        self.fingerprint = hashlib.sha256(f"{file_digest(table_path)} {self.masks.fingerprint()}".encode()).hexdigest()

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        return [self.of(xray) for xray in xrays]

    def of(self, xray: CachedXray) -> Lungs:
        """The same for one image. Raises ValueError for one the run has not looked at, or has seen in another size."""
        if xray.image_id not in self.known:
            raise ValueError(
                f"{self.run}, of {len(self.known)} images, has not looked at {xray.image_id!r}: apply the segmenter to the "
                "prepared run that is trained on. Extra images go with models that see whole ones in training (trained_on "
                "full, not masked)"
            )
        frame = self.frames.get(xray.image_id)
        if frame is None:
            return Lungs(None)
        codes = self.masks.read(xray.image_id)
        if codes.shape != xray.pixels.shape:
            raise ValueError(
                f"{self.masks.folder}: the mask of {xray.image_id} has {codes.shape} pixels, its decoded copy "
                f"{xray.pixels.shape}; apply the segmenter to this prepared run"
            )
        return Lungs(frame, np.isin(codes, LUNG_CODES))
