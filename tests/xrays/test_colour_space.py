"""Compressed colour frames against the luma of what was encoded, for every way that frame and header state the colours."""

import imagecodecs
import numpy as np
import pytest
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from kitlib.xrays.codestream import jpeg_segments
from kitlib.xrays.colour_space import NO_TRANSFORM, without_transform
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.writing import write_xray
from tests.small_frames import replace_pixels

Y, X = np.mgrid[0:1:48j, 0:1:40j]
# Red to the right, green downwards, little blue: the luma differs from each sample and from any wrong transform.
RGB = np.dstack([255 * X, 255 * Y, 60 * (1 - X)]).astype(np.uint8)
# JFIF 1.02 (ITU-T T.871): full-range YCbCr.
TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
YCBCR = (RGB @ TO_YCBCR.T + [0, 128, 128]).round().clip(0, 255).astype(np.uint8)
LUMA = RGB @ TO_YCBCR[0]
JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE = {name: b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([number]) for name, number in (("RGB", 0), ("YCC", 1))}
COMMENT = b"\xff\xfe\x00\x04hi"
SHORT = b"\xff\xee\x00\x0cAdobe\0\0\0\0\0"  # ends before its transform; pydicom's SC_rgb_jpeg.dcm has it


def test_only_the_segments_that_ask_for_a_transform_are_replaced():
    start, scan = b"\xff\xd8", b"\xff\xda\x00\x02pixels\xff\xd9"
    frame = b"".join([start, JFIF, COMMENT, ADOBE["YCC"], COMMENT, scan])
    assert without_transform(frame) == b"".join([start, NO_TRANSFORM, COMMENT, COMMENT, scan])


def stretched(values):
    return (values - values.min()) / (values.max() - values.min()) * 255


def jpeg(samples, marker=b"", ids=(1, 2, 3), **options):
    """Return a JPEG of `samples` as they are, with a marker segment and component ids."""
    frame = imagecodecs.jpeg8_encode(samples, colorspace="RGB", outcolorspace="RGB", subsampling="444", **options)
    parts, end = [frame[:2], marker], 2
    for kind, position in jpeg_segments(frame):
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        segment = bytearray(frame[position:end])
        if kind in (0xC0, 0xC1, 0xC3):
            segment[10::3] = bytes(ids)
        if kind not in (0xE0, 0xEE):
            parts.append(bytes(segment))
    scan = bytearray(frame[end:])
    scan[5:11:2] = bytes(ids)
    return b"".join([*parts, scan])


def write(path, frame, syntax, photometric="RGB"):
    extra = {"SamplesPerPixel": 3, "PlanarConfiguration": 1}  # has no meaning for these frames, so any value may occur
    write_xray(path, RGB[..., 0], transfer_syntax=ExplicitVRLittleEndian, photometric=photometric, extra=extra)
    return replace_pixels(path, frame, syntax)


@pytest.mark.parametrize("plugin", ["imagecodecs", "pillow"])
@pytest.mark.parametrize(
    ("samples", "marker", "ids", "photometric", "warned"),
    [
        # The Adobe marker goes before ids and header.
        ("RGB", ADOBE["RGB"], b"RGB", "RGB", False),
        ("RGB", JFIF + COMMENT + ADOBE["RGB"], (1, 2, 3), "RGB", False),
        ("RGB", ADOBE["RGB"], (1, 2, 3), "YBR_FULL", True),
        ("YCC", ADOBE["YCC"], b"RGB", "RGB", True),
        ("YCC", ADOBE["YCC"], (1, 2, 3), "YBR_FULL", False),
        # Then the ids.
        ("RGB", b"", b"RGB", "RGB", False),
        ("RGB", b"", b"RGB", "YBR_FULL_422", True),
        ("YCC", b"", (1, 2, 3), "RGB", True),
        ("YCC", b"", (1, 2, 3), "YBR_FULL_422", False),
        # Then JFIF, then the header.
        ("YCC", JFIF, (0, 1, 2), "RGB", True),
        ("YCC", JFIF, (1, 2, 3), "YBR_FULL", False),
        ("RGB", b"", (0, 1, 2), "RGB", False),
        ("RGB", SHORT, (0, 1, 2), "RGB", False),
        ("YCC", b"", (0, 1, 2), "YBR_FULL", False),
    ],
)
def test_the_markers_of_a_jpeg_decide_before_the_header(
    tmp_path, monkeypatch, plugin, samples, marker, ids, photometric, warned
):
    monkeypatch.setattr("kitlib.xrays.stored_values.plugin_for", lambda syntax: plugin)
    frame = jpeg(RGB if samples == "RGB" else YCBCR, marker, ids, level=100)
    xray = decode_xray(write(tmp_path / "x.dcm", frame, JPEGBaseline8Bit, photometric))
    assert np.abs(xray.pixels - stretched(LUMA)).max() <= 4  # lossy; a wrong transform is 30 grey levels off and more
    actual = "RGB" if samples == "RGB" else "YBR_FULL"
    warning = f"PhotometricInterpretation is {photometric}, but the frame's samples are {actual}"
    assert xray.warnings == ((warning,) if warned else ())


@pytest.mark.parametrize("marker", [b"", JFIF, ADOBE["RGB"], ADOBE["YCC"], COMMENT + ADOBE["YCC"], JFIF + ADOBE["YCC"]])
@pytest.mark.parametrize("ids", [(1, 2, 3), (0, 1, 2), tuple(b"RGB")])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_a_grey_x_ray_saved_as_rgb_keeps_its_greys_whatever_the_markers_say(tmp_path, marker, ids, photometric):
    grey = np.dstack([RGB[..., 1]] * 3)
    path = write(tmp_path / "x.dcm", jpeg(grey, marker, ids, level=100), JPEGBaseline8Bit, photometric)
    assert np.abs(decode_xray(path).pixels - stretched(RGB[..., 1].astype(float))).max() <= 2


@pytest.mark.parametrize("ids", [(1, 2, 3), (0, 1, 2), tuple(b"RGB")])
@pytest.mark.parametrize("plugin", ["imagecodecs", "pylibjpeg"])
def test_a_lossless_jpeg_is_rgb_unless_a_marker_or_the_header_says_otherwise(tmp_path, monkeypatch, ids, plugin):
    monkeypatch.setattr("kitlib.xrays.stored_values.plugin_for", lambda syntax: plugin)
    for samples, photometric in ((RGB, "RGB"), (YCBCR, "YBR_FULL")):
        if samples is YCBCR and ids == tuple(b"RGB"):
            continue
        path = write(tmp_path / "x.dcm", jpeg(samples, b"", ids, lossless=True, predictor=1), JPEGLosslessSV1, photometric)
        xray = decode_xray(path)
        assert np.abs(xray.pixels - stretched(LUMA)).max() <= 2 and xray.warnings == ()  # rounded twice


@pytest.mark.parametrize("plugin", ["imagecodecs", "pylibjpeg"])
@pytest.mark.parametrize(
    ("samples", "transformed", "photometric", "warned"),
    [
        (RGB, True, "YBR_RCT", False),
        (RGB, True, "RGB", False),
        (RGB, True, "YBR_FULL", True),
        (RGB, False, "RGB", False),
        (YCBCR, False, "YBR_FULL", False),
    ],
)
def test_a_jpeg_2000_is_rgb_after_its_transform(tmp_path, monkeypatch, plugin, samples, transformed, photometric, warned):
    monkeypatch.setattr("kitlib.xrays.stored_values.plugin_for", lambda syntax: plugin)
    frame = imagecodecs.jpeg2k_encode(samples, codecformat="j2k", reversible=True, mct=transformed)
    xray = decode_xray(write(tmp_path / "x.dcm", frame, JPEG2000Lossless, photometric))
    assert np.abs(xray.pixels - stretched(LUMA)).max() <= 2 and bool(xray.warnings) == warned


@pytest.mark.parametrize("plugin", ["imagecodecs", "pylibjpeg"])
@pytest.mark.parametrize(("samples", "photometric"), [(RGB, "RGB"), (YCBCR, "YBR_FULL")])
def test_a_jpeg_ls_has_the_headers_colour_space(tmp_path, monkeypatch, plugin, samples, photometric):
    monkeypatch.setattr("kitlib.xrays.stored_values.plugin_for", lambda syntax: plugin)
    xray = decode_xray(write(tmp_path / "x.dcm", imagecodecs.jpegls_encode(samples), JPEGLSLossless, photometric))
    assert np.abs(xray.pixels - stretched(LUMA)).max() <= 2 and xray.warnings == ()
