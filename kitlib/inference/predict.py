"""Predicts a stream of X-rays with one trained model; imports no training library, so that a submission starts fast."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.bundle import read_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.device import autocast, finite_or_float32, pick_device
from kitlib.errors import BundleError
from kitlib.inference.read_ahead import ahead
from kitlib.inference.segment_lungs import MaskPredictor
from kitlib.letterbox import PLACEMENTS, Placement, clip_boxes, flip_boxes
from kitlib.lungs.canvas import read_canvas
from kitlib.lungs.crop import choose_finder, crop, find_lungs, needs_lungs, needs_masks
from kitlib.lungs.finders import LungFinder, Lungs
from kitlib.models.families import BOXES, LUNGS, MASKS, STUDIES, load_network, recorded_family
from kitlib.models.halving_batches import HalvingBatches
from kitlib.models.patches import image_seed, join_centres, patch_canvas
from kitlib.recipes.fields import VIEWS
from kitlib.tables import BOX, check_table, empty_table
from kitlib.xrays.cache import CachedXray

BATCH_SIZES = {"cuda": 64, "cpu": 8}
# IoU for the fusion of boxes from different views; the 1st place used this value between models.
VIEWS_IOU = 0.6


@dataclass(frozen=True)
class Batch:
    """A model's input for a batch of n images, drawn on square canvases of the model's input size.

    `pixels` and `placements` are dicts whose keys say what the canvases show: "full" (whole images) or "lungs" (crops to the
    lungs). Each value of `pixels` is a tensor (n, side, side); each value of `placements` has one Placement per image, which
    maps canvas pixels to the image. For a patch model, `pixels` contains only "full", `placements` is empty, and `where`
    contains the patch centres. `lungs_missed` is the number of images that are used uncropped because no lungs were found.
    """

    image_ids: list[str]
    placements: dict[str, list[Placement]]
    pixels: dict[str, torch.Tensor]
    lungs_missed: int
    where: torch.Tensor | None = None  # int64 (m, 3), see kitlib.models.patches.join_centres


class Predictor:
    """A trained classifier or detector with its input preparation; predicts probabilities, or boxes in original pixels.

    `views` are the forms in which an image is predicted, such as "full" or "flip" (keys of VIEWS; default: the recipe's
    views). The predictions for several views are combined: probabilities by their mean, boxes by weighted box fusion.
    `lungs` finds the lungs of a batch. It is called only if the recipe crops or blackens images by lung masks (see
    kitlib.lungs.crop). If an image's lungs are not found, the whole image is used without blackening, by a patch model as a
    single patch. Patch centres are derived from the image's id, so that predictions are reproducible. If a batch overflows
    in half precision, it is predicted again in float32.

    `seen` lists the image_ids of the predicted images. `lungs_missed` is the number of images whose lungs were not found,
    `overflowed` the number of images in batches that overflowed. Raises ValueError for unknown or repeated views, and for a
    patch model with views other than "full".
    """

    def __init__(
        self,
        record: dict[str, Any],
        network: Any,
        device: torch.device,
        batch_size: int | None = None,
        views: Sequence[str] | None = None,
        lungs: LungFinder | None = None,
    ) -> None:
        self.family = recorded_family(record)
        self.model, self.fold, self.classes = record["model"], record["fold"], list(record["classes"])
        self.network, self.device = network, device
        self.fitted = HalvingBatches(self.model, device, batch_size or BATCH_SIZES[device.type])
        self.seen: list[str] = []  # image_ids whose predictions have been yielded, including those without boxes
        self.overflowed = self._overflowed_batches = 0
        self.lungs_missed = 0
        self.trained = record["precision"]
        recipe = record["recipe"]
        self.views = tuple(views or recipe.get("views") or ("full",))
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown or len(set(self.views)) < len(self.views):
            names = ", ".join(VIEWS)
            raise ValueError(f"{self.model}: views are {list(self.views)}; valid views, each at most once: {names}")
        if self.family.sees_patches and self.views != ("full",):
            raise ValueError(f"{self.model}: views are {list(self.views)}; a patch model supports only the view 'full'")
        self._canvas_names = sorted({VIEWS[view][0] for view in self.views})
        # A detector may predict on a larger canvas than it was trained on.
        self._canvas = read_canvas(recipe, recipe.get("inference_size") or record["image_size"])
        found_by = recipe.get("lungs", "darkness")
        self._finder, self._uses_lungs = choose_finder(found_by, lungs), needs_lungs(recipe, self.views)
        self.wants_masks = needs_masks(recipe, self.views)
        self.segmenter = record.get("architecture", {}).get("segmenter", "")  # digest of the segmenter used in training
        self._outputs = recipe.get("outputs", "both")
        self._make_placement = PLACEMENTS[record["placement"]]

    def predict(self, stream: Iterable[CachedXray]) -> Generator[pd.DataFrame, None, None]:
        """Yield one table of predictions per batch, while a thread prefetches X-rays from `stream`.

        Study models yield one row per image with the columns `image_id`, `model`, `fold`, the four classes and `none`;
        outputs that were not trained are NaN. Other classifiers yield `class_scores` tables. Detectors yield `detections`
        tables, in which images without boxes have no row. `seen`, `lungs_missed` and `overflowed` are reset at the start. If
        `stream` raises an error, this generator raises it. Closing the generator ends the thread.
        """
        self.seen, self.lungs_missed, self.overflowed = [], 0, 0
        for batch in ahead(self._batches(stream)):
            before = self._overflows()
            table = self._boxes(batch) if self.family.answers == BOXES else self._probabilities(batch)
            self.overflowed += len(batch.image_ids) * (self._overflows() > before)
            self.seen += batch.image_ids
            self.lungs_missed += batch.lungs_missed
            yield table

    def _batches(self, stream: Iterable[CachedXray]) -> Iterator[Batch]:
        xrays: list[CachedXray] = []
        for xray in stream:
            xrays.append(xray)
            if len(xrays) >= self.fitted.size:
                yield self.canvases(xrays)
                xrays = []
        if xrays:
            yield self.canvases(xrays)

    def canvases(self, xrays: list[CachedXray]) -> Batch:
        """Return the model's input for these X-rays."""
        if self.family.sees_patches:
            return self._patch_canvases(xrays)
        lungs = [Lungs(None)] * len(xrays)
        if self._uses_lungs:
            lungs = find_lungs(self._finder, xrays, self._canvas.needs_mask)
        frames: dict[str, list[np.ndarray | None]] = {"full": [None] * len(xrays), "lungs": [each.frame for each in lungs]}
        placements = {name: list(map(self._placement, xrays, frames[name])) for name in self._canvas_names}
        greys = [self._canvas.grey(xray.pixels, image_lungs.mask) for xray, image_lungs in zip(xrays, lungs, strict=True)]
        pixels = {
            name: torch.from_numpy(np.stack(list(map(self._canvas.lay, greys, canvas_placements))))
            for name, canvas_placements in placements.items()
        }
        missed_count = sum(each.frame is None for each in lungs) if self._uses_lungs else 0
        return Batch([xray.image_id for xray in xrays], placements, pixels, missed_count)

    def _patch_canvases(self, xrays: list[CachedXray]) -> Batch:
        image_ids, recipe = [xray.image_id for xray in xrays], self.network.recipe
        lungs = find_lungs(self._finder, xrays, masked=True)
        canvases = [patch_canvas(xray, image_lungs, recipe) for xray, image_lungs in zip(xrays, lungs, strict=True)]
        where = join_centres(
            [canvas.centres(recipe.patches, image_seed(name)) for canvas, name in zip(canvases, image_ids, strict=True)]
        )
        pixels = torch.from_numpy(np.stack([canvas.pixels for canvas in canvases]))
        return Batch(image_ids, {}, {"full": pixels}, sum(canvas.mask is None for canvas in canvases), where)

    def _placement(self, xray: CachedXray, frame: np.ndarray | None) -> Placement:
        """Return the placement of the lung frame, or of the whole image if `frame` is None, on the model's square canvas."""
        return self._canvas.middle(crop(self._make_placement, frame, xray.rows, xray.columns, self._canvas.whole))

    def _probabilities(self, batch: Batch) -> pd.DataFrame:
        if self.family.sees_patches:
            with torch.inference_mode(), autocast(self.device, self.trained):
                probabilities = self.network.image_probabilities(batch.pixels["full"], batch.where).numpy()
        else:
            probabilities = np.mean([self.fitted(self._classify, pixels) for pixels, _ in self._view_inputs(batch)], axis=0)
        table = pd.DataFrame(probabilities, columns=self.classes)
        if self.family.answers == STUDIES and self._outputs != "both":
            table[[name for name in self.classes if (name == "none") != (self._outputs == "none")]] = np.nan
        table.insert(0, "image_id", batch.image_ids)
        table.insert(1, "model", self.model)
        table.insert(2, "fold", self.fold)
        return table

    def _classify(self, pixels: torch.Tensor) -> list[np.ndarray]:
        with torch.inference_mode(), autocast(self.device, self.trained):
            logits, overflowed = finite_or_float32(lambda: self.network(self.network.normalise(pixels)), self.device)
            self._overflowed_batches += overflowed
            probabilities = self.network.probabilities(logits)
            # A `none` that is computed from NaN by comparison would be a number.
            probabilities[~logits.isfinite().flatten(1).all(dim=1)] = torch.nan
        return list(probabilities.double().cpu().numpy())

    def _overflows(self) -> int:
        """Return the number of batches so far that overflowed in half precision; a detector's network counts them itself."""
        return self.network.overflows if self.family.answers == BOXES else self._overflowed_batches

    def _view_inputs(self, batch: Batch) -> Iterator[tuple[torch.Tensor, list[Placement]]]:
        """Yield the canvases (n, side, side) and the placements for each of `views`; mirroring flips only the canvases."""
        for canvas, mirrored in (VIEWS[view] for view in self.views):
            pixels = batch.pixels[canvas]
            yield pixels.flip(-1) if mirrored else pixels, batch.placements[canvas]

    def _boxes(self, batch: Batch) -> pd.DataFrame:
        views = [
            [
                self._to_original(placement, canvas_boxes, VIEWS[view][1])
                for placement, canvas_boxes in zip(placements, self.fitted(self.network.predict, pixels), strict=True)
            ]
            for view, (pixels, placements) in zip(self.views, self._view_inputs(batch), strict=True)
        ]
        merged = [
            self._merge_views(lists, placement)
            for *lists, placement in zip(*views, batch.placements[self._canvas_names[0]], strict=True)
        ]
        rows = np.concatenate(merged)
        table = pd.DataFrame(rows[:, :4], columns=list(BOX))
        table.insert(0, "image_id", np.repeat(np.array(batch.image_ids, dtype=object), list(map(len, merged))))
        findings = np.array(self.classes, dtype=object)[rows[:, 5].astype(int)]
        table = table.assign(model=self.model, fold=self.fold, finding=findings, score=rows[:, 4])
        return check_table(table, "detections")

    def _to_original(self, placement: Placement, boxes_on_canvas: np.ndarray, mirrored: bool) -> np.ndarray:
        """Convert an image's boxes (k, 6) from canvas to original pixels; return the m boxes that remain, float (m, 6).

        The columns of both arrays are xmin, ymin, xmax, ymax, score and class. Boxes are clipped to the image; a box whose
        width or height is then below one pixel is dropped. If `mirrored`, the boxes are on a mirrored canvas.
        """
        boxes = flip_boxes(boxes_on_canvas[:, :4], placement.canvas_columns) if mirrored else boxes_on_canvas[:, :4]
        boxes, inside = clip_boxes(placement.boxes_to_original(boxes), placement.rows, placement.columns)
        rows = np.hstack([boxes, boxes_on_canvas[:, 4:]])[inside]
        rows[:, 4] = rows[:, 4].clip(0, 1)
        return rows

    def _merge_views(self, lists: list[np.ndarray], placement: Placement) -> np.ndarray:
        """Fuse an image's boxes from all views, class by class; return an array (k, 6).

        `lists` contains one array of boxes (m, 6) per view. All arrays have the columns of `_to_original`.
        """
        if len(lists) == 1:
            return lists[0]
        # Imported here because it takes a second and needs ensemble-boxes, which kernels without a detector do not install.
        from kitlib.fusion.box_fusion import merge_boxes

        side = np.array([placement.columns, placement.rows] * 2, dtype=float)
        merged = [np.empty((0, 6))]
        for code in np.unique(np.concatenate(lists)[:, 5]):
            of_class = [rows[(rows[:, 5] == code) & (rows[:, 4] > 0)] for rows in lists]
            boxes, scores = [rows[:, :4] / side for rows in of_class], [rows[:, 4] for rows in of_class]
            box, score = merge_boxes(boxes, scores, np.ones(len(lists)), iou=VIEWS_IOU)
            merged.append(np.column_stack([box * side, score, np.full(len(score), code)]))
        return np.concatenate(merged)


AnyPredictor = Predictor | MaskPredictor


def load_predictor(
    bundle_folder: str | Path,
    device: torch.device | None = None,
    batch_size: int | None = None,
    views: Sequence[str] | None = None,
    lungs: LungFinder | None = None,
) -> AnyPredictor:
    """Return a predictor with a bundle's model on `device` (default: `pick_device`). For other parameters see Predictor.

    If the bundle's model segments a structure that most images do not have, returns a MaskPredictor, which ignores `views`
    and `lungs`. Raises BundleError if the bundle is damaged or contains a lung segmenter.
    """
    record, state_dict = read_bundle(bundle_folder)
    device = device or pick_device()
    answers = recorded_family(record, bundle_folder).answers
    if answers == MASKS:
        return MaskPredictor(record, load_network(record, state_dict, device), device, batch_size)
    if answers == LUNGS:
        raise BundleError(
            f"{bundle_folder} contains a lung segmenter; load it with kitlib.inference.segment_lungs.load_segmenter instead"
        )
    return Predictor(record, load_network(record, state_dict, device), device, batch_size, views, lungs)


def study_and_image_scores(chunks: Iterable[pd.DataFrame], images: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Convert predictions of study models to two tables: `study_scores` (means over a study's images) and `image_scores`.

    `chunks` are the tables that Predictors yield, `images` has image_id and study_id. Outputs that were not trained are NaN
    in `chunks` and get no row. Raises ValueError if `chunks` contains an image that is not in `images`.
    """
    chunks = [chunk for chunk in chunks if len(chunk)]
    if not chunks:
        return empty_table("study_scores"), empty_table("image_scores")
    predictions = pd.concat(chunks, ignore_index=True)
    studies = images.set_index("image_id").study_id
    unknown = predictions.loc[~predictions.image_id.isin(studies.index), "image_id"]
    if len(unknown):
        raise ValueError(f"{len(unknown)} predicted images are not in the `images` table; the first is {unknown.iloc[0]}")
    predictions["study_id"] = predictions.image_id.map(studies)
    mean = predictions.groupby(["study_id", "model", "fold"], as_index=False)[list(STUDY_CLASSES)].mean()
    nones = predictions[["image_id", "model", "fold", "none"]]
    return check_table(mean.dropna(), "study_scores"), check_table(nones.dropna(), "image_scores")
