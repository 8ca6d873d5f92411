"""Reads a chest X-ray from a PNG or JPEG file, as NIH's and many re-packed data sets have them, and its size alone."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from kitlib.dicom import UnreadableXray, Xray
from kitlib.dicom_header import MAX_SAMPLES

SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
# Not PIL.Image.open, which ultralytics replaces by one that hides what is wrong with a file.
OPENERS = {"PNG": PngImageFile, "JPEG": JpegImageFile}


def image_format(path: str | Path) -> str:
    """ "PNG", "JPEG", or "" for anything else, by the file's first bytes and not by its name. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), "")


def image_size(path: str | Path) -> tuple[int, int]:
    """Rows and columns as the header promises them, without decoding. Raises UnreadableXray."""
    with _opened(path) as image:
        columns, rows = image.size
    return rows, columns


def decode_image(path: str | Path) -> Xray:
    """Grey as the file shows it: 8 bits as they are, 16 bits by their upper eight, colour by its luma; alpha is left out.

    Nothing is stretched: whoever made the file has chosen how it looks. Raises UnreadableXray, also for a file that ends
    early.
    """
    with _opened(path) as image:
        try:
            # Pillow refuses what is cut off or fails its checksums; OpenCV would fill in grey.
            image.load()
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, SyntaxError, ValueError, cv2.error) as error:
            raise UnreadableXray(path, f"damaged image: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise UnreadableXray(path, "damaged image: nothing could be decoded")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY) if pixels.shape[2] >= 3 else pixels[..., 0]
    return Xray(np.ascontiguousarray(pixels), ())


def _opened(path: str | Path) -> Image.Image:
    """The image with its header read and no pixel yet; its size is one that a chest can have."""
    try:
        name = image_format(path)
        if not name:
            raise ValueError("no PNG or JPEG image")
        image = OPENERS[name](path)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableXray(path, f"cannot be opened: {' '.join(str(error).split())}") from None
    columns, rows = image.size
    if not rows or not columns or rows * columns > MAX_SAMPLES:
        image.close()
        raise UnreadableXray(path, f"promises {rows} x {columns} pixels; wanted 1 to {MAX_SAMPLES}")
    return image
