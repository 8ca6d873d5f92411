"""Writes a data set's images as 8-bit PNG files in their original size, as a model sees them: for annotation tools."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import pandas as pd
from tqdm.auto import tqdm

from kitlib.atomic import replacing
from kitlib.cache import XrayCache, usable_cores

# Decoded together, in a folder that is deleted before the next ones are: of SIIM's size, 1.5 GB.
IMAGES_A_BATCH = 200


class PngExportError(ValueError):
    """Images that could not be written, and why; the others are."""


def write_pngs(images: pd.DataFrame, folder: str | Path, workers: int | None = None, progress: bool = True) -> None:
    """Write FOLDER/<image_id>.png for every row of the table images; files that are there are left as they are.

    Raises PngExportError for files that cannot be decoded, and for those that have another size than their row says, as
    their boxes would lie elsewhere; ValueError for images of unknown size.
    """
    if not ((images["rows"] > 0) & (images["columns"] > 0)).all():
        raise ValueError("images have no rows and columns: prepare the data set with notebook 10, which reads the sizes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = images[[not (folder / f"{image_id}.png").exists() for image_id in images["image_id"]]]
    problems: list[str] = []
    with tqdm(total=len(wanted), desc="images", unit="image", disable=not progress) as bar:
        for start in range(0, len(wanted), IMAGES_A_BATCH):
            batch = wanted.iloc[start : start + IMAGES_A_BATCH]
            with tempfile.TemporaryDirectory(prefix=".decoding.", dir=folder) as scratch:
                cache = XrayCache(scratch, int(batch[["rows", "columns"]].to_numpy().max()))
                done, failed = [], {}
                for outcome in cache.decode(batch, workers):
                    bar.update()
                    if outcome.status == "failed":
                        failed[outcome.image_id] = outcome.reason
                    else:
                        done.append(outcome.image_id)
                problems += [f"{image_id}: {reason}" for image_id, reason in sorted(failed.items())]
                sizes = batch.set_index("image_id")[["rows", "columns"]].loc[sorted(done)].itertuples()
                with ThreadPoolExecutor(workers or usable_cores()) as pool:
                    problems += filter(None, pool.map(partial(_write, cache, folder), sizes))
    if problems:
        raise PngExportError(
            f"{len(problems)} of {len(images)} images were not written to {folder}: {'; '.join(problems[:5])}"
        )


def _write(cache: XrayCache, folder: Path, size: tuple[str, int, int]) -> str:
    """Write one PNG; return what is wrong with it."""
    image_id, rows, columns = size
    xray = cache.read(image_id)
    if (xray.rows, xray.columns) != (rows, columns):
        return (
            f"{image_id}: the file has {xray.columns} x {xray.rows} pixels, its row says {columns} x {rows}; prepare again"
        )
    with replacing(folder / f"{image_id}.png") as beside:
        beside.write_bytes(cv2.imencode(".png", xray.pixels)[1].tobytes())
    return ""
