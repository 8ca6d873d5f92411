"""Chooses one decoder for each transfer syntax, so that training and test images are decoded in the same way.

The decoder is imagecodecs (as a pydicom plug-in) if it is installed, is faster than pydicom's usual plug-ins and gives the
same pixels; otherwise it is one of the usual plug-ins.
"""

import importlib.util

import numpy as np
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from kitlib.xrays.codestream import END

HAS_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
PLUGIN = "imagecodecs"

_JPEG = (JPEGBaseline8Bit, JPEGLossless, JPEGLosslessSV1)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_JPEG_2000 = (JPEG2000Lossless, JPEG2000)
# JPEG Extended is excluded, because some of its lossy 12-bit pixels differ by one from pylibjpeg's. RLE is excluded, because
# a damaged frame crashes the process in imagecodecs, while pylibjpeg's Rust decoder raises a panic, which can be caught.
SYNTAXES = (*_JPEG, *_JPEG_LS, *_JPEG_2000)

# pydicom requires this name and `is_available` in a plug-in's module.
DECODER_DEPENDENCIES = {syntax: ("imagecodecs",) for syntax in SYNTAXES}


def is_available(uid: str) -> bool:
    """Return whether imagecodecs is installed and decodes the transfer syntax `uid` (required by pydicom)."""
    return HAS_IMAGECODECS and uid in SYNTAXES


def decode_frame(frame: bytes, runner: DecodeRunner) -> np.ndarray:
    """Return the pixels of one compressed frame, uint8 or uint16: (rows, columns) or, in colour, (rows, columns, 3).

    pydicom calls the function and prescribes its parameters; `runner` states the transfer syntax.
    """
    import imagecodecs

    syntax = runner.transfer_syntax
    if syntax in _JPEG:
        pixels = imagecodecs.jpeg8_decode(frame)
    elif syntax in _JPEG_LS:
        # CharLS reads past the end of a truncated frame, for half a minute; an additional end marker stops it.
        pixels = imagecodecs.jpegls_decode(frame + END)
    else:
        pixels = imagecodecs.jpeg2k_decode(frame, numthreads=1)
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    return np.ascontiguousarray(pixels)


def plugin_for(syntax: str) -> str:
    """Return the name of the pydicom plug-in that decodes a transfer syntax, or "" to let pydicom choose."""
    if is_available(syntax):
        return PLUGIN
    if syntax == JPEGBaseline8Bit:
        return "pillow"  # uses libjpeg-turbo, as imagecodecs does; some of pylibjpeg's pixels differ by one
    return "pylibjpeg" if "pylibjpeg" in get_decoder(syntax).available_plugins else ""


for _syntax in SYNTAXES:
    if PLUGIN not in get_decoder(_syntax).available_plugins and HAS_IMAGECODECS:
        get_decoder(_syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
