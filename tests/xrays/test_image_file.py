"""PNG, JPEG, GIF and raw JSRT files: grey as stored, and one error, which names the file, for everything that is wrong."""

import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kitlib.errors import UnreadableXray
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.image_file import decode_image, image_format, image_size

GREY = np.random.default_rng(0).integers(40, 90, (48, 64)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(GREY)),
        # Some of NIH's PNGs are RGBA, of equal colours.
        ("rgba.png", Image.fromarray(np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]))),
        ("sixteen_bits.png", Image.fromarray((GREY.astype(np.uint16) << 8) + 77)),
        ("png_called.jpg", Image.fromarray(GREY)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_are_as_the_file_shows_them(tmp_path, name, image):
    image.save(tmp_path / name, format="PNG")
    assert image_format(tmp_path / name) == "PNG" and image_size(tmp_path / name) == (48, 64)
    # The grey is not stretched: 40..90 stays 40..90.
    np.testing.assert_array_equal(decode_image(tmp_path / name).pixels, GREY)


def test_a_gif_is_read_through_its_palette(tmp_path):
    indices = Image.fromarray((GREY > 60).astype(np.uint8), mode="P")
    # ITU-R BT.601: 0.587 of green.
    indices.putpalette([10, 10, 10, 0, 255, 0])
    indices.save(tmp_path / "a.gif")
    assert image_format(tmp_path / "a.gif") == "GIF" and image_size(tmp_path / "a.gif") == (48, 64)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.gif").pixels, np.where(GREY > 60, 150, 10))


def test_a_raw_file_of_jsrt_is_inverted(tmp_path):
    values = np.random.default_rng(2).integers(0, 4096, (2048, 2048))
    values[0, :3] = [0, 4095, 16]
    path = tmp_path / "JPCLN001.IMG"
    path.write_bytes(values.astype(">u2").tobytes())
    assert image_format(path) == "JSRT" and image_size(path) == (2048, 2048)
    pixels = decode_image(path).pixels
    # The upper 8 of 12 bits; the largest value is the darkest.
    assert pixels[0, :3].tolist() == [255, 0, 254]
    np.testing.assert_array_equal(pixels, 255 - values // 16)


def test_no_other_file_is_recognised_as_jsrt(tmp_path):
    raw = bytes(2 * 2048 * 2048)
    for name, content in (("short.IMG", raw[:-1]), ("other.raw", raw), ("empty.IMG", b"")):
        (tmp_path / name).write_bytes(content)
        assert image_format(tmp_path / name) == ""
        with pytest.raises(UnreadableXray, match=name):
            decode_image(tmp_path / name)
    # Little-endian: 4095 reads as 0xff0f.
    (tmp_path / "swapped.IMG").write_bytes(np.full((2048, 2048), 4095, "<u2").tobytes())
    with pytest.raises(UnreadableXray, match=r"swapped\.IMG.*65295.*12 bits"):
        decode_image(tmp_path / "swapped.IMG")


def test_a_jpeg_is_close_and_colour_becomes_luma(tmp_path):
    Image.fromarray(np.full((16, 16, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.jpg", quality=100)
    assert image_format(tmp_path / "red.jpg") == "JPEG"
    # ITU-R BT.601: 0.299 of red.
    assert np.abs(decode_image(tmp_path / "red.jpg").pixels.astype(int) - round(0.299 * 255)).max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_pixels_are_not_turned_as_exif_says(tmp_path, suffix, orientation):
    """Boxes are in the pixels of the file, and so is its size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    blocks = np.kron(GREY[::16, ::16], np.ones((16, 16), np.uint8))
    Image.fromarray(blocks).save(path, exif=exif, quality=100)
    assert Image.open(path).getexif()[0x0112] == orientation
    pixels = decode_image(path).pixels
    assert pixels.shape == image_size(path) == (48, 64)
    assert np.abs(pixels.astype(int) - blocks).max() <= 2


@pytest.mark.parametrize("length", [0, 4, 20, 40, 400, -20])
def test_a_truncated_file_is_unreadable(tmp_path, length):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:length])
    with pytest.raises(UnreadableXray, match=r"a\.png"):
        decode_image(tmp_path / "a.png")


def test_a_size_of_gigabytes_is_refused_before_decoding(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    damaged = bytearray((tmp_path / "a.png").read_bytes())
    damaged[16:24] = struct.pack(">II", 100_000, 100_000)
    damaged[29:33] = struct.pack(">I", zlib.crc32(damaged[12:29]))
    (tmp_path / "a.png").write_bytes(damaged)
    with pytest.raises(UnreadableXray, match="states 100000 x 100000"):
        image_size(tmp_path / "a.png")


def test_damaged_bytes_give_pixels_or_unreadable_xray(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in ("png", "jpg", "gif"):
        Image.fromarray(GREY).save(tmp_path / f"whole.{suffix}")
        encoded = np.fromfile(tmp_path / f"whole.{suffix}", np.uint8)
        for _ in range(150):
            damaged = encoded.copy()
            positions = rng.integers(0, len(damaged), 3)
            damaged[positions] = rng.integers(0, 256, 3)
            (tmp_path / "a").write_bytes(damaged.tobytes())
            try:
                pixels = decode_image(tmp_path / "a").pixels
            except UnreadableXray:
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 2


def test_a_huge_length_in_a_png_takes_no_memory(tmp_path):
    """Pillow reads the rest of a chunk in one go; as much as its length says, if it reads from a file."""
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    damaged = bytearray((tmp_path / "a.png").read_bytes())
    position = damaged.index(b"IDAT") - 4
    damaged[position : position + 4] = (2**31 - 1).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(damaged)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableXray):
            decode_image(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_the_cache_decodes_image_files(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    cache = XrayCache(tmp_path / "xrays", 32)
    images = pd.DataFrame({"image_id": ["a", "b"], "path": [str(tmp_path / f"{name}.png") for name in "ab"]})
    outcomes = cache.fill(images, workers=1)
    assert outcomes.status.tolist() == ["decoded", "failed"]
    xray = cache.read("a")
    assert xray.pixels.shape == (24, 32) and (xray.rows, xray.columns) == (48, 64)


def test_a_gif_whose_frame_exceeds_its_screen_is_unreadable(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "small.gif")
    raw = bytearray((tmp_path / "small.gif").read_bytes())
    # The image descriptor, GIF89a section 20: 0x2C, left, top, then width and height, little endian.
    position = raw.index(b"\x2c\0\0\0\0\x40\0\x40\0") + 5
    raw[position : position + 4] = (60000).to_bytes(2, "little") * 2
    (tmp_path / "bomb.gif").write_bytes(raw)
    with pytest.raises(UnreadableXray, match=r"bomb\.gif"):
        decode_image(tmp_path / "bomb.gif")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_16_bit_png_shows_the_upper_eight_of_the_bits_in_use(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "x.png")
    xray = decode_image(tmp_path / "x.png")
    np.testing.assert_array_equal(xray.pixels, values // 2 ** (bits - 8))
    assert (xray.pixels.min(), xray.pixels.max()) == (0, 255)
    warning = f"the 16-bit image uses only {bits} bits, of which the upper eight are shown"
    assert xray.warnings == (() if bits == 16 else (warning,))


def test_alpha_does_not_count_as_brightness(tmp_path):
    values = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    cv2.imwrite(str(tmp_path / "x.png"), np.dstack([values] * 3 + [np.full_like(values, 65535)]))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").pixels, values // 16)
