"""Grad-CAM heat maps of classifiers, and the share of the heat that is inside the lungs.

The method is that of Selvaraju et al. 2017, as implemented in the package grad-cam, applied to the last convolutional stage.
Heat does not prove why a model decides; it shows which cells of the last feature maps raise the output of a class. A cell is
1/32 of the canvas wide.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from kitlib.inference.predict import AnyPredictor, Predictor
from kitlib.lungs.finders import LungFinder
from kitlib.models.classifier import Classifier, FindingsClassifier
from kitlib.xrays.cache import CachedXray

try:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:  # for example on Kaggle, where no wheel is available
    raise ImportError(
        "heat maps need the grad-cam package; install the versions of grad-cam and ttach in requirements.txt with pip, or "
        "leave heat_runs empty"
    ) from error

LONGEST_NAME = 28  # number of characters of a model's name that fit in a line next to its row
COLUMNS = ["image_id", "class", "heat_inside", "area_inside", "concentration"]


@dataclass(frozen=True)
class Heat:
    """Heat map of an image for one class: float32 of the size of `xray.pixels`, 0..1, all 0 if there is no heat.

    `seen`, uint8 of the same size, is the image as the model sees it, for example black outside the lungs.
    """

    xray: CachedXray
    class_name: str
    heat: np.ndarray
    seen: np.ndarray


def heat_maps(network: Classifier, pixels: torch.Tensor, outputs: Sequence[int]) -> np.ndarray:
    """Return an array (n, side, side), 0..1: one heat map for each canvas in `pixels`.

    `pixels` is a tensor (n, side, side) of grey canvases, 0..255. `outputs` has, for each canvas, the index of the network's
    output to explain. The maximum of a heat map is 1, or 0 if nothing raises the output. Raises ValueError for a network
    without feature maps, such as a transformer.
    """
    wrapped = _FeatureMapsFirst(network).eval()
    device = next(network.parameters()).device
    with _UnscaledGradCAM(model=wrapped, target_layers=[wrapped.maps]) as gradients:
        gradients(network.normalise(pixels.to(device)), targets=[ClassifierOutputTarget(output) for output in outputs])
        unscaled = np.maximum(gradients.raw, 0)
    side = pixels.shape[-1]
    heat = np.stack([cv2.resize(grid.astype(np.float32), (side, side)) for grid in unscaled])
    hottest = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, hottest, out=np.zeros_like(heat), where=hottest > 0)


def compute_heat(predictor: AnyPredictor, xrays: Iterable[CachedXray], class_names: Sequence[str]) -> list[Heat]:
    """Return a heat map, of the size of the cached image, for each pair of an X-ray and its class in `class_names`.

    Pixels that the model does not see, such as those outside a crop, have no heat. If the model averages several crops or
    mirrored copies of an image, only the first, unmirrored one is used. Raises ValueError if the model lacks one of the
    classes, or is not a classifier of whole images.
    """
    if (
        not isinstance(predictor, Predictor)
        or not isinstance(predictor.network, Classifier)
        or predictor.family.sees_patches
    ):
        raise ValueError(
            f"{predictor.model} belongs to the family {predictor.family.name}; heat maps need a classifier of whole images"
        )
    unknown = sorted(set(class_names) - set(predictor.classes))
    if unknown:
        raise ValueError(f"{predictor.model} has no class {unknown[0]!r}; its classes: {', '.join(predictor.classes)}")
    heats = []
    pairs = list(zip(xrays, class_names, strict=True))
    for start in range(0, len(pairs), predictor.fitted.size):
        batch_xrays, batch_names = (
            list(canvas_heat) for canvas_heat in zip(*pairs[start : start + predictor.fitted.size], strict=True)
        )
        batch = predictor.canvases(batch_xrays)
        canvas = next(iter(batch.pixels))
        pixels, placements = batch.pixels[canvas], batch.placements[canvas]
        heat = heat_maps(predictor.network, pixels, [predictor.classes.index(name) for name in batch_names])
        for xray, name, place, canvas_heat, seen in zip(
            batch_xrays, batch_names, placements, heat, pixels.numpy(), strict=True
        ):
            heat_back, seen_back = (place.back(each, *xray.pixels.shape) for each in (canvas_heat, seen))
            heats.append(Heat(xray, name, heat_back.clip(0, 1), seen_back))
    return heats


def inside_lungs(heats: Iterable[Heat], lungs: LungFinder) -> pd.DataFrame:
    """Return one row per heat map, with the share of its heat that is inside the lung mask.

    The columns are image_id, class, heat_inside (the share), area_inside (the mask's share of the image) and concentration
    (their ratio, 1 if the heat is spread evenly). The last three are NaN if there is no mask or no heat.
    """
    rows = []
    for heat in heats:
        mask = lungs.find([heat.xray])[0].mask
        total = float(heat.heat.sum(dtype=float))
        inside, area = float("nan"), float("nan")
        if mask is not None and mask.any() and total > 0:
            inside, area = float(heat.heat[mask].sum(dtype=float)) / total, float(mask.mean())
        rows.append((heat.xray.image_id, heat.class_name, inside, area, inside / area))
    return pd.DataFrame(rows, columns=COLUMNS)


def heat_summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row per model: means of `heat_inside`, `area_inside` and `concentration`, and `images` and `not_judged`.

    `tables` maps each model to its table of `inside_lungs`. `images` is the number of rows of this table, `not_judged` the
    number of rows with NaN.
    """
    rows = {name: {**table[COLUMNS[2:]].mean(), "images": len(table)} for name, table in tables.items()}
    summary = pd.DataFrame.from_dict(rows, orient="index")
    return summary.assign(not_judged=[int(table.heat_inside.isna().sum()) for table in tables.values()])


def heat_figure(heats_by_model: Mapping[str, Sequence[Heat]], lungs: LungFinder | None = None) -> Figure:
    """Draw one column per image: the first row shows the images, each further row the heat maps of one model.

    Heat is drawn over the image as the model sees it. The outline of the lungs is drawn if `lungs` finds a mask. Raises
    ValueError if the models' heat maps are of different images.
    """
    first = next(iter(heats_by_model.values()))
    ids = [heat.xray.image_id for heat in first]
    for name, heats in heats_by_model.items():
        if [heat.xray.image_id for heat in heats] != ids:
            raise ValueError(f"{name} and {next(iter(heats_by_model))} have heat maps of different images")
    figure = Figure(figsize=(2.4 * max(len(ids), 1), 2.6 * (1 + len(heats_by_model))), layout="constrained")
    axes = figure.subplots(1 + len(heats_by_model), max(len(ids), 1), squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    # A name may be a run's full path, of which only the last part fits next to a row.
    labels = {name: Path(name).name for name in heats_by_model}
    if len(set(labels.values())) < len(labels):
        labels = {name: fill(name[-2 * LONGEST_NAME :], LONGEST_NAME) for name in heats_by_model}
    for row, (name, heats) in enumerate({"image": first, **heats_by_model}.items()):
        axes[row, 0].set_ylabel(labels.get(name, name), fontsize=9)
        for axis, heat in zip(axes[row], heats, strict=False):
            axis.imshow(heat.seen if row else heat.xray.pixels, cmap="gray", vmin=0, vmax=255)
            if row:
                axis.imshow(heat.heat, cmap="jet", vmin=0, vmax=1, alpha=0.4)
            mask = lungs.find([heat.xray])[0].mask if lungs is not None else None
            if mask is not None and mask.any() and not mask.all():
                axis.contour(mask, levels=[0.5], colors="limegreen", linewidths=0.8)
            axis.set_title(f"heat for {heat.class_name}" if row else heat.xray.image_id, fontsize=8)
    return figure


class _FeatureMapsFirst(nn.Module):
    """Wraps a classifier so that its last feature maps pass through the layer `maps`, to which Grad-CAM attaches its hooks.

    The layers before `maps` compute no gradients.
    """

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network, self.maps = network, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        backbone = self.network.backbone
        with torch.no_grad():
            # inception_v3 with an auxiliary head splits forward_features into two steps.
            split = isinstance(self.network, FindingsClassifier) and self.network.recipe.auxiliary
            last = backbone.forward_postaux(backbone.forward_preaux(x)) if split else backbone.forward_features(x)
        if last.ndim != 4:
            raise ValueError(
                f"{self.network.recipe.backbone} has features of shape {tuple(last.shape)}; heat maps need feature maps "
                "(n, channels, height, width)"
            )
        logits = self.network.head(backbone.forward_head(self.maps(last.detach().requires_grad_())))
        if logits.shape[1] == 1:
            # One logit represents two classes: evidence for the first is evidence against the second.
            return torch.cat([logits, -logits], dim=1)
        return logits


class _UnscaledGradCAM(GradCAM):
    """GradCAM that keeps the unscaled heat in `raw`.

    The package rescales each map to 0..1, but the share of the heat inside the lungs needs the unscaled values.
    """

    def get_cam_image(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.raw = super().get_cam_image(*args, **kwargs)
        return self.raw
