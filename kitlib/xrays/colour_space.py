"""Decides whether a compressed colour frame has RGB or YCbCr samples; in YCbCr, the first sample of a pixel is its luma."""

from pydicom.uid import JPEGTransferSyntaxes

from kitlib.xrays.codestream import FAMILIES, JPEG_2000_SYNTAXES, LOSSLESS_JPEG, has_component_transform, jpeg_segments

RGB, YCBCR = "RGB", "YBR_FULL"
APP0, APP14 = 0xE0, 0xEE
# APP14 segment whose last byte, the transform, is 0: decoders return the samples as they are.
NO_TRANSFORM = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
IDS = {(1, 2, 3): YCBCR, tuple(b"RGB"): RGB, tuple(b"rgb"): RGB}


def find_colour_space(frame: bytes, syntax: str, photometric: str) -> str:
    """Return RGB or YCBCR, the colour space of the samples that the decoder returns for a compressed colour frame.

    `photometric`, the PhotometricInterpretation of the DICOM header, decides unless the frame contradicts it:
    - JPEG: the first of these that exists decides: an Adobe marker (APP14); the component ids (1, 2, 3: YCbCr; R, G, B:
      RGB); a JFIF marker (YCbCr). A lossless JPEG usually has no colour transform, so its ids 1, 2, 3 and JFIF are ignored.
    - JPEG 2000: RGB, because the decoder undoes a colour transform; YCbCr only if the frame has no colour transform and
      `photometric` is YBR_FULL.
    """
    stated = YCBCR if photometric.startswith("YBR") else RGB
    if syntax in JPEG_2000_SYNTAXES:
        return YCBCR if photometric.startswith(YCBCR) and not has_component_transform(frame) else RGB
    return _read_jpeg_colour_space(frame) or stated if syntax in JPEGTransferSyntaxes else stated


def without_transform(frame: bytes) -> bytes:
    """Return the JPEG `frame` with other markers, so that decoders return its samples without a colour transform."""
    parts, end = [frame[:2], NO_TRANSFORM], 2
    for kind, position in jpeg_segments(frame):
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if kind not in (APP0, APP14):
            parts.append(frame[position:end])
    return b"".join([*parts, frame[end:]])


def _read_jpeg_colour_space(frame: bytes) -> str:
    """Return the colour space, RGB or YCBCR, that the markers of a JPEG state, or "" if no marker states it."""
    by_ids, has_jfif = "", False
    for kind, position in jpeg_segments(frame):
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        content = frame[position + 4 : position + 2 + length]
        if kind == APP14 and content.startswith(b"Adobe") and len(content) >= 12:  # shorter ones lack the transform
            return YCBCR if content[11] else RGB
        has_jfif |= kind == APP0 and content.startswith(b"JFIF")
        if kind in FAMILIES:
            by_ids = IDS.get(tuple(content[6::3]), "")
            if FAMILIES[kind] == LOSSLESS_JPEG:
                by_ids, has_jfif = by_ids.replace(YCBCR, ""), False
    return by_ids or (YCBCR if has_jfif else "")
