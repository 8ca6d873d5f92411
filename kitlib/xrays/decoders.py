"""Which decoder reads which transfer syntax: imagecodecs, a plug-in of pydicom, where it is faster and its pixels the same.

One decoder is named for each syntax, so that training and test images are decoded alike. Without imagecodecs the names
fall to pydicom's usual plug-ins.
"""

import importlib.util

import numpy as np
from pydicom.pixels import get_decoder
from pydicom.pixels.common import PhotometricInterpretation
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
# Not JPEG Extended, of whose lossy 12-bit pixels some differ by one from pylibjpeg's. Not RLE, whose damaged frames end
# imagecodecs' process; pylibjpeg's decoder is Rust and panics.
SYNTAXES = (*_JPEG, *_JPEG_LS, *_JPEG_2000)

# What pydicom asks of a plug-in's module, with `is_available`.
DECODER_DEPENDENCIES = {syntax: ("imagecodecs",) for syntax in SYNTAXES}


def is_available(uid: str) -> bool:
    return HAS_IMAGECODECS and uid in SYNTAXES


def decode_frame(frame: bytes, runner: DecodeRunner) -> np.ndarray:
    """One frame as (rows, columns) or (rows, columns, 3), uint8 or uint16; pydicom's signature of a plug-in."""
    import imagecodecs

    syntax = runner.transfer_syntax
    if syntax in _JPEG:
        pixels = imagecodecs.jpeg8_decode(frame)
    elif syntax in _JPEG_LS:
        # CharLS runs on past the end of a frame that was cut short, for half a minute; an end marker stops it.
        pixels = imagecodecs.jpegls_decode(frame + END)
    else:
        pixels = imagecodecs.jpeg2k_decode(frame, numthreads=1)
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
        if syntax not in _JPEG_LS:  # these decoders undo the colour transform themselves
            runner.set_option("photometric_interpretation", PhotometricInterpretation.RGB)
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    return np.ascontiguousarray(pixels)


def plugin_for(syntax: str) -> str:
    """The name of the plug-in that decodes `syntax`; empty where pydicom knows but one way."""
    if is_available(syntax):
        return PLUGIN
    if syntax == JPEGBaseline8Bit:
        return "pillow"  # libjpeg-turbo's pixels like imagecodecs'; pylibjpeg's differ by one here and there
    return "pylibjpeg" if "pylibjpeg" in get_decoder(syntax).available_plugins else ""


for _syntax in SYNTAXES:
    if PLUGIN not in get_decoder(_syntax).available_plugins and HAS_IMAGECODECS:
        get_decoder(_syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
