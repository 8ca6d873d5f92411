"""Reads a chest X-ray from a PNG or JPEG file, as NIH's and many re-packed data sets have them, and its size alone."""

import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from kitlib.dicom import UnreadableXray, Xray
from kitlib.dicom_header import MAX_SAMPLES

SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}


def image_format(path: str | Path) -> str:
    """ "PNG", "JPEG", or "" for anything else, by the file's first bytes and not by its name. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), "")


def image_size(path: str | Path) -> tuple[int, int]:
    """Rows and columns as the header promises them, without decoding. Raises UnreadableXray."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) == 24:
                columns, rows = struct.unpack(">II", start[16:])
            else:
                # Pillow opens lazily: it reads the header and no pixel.
                with Image.open(path, formats=("PNG", "JPEG")) as image:
                    columns, rows = image.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableXray(path, f"no PNG or JPEG image: {' '.join(str(error).split())}") from None
    if not rows or not columns or rows * columns > MAX_SAMPLES:
        raise UnreadableXray(path, f"promises {rows} x {columns} pixels; wanted 1 to {MAX_SAMPLES}")
    return rows, columns


def decode_image(path: str | Path) -> Xray:
    """Grey as the file shows it: 8 bits as they are, 16 bits by their upper eight, colour by its luma; alpha is left out.

    Nothing is stretched: whoever made the file has chosen how it looks. Raises UnreadableXray, also for a file that ends
    early.
    """
    image_size(path)
    try:
        encoded = np.fromfile(path, np.uint8)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            # Pillow refuses what is cut off or fails its checksums; OpenCV would fill in grey.
            image.load()
        pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, cv2.error) as error:
        raise UnreadableXray(path, f"damaged image: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise UnreadableXray(path, "damaged image: nothing could be decoded")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY) if pixels.shape[2] >= 3 else pixels[..., 0]
    return Xray(np.ascontiguousarray(pixels), ())
