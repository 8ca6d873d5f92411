"""A prepared run to choose from: pages of its images as thumbnails, and a chosen one's study with what is known of it."""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import CacheError, RunError, UnreadableXray
from kitlib.leaderboard.listing import ListedRun
from kitlib.leaderboard.prepared import named_folder
from kitlib.page.file_facts import read_facts
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.paths import project_root
from kitlib.runs.finished_run import read_metrics, read_prepared
from kitlib.tables import BOX
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.worker import shrink, source_of

logger = logging.getLogger(__name__)

THUMBNAIL = 160  # pixels, of the longest side
KEPT_THUMBNAILS = 1000  # at most 26 MB
NO_COPY = np.full((THUMBNAIL, THUMBNAIL), 128, np.uint8)
ALL, TEST = "all", "test"
# Data sets of which somebody has marked the opacities: elsewhere an image without a box may have some.
MARKED = ("siim", "rsna")


class Gallery:
    """The images of one prepared run (notebook 10); threads may share it. Opening it decodes nothing.

    `fingerprint` is the one that models trained on this run name (see data_fingerprint), `longest_side` that of its decoded
    copies, pixels. Raises RunError or TableError where `run` is no finished prepared run.
    """

    def __init__(self, run: str | Path, copies: DecodedCopies, a_page: int = 12) -> None:
        metrics, tables = read_metrics(run), read_prepared(run)
        if "longest_side" not in metrics:
            raise RunError(f"{run} is no run of notebook 10: its metrics.json does not say longest_side")
        self.name, self.longest_side = Path(run).resolve().name, int(metrics["longest_side"])
        self.fingerprint = data_fingerprint(**tables)
        self.a_page = a_page
        self._copies, self._xrays = copies, XrayCache(Path(run) / "xrays", self.longest_side)
        self._boxes = tables["boxes"]
        self._images = images = _described(tables, metrics.get("dataset") in MARKED)
        choices = {ALL: images} | {name: images[images["true_class"] == name] for name in STUDY_CLASSES}
        if "split" in images:
            choices[TEST] = images[images["split"] == TEST]
        self._choices = {name: rows for name, rows in choices.items() if len(rows) or name == ALL}
        self._thumbnail = lru_cache(KEPT_THUMBNAILS)(lambda key: shrink(self._xrays.read(key).pixels, THUMBNAIL))

    def choices(self) -> list[str]:
        """What there is to look at: "all", the study classes that it has, and "test" if some images were put aside."""
        return list(self._choices)

    def page(self, choice: str, number: int) -> tuple[list[tuple[np.ndarray, str]], int]:
        """Page `number` of `choice`, from 1, and how many there are; each image is uint8 (h, w) and its caption.

        The longest side is at most THUMBNAIL pixels; captions are plain text, no HTML. An image without a decoded copy is a
        grey tile. Raises ValueError for a choice or page that there is not.
        """
        if choice not in self._choices:
            raise ValueError(f"there is no choice {choice!r}; there are: {', '.join(self._choices)}")
        rows = self._choices[choice]
        pages = max(1, -(-len(rows) // self.a_page))
        if not 1 <= number <= pages:
            raise ValueError(f"there is no page {number} of {choice!r}, only 1 to {pages}")
        shown = rows.iloc[(number - 1) * self.a_page : number * self.a_page]
        return [self._tile(row) for row in shown.itertuples()], pages

    def open(self, image_id: str) -> OpenedStudy:
        """The whole study of the image of this name, which comes first.

        Another image of the study that cannot be read is left out, with a remark. Raises UnreadableXray where the chosen one
        cannot, ValueError for an image that there is not.
        """
        chosen = self._images[self._images["image_id"] == image_id]
        if chosen.empty:
            raise ValueError(f"there is no image {image_id!r} in {self.name}")
        study = self._images[self._images["study_id"].isin(chosen["study_id"])].drop(chosen.index)
        study = pd.concat([chosen, study.sort_values("image_id")])
        opened, remarks = [], []
        for row in study.itertuples():
            try:
                opened.append(self._opened(row))
            except UnreadableXray as error:
                if row.image_id == image_id:
                    raise
                remarks.append(f"The image {row.image_id} of this study is left out: {error.reason}.")
        folds = study["fold"].dropna().astype(int).tolist()
        if len(set(folds)) > 1:
            remarks.append(
                "Its images are in several folds: models that have not seen the first may have learnt from others."
            )
        return OpenedStudy(
            study_id=chosen["study_id"].iloc[0],
            images=tuple(opened),
            copies=self._copies,
            kept=self._xrays,
            trained_on=self.fingerprint,
            fold=folds[0] if folds else None,
            true_class=chosen["true_class"].iloc[0],
            remarks=tuple(remarks),
        )

    def _tile(self, row: Any) -> tuple[np.ndarray, str]:
        """`row`, here and below, is one that itertuples gives of `_described`: pandas has no type for its fields."""
        known = [row.true_class] if row.true_class else []
        if row.marked:
            known.append("no box" if not row.boxes else "1 box" if row.boxes == 1 else f"{row.boxes} boxes")
        try:
            pixels = self._thumbnail(row.image_id)
        except (KeyError, CacheError):
            pixels, known = NO_COPY, [*known, "no decoded copy"]
        return pixels, ", ".join([*known, row.image_id])

    def _opened(self, row: Any) -> OpenedImage:
        key, path, remarks = row.image_id, project_root() / row.path, []  # where notebooks run, paths start there
        there = path.is_file() and os.access(path, os.R_OK)
        if not there:
            remarks.append("Its file is not at hand: what is shown is the copy that the run keeps of it.")
        elif not self._is_decoded(path, key):
            remarks.append("Its file has changed since it was decoded: what is shown is the copy that the run keeps of it.")
            # As good as gone: boxes and class are those of the image that was in it.
            there, path = False, path.with_name(f"{path.name} (changed since it was decoded)")
        copy = self._copy(key, path)
        if not row.marked:
            remarks.append("Nobody has marked opacities on this image: whether it shows any is not known.")
        file = read_facts(path) if there else None  # in this process: it has been decoded before
        boxes = self._boxes.loc[self._boxes["image_id"] == key, list(BOX)].reset_index(drop=True)
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
            kept = key in self._xrays
            return self._xrays.read(key) if kept else self._copies.read(key, path, self.longest_side)
        except CacheError as error:
            raise UnreadableXray(path, str(error)) from error

    def _is_decoded(self, path: Path, key: str) -> bool:
        """Whether `path` is what the decoded copy was made from, as far as that is known; it may have been moved since."""
        try:
            with safe_open(self._xrays.folder / f"{key}.safetensors", framework="numpy") as copy:
                told = copy.metadata() or {}
        except (OSError, SafetensorError):  # whoever reads its pixels will say so
            return True
        found = source_of(str(path))
        return all(told.get(name, found[name]) == found[name] for name in ("source_bytes", "source_samples"))


def find_gallery(listed: Sequence[ListedRun], fingerprint: str, copies: DecodedCopies) -> Gallery | None:
    """The gallery of the prepared run with that data fingerprint: one of those listed, or named by a run trained on it.

    None where there is none, or it cannot be read (which is logged).
    """
    trained = [run for run in listed if fingerprint in [fold.get("data_fingerprint") for fold in run.folds.values()]]
    folders = [named_folder(run.parameters.get("prepare_run"), run) for run in trained]
    folders += [run.folder for run in listed if run.kind == "prepared" and run.state == "finished"]
    for folder in dict.fromkeys(folder.resolve() for folder in folders if folder is not None):
        try:
            gallery = Gallery(folder, copies)
        except (OSError, ValueError, CacheError) as error:
            logger.warning("%s is no gallery: %s", folder, error)
            continue
        if gallery.fingerprint == fingerprint:
            return gallery
    return None


def _described(tables: dict[str, pd.DataFrame], marked: bool) -> pd.DataFrame:
    """The images with `true_class` ("": not known), `fold` (NaN: none), `marked` (opacities, if any) and count of `boxes`.

    They are in the order of their ids' hashes: always the same, and mixed, where ids follow the class or the patient.
    """
    images, folds = tables["images"], tables["folds"].set_index("id")["fold"]
    truth = tables["labels"].set_index("id").reindex(columns=list(STUDY_CLASSES)).fillna(0.0)
    true_class = truth.idxmax(axis=1).where(truth.max(axis=1) > 0.5, "")
    fold = images["image_id"].map(folds).astype(float)
    unseen = images["false_none"].astype(bool) if "false_none" in images else False
    described = images.assign(
        true_class=images["study_id"].map(true_class).fillna(""),
        # Models that have learnt from a patient's other images are no fair judges of one that is in no fold.
        fold=fold.fillna(fold.groupby(images["patient_id"]).transform("first")),
        marked=marked & ~np.broadcast_to(unseen, len(images)),
        boxes=images["image_id"].map(tables["boxes"]["image_id"].value_counts()).fillna(0).astype(int),
    ).drop(columns="patient_id")
    mixed = pd.util.hash_pandas_object(images["image_id"], index=False).to_numpy()
    return described.iloc[np.argsort(mixed, kind="stable")].reset_index(drop=True)
