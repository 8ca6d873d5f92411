"""The first frame of encapsulated pixel data, with and without an offset table."""

import pytest

from kitlib.xrays.encapsulation import DELIMITER, ITEM, encapsulate_frame, is_unterminated, read_first_frame


def items(*contents):
    return b"".join(ITEM + len(content).to_bytes(4, "little") + content for content in contents)


def rle(segments):
    """Return a frame that begins as RLE does (PS3.5 G.5): the number of segments, at most 15, and the first one's offset."""
    return segments.to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(64)


FRAMES = {
    "JPEG": b"\xff\xd8\xff\xc3",
    "JPEG 2000": b"\xff\x4f\xff\x51",
    "JP2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "RLE of 1 segment": rle(1),
    "RLE of 15 segments": rle(15),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_frame_is_found_with_or_without_an_offset_table(frame):
    assert read_first_frame(encapsulate_frame(frame), 1) == frame
    for table in ([], [b""], [bytes(4)], [(64).to_bytes(4, "little") * 20]):
        for fragments in ([frame], [frame[:4], frame[4:]], [frame, b""]):
            if table or fragments[0] == frame:  # without a table, a frame is recognised by its first item
                assert read_first_frame(items(*table, *fragments) + DELIMITER, 1) == frame


@pytest.mark.parametrize("segments", [0, 16])
def test_an_item_of_another_number_of_segments_is_an_offset_table(segments):
    assert read_first_frame(items(rle(segments), FRAMES["JPEG"]), 1) == FRAMES["JPEG"]


def test_the_first_of_several_frames_is_found():
    assert read_first_frame(items(b"", b"first!", b"second"), 2) == b"first!"


@pytest.mark.parametrize("data", [b"", DELIMITER, items(b""), items(bytes(8)) + DELIMITER])
def test_pixel_data_without_a_frame_are_refused(data):
    with pytest.raises(ValueError, match="have no frame"):
        read_first_frame(data, 1)


def test_pixel_data_that_end_in_a_fragment_are_refused():
    whole = items(b"", FRAMES["JPEG"])
    assert read_first_frame(whole, 1) == FRAMES["JPEG"]
    with pytest.raises(ValueError, match="end after 3 of 4 bytes of a fragment"):
        read_first_frame(whole[:-1], 1)


def test_a_frame_of_odd_length_is_encapsulated_as_one_of_even_length():
    assert read_first_frame(encapsulate_frame(b"\xff\xd8\7"), 1) == b"\xff\xd8\7\0"


def test_only_the_pixel_data_of_the_image_have_to_end():
    """A thumbnail may have pixel data of its own before those of the image."""
    start = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    whole = start + encapsulate_frame(b"\xff\xd8")
    cut = whole.removesuffix(DELIMITER)
    assert [is_unterminated(source) for source in (b"", whole, cut, whole + cut, cut + whole)] == [
        *(False, False, True),
        *(True, False),
    ]
