"""Finds the first frame in encapsulated (compressed) pixel data, even if its offset table or its end is damaged."""

from pydicom.encaps import get_frame

ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
# Pixel Data with explicit VR and undefined length, as every compressed file has it.
UNDEFINED_LENGTH = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"


def read_first_frame(data: bytes, frames: int) -> bytes:
    """Return the first frame in `data`, the content of an encapsulated PixelData element that has `frames` frames.

    If there is only one frame, all fragments belong to it, whatever the Basic Offset Table says. Raises ValueError if `data`
    contains no frame, or ends inside a fragment.
    """
    if frames > 1:
        return get_frame(data, 0, number_of_frames=frames)
    items, position = [], 0
    while data[position : position + 4] == ITEM:
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        items.append(data[position + 8 : position + 8 + length])
        position += 8 + length
        if position > len(data):
            raise ValueError(f"the pixel data end after {len(items[-1])} of {length} bytes of a fragment")
    # The first item is the offset table, which a few writers leave out.
    if items and not _is_frame(items[0]):
        del items[0]
    if not items:
        raise ValueError("the encapsulated pixel data have no frame")
    return b"".join(items)


def encapsulate_frame(frame: bytes) -> bytes:
    """Return encapsulated pixel data that contain one frame as one fragment."""
    frame += b"\0" * (len(frame) % 2)
    return ITEM + bytes(4) + ITEM + len(frame).to_bytes(4, "little") + frame + DELIMITER


def is_unterminated(source: bytes) -> bool:
    """Return whether `source`, a file's content, has encapsulated pixel data without the delimiter that should end them."""
    start = source.rfind(UNDEFINED_LENGTH)
    return start >= 0 and source.find(DELIMITER[:4], start) < 0


def _is_frame(item: bytes) -> bool:
    """Return whether an item starts like a JPEG, JPEG-LS, JPEG 2000 or RLE frame."""
    segments, offset = int.from_bytes(item[:4], "little"), int.from_bytes(item[4:8], "little")
    is_rle = len(item) > 64 and 1 <= segments <= 15 and offset == 64
    return is_rle or item.startswith((b"\xff\xd8", b"\xff\x4f", b"\x00\x00\x00\x0cjP"))
