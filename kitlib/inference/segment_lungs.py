"""Runs trained segmenters, which predict probability maps; a lung segmenter also gives lung masks and frames for cropping.

Imports no training library, so that a submission starts in seconds.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kitlib.bundle import read_bundle
from kitlib.device import autocast, finite_or_float32, pick_device
from kitlib.errors import BundleError
from kitlib.inference.read_ahead import ahead
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import FOUND, clean_up_mask, decode_maps, make_input, place_image
from kitlib.lungs.finders import Lungs, segmenter_digest
from kitlib.models.families import LUNGS, MASKS, load_network, recorded_family
from kitlib.models.halving_batches import HalvingBatches
from kitlib.models.segmenter import Segmenter
from kitlib.recipes.fields import VIEWS
from kitlib.tables import check_table
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import encode_grey

BATCH_SIZES = {"cuda": 64, "cpu": 8}


class TrainedSegmenter:
    """A trained segmenter with its input preparation.

    If the recipe has several `views`, their probabilities are averaged. A batch that overflows in half precision is
    segmented again in float32; `overflowed` counts the images in such batches.
    """

    def __init__(
        self, record: dict[str, Any], network: Segmenter, device: torch.device, batch_size: int | None = None
    ) -> None:
        self.model, self.recipe, self.network, self.device = record["model"], network.recipe, network, device
        self.trained = record["precision"]
        self.fitted = HalvingBatches(self.model, device, batch_size or BATCH_SIZES[device.type])
        self.overflowed = 0
        self._mirrored = [VIEWS[view][1] for view in getattr(self.recipe, "views", ("full",))]

    def maps(self, stream: Iterable[CachedXray]) -> Iterator[tuple[CachedXray, np.ndarray, Placement]]:
        """Yield each X-ray with its probability maps, one per structure, and its placement on the network's square input.

        The maps are uint8 (structures, side, side), aligned with the input; 255 is a probability of 1. A thread prefetches
        X-rays and inputs.
        """
        for xrays, placements, pixels in ahead(self._batches(stream)):
            yield from zip(xrays, self.fitted(self._compute, pixels), placements, strict=True)

    def _batches(self, stream: Iterable[CachedXray]) -> Iterator[tuple[list[CachedXray], list[Placement], torch.Tensor]]:
        xrays: list[CachedXray] = []
        for xray in stream:
            xrays.append(xray)
            if len(xrays) >= self.fitted.size:
                yield xrays, *self._place(xrays)
                xrays = []
        if xrays:
            yield xrays, *self._place(xrays)

    def _place(self, xrays: Sequence[CachedXray]) -> tuple[list[Placement], torch.Tensor]:
        placements = [place_image(xray, self.recipe) for xray in xrays]
        canvases = [
            make_input(xray, xray_placement, self.recipe) for xray, xray_placement in zip(xrays, placements, strict=True)
        ]
        return placements, torch.from_numpy(np.stack(canvases))

    def _compute(self, pixels: torch.Tensor) -> list[np.ndarray]:
        views, any_overflowed = [], False
        for mirrored in self._mirrored:
            with torch.inference_mode(), autocast(self.device, self.trained):
                x = self.network.normalise(pixels.flip(-1) if mirrored else pixels)
                logits, overflowed = finite_or_float32(partial(self.network, x), self.device)
                probabilities = self.network.probabilities(logits)[:, 1:]
            views.append(probabilities.flip(-1) if mirrored else probabilities)
            any_overflowed |= overflowed
        self.overflowed += len(pixels) * any_overflowed
        return list((255 * torch.stack(views).mean(dim=0)).round().to(torch.uint8).cpu().numpy())


class LungSegmenter(TrainedSegmenter):
    """A `LungFinder` that runs a trained segmenter; `missed` counts the images in which no plausible lungs were found."""

    def __init__(
        self, record: dict[str, Any], network: Segmenter, device: torch.device, batch_size: int | None = None
    ) -> None:
        super().__init__(record, network, device, batch_size)
        self.segmenter = segmenter_digest(record) if "weights_sha256" in record else ""
        self.missed = 0

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return the lung frame and mask of each X-ray; both are None if the mask is not plausible."""
        placements, pixels = self._place(xrays)
        results = [
            clean_up_mask(xray, decode_maps(maps, place, xray.pixels.shape, self.recipe), self.recipe)
            for xray, maps, place in zip(xrays, self.fitted(self._compute, pixels), placements, strict=True)
        ]
        self.missed += sum(result.verdict != FOUND for result in results)
        return [Lungs(result.frame, result.mask) if result.verdict == FOUND else Lungs(None) for result in results]


class MaskPredictor(TrainedSegmenter):
    """A segmenter of a structure that most images do not have, used like a kitlib.inference.predict.Predictor.

    `seen` lists the predicted images; `lungs_missed` is always 0, because the images are used whole.
    """

    lungs_missed, wants_masks, segmenter = 0, False, ""

    def __init__(
        self, record: dict[str, Any], network: Segmenter, device: torch.device, batch_size: int | None = None
    ) -> None:
        super().__init__(record, network, device, batch_size)
        self.family, self.fold, self.classes = recorded_family(record), record["fold"], list(record["classes"])
        self.seen: list[str] = []

    def predict(self, stream: Iterable[CachedXray]) -> Generator[pd.DataFrame, None, None]:
        """Segment the X-rays in `stream`; yield one `mask_maps` table per batch. A thread reads X-rays ahead.

        The counts in `seen` and `overflowed` start anew.
        """
        self.seen, self.overflowed = [], 0
        for xrays, placements, pixels in ahead(self._batches(stream)):
            batch_maps = self.fitted(self._compute, pixels)
            table = pd.concat(self.map_table(*each) for each in zip(xrays, batch_maps, placements, strict=True))
            self.seen += [xray.image_id for xray in xrays]
            yield check_table(table, "mask_maps")

    def map_table(self, xray: CachedXray, maps: np.ndarray, place: Placement) -> pd.DataFrame:
        """Return one item of `TrainedSegmenter.maps` as a `mask_maps` table, without the padding of the network's input."""
        pngs = [encode_grey(place.shown(probabilities)) for probabilities in maps]
        names = {"image_id": xray.image_id, "model": self.model, "fold": self.fold}
        return pd.DataFrame({**names, "finding": self.recipe.structures, "map": pngs})


def load_any_segmenter(
    bundle_folder: str | Path, device: torch.device | None = None, batch_size: int | None = None
) -> LungSegmenter | MaskPredictor:
    """Load the segmenter in a bundle, of lungs or of another structure, on `device` (default: `pick_device`).

    Raises BundleError if the bundle is damaged or contains another kind of model.
    """
    record, state_dict = read_bundle(bundle_folder)
    answers = recorded_family(record, bundle_folder).answers
    if answers not in (LUNGS, MASKS):
        raise BundleError(f"{bundle_folder} contains a {record['family']} model; choose the bundle of a segmenter's run")
    device, kind = device or pick_device(), LungSegmenter if answers == LUNGS else MaskPredictor
    return kind(record, load_network(record, state_dict, device), device, batch_size)


def load_segmenter(
    bundle_folder: str | Path, device: torch.device | None = None, batch_size: int | None = None
) -> LungSegmenter:
    """Load the lung segmenter in a bundle on `device` (default: `pick_device`).

    Raises BundleError if the bundle is damaged or contains another kind of model.
    """
    segmenter = load_any_segmenter(bundle_folder, device, batch_size)
    if not isinstance(segmenter, LungSegmenter):
        raise BundleError(
            f"{bundle_folder} contains a segmenter of {', '.join(segmenter.classes)}; choose a lung segmenter (notebook 12)"
        )
    return segmenter
