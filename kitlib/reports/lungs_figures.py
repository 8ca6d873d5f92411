"""Figures of segmentation: Dice distribution, mask outlines on their images, accepted and rejected lungs."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kitlib.classes import LUNG_CODES
from kitlib.lungs.clean_up import FOUND
from kitlib.lungs.finders import StoredLungs
from kitlib.reports.figures import BESIDE, PREDICTION, TRUTH, draw_outlines, image_grid, show_legend, show_xray
from kitlib.reports.lungs_report import HUMAN_AGREEMENT
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.mask_store import MaskStore


class Masks(Protocol):
    """Protocol of a store of segmentation masks, such as a MaskStore. A mask has the size of the cached image.

    A pixel's value is the code of its structure (see MASK_CODES), or 0 outside all structures.
    """

    def __contains__(self, image_id: str) -> bool: ...

    def read(self, image_id: str) -> np.ndarray: ...


def overlap_figure(scores: pd.DataFrame) -> Figure:
    """Draw the cumulative share of images over Dice, one line per structure.

    If the structures include lungs, a dotted line shows the median Dice of two human annotators.
    """
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    for structure, part in scores.groupby("structure", sort=False):
        axis.plot(np.sort(part.dice), np.arange(1, len(part) + 1) / len(part), drawstyle="steps-post", label=structure)
    if "lungs" in set(scores.structure):
        axis.axvline(HUMAN_AGREEMENT, color="grey", linestyle=":", label="two readers, median")
    axis.set(xlabel="Dice, out of fold", ylabel="share of images", xlim=(min(0.7, scores.dice.min()), 1), ylim=(0, 1))
    axis.legend(fontsize=8, **BESIDE)
    return figure


def mask_images(
    cache: XrayCache, masks: Masks, image_ids: Sequence[str], titles: Sequence[str], drawn: Masks | None = None
) -> Figure:
    """Draw images with mask outlines, where available: predicted (`masks`) in orange, annotated (`drawn`) in green."""
    figure, axes = image_grid(len(image_ids), 4, 3.2, 3.4)
    for axis, image_id, title in zip(axes, image_ids, titles, strict=False):
        show_xray(axis, cache.read(image_id), title)
        for store, colour in ((drawn, TRUTH), (masks, PREDICTION)):
            if store is not None and image_id in store:
                draw_outlines(axis, store.read(image_id), colour)
    show_legend(figure, **({} if drawn is None else {TRUTH: "annotated"}), **{PREDICTION: "predicted"})
    return figure


def clean_up_figure(cache: XrayCache, lungs: StoredLungs, image_ids: Iterable[str]) -> Figure:
    """Draw one column per image: the image, the predicted mask, the mask after the clean-up, and the image inside this mask.

    As in figure 6 of the UNet + HRNet paper. Each image must have the verdict FOUND.
    """
    xrays = [cache.read(image_id) for image_id in image_ids]
    figure = Figure(figsize=(2 * max(len(xrays), 1), 8.4), layout="constrained")
    axes = figure.subplots(4, max(len(xrays), 1), squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for row, name in enumerate(("image", "predicted mask", "cleaned", "masked image")):
        axes[row, 0].set_ylabel(name)
    for column, xray in enumerate(xrays):
        drawn, mask = np.isin(lungs.masks.read(xray.image_id), LUNG_CODES), np.asarray(lungs.find_one(xray).mask)
        rows = (xray.pixels, 255 * drawn, 255 * mask, np.where(mask, xray.pixels, 0))
        for axis, pixels in zip(axes[:, column], rows, strict=True):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(xray.image_id[:24], fontsize=8)
    return figure


def lungs_montage(cache: XrayCache, masks: MaskStore, lungs: pd.DataFrame) -> Figure:
    """Draw each image of the table `lungs`, dimmed outside the lung mask; if lungs were found, with the lung frame."""
    figure, axes = image_grid(len(lungs), 6, 2.1, 2.3)
    for axis, row in zip(axes, lungs.itertuples(), strict=False):
        xray = cache.read(row.image_id)
        inside = np.isin(masks.read(row.image_id), LUNG_CODES)
        dimmed = CachedXray(xray.image_id, np.where(inside, xray.pixels, xray.pixels // 3), xray.rows, xray.columns)
        show_xray(axis, dimmed, f"{row.image_id[:24]}\n{row.verdict}, {row.area:.0%}")
        if row.verdict == FOUND:
            x, y = xray.pixels.shape[1] / xray.columns, xray.pixels.shape[0] / xray.rows
            # matplotlib's origin is the centre of the first pixel, not its corner.
            corner, size = (row.xmin * x - 0.5, row.ymin * y - 0.5), ((row.xmax - row.xmin) * x, (row.ymax - row.ymin) * y)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=PREDICTION, linewidth=1.5))
    show_legend(figure, **{PREDICTION: "frame that models crop to; above: verdict, and the lungs' share of the image"})
    return figure
