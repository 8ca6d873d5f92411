"""Masks of a run's images: label images as PNG bytes in a few Arrow files, which are mapped and not read."""

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


class MaskStore:
    """One label image an image_id, at the size of its decoded copy: uint8 (height, width), codes as MASK_CODES.

    They lie in `folder`, to which `add` writes, and in any `others`, such as those of a model's other folds. Each `add`
    writes one more file, whole or not at all, so that an interrupted stage goes on after the last one. A few files hold all,
    because Kaggle chokes on an output of thousands; memory stays flat, because they are memory-mapped.
    """

    def __init__(self, folder: str | Path, *others: str | Path) -> None:
        self.folder, self.others = Path(folder), tuple(map(Path, others))
        self._place: dict[str, tuple[Path, pa.ChunkedArray, int]] = {}
        for each in (self.folder, *self.others):
            for part in sorted(each.glob("part-*.arrow")):
                self._open(part)

    def __reduce__(self) -> tuple[type["MaskStore"], tuple[Path, ...]]:
        # A process of its own maps the files again, where copying would read them all.
        return MaskStore, (self.folder, *self.others)

    @classmethod
    def afresh(cls, folder: str | Path) -> "MaskStore":
        """An empty one; what was in the folder goes."""
        shutil.rmtree(folder, ignore_errors=True)
        return cls(folder)

    @property
    def ids(self) -> list[str]:
        return list(self._place)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._place

    def __len__(self) -> int:
        return len(self._place)

    def read(self, image_id: str) -> np.ndarray:
        """Raises KeyError where the image has no mask, MaskError where it is damaged."""
        if image_id not in self._place:
            raise KeyError(f"no mask of image {image_id!r} in {self.folder}, which has {len(self)}")
        part, column, row = self._place[image_id]
        png = np.frombuffer(column[row].as_py() or b"", np.uint8)
        codes = cv2.imdecode(png, cv2.IMREAD_UNCHANGED) if png.size else None
        if codes is None or codes.ndim != 2 or codes.dtype != np.uint8:
            raise MaskError(f"{part}: the mask of image {image_id!r} is damaged; delete {part.parent}, make the masks again")
        return codes

    def add(self, masks: Mapping[str, np.ndarray]) -> None:
        """Write label images, by image_id, as one more file.

        Raises ValueError for one that is there already, or that has other sides or codes than a label image.
        """
        there = [image_id for image_id in masks if image_id in self]
        if there:
            raise ValueError(f"{self.folder} has a mask of image {there[0]!r} already, and of {len(there) - 1} others")
        for image_id, codes in masks.items():
            if codes.ndim != 2 or not codes.size or codes.min() < 0 or codes.max() > max(MASK_CODES.values()):
                raise ValueError(f"the mask of image {image_id!r} is no label image: wanted (rows, columns) of {MASK_CODES}")
        if not masks:
            return
        png = [cv2.imencode(".png", np.ascontiguousarray(codes, np.uint8))[1].tobytes() for codes in masks.values()]
        table = pa.table({"image_id": list(masks), "png": png}, schema=SCHEMA)
        parts = [int(part.stem.removeprefix("part-")) for part in self.folder.glob("part-*.arrow")]
        part = self.folder / f"part-{max(parts, default=-1) + 1:05d}.arrow"
        with replacing(part) as beside, pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(table)
        self._open(part)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all masks, in whichever files they lie."""
        digest = hashlib.sha256()
        for image_id in sorted(self.ids):
            _, column, row = self._place[image_id]
            digest.update(image_id.encode() + hashlib.sha256(column[row].as_buffer()).digest())
        return digest.hexdigest()

    def _open(self, part: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(part))).read_all()
            if table.schema != SCHEMA:
                raise pa.ArrowInvalid(f"it has {', '.join(f'{field.name} {field.type}' for field in table.schema)}")
        except pa.ArrowInvalid as error:
            raise MaskError(f"{part} is no file of masks ({error}); delete {part.parent}, make the masks again") from error
        ids, png = table["image_id"].to_pylist(), table["png"]
        self._place |= {image_id: (part, png, row) for row, image_id in enumerate(ids)}
