"""Runs a trained lung segmenter: probability maps, plausible lung masks, and the frames to crop to.

Imports no training library, so that a submission starts in seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kitlib.bundle import read_bundle
from kitlib.device import autocast, finite_or_float32, pick_device
from kitlib.errors import BundleError
from kitlib.inference.read_ahead import ahead
from kitlib.letterbox import Placement
from kitlib.lungs.clean_up import FOUND, clean_up_mask, decode_maps, make_input, place_image
from kitlib.lungs.finders import Lungs, segmenter_digest
from kitlib.models.families import LUNGS, load_network, recorded_family
from kitlib.models.halving_batches import HalvingBatches
from kitlib.models.segmenter import Segmenter
from kitlib.xrays.cache import CachedXray

BATCH_SIZES = {"cuda": 64, "cpu": 8}


class LungSegmenter:
    """A `LungFinder` that runs a trained segmenter.

    `missed` counts the images in which no plausible lungs were found, `overflowed` those in batches that overflowed in half
    precision and were segmented again in float32.
    """

    def __init__(
        self, record: dict[str, Any], network: Segmenter, device: torch.device, batch_size: int | None = None
    ) -> None:
        self.model, self.recipe, self.network, self.device = record["model"], network.recipe, network, device
        self.segmenter = segmenter_digest(record) if "weights_sha256" in record else ""
        self.trained = record["precision"]
        self.fitted = HalvingBatches(self.model, device, batch_size or BATCH_SIZES[device.type])
        self.missed = self.overflowed = 0

    def find(self, xrays: Sequence[CachedXray]) -> list[Lungs]:
        """Return the lung frame and mask of each X-ray; both are None if the mask is not plausible."""
        results = [
            clean_up_mask(xray, decode_maps(maps, place, xray.pixels.shape, self.recipe), self.recipe)
            for xray, maps, place in zip(xrays, *self._segment(xrays), strict=True)
        ]
        self.missed += sum(result.verdict != FOUND for result in results)
        return [Lungs(result.frame, result.mask) if result.verdict == FOUND else Lungs(None) for result in results]

    def maps(self, stream: Iterable[CachedXray]) -> Iterator[tuple[CachedXray, np.ndarray, Placement]]:
        """Yield for each X-ray: itself, the probability maps of its structures, and its placement on the network's canvas.

        The maps show that canvas and are uint8 (structures, side, side); 255 is a probability of 1. A thread prefetches
        X-rays and canvases.
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

    def _segment(self, xrays: Sequence[CachedXray]) -> tuple[list[np.ndarray], list[Placement]]:
        placements, pixels = self._place(xrays)
        return self.fitted(self._compute, pixels), placements

    def _compute(self, pixels: torch.Tensor) -> list[np.ndarray]:
        with torch.inference_mode(), autocast(self.device, self.trained):
            logits, overflowed = finite_or_float32(lambda: self.network(self.network.normalise(pixels)), self.device)
            self.overflowed += len(pixels) * overflowed
            probabilities = self.network.probabilities(logits)
        return list((255 * probabilities[:, 1:]).round().to(torch.uint8).cpu().numpy())


def load_segmenter(
    bundle_folder: str | Path, device: torch.device | None = None, batch_size: int | None = None
) -> LungSegmenter:
    """Return a bundle's segmenter on `device` (default: `pick_device`).

    Raises BundleError if the bundle is damaged or contains another kind of model.
    """
    record, state_dict = read_bundle(bundle_folder)
    if recorded_family(record, bundle_folder).answers != LUNGS:
        raise BundleError(f"{bundle_folder} contains a {record['family']} model; choose the bundle of a segmenter's run")
    device = device or pick_device()
    return LungSegmenter(record, load_network(record, state_dict, device), device, batch_size)
