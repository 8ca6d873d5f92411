"""Speed of decoding and resizing to 1,024 pixels: the kit against the usual public recipe, for each transfer syntax.

Part of `make bench`. The recipe is what public notebooks do: pydicom's `pixel_array` with pylibjpeg, `apply_voi_lut`,
MONOCHROME1 inversion, min-max in float, `cv2.resize`. Both read the same files alternately, on one thread. The kit resizes
by area means, which takes about 20 ms longer than the recipe's bilinear resize and avoids aliasing.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import typer
from pydicom import dcmread
from pydicom.pixels import apply_voi_lut, get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLosslessSV1
from rich.console import Console
from rich.table import Table

from kitlib.xrays.image_file import read_xray
from kitlib.xrays.stored_values import NATIVE
from kitlib.xrays.worker import shrink
from kitlib.xrays.writing import WRITABLE, write_xray

SIDE = 1024  # of the resized image, pixels
# Least speed relative to the recipe; with every other syntax, the kit must not be slower.
BARS = {ExplicitVRLittleEndian: 4.0, JPEGLosslessSV1: 3.0}
# Arguments of `main` for the tests, with which it takes about a second.
SMALLEST = {"rows": 1100, "columns": 1030, "repeats": 1, "strict": False}


def radiograph(rows: int, columns: int, bits: int) -> np.ndarray:
    """Return an image of smooth anatomy, edges and noise, which compresses like a chest X-ray (lossless to 40 to 55 %)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    body = 0.55 - 0.3 * np.exp(-(((x - 0.3) / 0.13) ** 2) - ((y - 0.45) / 0.25) ** 2)
    body -= 0.3 * np.exp(-(((x - 0.7) / 0.13) ** 2) - ((y - 0.45) / 0.25) ** 2)
    ribs = 0.04 * (np.sin(60 * y + 8 * (x - 0.5) ** 2) > 0.3)
    levels = 2**bits - 1
    return (
        ((body + ribs) * levels + rng.normal(0, 0.004 * levels, (rows, columns))).clip(0, levels).round().astype(np.uint16)
    )


def recipe(path: Path) -> np.ndarray:
    dataset = dcmread(path)
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    plugin = "" if syntax in NATIVE else "pylibjpeg"
    stored = get_decoder(syntax).as_array(dataset, decoding_plugin=plugin)[0]
    pixels = apply_voi_lut(stored, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = np.amax(pixels) - pixels
    pixels = pixels - np.min(pixels)
    pixels = pixels / np.max(pixels)
    return (pixels * 255).astype(np.uint8)


def milliseconds(read: Callable[[Path], np.ndarray], resize: Callable[[np.ndarray], np.ndarray], path: Path) -> float:
    start = time.perf_counter()
    resize(read(path))
    return 1000 * (time.perf_counter() - start)


def main(rows: int = 2800, columns: int = 2400, repeats: int = 7, strict: bool = True) -> None:
    """Print the table; with `strict`, exit with code 1 if a required speed is not reached."""
    cv2.setNumThreads(1)
    table = Table(
        "transfer syntax", "file MB", "recipe ms", "kit ms", "times faster", "required", "pixels differ by at most"
    )
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for syntax in map(UID, WRITABLE):
            path = Path(folder) / "x.dcm"
            bits = 8 if syntax == JPEGBaseline8Bit else 12
            stored = radiograph(rows, columns, bits).astype(np.uint8 if bits == 8 else np.uint16)
            middle = 2.0 ** (bits - 1)
            header = {"photometric": "MONOCHROME1", "window": (middle, 1.5 * middle), "bits_stored": bits}
            write_xray(path, stored, transfer_syntax=syntax, **header)
            apart = int(np.abs(recipe(path).astype(int) - read_xray(path)).max())  # warms both up as well
            usual, kit = [], []
            for _ in range(repeats):
                usual.append(milliseconds(recipe, lambda pixels: cv2.resize(pixels, (SIDE, SIDE)), path))
                kit.append(milliseconds(read_xray, lambda pixels: shrink(pixels, SIDE), path))
            times, bar = median(usual) / median(kit), BARS.get(syntax, 1.0)
            missed += [syntax.name] if times < bar else []
            table.add_row(
                *(f"{syntax.name[:32]} ({syntax[17:] or '.'})", f"{path.stat().st_size / 1e6:.1f}"),
                *(f"{median(usual):.0f}", f"{median(kit):.0f}", f"{times:.1f}", f"{bar:.0f}", str(apart)),
            )
    console = Console(width=125)
    console.print(f"{rows} x {columns}, 12 bits (JPEG baseline 8), median of {repeats}, alternating", table, sep="\n")
    console.print(f"too slow: {', '.join(missed)}" if missed else "every required speed is reached")
    if missed and strict:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
