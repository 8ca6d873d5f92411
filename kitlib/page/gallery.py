"""The gallery of a prepared run: pages of thumbnails, from which a study can be opened with its annotations."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.errors import CacheError, RunError, UnreadableXray
from kitlib.leaderboard.listing import ListedRun
from kitlib.page.file_facts import read_facts
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.paths import project_root
from kitlib.runs.finished_run import read_metrics, read_prepared
from kitlib.runs.run_kinds import named_folder
from kitlib.tables import BOX, findings_of
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.worker import shrink, source_of

logger = logging.getLogger(__name__)

THUMBNAIL = 160  # pixels, of the longest side
CACHED_THUMBNAILS = 1000  # take at most 26 MB
GREY_TILE = np.full((THUMBNAIL, THUMBNAIL), 128, np.uint8)
ALL, TEST = "all", "test"
# Data sets in which every finding has boxes. In other data sets, an image without a box may still show a finding.
MARKED = ("siim", "rsna", "vinbigdata")


class Gallery:
    """The images of one prepared run (notebook 10). Creating a gallery decodes nothing; it may be shared between threads.

    `fingerprint` is the data_fingerprint in the records of models that were trained on this run. `longest_side` is the
    largest side length, in pixels, of the run's decoded copies (its X-rays, decoded to 8 bits and reduced). Raises RunError
    or TableError if `run` is not a finished prepared run.
    """

    def __init__(self, run: str | Path, copies: DecodedCopies, page_size: int = 12) -> None:
        metrics, tables = read_metrics(run), read_prepared(run)
        if "longest_side" not in metrics:
            raise RunError(f"{run} is not a run of notebook 10, because its metrics.json lacks 'longest_side'")
        self.name, self.longest_side = Path(run).resolve().name, int(metrics["longest_side"])
        self.fingerprint = data_fingerprint(**tables)
        self.page_size = page_size
        self._copies, self._xrays = copies, XrayCache(Path(run) / "xrays", self.longest_side)
        self._boxes = tables["boxes"]
        self.findings = findings_of(self._boxes)
        self._images = images = _describe_images(tables, metrics.get("dataset") in MARKED)
        classes = [name for name in tables["labels"] if name != "id"]
        choices = {name: images[[name in annotated for annotated in images["true_classes"]]] for name in classes}
        boxed = {name: images[[name in found for found in images["boxes"]]] for name in self.findings}
        choices = {ALL: images} | choices | (boxed if len(boxed) > 1 else {})
        if "split" in images:
            choices[TEST] = images[images["split"] == TEST]
        self._choices = {name: rows for name, rows in choices.items() if len(rows) or name == ALL}
        self._thumbnail = lru_cache(CACHED_THUMBNAILS)(lambda key: shrink(self._xrays.read(key).pixels, THUMBNAIL))

    def choices(self) -> list[str]:
        """Return the choices of images: "all", each class and finding that occurs, and "test" if there are test images."""
        return list(self._choices)

    def page(self, choice: str, number: int) -> tuple[list[tuple[np.ndarray, str]], int]:
        """Return two values: the thumbnails on page `number` (from 1) of the images in `choice`, and the number of pages.

        `choice` is one of `choices()`. Each thumbnail is a pair of an array, uint8 (h, w) with sides of at most 160 pixels
        (THUMBNAIL), and a caption in plain text. The array is plain grey if the image has no decoded copy. Raises ValueError
        if the choice or the page does not exist.
        """
        if choice not in self._choices:
            raise ValueError(f"choice {choice!r} does not exist; choices: {', '.join(self._choices)}")
        rows = self._choices[choice]
        pages = max(1, -(-len(rows) // self.page_size))
        if not 1 <= number <= pages:
            raise ValueError(f"page {number} does not exist; {choice!r} has pages 1 to {pages}")
        rows_of_page = rows.iloc[(number - 1) * self.page_size : number * self.page_size]
        return [self._tile(row) for row in rows_of_page.itertuples()], pages

    def open(self, image_id: str) -> OpenedStudy:
        """Return the whole study that the image `image_id` belongs to, with this image first.

        Other images of the study are left out and named in `remarks` if they cannot be read. Raises UnreadableXray if the
        image `image_id` cannot be read, and ValueError if this image does not exist.
        """
        chosen = self._images[self._images["image_id"] == image_id]
        if chosen.empty:
            raise ValueError(f"image {image_id!r} does not exist in {self.name}")
        study = self._images[self._images["study_id"].isin(chosen["study_id"])].drop(chosen.index)
        study = pd.concat([chosen, study.sort_values("image_id")])
        opened, remarks = [], []
        for row in study.itertuples():
            try:
                opened.append(self._open_image(row))
            except UnreadableXray as error:
                if row.image_id == image_id:
                    raise
                remarks.append(f"Image {row.image_id} of this study is left out: {error.reason}.")
        folds = study["fold"].dropna().astype(int).tolist()
        if len(set(folds)) > 1:
            remarks.append(
                "The images of this study are in several folds: models that were not trained on the first image may have "
                "been trained on the other images."
            )
        return OpenedStudy(
            study_id=chosen["study_id"].iloc[0],
            images=tuple(opened),
            copies=self._copies,
            run_cache=self._xrays,
            trained_on=self.fingerprint,
            fold=folds[0] if folds else None,
            true_classes=chosen["true_classes"].iloc[0],
            findings=self.findings,
            remarks=tuple(remarks),
        )

    def _tile(self, row: Any) -> tuple[np.ndarray, str]:
        """Return the thumbnail and the caption of one image; `row` is the image's row of `self._images`, a named tuple."""
        caption, count = list(row.true_classes), sum(row.boxes.values())
        if row.marked and count and len(self.findings) > 1:
            caption = [name for name in caption if name not in row.boxes]
            caption += [f"{of_finding} {name}" for name, of_finding in sorted(row.boxes.items())]
        elif row.marked:
            caption.append("no box" if not count else "1 box" if count == 1 else f"{count} boxes")
        try:
            pixels = self._thumbnail(row.image_id)
        except (KeyError, CacheError):
            pixels, caption = GREY_TILE, [*caption, "no decoded copy"]
        return pixels, ", ".join([*caption, row.image_id])

    def _open_image(self, row: Any) -> OpenedImage:
        key, path, remarks = row.image_id, project_root() / row.path, []  # paths are relative to the root
        is_available = path.is_file() and os.access(path, os.R_OK)
        if not is_available:
            remarks.append("The original file was not found. The picture is the copy stored in the run.")
        elif not self._is_decoded(path, key):
            remarks.append("The original file has changed since it was decoded. The picture is the copy stored in the run.")
            # Treated as missing, because boxes and class belong to the earlier image.
            is_available, path = False, path.with_name(f"{path.name} (changed since it was decoded)")
        copy = self._copy(key, path)
        if not row.marked:
            remarks.append("No boxes were annotated on this image, so it is unknown what it shows.")
        file = read_facts(path) if is_available else None  # safe in this process, because the file was decoded before
        boxes = self._boxes.loc[self._boxes["image_id"] == key, ["finding", *BOX]].reset_index(drop=True)
        return OpenedImage(
            image_id=key,
            key=key,
            path=path,
            rows=copy.rows,
            columns=copy.columns,
            is_dicom=file is not None and file.kind == "DICOM",
            facts={**(file.shown if file else {}), "Size": f"{copy.rows} x {copy.columns} (rows x columns)"},
            remarks=tuple(remarks),
            truth=boxes if row.marked else None,
        )

    def _copy(self, key: str, path: Path) -> CachedXray:
        try:
            is_in_run = key in self._xrays
            return self._xrays.read(key) if is_in_run else self._copies.read(key, path, self.longest_side)
        except CacheError as error:
            raise UnreadableXray(path, str(error)) from error

    def _is_decoded(self, path: Path, key: str) -> bool:
        """Return False if the file `path` has changed since the decoded copy called `key` was made from it.

        Compares the file's size and samples of its content, but not the path, because the file may have been moved.
        """
        try:
            metadata = self._xrays.facts(key)
        except (OSError, CacheError):  # reading its pixels will report the error
            return True
        source = source_of(str(path))
        return all(metadata.get(name, source[name]) == source[name] for name in ("source_bytes", "source_samples"))


def find_gallery(listed: Sequence[ListedRun], fingerprint: str, copies: DecodedCopies) -> Gallery | None:
    """Return the Gallery of the prepared run with the data fingerprint `fingerprint`, or None if no such run can be read.

    Searches the prepared runs in `listed`, and those that were used by training runs with this fingerprint in `listed`.
    A prepared run that cannot be read is logged and skipped.
    """
    trained = [run for run in listed if fingerprint in [fold.get("data_fingerprint") for fold in run.folds.values()]]
    folders = [named_folder(run.parameters.get("prepare_run"), run.folder) for run in trained]
    folders += [run.folder for run in listed if run.kind == "prepared" and run.state == "finished"]
    for folder in dict.fromkeys(folder.resolve() for folder in folders if folder is not None):
        try:
            gallery = Gallery(folder, copies)
        except (OSError, ValueError, CacheError) as error:
            logger.warning("%s cannot be opened as a gallery: %s", folder, error)
            continue
        if gallery.fingerprint == fingerprint:
            return gallery
    return None


def _describe_images(tables: dict[str, pd.DataFrame], marked: bool) -> pd.DataFrame:
    """Return the table `images` without `patient_id`, with the new columns `true_classes`, `fold`, `marked` and `boxes`.

    `true_classes` is a tuple of the annotated classes. `fold` is the image's fold. An image without a fold gets the fold of
    another image of the patient, otherwise NaN. The column `marked` says whether the image was annotated with boxes, the
    argument `marked` whether the data set was. `boxes` is a Counter of the findings of the image's boxes. Rows are sorted by
    a hash of the image id. This order is always the same, and mixes classes and patients.
    """
    images, folds = tables["images"], tables["folds"].set_index("id")["fold"]
    boxes = {name: Counter(found) for name, found in tables["boxes"].groupby("image_id")["finding"]}
    truth = tables["labels"].set_index("id")
    true_classes = {name: tuple(truth.columns[row > 0.5]) for name, row in zip(truth.index, truth.to_numpy(), strict=True)}
    fold = images["image_id"].map(folds).astype(float)
    unannotated = images["false_none"].astype(bool) if "false_none" in images else False
    described = images.assign(
        true_classes=[true_classes.get(name, ()) for name in images["study_id"]],
        # An image in no fold gets the fold of its patient's other images, because models may be trained on those.
        fold=fold.fillna(fold.groupby(images["patient_id"]).transform("first")),
        marked=marked & ~np.broadcast_to(unannotated, len(images)),
        boxes=[boxes.get(name, Counter()) for name in images["image_id"]],
    ).drop(columns="patient_id")
    hashes = pd.util.hash_pandas_object(images["image_id"], index=False).to_numpy()
    return described.iloc[np.argsort(hashes, kind="stable")].reset_index(drop=True)
