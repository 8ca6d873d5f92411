"""Stores the masks of a run's images, as label images in PNG format, in a few memory-mapped Arrow files."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from kitlib.atomic import replacing
from kitlib.classes import MASK_CODES
from kitlib.errors import MaskError

SCHEMA = pa.schema({"image_id": pa.string(), "png": pa.binary()})


def encode_grey(pixels: np.ndarray) -> bytes:
    """Return the content of a PNG file with the grey image `pixels`, uint8 (rows, columns)."""
    return cv2.imencode(".png", np.ascontiguousarray(pixels, np.uint8))[1].tobytes()


def decode_grey(png: bytes) -> np.ndarray:
    """Return the grey image, uint8 (rows, columns), in a PNG file's content. Raises MaskError if there is no such image."""
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    if pixels is None or pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise MaskError(f"{len(png)} bytes are not a PNG file of an 8-bit grey image; predict the masks again")
    return pixels


class MaskStore:
    """Store of masks by image_id. A mask is a label image, uint8 (height, width): each pixel is the code of a structure.

    The codes are those of MASK_CODES, and 0 outside all structures. A mask has the size of the image's decoded copy (the
    X-ray decoded to 8 bits and reduced). Masks are read from `folder` and from the folders `others`, for example those of a
    model's other folds; `add` writes to `folder`. Each `add` writes one new file atomically, so that an interrupted stage
    can continue after the last file. Many masks share a file, because Kaggle handles outputs of thousands of files badly;
    files are memory-mapped, so memory use stays low. Raises MaskError if a file is damaged.
    """

    def __init__(self, folder: str | Path, *others: str | Path) -> None:
        self.folder, self.others = Path(folder), tuple(map(Path, others))
        self._locations: dict[str, tuple[Path, pa.ChunkedArray, int]] = {}
        for source in (self.folder, *self.others):
            for part in sorted(source.glob("part-*.arrow")):
                self._open(part)

    def __reduce__(self) -> tuple[type["MaskStore"], tuple[Path, ...]]:
        # Another process maps the files itself, because pickling the masks would read all of them.
        return MaskStore, (self.folder, *self.others)

    @classmethod
    def create_empty(cls, folder: str | Path) -> "MaskStore":
        """Delete `folder` with its content and return an empty store that writes to it."""
        shutil.rmtree(folder, ignore_errors=True)
        return cls(folder)

    @property
    def ids(self) -> list[str]:
        """Ids of all images that have a mask."""
        return list(self._locations)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def read(self, image_id: str) -> np.ndarray:
        """Return the mask of one image. Raises KeyError if the image has no mask, MaskError if the mask is damaged."""
        if image_id not in self._locations:
            raise KeyError(f"no mask for image {image_id!r} in {self.folder}, which has {len(self)} masks")
        part, column, row = self._locations[image_id]
        try:
            return decode_grey(column[row].as_py() or b"")
        except MaskError as error:
            raise MaskError(
                f"{part}: the mask for image {image_id!r} is damaged; delete {part.parent} and create the masks again"
            ) from error

    def shows(self, image_id: str) -> bool:
        """Return whether the mask of an image shows any structure. Raises the errors of `read`."""
        return bool(self.read(image_id).any())

    def add(self, masks: Mapping[str, np.ndarray]) -> None:
        """Write the masks in `masks` (image_id -> label image) to one new file.

        Raises ValueError, and writes none of the masks, if an image already has a mask or if an array is not a label image.
        """
        existing = [image_id for image_id in masks if image_id in self]
        if existing:
            raise ValueError(f"{self.folder} already has masks for {len(existing)} images; the first is {existing[0]!r}")
        for image_id, codes in masks.items():
            if codes.ndim != 2 or not codes.size or codes.min() < 0 or codes.max() > max(MASK_CODES.values()):
                raise ValueError(
                    f"the mask for image {image_id!r} is not a label image; expected (rows, columns) of codes {MASK_CODES}, "
                    f"got shape {codes.shape}, unknown codes {np.setdiff1d(codes, [0, *MASK_CODES.values()])[:5].tolist()}"
                )
        if not masks:
            return
        png = [encode_grey(codes) for codes in masks.values()]
        table = pa.table({"image_id": list(masks), "png": png}, schema=SCHEMA)
        parts = [int(part.stem.removeprefix("part-")) for part in self.folder.glob("part-*.arrow")]
        part = self.folder / f"part-{max(parts, default=-1) + 1:05d}.arrow"
        with (
            replacing(part) as temporary_path,
            pa.OSFile(str(temporary_path), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            writer.write_table(table)
        self._open(part)

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of all image ids and masks; it does not depend on how the masks are divided into files."""
        digest = hashlib.sha256()
        for image_id in sorted(self.ids):
            _, column, row = self._locations[image_id]
            digest.update(image_id.encode() + hashlib.sha256(column[row].as_buffer()).digest())
        return digest.hexdigest()

    def _open(self, part: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(part))).read_all()
            if table.schema != SCHEMA:
                raise pa.ArrowInvalid(f"its columns are {', '.join(f'{field.name} {field.type}' for field in table.schema)}")
        except pa.ArrowInvalid as error:
            raise MaskError(
                f"{part} is not a mask file ({error}); delete {part.parent} and create the masks again"
            ) from error
        ids, png = table["image_id"].to_pylist(), table["png"]
        self._locations |= {image_id: (part, png, row) for row, image_id in enumerate(ids)}
