"""Reads and writes an entry of the X-ray cache: a safetensors file with pixels, metadata (facts), and a checksum of both."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from kitlib.atomic import replacing
from kitlib.errors import CacheError

CHECKSUM = "crc32"


def write_entry(path: Path, pixels: np.ndarray, facts: dict[str, str]) -> None:
    """Write the cache entry of one X-ray atomically, with a checksum.

    `pixels` is uint8 (height, width); `facts` is the metadata.
    """
    pixels = np.ascontiguousarray(pixels)
    content = save({"pixels": pixels}, metadata={**facts, CHECKSUM: _checksum(pixels, facts)})
    with replacing(path) as temporary_path:
        temporary_path.write_bytes(content)


def read_entry(path: Path, verify: bool = True) -> tuple[np.ndarray, dict[str, str]]:
    """Return the pixels, uint8 (height, width), and the metadata of the cache entry `path`.

    The checksum is only verified if `verify` is True. Raises CacheError if the entry is damaged, OSError if it cannot be
    opened.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            pixels, facts = opened.get_tensor("pixels"), opened.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    return _checked(path, pixels, facts, verify)


def parse_entry(content: bytes, path: Path, verify: bool = True) -> tuple[np.ndarray, dict[str, str]]:
    """Return the pixels, uint8 (height, width), and the metadata in `content`, the bytes of a cache entry.

    `path` is only used in error messages; `verify` and errors are as in `read_entry`.
    """
    try:
        pixels = load(content)["pixels"]
        # safetensors returns no metadata for content in memory, which begins with the length of the header, then the header.
        facts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    return _checked(path, pixels, facts, verify)


def _checked(path: Path, pixels: np.ndarray, facts: dict[str, str], verify: bool) -> tuple[np.ndarray, dict[str, str]]:
    checksum = facts.pop(CHECKSUM, "")
    if not checksum or (verify and checksum != _checksum(pixels, facts)):
        raise _damaged(path, "its checksum is wrong or missing")
    return pixels, facts


def _checksum(pixels: np.ndarray, facts: dict[str, str]) -> str:
    described = json.dumps([pixels.dtype.str, pixels.shape, sorted(facts.items())])
    return f"{zlib.crc32(pixels.data, zlib.crc32(described.encode())):08x}"


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(
        f"{path} is damaged ({reason}); prepare the run again on a computer that has the image file, to decode it again"
    )
