"""Finders, which locate the lungs in images: by their darkness, or from the masks of a finished run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kitlib.bundle import file_digest, read_record
from kitlib.errors import BundleError
from kitlib.lungs.clean_up import CLEAN_UP, FOUND, clean_up_mask, in_original
from kitlib.lungs.darkness import lung_box
from kitlib.recipes.fields import SegmenterRecipe
from kitlib.settings import from_dict
from kitlib.tables import BOX, read_table
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import MaskStore


@dataclass(frozen=True)
class Lungs:
    """The frame and the mask of the lungs in one image; both are None if the lungs were not found."""

    frame: np.ndarray | None  # (4,) xmin, ymin, xmax, ymax in original pixels; None if not found: the whole image is used
    mask: np.ndarray | None = None  # bool, of the same shape as the cached pixels; None if there is no mask


class LungFinder(Protocol):
    """Interface of finders: objects that locate the lungs in images."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return one Lungs per image, in the order of the images."""


class DarkLungs:
    """A finder that uses the lungs' darkness alone (see kitlib.lungs.darkness); it finds frames, but no masks."""

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return one Lungs per image, with a frame, or without one if the lungs are uncertain."""
        lungs = []
        for xray in xrays:
            box = lung_box(xray.pixels)
            lungs.append(Lungs(None if box is None else in_original(box, xray)))
        return lungs


def segmenter_digest(record: dict[str, Any]) -> str:
    """Return a SHA-256 (hex) of what decides which lungs a segmenter finds: its weights, its recipe, the clean-up version.

    `record` is the record of the segmenter's bundle.
    """
    content = json.dumps([record["weights_sha256"], record["recipe"], CLEAN_UP], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class StoredLungs:
    """A finder that reads the lungs from a finished run of notebook 14: its `lungs` table and its masks.

    The stored masks are those that the network predicted; they are cleaned up when they are read, as in a submission.
    `fingerprint` (hex) changes if a frame or a mask changes. `segmenter` is the digest of the segmenter that found the lungs
    (see `segmenter_digest`). `image_ids` are the ids of all images in the run. Raises BundleError if the run is from a
    version of the kit that cleans up masks differently.
    """

    def __init__(self, run_folder: str | Path) -> None:
        table_path = Path(run_folder) / "tables" / "lungs.parquet"
        table = read_table("lungs", table_path)
        record = read_record(Path(run_folder) / "bundle")
        if record["architecture"].get("clean_up") != CLEAN_UP:
            raise BundleError(
                f"{run_folder} was written by a version of the kit that cleaned up masks differently; apply the "
                "segmenter again with notebook 14"
            )
        self.recipe, self.segmenter = from_dict(SegmenterRecipe, record["recipe"]), segmenter_digest(record)
        self.run, self.image_ids = Path(run_folder), frozenset(table.image_id)
        found_rows = table[table.verdict == FOUND]
        self.frames = dict(zip(found_rows.image_id, found_rows[list(BOX)].to_numpy(float), strict=True))
        self.masks = MaskStore(Path(run_folder) / "masks")
        self.fingerprint = hashlib.sha256(f"{file_digest(table_path)} {self.masks.fingerprint()}".encode()).hexdigest()

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return one Lungs per image. Raises ValueError if an image was not segmented, or was segmented at another size."""
        return [self.find_one(xray) for xray in xrays]

    def find_one(self, xray: CachedXray) -> Lungs:
        """Return the lungs of one image.

        Raises ValueError if the run has not segmented the image, or if the stored mask has another size than `xray`.
        """
        if xray.image_id not in self.image_ids:
            raise ValueError(
                f"{self.run} has segmented {len(self.image_ids)} images, but not the image {xray.image_id!r}. If the image "
                "is from an extra run, leave out the extra run, or train on whole images: trained_on='full', masked=False. "
                "Otherwise, apply the segmenter to the prepared run that is used for training"
            )
        frame = self.frames.get(xray.image_id)
        if frame is None:
            return Lungs(None)
        codes = self.masks.read(xray.image_id)
        if codes.shape != xray.pixels.shape:
            raise ValueError(
                f"{self.masks.folder}: the mask of {xray.image_id!r} has {codes.shape} pixels, but the image in the "
                f"prepared run has {xray.pixels.shape} pixels; apply the segmenter to this prepared run"
            )
        return Lungs(frame, clean_up_mask(xray, codes, self.recipe).mask)
