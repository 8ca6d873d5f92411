"""Reads a chest X-ray from a PNG, JPEG or GIF file, as NIH's and many re-packed data sets have them, or from JSRT's raw one.

A raw file of JSRT's database is 2048 x 2048 big-endian 16-bit numbers without a header, 12 bits of which are used
(db.jsrt.or.jp); the larger, the darker is the film. Its suffix and its exact size tell it.
"""

import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import Xray
from kitlib.xrays.header import MAX_SAMPLES

SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
# Not PIL.Image.open, which ultralytics replaces by one that hides what is wrong with a file.
OPENERS = {"PNG": PngImageFile, "JPEG": JpegImageFile, "GIF": GifImageFile}
JSRT_SUFFIX, JSRT_SIDE, JSRT_BITS = ".img", 2048, 12
JSRT_BYTES = 2 * JSRT_SIDE**2


def image_format(path: str | Path) -> str:
    """ "PNG", "JPEG" or "GIF" by the file's first bytes and not by its name, "JSRT", or "" for anything else.

    Raises OSError.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        raw = Path(path).suffix.lower() == JSRT_SUFFIX and file.seek(0, os.SEEK_END) == JSRT_BYTES
    return next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), "JSRT" if raw else "")


def image_size(path: str | Path) -> tuple[int, int]:
    """Rows and columns as the header promises them, without decoding. Raises UnreadableXray."""
    if _is_jsrt(path):
        return JSRT_SIDE, JSRT_SIDE
    with open_image(path) as image:
        columns, rows = image.size
    return rows, columns


def decode_image(path: str | Path) -> Xray:
    """Grey as the file shows it: 8 bits as they are, 16 bits by their upper eight, colour by its luma; alpha is left out.

    Of JSRT's raw files the upper eight of twelve bits, inverted, so that air is dark. Nothing is stretched: whoever made
    the file has chosen how it looks. Raises UnreadableXray, also for a file that ends early.
    """
    if _is_jsrt(path):
        return Xray(_decode_jsrt(path), ())
    with open_image(path) as image:
        try:
            # Pillow refuses what is cut off or fails its checksums; OpenCV would fill in grey.
            image.load()
            if image.format == "GIF":  # which OpenCV gives as an animation
                return Xray(np.array(image.convert("L")), ())
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError) as error:
            raise UnreadableXray(path, f"damaged image: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise UnreadableXray(path, "damaged image: nothing could be decoded")
    if pixels.dtype == np.uint16:
        pixels = (pixels // 256).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY) if pixels.shape[2] >= 3 else pixels[..., 0]
    return Xray(np.ascontiguousarray(pixels), ())


def open_image(path: str | Path) -> Image.Image:
    """The PNG, JPEG or GIF image with its header read and no pixel yet; its size is one that a chest can have.

    Raises UnreadableXray.
    """
    try:
        name = image_format(path)
        if name not in OPENERS:
            raise ValueError("no PNG, JPEG or GIF image")
        image = OPENERS[name](path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableXray(path, f"cannot be opened: {' '.join(str(error).split())}") from None
    columns, rows = image.size
    if not rows or not columns or rows * columns > MAX_SAMPLES:
        image.close()
        raise UnreadableXray(path, f"promises {rows} x {columns} pixels; wanted 1 to {MAX_SAMPLES}")
    return image


def _is_jsrt(path: str | Path) -> bool:
    try:
        return image_format(path) == "JSRT"
    except OSError:  # opening it will tell
        return False


def _decode_jsrt(path: str | Path) -> np.ndarray:
    """uint8 (2048, 2048)."""
    values = np.fromfile(path, ">u2").reshape(JSRT_SIDE, JSRT_SIDE)
    if values.max() >> JSRT_BITS:
        raise UnreadableXray(
            path, f"has the value {values.max()}, and JSRT's have {JSRT_BITS} bits: are its bytes swapped? Fetch it again"
        )
    return 255 - (values >> (JSRT_BITS - 8)).astype(np.uint8)
