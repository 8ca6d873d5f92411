"""Reads a chest X-ray from a PNG, JPEG or GIF file, as in NIH and many re-packed data sets, or from a raw JSRT file.

A raw file of the JSRT database (db.jsrt.or.jp) contains 2048 x 2048 big-endian 16-bit numbers without a header. Only 12 bits
are used; larger values are darker. The file is recognised by its suffix and its exact size.
"""

import logging
import os
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from kitlib.errors import UnreadableXray
from kitlib.xrays.dicom import Xray, decode_xray, show_stored
from kitlib.xrays.header import MAX_SAMPLES
from kitlib.xrays.json_header import json_header_path, read_json_header

SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
# PIL.Image.open is not used, because ultralytics replaces it with a version that hides why a file cannot be opened.
OPENERS = {"PNG": PngImageFile, "JPEG": JpegImageFile, "GIF": GifImageFile}
JSRT_SUFFIX, JSRT_SIDE, JSRT_BITS = ".img", 2048, 12
JSRT_BYTES = 2 * JSRT_SIDE**2


def image_format(path: str | Path) -> str:
    """Return the format of a file: "PNG", "JPEG", "GIF" or "JSRT" (raw), or "" for any other format.

    The format is recognised by the first bytes, not by the name; only JSRT's raw files are recognised by suffix and size.
    Raises OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        raw = Path(path).suffix.lower() == JSRT_SUFFIX and file.seek(0, os.SEEK_END) == JSRT_BYTES
    return next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), "JSRT" if raw else "")


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the numbers of rows and columns of an image file, without decoding it.

    Raises UnreadableXray if the file cannot be opened.
    """
    if _is_jsrt(path):
        return JSRT_SIDE, JSRT_SIDE
    with open_image(path, with_pixels=False) as image:
        columns, rows = image.size
    return rows, columns


def read_xray(path: str | Path) -> np.ndarray:
    """Return the pixels of a DICOM, PNG, JPEG, GIF or raw JSRT file, uint8 (rows, columns); 255 is white (bone).

    Logs warnings about the file; see `decode_file`. Raises UnreadableXray if the file cannot be read as an X-ray.
    """
    try:
        xray = decode_file(path)
    except OSError as error:  # missing, a folder, or not allowed
        raise UnreadableXray(path, error.strerror or str(error)) from None
    if xray.warnings:
        logging.getLogger(__name__).warning("%s: %s", path, "; ".join(xray.warnings))
    return xray.pixels


def decode_file(path: str | Path) -> Xray:
    """Decode an image file (see `decode_image`) or a DICOM file (see kitlib.xrays.dicom.decode_xray); return an Xray.

    The format is recognised by the file's content. Raises UnreadableXray if the file cannot be read as an X-ray, OSError if
    it cannot be opened.
    """
    return decode_image(path) if image_format(path) else decode_xray(path)


def decode_image(path: str | Path) -> Xray:
    """Decode a PNG, JPEG, GIF or raw JSRT file; return an Xray with 8-bit grey pixels, and warnings about the file.

    Colour is converted to luma, and alpha is ignored. 8-bit values are unchanged. In a 16-bit image, the largest value tells
    whether 8, 10, 12, 14 or 16 bits are used; the upper eight of these bits are kept. JSRT's 12-bit values are also reduced
    to the upper eight bits, and inverted, so that air is dark. The grey range is not stretched, because the data set's
    authors have already chosen it. If a JSON file next to a 16-bit grey PNG has the original's DICOM header (see
    kitlib.xrays.json_header), the PNG is displayed as this header says; an invalid header is ignored, with a warning. Raises
    UnreadableXray if the file is damaged or truncated.
    """
    if _is_jsrt(path):
        return Xray(_decode_jsrt(path), ())
    with open_image(path) as image:
        try:
            # Pillow refuses truncated files and wrong checksums; OpenCV would fill the missing part with grey.
            image.load()
            if image.format == "GIF":  # OpenCV would return an animation
                return Xray(np.array(image.convert("L")), ())
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError) as error:
            raise UnreadableXray(path, f"damaged image: {' '.join(str(error).split())}") from None
    if pixels is None:
        raise UnreadableXray(path, "damaged image: nothing could be decoded")
    warnings: list[str] = []
    if pixels.dtype == np.uint16 and pixels.ndim == 2 and (header := json_header_path(path)):
        try:
            return show_stored(pixels, read_json_header(header))
        except Exception as error:  # any error is possible, because a damaged header may state anything
            warnings.append(f"the DICOM header in the JSON file is ignored: {error}")
    if pixels.ndim == 3:  # alpha is not shown, and would count as the brightest pixel
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    if pixels.dtype == np.uint16:
        # Converted DICOM files keep their 12 bits or so in 16; the upper eight would be nearly black.
        bits = next(bits for bits in (8, 10, 12, 14, 16) if int(pixels.max()) < 2**bits)
        if bits < 16:
            warnings.append(f"the 16-bit image uses only {bits} bits, of which the upper eight are shown")
        pixels = (pixels // 2 ** (bits - 8)).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_BGR2GRAY)
    return Xray(np.ascontiguousarray(pixels), tuple(warnings))


def open_image(path: str | Path, with_pixels: bool = True) -> Image.Image:
    """Open a PNG, JPEG or GIF file as a Pillow image, whose pixels are not decoded yet.

    Pass False as `with_pixels` if only the header is needed; the file is then not read into memory. Raises UnreadableXray if
    the file cannot be opened, or if the number of pixels in its header is not in 1..MAX_SAMPLES.
    """
    try:
        name = image_format(path)
        if name not in OPENERS:
            raise ValueError("not a PNG, JPEG or GIF image")
        # A damaged PNG may state a huge length. Reading from memory stops at the end of the data, but reading from a file
        # first allocates the stated length.
        image = OPENERS[name](BytesIO(Path(path).read_bytes()) if with_pixels else path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableXray(path, f"cannot be opened: {' '.join(str(error).split())}") from None
    columns, rows = image.size
    if not rows or not columns or rows * columns > MAX_SAMPLES:
        image.close()
        raise UnreadableXray(path, f"states {rows} x {columns} pixels in its header; expected 1 to {MAX_SAMPLES} pixels")
    return image


def _is_jsrt(path: str | Path) -> bool:
    try:
        return image_format(path) == "JSRT"
    except OSError:  # the error is reported when the file is opened
        return False


def _decode_jsrt(path: str | Path) -> np.ndarray:
    """Decode a raw JSRT file to uint8 (2048, 2048). Raises UnreadableXray if a value needs more than 12 bits."""
    values = np.fromfile(path, ">u2").reshape(JSRT_SIDE, JSRT_SIDE)
    if values.max() >> JSRT_BITS:
        raise UnreadableXray(
            path,
            f"has the value {values.max()}, but JSRT files use {JSRT_BITS} bits; the bytes may be swapped, so download "
            "the file again",
        )
    return 255 - (values >> (JSRT_BITS - 8)).astype(np.uint8)
